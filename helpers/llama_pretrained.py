"""8 · From GPT-2 to Llama: the modern decoder.

Made from notebooks/08_llama.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.llama, helpers.hf_tokenizer, helpers.llama_gguf.
"""

import torch
from torch import Tensor

import json
from pathlib import Path

import tiktoken
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers.common import atomic_write
from helpers.download import find_files
from helpers.pretrained import _empty_model
from helpers.training import unwrap_model
from helpers.hf_tokenizer import HFEncoding, load_hf_tokenizer, save_hf_tokenizer
from helpers.llama import Llama, LlamaConfig, RopeScaling

__all__ = [
    "load_llama_config",
    "LLAMA_PARTS",
    "llama_key_map",
    "read_shards",
    "load_llama_weights",
    "load_llama",
    "save_llama",
]


# cell llama-rope of notebooks/08_llama.ipynb
def _rope(raw: dict, path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, in the old form of config.json and in the new."""
    said = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    base = said.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"{path} has rotary positions of type {kind!r}; this series builds "
                         "'default', 'linear' and 'llama3'.")
    fields = ["factor"] if kind == "linear" else [
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if missing := [name for name in fields if name not in said]:
        raise ValueError(f"{path} has rotary positions of type {kind!r} without "
                         f"{', '.join(missing)}.")
    factor, *bounds = (said[name] for name in fields)
    return base, RopeScaling(factor, kind, *bounds)


# cell is-id of notebooks/08_llama.ipynb
def _is_id(value: object, raw: dict) -> bool:
    """Whether an id is given, and not beyond the vocabulary; LlamaConfig refuses others."""
    return value is not None and not (type(value) is int and value >= raw["vocab_size"])


# cell load-llama-config of notebooks/08_llama.ipynb
def load_llama_config(path: str | Path) -> LlamaConfig:
    """Read a Hugging Face `config.json` of `model_type` llama.

    Begin and end ids outside the vocabulary are left out. `attention_dropout`, which is zero in
    published models, becomes the dropout of the model.

    Raises:
        ValueError: not JSON, another kind of model, a field missing, or a variant of Llama that
            this series does not build.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a config.json: {error}") from None
    if kind != "llama":
        raise ValueError(f"{path} describes a model of type {kind!r}; expected 'llama'.")
    allowed = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None),
               "mlp_bias": (False, None), "rope_interleaved": (False, None),
               "partial_rotary_factor": (1.0, None)}
    said = (raw.get("rope_parameters") or {}) | raw
    for name, values in allowed.items():
        if said.get(name, values[0]) not in values:
            raise ValueError(f"{path} has {name} = {said[name]!r}; this series builds "
                             f"{values[0]!r} only.")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
              "num_hidden_layers")
    if missing := [name for name in needed if name not in raw]:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    base, scaling = _rope(raw, path)
    try:
        ends = raw.get("eos_token_id")
        ends = [i for i in (ends if isinstance(ends, list) else [ends]) if _is_id(i, raw)]
        begin = raw.get("bos_token_id")
        return LlamaConfig(
            vocab_size=raw["vocab_size"], context_length=raw.get("max_position_embeddings", 2048),
            n_embd=raw["hidden_size"], n_head=raw["num_attention_heads"],
            n_layer=raw["num_hidden_layers"], n_kv_head=raw.get("num_key_value_heads"),
            intermediate_size=raw["intermediate_size"], rope_base=base, rope_scaling=scaling,
            head_size=raw.get("head_dim"), dropout=raw.get("attention_dropout", 0.0),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            bos_token_id=begin if _is_id(begin, raw) else None,
            eos_token_id=tuple(ends) if len(ends) > 1 else (ends or [None])[0])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a Llama of this series: {error}") from None


# cell llama-parts of notebooks/08_llama.ipynb
LLAMA_PARTS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
               "attention.q_projection": "self_attn.q_proj",
               "attention.k_projection": "self_attn.k_proj",
               "attention.v_projection": "self_attn.v_proj",
               "attention.output_projection": "self_attn.o_proj",
               "feed_forward.gate_projection": "mlp.gate_proj",
               "feed_forward.up_projection": "mlp.up_proj",
               "feed_forward.down_projection": "mlp.down_proj"}


