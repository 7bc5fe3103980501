"""Tests of helpers.lora, helpers.quantization and helpers.adapters, the modules of appendix B."""

from __future__ import annotations

import argparse
import copy
import doctest
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import helpers.adapters
import helpers.lora
import helpers.quantization
from helpers.adapters import PrefixTuning, PromptTuning, apply_adapters, apply_bitfit
from helpers.classification import (
    GPTForSequenceClassification,
    classification_loss,
    save_classifier,
)
from helpers.generation import generate
from helpers.gpt import GPT, GPTConfig
from helpers.lora import (
    GPT_LINEAR_LAYERS,
    LoRALinear,
    apply_lora,
    count_parameters,
    find_linear_layers,
    freeze,
    load_adapter,
    lora_layers,
    merge_lora,
    remove_lora,
    save_adapter,
)
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.quantization import (
    QuantizedLinear,
    dequantize,
    nf4_codebook,
    quantize,
    quantize_linear_layers,
    uniform_codebook,
)
from helpers.tokenizer import train_bpe
from helpers.training import TrainConfig, configure_optimizer, fit

ROOT = Path(__file__).resolve().parent.parent
CONFIG = GPTConfig(vocab_size=270, context_length=24, n_embd=32, n_head=2, n_layer=2)
TOKENS = torch.randint(1, 260, (3, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([9, 4, 1])
BATCH = (TOKENS, LENGTHS, torch.tensor([0, 1, 1]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe("see you at six, you won a boat " * 3, vocab_size=270)


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its start: fresh biases are zero, fresh norms one, B zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


def make_gpt(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return perturb(GPT(replace(CONFIG, **changes)))


def make_classifier(seed: int = 0, **changes) -> GPTForSequenceClassification:
    return perturb(GPTForSequenceClassification(make_gpt(seed, **changes), trainable="all"))


def move_adapter(model: nn.Module, seed: int = 5) -> nn.Module:
    """Perturb what trains, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------
# The layer

sizes = st.integers(1, 12)


@given(sizes, sizes, st.integers(1, 6), st.floats(0.1, 64), st.booleans(), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_at_the_start_it_changes_nothing_and_merged_equals_unmerged(
        n_in: int, n_out: int, r: int, alpha: float, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    base, x = nn.Linear(n_in, n_out, bias=bias, dtype=torch.float64), torch.randn(3, 2, n_in)
    layer, x = LoRALinear(base, r, alpha, dropout=0.5).eval(), x.double()
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.train()(x), base(x))                    # with dropout too
    perturb(layer.eval(), seed)
    by_hand = base(x) + alpha / r * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), by_hand)
    merged = layer.merged()
    assert type(merged) is nn.Linear and trains(merged) == set()
    torch.testing.assert_close(merged(x), layer(x))


def test_gradients_of_the_first_step() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 4), r=2)
    layer(torch.randn(3, 5)).square().sum().backward()
    assert layer.lora_B.grad.norm() > 0 and layer.lora_A.grad.norm() == 0
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_dropout_drops_the_input_of_the_update_only() -> None:
    torch.manual_seed(0)
    layer = perturb(LoRALinear(nn.Linear(6, 4), r=2, dropout=0.5))
    x, without = torch.ones(2000, 6), layer.base(torch.ones(1, 6))
    updates = layer.train()(x) - without
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 6)                # (64, 6)
    distance = (updates[:, None] - masks @ layer.delta.T).abs().amax(dim=-1)     # (2000, 64)
    assert distance.amin(dim=1).max() < 1e-5 and distance.argmin(dim=1).unique().numel() > 60
    torch.testing.assert_close(layer.eval()(x[:1]) - without, x[:1] @ layer.delta.T)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"r": -1}, {"r": 1.5}, {"alpha": 0}, {"alpha": -1.0},
                                   {"alpha": math.nan}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_what_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected a whole r of at least 1"):
        LoRALinear(nn.Linear(3, 3), **wrong)


def test_half_precision_trains_in_float32() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 8, dtype=torch.bfloat16), r=2)
    assert layer.lora_A.dtype == torch.float32
    perturb(layer)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16 and layer.merged().weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------
# A whole model


def test_only_the_adapter_trains_and_its_parameters_are_counted() -> None:
    model = make_classifier()
    before = count_parameters(model)
    apply_lora(model, r=3, modules_to_save=["head"])
    layers = lora_layers(model)
    assert set(layers) == {f"gpt.{n}" for n in find_linear_layers(make_gpt(), GPT_LINEAR_LAYERS)}
    assert trains(model) == {"head.weight"} | {f"{n}.lora_{x}" for n in layers for x in "AB"}
    C, L = CONFIG.n_embd, CONFIG.n_layer
    n_lora = L * 3 * ((C + 3 * C) + (C + C) + (C + 4 * C) + (4 * C + C))
    assert count_parameters(model) == (n_lora + 2 * C, before[1] + n_lora)


def test_nothing_changes_at_the_start_and_removing_gives_the_model_back() -> None:
    model = make_classifier(dropout=0.1).eval()
    before, layer = weights_of(model), model.gpt.blocks[0].attention.qkv
    with torch.no_grad():
        expected = model(TOKENS, LENGTHS)
        assert torch.equal(apply_lora(model, dropout=0.3)(TOKENS, LENGTHS), expected)
        assert not any(m.training for m in model.modules())          # as it came
        move_adapter(model)
        assert not torch.equal(model(TOKENS, LENGTHS), expected)
        assert remove_lora(model) is model and model.gpt.blocks[0].attention.qkv is layer
        assert torch.equal(model(TOKENS, LENGTHS), expected)
    assert before.keys() == weights_of(model).keys()


def test_names_are_matched_at_dots() -> None:
    model = make_gpt()
    assert set(find_linear_layers(model, ["attention.qkv"])) == {
        "blocks.0.attention.qkv", "blocks.1.attention.qkv"}
    assert list(find_linear_layers(model, "blocks.1.attention.qkv")) == ["blocks.1.attention.qkv"]
    assert len(find_linear_layers(model, ["qkv", "attention.qkv"])) == 2       # each once
    with pytest.raises(ValueError, match=r"named 'projection'; there are .*blocks\.\*\.attention"):
        find_linear_layers(model, ["projection"])                              # a part of a name
    assert list(find_linear_layers(nn.Sequential(nn.Linear(1, 1)), ["0"])) == ["0"]


def test_refusals_leave_the_model_as_it_was() -> None:
    model = make_gpt()
    before = trains(model), str(model)
    for wrong, message in [({"target_modules": ["lm_head"]}, "tied.*token_embedding.weight"),
                           ({"target_modules": ["q_proj"]}, "named 'q_proj'"),
                           ({"modules_to_save": ["head"]}, "no module 'head'.*blocks"),
                           ({"r": 0}, "whole r")]:
        with pytest.raises(ValueError, match=message):
            apply_lora(model, **wrong)
        assert before == (trains(model), str(model))
    apply_lora(model)
    with pytest.raises(ValueError, match="LoRA layers already"):
        apply_lora(model)
    with pytest.raises(ValueError, match="no LoRA layer"):
        merge_lora(make_gpt())


def test_an_untied_output_layer_can_be_adapted() -> None:
    model = apply_lora(make_gpt(tie_word_embeddings=False), target_modules=["lm_head"])
    perturb(model.lm_head)
    embedding, expected = model.token_embedding.weight.clone(), model(TOKENS)
    torch.testing.assert_close(merge_lora(model)(TOKENS), expected)
    assert torch.equal(embedding, model.token_embedding.weight)


def test_a_merge_leaves_the_tensors_of_the_base_alone() -> None:
    base = make_gpt()
    before = weights_of(base)
    model = GPTForSequenceClassification(base)
    qkv = base.blocks[0].attention.qkv
    apply_lora(model, target_modules=["qkv"])
    merge_lora(move_adapter(model))
    assert not torch.equal(base.blocks[0].attention.qkv.weight, qkv.weight)
    assert torch.equal(qkv.weight, before["blocks.0.attention.qkv.weight"])


def test_fit_trains_the_adapter_and_nothing_else() -> None:
    model = apply_lora(make_classifier(dropout=0.1), r=4, dropout=0.1, modules_to_save=["head"])
    before = weights_of(model)
    optimizer = configure_optimizer(model, lr=1e-2)
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert moved == {id(p) for p in model.parameters() if p.requires_grad}
    history = fit(model, [BATCH], TrainConfig(max_steps=30, lr=1e-2), loss_fn=classification_loss,
                  optimizer=optimizer)
    assert history.last("train_loss") < history.records[0]["train_loss"] / 2
    after = weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == trains(model)


def test_generation_and_the_model_folder_after_a_merge(tmp_path: Path, tokenizer) -> None:
    model = perturb(apply_lora(make_gpt(), r=2, alpha=3.0)).double()
    prompts = [[1, 2, 3], [4]]
    cached = generate(model, prompts, 30)                            # beyond the context too
    assert cached == generate(model, prompts, 30, use_cache=False)
    assert generate(merge_lora(copy.deepcopy(model)), prompts, 30) == cached
    merged = merge_lora(model).float()
    save_pretrained(merged, tokenizer, tmp_path)
    again, _ = load_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS), merged.eval()(TOKENS))
        torch.testing.assert_close(theirs(TOKENS).logits, again(TOKENS), rtol=0, atol=1e-4)


def test_weights_mapped_from_a_file_can_be_adapted_and_merged(tmp_path: Path, tokenizer) -> None:
    save_pretrained(make_gpt(), tokenizer, tmp_path)
    stored = (tmp_path / "model.safetensors").read_bytes()
    model = perturb(apply_lora(load_pretrained(tmp_path)[0], r=2))
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(merge_lora(model)(TOKENS), expected, rtol=0, atol=1e-4)
    assert (tmp_path / "model.safetensors").read_bytes() == stored


def test_a_compiled_model_is_adapted_inside() -> None:
    model = make_gpt()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled(TOKENS)
        assert apply_lora(compiled, r=2) is compiled and len(lora_layers(compiled)) == 8
        torch.testing.assert_close(compiled(TOKENS), expected)
        perturb(model)
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
        merge_lora(compiled)
        assert not lora_layers(model)


def test_a_model_wrapped_for_distributed_training_is_refused(monkeypatch) -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="apply LoRA first, then wrap"):
        apply_lora(Wrapped(make_gpt()))
    assert len(lora_layers(Wrapped(apply_lora(make_gpt())))) == 8    # the right order


# ---------------------------------------------------------------------------------------------
# peft's files


def theirs_lm(model: GPT, tokenizer, folder: Path) -> transformers.GPT2LMHeadModel:
    save_pretrained(model, tokenizer, folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def theirs_classifier(model, tokenizer, folder: Path):
    save_classifier(model, tokenizer, folder)
    return transformers.GPT2ForSequenceClassification.from_pretrained(folder).eval()


TARGETS = [GPT_LINEAR_LAYERS, ("qkv",),
           ("output_projection", "blocks.1.feed_forward.up_projection")]


@pytest.mark.parametrize("targets", TARGETS, ids=len)
def test_our_adapter_opens_in_peft(tmp_path: Path, tokenizer, targets: tuple) -> None:
    model = make_gpt().eval()
    theirs = theirs_lm(model, tokenizer, tmp_path / "base")
    with torch.no_grad():
        base = model(TOKENS)
    move_adapter(apply_lora(model, r=3, alpha=5.0, target_modules=targets))
    save_adapter(model, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours = model(TOKENS)
        assert (ours - base).abs().max() > 0.1
        torch.testing.assert_close(wrapped(TOKENS).logits, ours, rtol=0, atol=1e-4)
        merged = wrapped.merge_and_unload()              # here the transposed weights matter
        torch.testing.assert_close(merged(TOKENS).logits, ours, rtol=0, atol=1e-4)
        torch.testing.assert_close(merge_lora(model)(TOKENS), ours, rtol=0, atol=1e-4)


def test_our_classifier_opens_in_peft_with_its_head(tmp_path: Path, tokenizer) -> None:
    model = make_classifier().eval()
    theirs = theirs_classifier(model, tokenizer, tmp_path / "base")
    move_adapter(apply_lora(model, r=2, dropout=0.1, modules_to_save=["head"]))
    save_adapter(model, tmp_path / "adapter", base="a-name")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert wrapped.peft_config["default"].task_type == "SEQ_CLS"
    with torch.no_grad():
        ours = model(TOKENS, torch.tensor([9, 9, 9]))
        torch.testing.assert_close(wrapped(TOKENS).logits, ours, rtol=0, atol=1e-4)
        again = load_adapter(make_classifier(), tmp_path / "adapter").eval()
        assert torch.equal(again(TOKENS, LENGTHS), model(TOKENS, LENGTHS))
    assert trains(again) == trains(model)
    assert lora_layers(again)["gpt.blocks.0.attention.qkv"].dropout.p == 0.1


@pytest.mark.parametrize("options", [
    {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": ["attn.c_proj", "c_fc"], "rank_pattern": {"h.0.mlp.c_fc": 5},
     "alpha_pattern": {"attn.c_proj": 32}},
], ids=["plain", "rslora", "patterns"])
def test_an_adapter_made_by_peft_opens_here(tmp_path: Path, tokenizer, options: dict) -> None:
    model = make_gpt().eval()
    theirs = theirs_lm(model, tokenizer, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, fan_in_fan_out=True, init_lora_weights=False,
                             task_type="CAUSAL_LM", **options)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(theirs, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    assert not any(m.training for m in model.modules())
    with torch.no_grad():
        expected = wrapped(TOKENS).logits
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(merge_lora(model)(TOKENS), expected, rtol=0, atol=1e-4)


def test_a_classifier_made_by_peft_opens_here(tmp_path: Path, tokenizer) -> None:
    model = make_classifier().eval()
    theirs = theirs_classifier(model, tokenizer, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True,
                             init_lora_weights=False, task_type="SEQ_CLS",
                             modules_to_save=["score", "ln_f"])
    wrapped = move_adapter(peft.get_peft_model(theirs, config).eval())
    wrapped.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    assert "gpt.final_norm.bias" in trains(model) and "head.weight" in trains(model)
    with torch.no_grad():
        ours = model(TOKENS, torch.tensor([9, 9, 9]))
        torch.testing.assert_close(ours, wrapped(TOKENS).logits, rtol=0, atol=1e-4)


def test_unequal_ranks_and_whole_matrices_survive_the_file(tmp_path: Path, tokenizer) -> None:
    """A transposed matrix that trained whole, and two layers of other rank and alpha."""
    def make() -> GPT:
        model = make_gpt().eval()
        freeze(model, ["blocks.1.feed_forward.up_projection", "final_norm"])
        for name, r, alpha in (("0.attention.qkv", 2, 4.0), ("1.attention.qkv", 3, 9.0)):
            layer = LoRALinear(model.get_submodule(f"blocks.{name}"), r, alpha)
            helpers.lora.replace_module(model, f"blocks.{name}", layer)
        return model

    model = make_gpt().eval()
    theirs = theirs_lm(model, tokenizer, tmp_path / "base")
    model = move_adapter(make())
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"transformer.h.1.attn.c_attn": 3}
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours = model(TOKENS)
        torch.testing.assert_close(wrapped(TOKENS).logits, ours, rtol=0, atol=1e-4)
        assert torch.equal(load_adapter(make_gpt(), tmp_path / "adapter").eval()(TOKENS), ours)


class Other(nn.Module):
    """A model that is no GPT, with linear layers of its own names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.up_proj = nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(self.q_proj(x).tanh())


def test_any_model_with_linear_layers(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    model = move_adapter(apply_lora(Other(), r=2, target_modules=["q_proj"],
                                    modules_to_save=["up_proj"]))
    save_adapter(model, tmp_path / "own")
    assert torch.equal(load_adapter(Other(), tmp_path / "own")(x), model(x))
    wrapped = peft.PeftModel.from_pretrained(Other(), tmp_path / "own")
    torch.testing.assert_close(wrapped(x), model(x))
    names = {"q_proj.weight": ("layers.q.weight", False), "up_proj.weight": ("up.weight", True),
             "up_proj.bias": ("up.bias", False)}
    save_adapter(model, tmp_path / "mapped", key_map=names)
    stored = load_file(tmp_path / "mapped" / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in stored.items()} == {
        "base_model.model.layers.q.lora_A.weight": (2, 6),
        "base_model.model.layers.q.lora_B.weight": (4, 2),
        "base_model.model.up.weight": (4, 3), "base_model.model.up.bias": (3,)}
    again = load_adapter(Other(), tmp_path / "mapped", key_map=names)
    assert torch.equal(again(x), model(x))


def damaged(folder: Path, what: str) -> Path:
    """An adapter of a two-layer classifier with one fault."""
    save_adapter(move_adapter(apply_lora(make_classifier(), r=2, modules_to_save=["head"])), folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    about, tensors = json.loads(config.read_text()), load_file(weights)
    prefix = "base_model.model.transformer.h.0.attn.c_attn"
    match what:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "not JSON":
            config.write_text("r = 2")
        case "a list":
            config.write_text("[1, 2]")
        case "another method":
            config.write_text(json.dumps(about | {"peft_type": "PREFIX_TUNING"}))
        case "DoRA":
            config.write_text(json.dumps(about | {"use_dora": True}))
        case "biases":
            config.write_text(json.dumps(about | {"bias": "lora_only"}))
        case "no B":
            del tensors[f"{prefix}.lora_B.weight"]
            save_file(tensors, weights)
        case "unequal ranks":
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(96, 3)
            save_file(tensors, weights)
        case "another width":
            tensors[f"{prefix}.lora_A.weight"] = torch.zeros(2, 33)
            save_file(tensors, weights)
        case "another head":
            tensors["base_model.model.score.weight"] = torch.zeros(3, 32)
            save_file(tensors, weights)
        case "an unknown layer":
            key = "base_model.model.transformer.h.7.attn.c_attn.lora_A.weight"
            tensors[key] = torch.zeros(2, 32)
            save_file(tensors, weights)
        case "an embedding":
            tensors["base_model.model.transformer.wte.lora_A.weight"] = torch.zeros(2, 32)
            save_file(tensors, weights)
        case "a tied layer":
            for x, shape in (("A", (2, 32)), ("B", (270, 2))):
                tensors[f"base_model.model.lm_head.lora_{x}.weight"] = torch.zeros(shape)
            save_file(tensors, weights)
        case "nothing":
            save_file({}, weights)
    return folder


@pytest.mark.parametrize(("what", "error", "message"), [
    ("no config", FileNotFoundError, "adapter_config.json is missing"),
    ("no weights", FileNotFoundError, "adapter_model.safetensors is missing"),
    ("truncated", ValueError, "not a whole safetensors file"),
    ("not JSON", ValueError, "not an adapter_config.json"),
    ("a list", ValueError, "not an adapter_config.json"),
    ("another method", ValueError, "'PREFIX_TUNING'; expected a LoRA adapter"),
    ("DoRA", ValueError, "use_dora = True"),
    ("biases", ValueError, "bias = 'lora_only'"),
    ("no B", ValueError, "has lora_A and lora_B of shapes"),
    ("unequal ranks", ValueError, "has lora_A and lora_B of shapes"),
    ("another width", ValueError, "32 to 96"),
    ("another head", ValueError, r"head.weight has the shape \(3, 32\), here \(2, 32\)"),
    ("an unknown layer", ValueError, "h.7.attn.c_attn.lora_A.weight has no place"),
    ("an embedding", ValueError, "wte.lora_A.weight has no place"),
    ("a tied layer", ValueError, "lm_head.lora_A.weight has no place"),
    ("nothing", ValueError, "it holds no LoRA layer"),
])
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, what: str, error: type,
                                                         message: str) -> None:
    model = make_classifier()
    before, about = weights_of(model), (trains(model), str(model))
    with pytest.raises(error, match=message):
        load_adapter(model, damaged(tmp_path, what))
    assert about == (trains(model), str(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_saving_needs_an_adapter_and_loading_a_model_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA layer to save"):
        save_adapter(make_gpt(), tmp_path)
    assert not list(tmp_path.iterdir())
    model = apply_lora(make_gpt())
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="LoRA layers already"):
        load_adapter(model, tmp_path)


# ---------------------------------------------------------------------------------------------
# Quantization

# Dettmers et al. 2023 (arXiv:2305.14314), appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]
CODEBOOKS = {"int8": uniform_codebook(8), "int4": uniform_codebook(4), "NF4": nf4_codebook()}


def test_the_values_of_nf4() -> None:
    torch.testing.assert_close(nf4_codebook(), torch.tensor(NF4), rtol=0, atol=1e-6)
    assert len(CODEBOOKS["int8"]) == 255 and len(CODEBOOKS["int4"]) == 15
    assert 0.0 in CODEBOOKS["int8"].tolist()


@given(st.sampled_from(sorted(CODEBOOKS)), st.integers(1, 5), st.sampled_from([1, 2, 8]),
       st.integers(0, 999), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_each_weight_goes_to_the_nearest_value(name: str, n_blocks: int, size: int, seed: int,
                                               factor: float) -> None:
    weight = factor * torch.randn(n_blocks, size, generator=torch.Generator().manual_seed(seed))
    codebook = CODEBOOKS[name]
    codes, scales = quantize(weight, codebook, size)
    assert codes.dtype == torch.uint8 and scales.shape == (n_blocks, 1)
    restored = dequantize(codes, scales, codebook, weight.shape)
    nearest = (weight[..., None] - scales[..., None] * codebook).abs().amin(dim=-1)
    torch.testing.assert_close((restored - weight).abs(), nearest, rtol=1e-4, atol=factor * 1e-6)
    again, _ = quantize(restored, codebook, size)
    assert torch.equal(again, codes)                                  # a fixed point


def test_a_block_of_zeros_stays_zero_and_a_remainder_is_refused() -> None:
    for codebook in CODEBOOKS.values():
        codes, scales = quantize(torch.zeros(2, 64), codebook)
        assert torch.equal(dequantize(codes, scales, codebook, (128,)), torch.zeros(128))
    with pytest.raises(ValueError, match="65 weights are not a multiple"):
        quantize(torch.zeros(65), nf4_codebook())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_quantized_layer(name: str) -> None:
    torch.manual_seed(0)
    base, codebook, x = nn.Linear(32, 6), CODEBOOKS[name], torch.randn(3, 32)
    layer = QuantizedLinear(base, codebook)
    weight = dequantize(*quantize(base.weight, codebook), codebook, base.weight.shape)
    assert torch.equal(layer.weight, weight) and not trains(layer)
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias)
    assert layer.n_bytes == (192 if name == "int8" else 96) + 4 * 3
    again = QuantizedLinear(nn.Linear(32, 6), codebook)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_gradients_pass_a_quantized_layer_which_keeps_no_weight() -> None:
    """The gradients of input and bias are those of a plain layer of the restored weight."""
    torch.manual_seed(0)
    layer, x = QuantizedLinear(nn.Linear(32, 6), nf4_codebook()), torch.randn(2, 3, 32)
    layer.bias.requires_grad_(True)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(found)
    assert not kept
    y.square().sum().backward()
    bias = layer.bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(wanted, layer.weight, bias).square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_layer_under_autocast(dtype: torch.dtype) -> None:
    layer, x = QuantizedLinear(nn.Linear(32, 6), nf4_codebook()), torch.randn(3, 32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, -1), atol=0.05, rtol=0.05)


def test_lora_on_quantized_weights(tmp_path: Path) -> None:
    model = quantize_linear_layers(make_classifier().eval(), nf4_codebook())
    expected = model(TOKENS, LENGTHS)
    assert len([m for m in model.modules() if isinstance(m, QuantizedLinear)]) == 8
    with pytest.raises(ValueError, match="quantized already"):
        quantize_linear_layers(model, nf4_codebook())
    apply_lora(model, r=2, modules_to_save=["head"])
    assert torch.equal(model(TOKENS, LENGTHS), expected)
    history = fit(model, [BATCH], TrainConfig(max_steps=20, lr=1e-2), loss_fn=classification_loss)
    assert history.last("train_loss") < history.records[0]["train_loss"] / 2
    expected = model.eval()(TOKENS, LENGTHS)
    save_adapter(model, tmp_path)
    again = quantize_linear_layers(make_classifier().eval(), nf4_codebook())
    assert torch.equal(load_adapter(again, tmp_path)(TOKENS, LENGTHS), expected)
    merge_lora(model)
    assert type(model.gpt.blocks[0].attention.qkv) is nn.Linear
    torch.testing.assert_close(model(TOKENS, LENGTHS), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Relatives

PROMPT = [5, 6, 7]


@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning])
def test_a_soft_prompt_starts_as_the_real_one(method: type) -> None:
    tokens = torch.cat([torch.tensor([PROMPT]).expand(3, -1), TOKENS], dim=1)
    with torch.no_grad():
        expected = make_classifier()(tokens, LENGTHS + 3)
        model = method(make_classifier(), PROMPT)
        torch.testing.assert_close(model(TOKENS, LENGTHS), expected)
        padded = nn.functional.pad(TOKENS, (0, 5), value=9)
        torch.testing.assert_close(model(padded, LENGTHS), expected, rtol=0, atol=1e-5)
    trained = 3 * 32 * (2 * 2 if method is PrefixTuning else 1) + 2 * 32
    assert count_parameters(model)[0] == trained


METHODS = {
    "prompt": lambda m: PromptTuning(m, PROMPT), "prefix": lambda m: PrefixTuning(m, PROMPT),
    "adapters": lambda m: apply_adapters(m, 4, modules_to_save=["head"]),
    "BitFit": lambda m: apply_bitfit(m, modules_to_save=["head"]),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_relative_trains_its_own_parameters_only(name: str) -> None:
    model = METHODS[name](make_classifier())
    before = weights_of(model)
    history = fit(model, [BATCH], TrainConfig(max_steps=40, lr=3e-2), loss_fn=classification_loss)
    assert history.last("train_loss") < history.records[0]["train_loss"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == trains(model)
    own = {"prompt": ["prompt"], "prefix": ["prefix"], "adapters": ["down", "up"],
           "BitFit": ["bias"]}[name]
    for parameter in changed - {"head.weight", "classifier.head.weight"}:
        assert any(part in parameter for part in own)


def test_adapters_start_as_the_identity_and_bitfit_counts_biases() -> None:
    model = make_classifier().eval()
    with torch.no_grad():
        expected = model(TOKENS, LENGTHS)
        assert torch.equal(apply_adapters(model, 4)(TOKENS, LENGTHS), expected)
    C, L, m = CONFIG.n_embd, CONFIG.n_layer, 4
    assert count_parameters(model)[0] == L * 2 * (2 * C * m + m + C)
    biases = L * (2 * C + 3 * C + C + 4 * C + C) + C                 # norms, linear layers; final
    assert count_parameters(apply_bitfit(make_classifier()))[0] == biases


# ---------------------------------------------------------------------------------------------
# Docstrings and the benchmark


@pytest.mark.parametrize("module", [helpers.lora, helpers.quantization, helpers.adapters],
                         ids=lambda module: module.__name__)
def test_examples_in_docstrings(module) -> None:
    names = {"torch": torch, "nn": nn, "GPT": GPT, "GPTConfig": GPTConfig,
             "count_parameters": count_parameters}
    found = doctest.testmod(module, extraglobs=names, verbose=False)
    assert found.attempted and not found.failed


@pytest.fixture
def benchmark(tmp_path: Path, tokenizer):
    """The script as a module, prepared for a tiny base model and twenty messages."""
    spec = importlib.util.spec_from_file_location("lora_benchmark",
                                                  ROOT / "tests" / "benchmarks" / "lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    save_pretrained(make_gpt(context_length=160), tokenizer, tmp_path)
    threads = torch.get_num_threads()
    module.prepare(argparse.Namespace(base=str(tmp_path), messages=None, quick=True, epochs=1,
                                      batch_size=4))
    yield module
    torch.set_num_threads(threads)


def test_the_benchmark_runs_each_method_once(benchmark) -> None:
    runs = [run for run in benchmark.learning_rate_runs() if run["seed"] == 0]
    assert len(runs) == 32
    rows = [benchmark.measure(run) for run in runs]
    assert all(set(row) == set(benchmark.COLUMNS) for row in rows)
    assert len({row["n_trained"] for row in rows}) == 8              # each method has its own
    rates = benchmark.best_rates(rows)
    for method, rate in rates.items():
        losses = {row["lr"]: row["val_loss"] for row in rows if row["method"] == method}
        assert method == "QLoRA" or losses[rate] == min(losses.values())
    later = list(benchmark.later_runs(rates, seeds=2))
    assert {run["experiment"] for run in later} == {"methods", "few_labels", "rank",
                                                     "rank_fixed_alpha", "targets"}
    assert benchmark.measure(next(run for run in later if run["method"] == "QLoRA"))["val_loss"] > 0
