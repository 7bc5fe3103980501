"""5 · Pretraining.

Made from notebooks/05_pretraining.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import json
import os
import tempfile
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.gpt import GPT, GPTConfig
from helpers.tokenizer import find_files, load_tokenizer, save_tokenizer
from helpers.training import unwrap_model

__all__ = ["hf_key_map", "load_config", "load_weights", "load_pretrained", "save_pretrained"]


# cell key-map of notebooks/05_pretraining.ipynb
def hf_key_map(config: GPTConfig) -> dict[str, tuple[str, bool]]:
    """Our parameter names, each with its name in GPT-2's file and whether it lies transposed there.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> hf_key_map(config)["blocks.0.attention.qkv.weight"]
        ('h.0.attn.c_attn.weight', True)
    """
    names = {"token_embedding.weight": ("wte.weight", False),
             "position_embedding.weight": ("wpe.weight", False),
             "final_norm.weight": ("ln_f.weight", False), "final_norm.bias": ("ln_f.bias", False)}
    parts = {"attention.qkv": "attn.c_attn", "attention.output_projection": "attn.c_proj",
             "feed_forward.up_projection": "mlp.c_fc", "feed_forward.down_projection": "mlp.c_proj"}
    for i in range(config.n_layer):
        for ours, theirs in (("norm_1", "ln_1"), ("norm_2", "ln_2")):
            names[f"blocks.{i}.{ours}.weight"] = (f"h.{i}.{theirs}.weight", False)
            names[f"blocks.{i}.{ours}.bias"] = (f"h.{i}.{theirs}.bias", False)
        for ours, theirs in parts.items():
            names[f"blocks.{i}.{ours}.weight"] = (f"h.{i}.{theirs}.weight", True)
            if ours != "attention.qkv" or config.qkv_bias:
                names[f"blocks.{i}.{ours}.bias"] = (f"h.{i}.{theirs}.bias", False)
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("lm_head.weight", False)
    return names


# cell read-config of notebooks/05_pretraining.ipynb
def load_config(path: str | Path) -> GPTConfig:
    """Read a Hugging Face `config.json` of a GPT-2.

    Raises:
        ValueError: not JSON, another kind of model, a field missing, or a variant of GPT-2 that
            this series does not build.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a config.json: {error}") from None
    if kind != "gpt2":
        raise ValueError(f"{path} describes a model of type {kind!r}; expected 'gpt2'.")
    fixed = {"activation_function": "gelu_new", "scale_attn_weights": True, "n_inner": None,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in fixed.items():
        allowed = (value, 4 * raw.get("n_embd", 0)) if name == "n_inner" else (value,)
        if raw.get(name, value) not in allowed:
            raise ValueError(f"{path} has {name} = {raw[name]!r}; this series builds {value!r} "
                             "only.")
    missing = [k for k in ("vocab_size", "n_embd", "n_head", "n_layer") if k not in raw]
    length = raw.get("n_positions", raw.get("n_ctx"))
    if missing or length is None:
        raise ValueError(f"{path} lacks {', '.join(missing) or 'n_positions'}.")
    try:
        return GPTConfig(vocab_size=raw["vocab_size"], context_length=length, n_embd=raw["n_embd"],
                         n_head=raw["n_head"], n_layer=raw["n_layer"],
                         dropout=raw.get("resid_pdrop", 0.1),
                         tie_word_embeddings=raw.get("tie_word_embeddings", True),
                         norm_eps=raw.get("layer_norm_epsilon", 1e-5),
                         bos_token_id=raw.get("bos_token_id"), eos_token_id=raw.get("eos_token_id"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a GPT of this series: {error}") from None


# cell read-weights of notebooks/05_pretraining.ipynb
def load_weights(path: str | Path, config: GPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a GPT-2 safetensors file under our names, transposed where need be.

    Names may carry the prefix `transformer.` or not; the old `attn.bias` buffers are passed over,
    and so is `lm_head.weight` where the embeddings are tied.

    Raises:
        ValueError: not a safetensors file, or names missing, unexpected, or of another shape.
    """
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in GPT(config).state_dict().items()}
    problems, sources, weights = [], {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            there = {name.removeprefix("transformer."): name for name in keys}
            for ours, (theirs, transposed) in hf_key_map(config).items():
                if theirs not in there:
                    problems.append(f"{theirs} is missing")
                    continue
                sources[ours] = there.pop(theirs)
                shape = tuple(file.get_slice(sources[ours]).get_shape())
                shape = shape[::-1] if transposed else shape
                if shape != expected[ours]:
                    problems.append(f"{theirs} has shape {shape}, expected {expected[ours]}")
            buffers = tuple(f".attn.{name}" for name in ("bias", "masked_bias"))
            foreign = [n for n in there if not n.endswith(buffers) and n != "lm_head.weight"]
            problems += [f"{name} is unexpected" for name in foreign]
            if problems:
                raise ValueError(f"{path} does not fit its config: {'; '.join(problems)}.")
        for ours, (_, transposed) in hf_key_map(config).items():
            with safe_open(path, framework="pt") as file:     # anew, which gives its memory back
                tensor = file.get_tensor(sources[ours])
            tensor = tensor.t() if transposed else tensor
            weights[ours] = torch.empty(expected[ours], dtype=dtype).copy_(tensor)
            del tensor
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None
    return weights


# cell load-pretrained of notebooks/05_pretraining.ipynb
def load_pretrained(folder_or_name: str | Path, *, dtype: torch.dtype = torch.float32
                    ) -> tuple[GPT, tiktoken.Encoding]:
    """Open a GPT-2 folder, ours or the Hugging Face hub's: the model in eval mode, its tokenizer.

    Args:
        folder_or_name: a folder with config.json, model.safetensors, vocab.json and merges.txt;
            "tiny"; "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"; or a name on the hub.
        dtype: of the weights in memory, whatever the file holds.

    Raises:
        FileNotFoundError: no such folder or name, or a file missing in it.
        ValueError: a file that is damaged, or that does not fit the others.

    Example:
        >>> model, tokenizer = load_pretrained("tiny")
        >>> model.config.vocab_size == tokenizer.n_vocab
        True
    """
    names = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    paths = find_files(folder_or_name, names)
    config, tokenizer = load_config(paths[0]), load_tokenizer(paths[2].parent)
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"{paths[0].parent}: the tokenizer has {tokenizer.n_vocab} tokens, the "
                         f"model {config.vocab_size}; they do not belong together.")
    weights = load_weights(paths[1], config, dtype)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval(), tokenizer


# cell save-pretrained of notebooks/05_pretraining.ipynb
def save_pretrained(model: GPT, tokenizer: tiktoken.Encoding, folder: str | Path, *,
                    dtype: torch.dtype | None = None) -> None:
    """Write a folder that `load_pretrained` and `transformers` open, with equal logits and ids.

    A model without qkv bias is written with a bias of zeros, which GPT-2's format demands.

    Args:
        dtype: of the weights in the file; as they are in memory unless given.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
        OSError: the folder cannot be written; what lay there before is untouched.
    """
    model, folder = unwrap_model(model), Path(folder)
    config = model.config
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"The tokenizer has {tokenizer.n_vocab} tokens, the model "
                         f"{config.vocab_size}.")
    state = model.state_dict()
    weights = {}
    for ours, (theirs, transposed) in hf_key_map(config).items():
        name = theirs if theirs.startswith("lm_head") else f"transformer.{theirs}"
        tensor = state[ours].detach().to("cpu", dtype or state[ours].dtype)
        weights[name] = (tensor.t() if transposed else tensor).contiguous()
    if not config.qkv_bias:
        for i in range(config.n_layer):
            like = weights[f"transformer.h.{i}.attn.c_attn.weight"]
            weights[f"transformer.h.{i}.attn.c_attn.bias"] = like.new_zeros(3 * config.n_embd)
    stored = next(iter(weights.values())).dtype
    description = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size, "n_positions": config.context_length,
        "n_embd": config.n_embd, "n_head": config.n_head, "n_layer": config.n_layer,
        "activation_function": "gelu_new", "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_word_embeddings, "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id, "torch_dtype": str(stored).removeprefix("torch."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".part") as part:
        save_tokenizer(tokenizer, part)
        try:
            save_file(weights, Path(part, "model.safetensors"), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / 'model.safetensors'} could not be written ({error}). Is the "
                          "disk full?") from error
        text = json.dumps(description, indent=1) + "\n"
        Path(part, "config.json").write_text(text, encoding="utf-8", newline="\n")
        for path in Path(part).iterdir():
            os.replace(path, folder / path.name)