# cell llama-key-map of notebooks/08_llama.ipynb
def llama_key_map(config: LlamaConfig) -> dict[str, str]:
    """Our parameter names, each with its name in a Hugging Face folder of `model_type` llama.

    Example:
        >>> config = LlamaConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> llama_key_map(config)["blocks.0.feed_forward.gate_projection.weight"]
        'model.layers.0.mlp.gate_proj.weight'
    """
    names = {"token_embedding.weight": "model.embed_tokens.weight",
             "final_norm.weight": "model.norm.weight"}
    for i in range(config.n_layer):
        for ours, theirs in LLAMA_PARTS.items():
            names[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    return names


# cell read-shard of notebooks/08_llama.ipynb
def _read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, mapped."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None


# cell read-shards of notebooks/08_llama.ipynb
def read_shards(folder_or_name: str | Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a folder, from `model.safetensors` or from the shards that its index lists.

    They are views of the mapped files. Returned with the path of the file or index, for errors.

    Raises:
        FileNotFoundError: neither file, or a shard is missing.
        ValueError: a file is damaged, or index and shards do not hold the same names.
    """
    index_name = "model.safetensors.index.json"
    try:
        path = find_files(folder_or_name, ["model.safetensors"])[0]
        return _read_shard(path), path
    except FileNotFoundError as error:
        try:
            path = find_files(folder_or_name, [index_name])[0]
        except FileNotFoundError:
            raise FileNotFoundError(f"{error} Neither was there a {index_name}.") from None
    try:
        shard_of = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(shard_of.values()))
        if bad := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{bad[0]!r} is not the name of a file")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an index of shards: {error}") from None
    shards = {name: _read_shard(p) for name, p in
              zip(files, find_files(folder_or_name, files), strict=True)}
    problems = [f"{key} should be in {name}, and is not" for key, name in shard_of.items()
                if key not in shards[name]]
    problems += [f"{key} in {name} is not in the index" for name, shard in shards.items()
                 for key in shard if shard_of.get(key) != name]
    if problems:
        raise ValueError(f"{path} does not fit its shards: {'; '.join(problems)}.")
    return {key: tensor for shard in shards.values() for key, tensor in shard.items()}, path


# cell load-llama-weights of notebooks/08_llama.ipynb
def load_llama_weights(folder_or_name: str | Path, config: LlamaConfig,
                       dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a Llama folder under our names.

    Where the file has the dtype asked for, the tensors are views of the mapped file, read when they
    are used; writing to them changes memory only. Old buffers of rotary positions are passed over,
    and so is `lm_head.weight` where the embeddings are tied.

    Raises:
        FileNotFoundError, ValueError: as in `read_shards`, or names missing, unexpected, or of
            another shape.
    """
    found, path = read_shards(folder_or_name)
    expected = {k: tuple(v.shape) for k, v in _empty_model(config, Llama).state_dict().items()}
    problems, weights = [], {}
    for ours, theirs in llama_key_map(config).items():
        tensor = found.pop(theirs, None)
        if tensor is None:
            problems.append(f"{theirs} is missing")
        elif tensor.shape != expected[ours]:
            problems.append(f"{theirs} has shape {tuple(tensor.shape)}, expected {expected[ours]}")
        else:
            weights[ours] = tensor.to(dtype)               # the tensor itself, if it has the dtype
    problems += [f"{name} is unexpected" for name in found
                 if not name.endswith(".rotary_emb.inv_freq") and name != "lm_head.weight"]
    if problems:
        raise ValueError(f"{path} does not fit its config: {'; '.join(problems)}.")
    return weights


# cell load-llama of notebooks/08_llama.ipynb
def load_llama(folder_or_name: str | Path, *, dtype: torch.dtype = torch.float32
               ) -> tuple[Llama, HFEncoding]:
    """Open a Llama folder, ours or the Hugging Face hub's; `load_pretrained` comes here for it.

    Raises:
        FileNotFoundError: no such folder or name, or a file missing in it.
        ValueError: a file that is damaged, not supported, or that does not fit the others.

    Example:
        >>> model, tokenizer = load_llama("smollm2-135m")                     # doctest: +SKIP
    """
    path = find_files(folder_or_name, ["config.json"])[0]
    config, tokenizer = load_llama_config(path), load_hf_tokenizer(folder_or_name)
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"{path.parent}: the tokenizer has {tokenizer.n_vocab} tokens, the model "
                         f"{config.vocab_size}; they do not belong together.")
    weights = load_llama_weights(folder_or_name, config, dtype)
    model = _empty_model(config, Llama)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval(), tokenizer


# cell llama-description of notebooks/08_llama.ipynb
def _llama_description(config: LlamaConfig, dtype: torch.dtype) -> dict:
    """What config.json says of a Llama, in the form that every version of transformers reads."""
    if config.qk_norm or config.sliding_window is not None:
        raise ValueError("A folder of model_type llama has no word for qk_norm or sliding_window; "
                         "this model cannot be saved as one.")
    scaling = config.rope_scaling
    said = None if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
    if said and scaling.kind == "llama3":
        said |= {"low_freq_factor": scaling.low_freq_factor,
                 "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_context_length}
    ends = config.eos_token_id
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "hidden_size": config.n_embd, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "head_dim": config.head_size,
        "rope_theta": config.rope_base, "rope_scaling": said, "rms_norm_eps": config.norm_eps,
        "attention_bias": False, "mlp_bias": False, "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_word_embeddings, "bos_token_id": config.bos_token_id,
        "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
        "torch_dtype": str(dtype).removeprefix("torch.")}


# cell save-llama of notebooks/08_llama.ipynb
def save_llama(model: Llama, tokenizer: tiktoken.Encoding, folder: str | Path, *,
               dtype: torch.dtype | None = None) -> None:
    """Write a folder that `load_pretrained` and `transformers` open, with equal logits and ids.

    Each file is replaced as a whole, `config.json` last. `save_pretrained` comes here for a Llama.

    Args:
        dtype: of the weights in the file; as they are in memory unless given.

    Raises:
        ValueError: the tokenizer has more tokens than the model or a split pattern that
            `tokenizer.json` cannot say here, or the model is no Llama of that format.
        OSError: a file cannot be written, for example because the disk is full.
    """
    model, folder = unwrap_model(model), Path(folder)
    config, state = model.config, model.state_dict()
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"The tokenizer has {tokenizer.n_vocab} tokens, the model "
                         f"{config.vocab_size}.")
    weights = {theirs: state[ours].detach().to("cpu", dtype or state[ours].dtype).contiguous()
               for ours, theirs in llama_key_map(config).items()}
    description = _llama_description(config, next(iter(weights.values())).dtype)
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    ids = {"bos_token": config.bos_token_id, "eos_token": ends[0]}
    names = {role: tokenizer.decode([i]) for role, i in ids.items()
             if i is not None and i < tokenizer.n_vocab}
    save_hf_tokenizer(tokenizer, folder, getattr(tokenizer, "names", names))
    with atomic_write(folder / "model.safetensors") as temporary:
        try:
            save_file(weights, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / 'model.safetensors'} could not be written ({error}). Is the "
                          "disk full?") from error
    with atomic_write(folder / "config.json") as temporary:
        text = json.dumps(description, indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")
