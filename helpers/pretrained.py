"""5 · Pretraining.

Made from notebooks/05_pretraining.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.sampling, helpers.training, helpers.callbacks.
"""

import json
import warnings
from importlib import import_module
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from helpers.common import atomic_write
from helpers.download import find_files
from helpers.gpt import GPT, GPTConfig
from helpers.tokenizer import load_tokenizer, save_tokenizer
from helpers.training import unwrap_model

__all__ = [
    "hf_key_map",
    "load_config",
    "load_weights",
    "OTHER_ARCHITECTURES",
    "load_pretrained",
    "save_pretrained",
]


# cell hf-key-map of notebooks/05_pretraining.ipynb
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


# cell load-config of notebooks/05_pretraining.ipynb
def load_config(path: str | Path) -> GPTConfig:
    """Read a Hugging Face `config.json` of a GPT-2.

    Where its three dropout probabilities differ, that of the residual stream is taken, with a
    warning; begin and end ids outside the vocabulary, which `transformers` writes by default for
    small models, are left out.

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
        raise ValueError(f"{path} describes a model of type {kind!r}; expected 'gpt2', or 'llama' "
                         "where chapter 8 opens it.")
    allowed = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
               "scale_attn_weights": (True,), "n_inner": (None, 4 * raw.get("n_embd", 0)),
               "add_cross_attention": (False,), "scale_attn_by_inverse_layer_idx": (False,)}
    for name, values in allowed.items():
        if raw.get(name, values[0]) not in values:
            raise ValueError(f"{path} has {name} = {raw[name]!r}; this series builds "
                             f"{' or '.join(map(repr, values))} only.")
    missing = [k for k in ("vocab_size", "n_embd", "n_head", "n_layer") if k not in raw]
    length = raw.get("n_positions", raw.get("n_ctx"))
    if missing or length is None:
        raise ValueError(f"{path} lacks {', '.join(missing) or 'n_positions'}.")
    rates = [raw.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if len(set(rates)) > 1:
        warnings.warn(f"{path} has dropout {rates} for residual stream, embeddings and attention; "
                      f"this model uses {rates[0]} for all three.", stacklevel=2)
    ids = {name: raw.get(name) for name in ("bos_token_id", "eos_token_id")}
    try:
        ids = {name: None if type(i) is int and i >= raw["vocab_size"] else i
               for name, i in ids.items()}
        return GPTConfig(vocab_size=raw["vocab_size"], context_length=length, n_embd=raw["n_embd"],
                         n_head=raw["n_head"], n_layer=raw["n_layer"], dropout=rates[0],
                         tie_word_embeddings=raw.get("tie_word_embeddings", True),
                         norm_eps=raw.get("layer_norm_epsilon", 1e-5), **ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a GPT of this series: {error}") from None


# cell no-initialization of notebooks/05_pretraining.ipynb
class _NoInitialization(TorchFunctionMode):
    """Within it the functions of `torch.nn.init` leave their tensor as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


# cell empty-model of notebooks/05_pretraining.ipynb
def _empty_model(config: GPTConfig, model_class: type[GPT] = GPT) -> GPT:
    """A model on the meta device: names and shapes without memory."""
    with torch.device("meta"), _NoInitialization():
        return model_class(config)


