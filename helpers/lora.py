"""B · LoRA: fine-tuning with few parameters.

Made from notebooks/B_lora.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.quantization, helpers.adapters.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.common import atomic_write
from helpers.gpt import GPT
from helpers.pretrained import hf_key_map
from helpers.training import unwrap_model

__all__ = [
    "LoRALinear",
    "GPT_LINEAR_LAYERS",
    "find_linear_layers",
    "replace_module",
    "freeze",
    "lora_layers",
    "apply_lora",
    "count_parameters",
    "remove_lora",
    "merge_lora",
    "adapter_key_map",
    "save_adapter",
    "load_adapter",
]


# cell lora-linear of notebooks/B_lora.ipynb
class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of low rank (Hu et al. 2021, arXiv:2106.09685).

    Computes W x + b + alpha / r * B A dropout(x). B starts at zero: at first nothing changes.

    Args:
        base: the layer to adapt. It is frozen, and not copied.
        r: the rank of the update.
        alpha: the update is multiplied by alpha / r.
        dropout: of the update's input, while training.

    Raises:
        ValueError: r below 1, alpha not positive, or dropout outside [0, 1).

    Example:
        >>> layer = LoRALinear(nn.Linear(6, 4), r=2)
        >>> layer.lora_A.shape, layer.lora_B.shape, layer(torch.zeros(5, 6)).shape
        (torch.Size([2, 6]), torch.Size([4, 2]), torch.Size([5, 4]))
    """

    def __init__(self, base: nn.Module, r: int = 8, alpha: float = 16.0,
                 dropout: float = 0.0) -> None:
        super().__init__()
        if r < 1 or r % 1 or not alpha > 0 or not 0 <= dropout < 1:
            raise ValueError("expected a whole r of at least 1, alpha above 0, dropout in [0, 1); "
                             f"got r {r}, alpha {alpha}, dropout {dropout}.")
        self.base, self.r, self.alpha = base.requires_grad_(False), r, alpha
        self.in_features, self.out_features = base.in_features, base.out_features
        dtype = torch.promote_types(base.weight.dtype, torch.float32)   # small steps must count
        like = {"device": base.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))          # as nn.Linear does
        self.dropout = nn.Dropout(dropout)
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out_features, in_features), without the update."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    @property
    def delta(self) -> Tensor:
        """The update of the weight, alpha / r * B A: (out_features, in_features)."""
        return self.alpha / self.r * self.lora_B @ self.lora_A

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        y = self.base(x)
        x = self.dropout(x.to(self.lora_A.dtype))
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)      # by way of (..., r)
        return y + (self.alpha / self.r * update).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One frozen linear layer that computes the same, with the weight W + alpha / r * B A."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.to(self.delta.dtype) + self.delta
        layer.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"r={self.r}, alpha={self.alpha:g}"


# cell gpt-linear-layers of notebooks/B_lora.ipynb
GPT_LINEAR_LAYERS = ("qkv", "output_projection", "up_projection", "down_projection")