# cell load-weights of notebooks/05_pretraining.ipynb
def load_weights(path: str | Path, config: GPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a GPT-2 safetensors file under our names, transposed where need be.

    Where the file has the dtype asked for, the tensors are views of the mapped file, read when
    they are used; writing to them changes memory only. Names may carry the prefix `transformer.`
    or not; the old `attn.bias` buffers are passed over, and so is `lm_head.weight` where the
    embeddings are tied.

    Raises:
        ValueError: not a safetensors file, or names missing, unexpected, or of another shape.
    """
    expected = {k: tuple(v.shape) for k, v in _empty_model(config).state_dict().items()}
    problems, weights = [], {}
    try:
        found = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from None
    for ours, (theirs, transposed) in hf_key_map(config).items():
        if theirs not in found:
            problems.append(f"{theirs} is missing")
            continue
        tensor = found.pop(theirs)
        tensor = tensor.t() if transposed and tensor.dim() == 2 else tensor
        if tensor.shape != expected[ours]:
            problems.append(f"{theirs} has shape {tuple(tensor.shape)}, expected {expected[ours]}")
        elif tensor.dtype == dtype:
            weights[ours] = tensor
        else:
            weights[ours] = torch.empty(expected[ours], dtype=dtype).copy_(tensor)
    buffers = tuple(f".attn.{name}" for name in ("bias", "masked_bias"))
    foreign = [n for n in found if not n.endswith(buffers) and n != "lm_head.weight"]
    problems += [f"{name} is unexpected" for name in foreign]
    if problems:
        raise ValueError(f"{path} does not fit its config: {'; '.join(problems)}.")
    return weights


# cell other-architectures of notebooks/05_pretraining.ipynb
OTHER_ARCHITECTURES = {"llama": "helpers.llama_pretrained"}    # model_type in config.json, module


# cell model-type of notebooks/05_pretraining.ipynb
def _model_type(path: Path) -> str | None:
    """What config.json says the model is; None where that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        return None                                # load_config says what is wrong


# cell open-tokenizer of notebooks/05_pretraining.ipynb
def _open_tokenizer(folder_or_name: str | Path) -> tiktoken.Encoding:
    """The tokenizer of a folder: vocab.json and merges.txt, or else the newer tokenizer.json."""
    try:
        return load_tokenizer(find_files(folder_or_name, ["vocab.json", "merges.txt"])[0].parent)
    except FileNotFoundError as error:
        try:
            find_files(folder_or_name, ["tokenizer.json"])
        except FileNotFoundError:
            raise error from None
    return import_module("helpers.hf_tokenizer").load_hf_tokenizer(folder_or_name)


# cell load-pretrained of notebooks/05_pretraining.ipynb
def load_pretrained(folder_or_name: str | Path, *, dtype: torch.dtype = torch.float32
                    ) -> tuple[GPT, tiktoken.Encoding]:
    """Open a model's folder, ours or the Hugging Face hub's: the model in eval mode, its tokenizer.

    Args:
        folder_or_name: a folder with config.json, model.safetensors, and vocab.json and merges.txt
            or tokenizer.json; a name on the hub; "tiny"; "gpt2", "gpt2-medium", "gpt2-large",
            "gpt2-xl"; or "smollm2-135m" and others of OTHER_ARCHITECTURES.
        dtype: of the weights in memory, whatever the file holds.

    Raises:
        FileNotFoundError: no such folder or name, or a file missing in it.
        ValueError: a file that is damaged, or that does not fit the others.

    Example:
        >>> model, tokenizer = load_pretrained("tiny")
        >>> model.config.vocab_size == tokenizer.n_vocab
        True
    """
    path = find_files(folder_or_name, ["config.json"])[0]
    if (kind := _model_type(path)) in OTHER_ARCHITECTURES:
        module = import_module(OTHER_ARCHITECTURES[kind])
        return getattr(module, f"load_{kind}")(folder_or_name, dtype=dtype)
    config, tokenizer = load_config(path), _open_tokenizer(folder_or_name)
    weights_path = find_files(folder_or_name, ["model.safetensors"])[0]
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"{path.parent}: the tokenizer has {tokenizer.n_vocab} tokens, the "
                         f"model {config.vocab_size}; they do not belong together.")
    weights = load_weights(weights_path, config, dtype)
    model = _empty_model(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval(), tokenizer


# cell write-tokenizer of notebooks/05_pretraining.ipynb
def _write_tokenizer(tokenizer: tiktoken.Encoding, folder: Path) -> None:
    """Write vocab.json and merges.txt; or tokenizer.json, if it was opened from one."""
    if type(tokenizer) is tiktoken.Encoding:
        return save_tokenizer(tokenizer, folder)
    import_module("helpers.hf_tokenizer").save_hf_tokenizer(tokenizer, folder)
    for name in ("vocab.json", "merges.txt"):            # of another tokenizer: they go first
        (folder / name).unlink(missing_ok=True)


# cell save-pretrained of notebooks/05_pretraining.ipynb
def save_pretrained(model: GPT, tokenizer: tiktoken.Encoding, folder: str | Path, *,
                    dtype: torch.dtype | None = None) -> None:
    """Write a folder that `load_pretrained` and `transformers` open, with equal logits and ids.

    Each file is replaced as a whole, `config.json` last. A model without qkv bias is written with
    a bias of zeros, which GPT-2's format demands. A model of OTHER_ARCHITECTURES is written by its
    module, and a tokenizer that came from a tokenizer.json as one.

    Args:
        dtype: of the weights in the file; as they are in memory unless given.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
        OSError: a file cannot be written, for example because the disk is full.
    """
    model, folder = unwrap_model(model), Path(folder)
    if (kind := type(model).__name__.lower()) in OTHER_ARCHITECTURES:
        module = import_module(OTHER_ARCHITECTURES[kind])
        return getattr(module, f"save_{kind}")(model, tokenizer, folder, dtype=dtype)
    config = model.config
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"The tokenizer has {tokenizer.n_vocab} tokens, the model "
                         f"{config.vocab_size}.")
    state, weights = model.state_dict(), {}
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
    _write_tokenizer(tokenizer, folder)
    with atomic_write(folder / "model.safetensors") as temporary:
        try:
            save_file(weights, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / 'model.safetensors'} could not be written ({error}). Is the "
                          "disk full?") from error
    with atomic_write(folder / "config.json") as temporary:
        text = json.dumps(description, indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")