# cell find-linear of notebooks/B_lora.ipynb
def find_linear_layers(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers whose name is one of the targets, or ends in one after a dot.

    Raises:
        ValueError: a target that names no linear layer, or a layer whose weight is tied to another
            module's.

    Example:
        >>> model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        >>> list(find_linear_layers(model, ["b"]))
        ['b']
    """
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    linear = {name: m for name, m in model.named_modules()         # quantized layers are linear too
              if hasattr(m, "in_features") and not isinstance(m, LoRALinear)}
    found: dict[str, nn.Module] = {}
    for target in targets:
        hits = {n: m for n, m in linear.items() if f".{n}".endswith(f".{target}")}
        if not hits:
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", f".{n}")[1:] for n in linear})
            raise ValueError(f"No linear layer is named {target!r}; there are {', '.join(kinds)}.")
        found |= hits
    for name, layer in found.items():
        tied = [n for n, p in model.named_parameters(remove_duplicate=False)
                if p is layer.weight and n != f"{name}.weight"]
        if tied:
            raise ValueError(f"{name} is tied: its weight is {tied[0]} too, and a merge would "
                             "change both. Leave it out of target_modules, or untie it first.")
    return {name: layer for name, layer in linear.items() if name in found}


# cell replace-module of notebooks/B_lora.ipynb
def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule with this name, as `named_modules` gives it.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> replace_module(model, "0", nn.ReLU())
        >>> model
        Sequential(
          (0): ReLU()
        )
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


# cell freeze of notebooks/B_lora.ipynb
def freeze(model: nn.Module, modules_to_save: Sequence[str] = ()) -> None:
    """Let nothing train but the modules with these names: a new head, for example.

    Raises:
        ValueError: there is no such module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> freeze(model, ["1"])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['1.weight', '1.bias']
    """
    names = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
    named = dict(model.named_modules())
    if missing := [name for name in names if name not in named]:
        raise ValueError(f"The model has no module {missing[0]!r}; at its top are "
                         f"{', '.join(name for name, _ in model.named_children())}.")
    model.requires_grad_(False)
    for name in names:
        named[name].requires_grad_(True)


# cell lora-layers of notebooks/B_lora.ipynb
def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by name; none if `apply_lora` has not been there.

    Example:
        >>> list(lora_layers(nn.Sequential(LoRALinear(nn.Linear(3, 2)), nn.ReLU())))
        ['0']
    """
    return {name: module for name, module in unwrap_model(model).named_modules()
            if isinstance(module, LoRALinear)}


# cell apply-lora of notebooks/B_lora.ipynb
def apply_lora(model: nn.Module, r: int = 8, alpha: float = 16.0, *, dropout: float = 0.0,
               target_modules: Sequence[str] = GPT_LINEAR_LAYERS,
               modules_to_save: Sequence[str] = ()) -> nn.Module:
    """Put a LoRA layer around linear layers, in place; only they train afterwards.

    Args:
        r, alpha, dropout: see `LoRALinear`.
        target_modules: names of the layers, or the ends of their names after a dot.
        modules_to_save: names of modules that train whole, such as a new head.

    Returns:
        The same model.

    Raises:
        ValueError: a name that fits nothing, a tied layer, a model that has LoRA layers already, or
            one that is wrapped for distributed training, which has noted its parameters already.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> model = apply_lora(GPT(config), r=1)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        128
    """
    inner = unwrap_model(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("The model is wrapped for distributed training already: apply LoRA first, "
                         "then wrap it.")
    if lora_layers(inner):
        raise ValueError("The model has LoRA layers already: merge_lora or remove_lora first.")
    layers = find_linear_layers(inner, target_modules)
    LoRALinear(nn.Linear(1, 1), r, alpha, dropout)          # refuses before anything is changed
    freeze(inner, modules_to_save)
    for name, layer in layers.items():
        replace_module(inner, name, LoRALinear(layer, r, alpha, dropout))
    return model


# cell count-parameters of notebooks/B_lora.ipynb
def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are; a tied one counts once.

    Example:
        >>> count_parameters(LoRALinear(nn.Linear(100, 100), r=1))
        (200, 10300)
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


# cell remove-lora of notebooks/B_lora.ipynb
def remove_lora(model: nn.Module) -> nn.Module:
    """Take the updates away, in place: the layers are those from before `apply_lora`.

    Modules that were trained whole keep what they have learned. Returns the same model.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> remove_lora(nn.Sequential(LoRALinear(layer)))[0] is layer
        True
    """
    for name, layer in lora_layers(model).items():
        replace_module(unwrap_model(model), name, layer.base)
    return model


# cell merge-lora of notebooks/B_lora.ipynb
def merge_lora(model: nn.Module) -> nn.Module:
    """Add each update to its weight, in place: the layers are ordinary linear layers again.

    What was frozen stays frozen; `model.requires_grad_(True)` lets all of it train.

    Returns:
        The same model.

    Raises:
        ValueError: there is no LoRA layer.

    Example:
        >>> merge_lora(nn.Sequential(LoRALinear(nn.Linear(3, 2))))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("There is no LoRA layer to merge: was it merged before?")
    for name, layer in layers.items():
        replace_module(unwrap_model(model), name, layer.merged())
    return model


# cell adapter-key-map of notebooks/B_lora.ipynb
def adapter_key_map(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Our parameter names, each with its name in `transformers` and whether it is transposed.

    For a GPT, or a classifier that holds one; empty for other models, which keep their own names.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> adapter_key_map(GPT(config))["blocks.0.attention.qkv.weight"]
        ('transformer.h.0.attn.c_attn.weight', True)
    """
    inside = next((name for name, m in model.named_modules() if isinstance(m, GPT)), None)
    if inside is None:
        return {}
    prefix, names = f"{inside}." if inside else "", {}
    for ours, (theirs, transposed) in hf_key_map(model.get_submodule(inside).config).items():
        theirs = theirs if theirs.startswith("lm_head") else f"transformer.{theirs}"
        names[f"{prefix}{ours}"] = theirs, transposed
    return names | ({"head.weight": ("score.weight", False)} if inside else {})


# cell adapter-config of notebooks/B_lora.ipynb
def _adapter_config(layers: Mapping[str, LoRALinear], theirs: Mapping[str, str],
                    modules_to_save: list[str]) -> dict:
    """The content of adapter_config.json, but for what depends on the base model."""
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA", "inference_mode": True, "bias": "none", "r": first.r,
        "lora_alpha": first.alpha, "lora_dropout": first.dropout.p,
        "target_modules": list(theirs.values()), "modules_to_save": modules_to_save or None,
        "rank_pattern": {theirs[n]: x.r for n, x in layers.items() if x.r != first.r},
        "alpha_pattern": {theirs[n]: x.alpha for n, x in layers.items() if x.alpha != first.alpha},
    }


# cell save-adapter of notebooks/B_lora.ipynb
def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None,
                 key_map: Mapping[str, tuple[str, bool]] | None = None) -> None:
    """Write the LoRA layers, and what else trains, in the format of Hugging Face's `peft`.

    Args:
        base: a name or folder of the base model, for the reader of the file.
        key_map: parameter names, ours to theirs, as `adapter_key_map` gives them.

    Raises:
        ValueError: there is no LoRA layer.
        OSError: a file cannot be written, for example because the disk is full.

    Example:
        >>> save_adapter(model, "spam-adapter")                          # doctest: +SKIP
    """
    inner, folder, layers = unwrap_model(model), Path(folder), lora_layers(model)
    if not layers:
        raise ValueError("There is no LoRA layer to save: was it merged before?")
    names = adapter_key_map(inner) if key_map is None else key_map
    theirs = {n: names.get(f"{n}.weight", (f"{n}.weight",))[0].removesuffix(".weight")
              for n in layers}
    tensors = {f"{theirs[n]}.lora_{x}.weight": getattr(layer, f"lora_{x}")
               for n, layer in layers.items() for x in "AB"}
    whole = {}
    for name, p in inner.named_parameters():
        if p.requires_grad and not name.endswith((".lora_A", ".lora_B")):
            key, transposed = names.get(name, (name, False))
            whole[key] = p.t() if transposed else p
    config = _adapter_config(layers, theirs, sorted({k.rpartition(".")[0] for k in whole}))
    config |= {"base_model_name_or_path": base,
               "task_type": "CAUSAL_LM" if isinstance(inner, GPT) else
                            "SEQ_CLS" if "score.weight" in whole else None,
               "fan_in_fan_out": any(names.get(f"{n}.weight", ("", False))[1] for n in layers)}
    tensors = {f"base_model.model.{key}": t.detach().cpu().contiguous()
               for key, t in (tensors | whole).items()}
    with atomic_write(folder / "adapter_model.safetensors") as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder}: the adapter could not be written ({error}). Is the disk "
                          "full?") from error
    with atomic_write(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8", newline="\n")


# cell read-adapter of notebooks/B_lora.ipynb
def _read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a peft folder, without the prefix of the names."""
    paths = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected a folder that save_adapter or "
                                    "peft wrote.")
    try:
        config = dict(json.loads(paths[0].read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{paths[0]} is not an adapter_config.json: {error}") from None
    try:
        tensors = load_file(paths[1])
    except SafetensorError as error:
        raise ValueError(f"{paths[1]} is not a whole safetensors file: {error}.") from None
    if config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise ValueError(f"{paths[0]} describes {config.get('peft_type')!r}; expected a LoRA "
                         "adapter, with peft_type 'LORA' and lora_alpha.")
    for name, value in (("use_dora", False), ("bias", "none"), ("lora_bias", False)):
        if config.get(name, value) != value:
            raise ValueError(f"{paths[0]} has {name} = {config[name]!r}, which changes what the "
                             f"layer computes; only {value!r} can be opened here.")
    return config, {key.removeprefix("base_model.model."): t for key, t in tensors.items()}


# cell match-adapter of notebooks/B_lora.ipynb
def _match_adapter(model: nn.Module, tensors: Mapping[str, Tensor],
                   names: Mapping[str, tuple[str, bool]]) -> tuple[dict, dict]:
    """For each layer its name there, A and B; for each parameter saved whole its tensor."""
    params = dict(model.named_parameters())
    linear = {f"{n}.weight": m for n, m in model.named_modules() if hasattr(m, "in_features")}
    ours = {theirs: (name, transposed) for name in params | linear
            for theirs, transposed in [names.get(name, (name, False))]}
    layers, whole, problems = {}, {}, []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        name, transposed = ours.get(f"{match[1]}.weight" if match else key, ("", False))
        if name not in (linear if match else params):
            problems.append(f"{key} has no place in the model")
        elif match:
            owner = name.removesuffix(".weight")
            layers.setdefault(owner, {"theirs": match[1]})[match[2]] = tensor
        else:
            whole[name] = tensor.t() if transposed else tensor
    for name, found in layers.items():
        out, in_ = linear[f"{name}.weight"].out_features, linear[f"{name}.weight"].in_features
        shapes = [tuple(found[x].shape) for x in "AB" if x in found]
        r = shapes[0][0] if shapes[0] else 0
        if shapes != [(r, in_), (out, r)]:
            problems.append(f"{name} ({in_} to {out}) has lora_A and lora_B of shapes {shapes}")
    problems += [f"{name} has the shape {tuple(t.shape)}, here {tuple(params[name].shape)}"
                 for name, t in whole.items() if t.shape != params[name].shape]
    if problems or not layers:
        raise ValueError("The adapter does not fit this model: "
                         f"{'; '.join(problems[:3]) or 'it holds no LoRA layer'}.")
    find_linear_layers(model, list(layers))                           # refuses tied ones
    return layers, whole


# cell load-adapter of notebooks/B_lora.ipynb
def load_adapter(model: nn.Module, folder: str | Path, *,
                 key_map: Mapping[str, tuple[str, bool]] | None = None) -> nn.Module:
    """Open an adapter, ours or one of peft's, on its base model, in place.

    Afterwards the adapter trains and the rest does not, as after `apply_lora`. Where something does
    not fit, the model is left as it was.

    Args:
        key_map: as for `save_adapter`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, an adapter of another kind, names or shapes that do not fit, or
            a model that has LoRA layers already.

    Example:
        >>> model = load_adapter(model, "spam-adapter")                  # doctest: +SKIP
    """
    inner, (config, tensors) = unwrap_model(model), _read_adapter(Path(folder))
    if lora_layers(inner):
        raise ValueError("The model has LoRA layers already: merge_lora or remove_lora first.")
    names = adapter_key_map(inner) if key_map is None else key_map
    layers, whole = _match_adapter(inner, tensors, names)
    params = dict(inner.named_parameters())
    freeze(inner)
    for name, found in layers.items():
        r, patterns = len(found["A"]), config.get("alpha_pattern") or {}
        alpha = next((a for key, a in patterns.items()
                      if re.fullmatch(rf"(.*\.)?({key})", found["theirs"])), config["lora_alpha"])
        if config.get("use_rslora"):
            alpha *= math.sqrt(r)                    # its updates are scaled by alpha / sqrt(r)
        layer = LoRALinear(inner.get_submodule(name), r, alpha, config.get("lora_dropout") or 0.0)
        layer.lora_A.data.copy_(found["A"])
        layer.lora_B.data.copy_(found["B"])
        replace_module(inner, name, layer)
    for name, tensor in whole.items():
        params[name].data.copy_(tensor)
        params[name].requires_grad_(True)
    return model
