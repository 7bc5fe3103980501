"""Chapter 8: the model equals transformers' Llama, and everything made for GPT works on it.

Every tensor is perturbed before a comparison: fresh norms are one, so a swap of two would pass.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig as TheirConfig
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers import llama
from helpers.attention import CausalSelfAttention, KVCache
from helpers.classification import (
    GPTForSequenceClassification,
    classification_loss,
    collate_messages,
)
from helpers.data import TokenDataset, make_dataloader
from helpers.generation import generate, generate_stream
from helpers.gpt import GPT, GPTConfig
from helpers.inference import optimize_for_inference
from helpers.instruction import InstructionDataset, collate, generate_responses, masked_lm_loss
from helpers.llama import (
    LLAMA_LINEAR_LAYERS,
    GroupedQueryAttention,
    Llama,
    LlamaConfig,
    RMSNorm,
    RopeScaling,
    SwiGLU,
    apply_rope,
    apply_rope_interleaved,
    interleaved_to_half_split,
    repeat_kv,
    rope_frequencies,
    rope_tables,
    sliding_window_mask,
)
from helpers.lora import apply_lora, count_parameters, lora_layers, merge_lora
from helpers.optim import Muon
from helpers.quantization import nf4_codebook, quantize_linear_layers
from helpers.sampling import make_sampler
from helpers.tokenizer import eos_token_id, load_tokenizer
from helpers.training import TrainConfig, evaluate_loss, fit

CONFIG = LlamaConfig(vocab_size=50, context_length=16, n_embd=32, n_head=4, n_layer=2, n_kv_head=2,
                     intermediate_size=48)
LONG = replace(CONFIG, context_length=64)
SCALING = RopeScaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=24)
CONFIGS = {
    "grouped queries": LONG,
    "multi-query": replace(LONG, n_kv_head=1),
    "multi-head": replace(LONG, n_kv_head=4),
    "untied": replace(LONG, tie_word_embeddings=False),
    "wide heads": replace(LONG, head_size=14),
    "another base and epsilon": replace(LONG, rope_base=500_000.0, norm_eps=1e-3),
    "llama3 scaling": replace(LONG, rope_scaling=SCALING, rope_base=300.0),
    "linear scaling": replace(LONG, rope_scaling=RopeScaling(4.0, kind="linear")),
}
QUICK = settings(deadline=None, max_examples=20)


def perturb(model: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Move every parameter away from its start, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def their_settings(config: LlamaConfig) -> dict:
    """A configuration in the words of transformers."""
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if scaling := config.rope_scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor,
                     "high_freq_factor": scaling.high_freq_factor,
                     "original_max_position_embeddings": scaling.original_context_length}
    return {"vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
            "hidden_size": config.n_embd, "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head, "num_hidden_layers": config.n_layer,
            "intermediate_size": config.intermediate_size, "head_dim": config.head_size,
            "rms_norm_eps": config.norm_eps, "rope_parameters": rope, "bos_token_id": None,
            "tie_word_embeddings": config.tie_word_embeddings, "eos_token_id": None,
            "pad_token_id": None}


def our_names(theirs: PreTrainedModel, kind: str = "weight") -> dict[str, Tensor]:
    """The weights of a reference, or their gradients, under our names."""
    parts = {"model.": "", "layers.": "blocks.", "embed_tokens": "token_embedding",
             "self_attn.": "attention.", "mlp.": "feed_forward.", "o_proj": "output_projection",
             "_proj.": "_projection.", "input_layernorm": "norm_1",
             "post_attention_layernorm": "norm_2"}
    found = {}
    for name, p in theirs.named_parameters():
        for old, new in parts.items():
            name = name.replace(old, new)
        found[name.removeprefix("norm.") if name != "norm.weight" else "final_norm.weight"] = (
            p.grad if kind == "grad" else p.detach())
    return found


def pair(config: LlamaConfig, make: type = LlamaForCausalLM, settings: type = TheirConfig,
         **more: object) -> tuple[Llama, PreTrainedModel]:
    """Our model and one of transformers, with the same perturbed weights."""
    torch.manual_seed(0)
    theirs = perturb(make(settings(**their_settings(config), **more))).eval()
    ours = Llama(config).eval()
    missing, unexpected = ours.load_state_dict(our_names(theirs), strict=False)
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else []) and not unexpected
    return ours, theirs


def ids(config: LlamaConfig, B: int = 3, T: int = 48, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (B, T), generator=generator)


def rope_of(T: int, hs: int) -> tuple[Tensor, Tensor]:
    return rope_tables(torch.arange(T), rope_frequencies(hs))


# ---------------------------------------------------------------------------------------------
# Equal to transformers


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(config: LlamaConfig) -> None:
    ours, theirs = pair(config)
    tokens = ids(config)
    logits, reference = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)
    for output in (logits, reference):
        F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = our_names(theirs, "grad")
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_sliding_window_is_that_of_mistral(window: int) -> None:
    config = replace(LONG, sliding_window=window)
    ours, theirs = pair(config, MistralForCausalLM, MistralConfig, sliding_window=window,
                        attn_implementation="eager")
    tokens = ids(config)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_qk_norm_is_that_of_qwen3() -> None:
    config = replace(LONG, qk_norm=True)
    ours, theirs = pair(config, Qwen3ForCausalLM, Qwen3Config)
    tokens = ids(config)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert ours.blocks[0].attention.q_norm.weight.shape == (config.head_size,)


@pytest.mark.parametrize("mistake", ["norms", "gate and up", "keys and values", "layout", "base"])
def test_a_swap_would_be_seen(mistake: str, monkeypatch) -> None:
    ours, theirs = pair(LONG)
    block, tokens = ours.blocks[1], ids(LONG)
    if mistake == "norms":
        block.norm_1, block.norm_2 = block.norm_2, block.norm_1
    elif mistake == "gate and up":
        ff = block.feed_forward
        ff.gate_projection, ff.up_projection = ff.up_projection, ff.gate_projection
    elif mistake == "keys and values":
        a = block.attention
        a.k_projection, a.v_projection = a.v_projection, a.k_projection
    elif mistake == "layout":
        monkeypatch.setattr(llama, "apply_rope", apply_rope_interleaved)
    else:
        ours.config = replace(LONG, rope_base=20_000.0)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_is_pytorchs_and_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = perturb(RMSNorm(16, 1e-3)).to(dtype), nn.RMSNorm(16, 1e-3).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = (torch.randn(2, 5, 16) * 7).to(dtype)
    formula = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    formula = (formula * ours.weight.double()).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), formula)


@given(st.floats(1e-2, 1e3), st.integers(0, 99))
@QUICK
def test_rms_norm_ignores_the_scale_of_its_input(factor: float, seed: int) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm = RMSNorm(8, eps=1e-12).double()
    torch.testing.assert_close(norm(factor * x), norm(x))


def test_swiglu_is_the_formula_and_has_as_many_parameters_as_gpts() -> None:
    torch.manual_seed(0)
    ff, x = SwiGLU(12, 32), torch.randn(2, 3, 12)
    a, b = x @ ff.gate_projection.weight.T, x @ ff.up_projection.weight.T
    torch.testing.assert_close(ff(x), (a / (1 + (-a).exp()) * b) @ ff.down_projection.weight.T)
    assert sum(p.numel() for p in ff.parameters()) == 2 * 12 * 4 * 12      # 8/3 C is exact here


@given(st.integers(1, 8).map(lambda i: 2 * i), st.integers(0, 2000), st.integers(0, 2000),
       st.integers(0, 5000), st.integers(0, 99), st.booleans())
@QUICK
def test_scores_depend_on_the_distance_only(hs: int, i: int, j: int, shift: int, seed: int,
                                            interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, hs, generator=generator, dtype=torch.float64)
    rotate = apply_rope_interleaved if interleaved else apply_rope
    inv_freq = rope_frequencies(hs).double()

    def score(i: int, j: int) -> Tensor:
        tables = [[t(torch.tensor([n], dtype=torch.float64)[:, None] * inv_freq)
                   for t in (torch.cos, torch.sin)] for n in (i, j)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift))
    if i != j:                                          # and it does depend on the distance
        assert not torch.allclose(score(i, j), score(i, i), rtol=0, atol=1e-12)


@given(st.integers(1, 8).map(lambda i: 2 * i), st.integers(0, 99))
@QUICK
def test_a_rotation_keeps_lengths_and_position_0_changes_nothing(hs: int, seed: int) -> None:
    x = torch.randn(2, 3, 7, hs, generator=torch.Generator().manual_seed(seed))
    rotated = apply_rope(x, *rope_of(7, hs))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize(("nh", "hs"), [(1, 2), (3, 4), (4, 10)])
def test_the_two_layouts_give_the_same_scores_after_reordering(nh: int, hs: int) -> None:
    torch.manual_seed(0)
    x, W_q, W_k = torch.randn(2, 9, 6), torch.randn(nh * hs, 6), torch.randn(nh * hs, 6)
    heads = lambda y: y.view(2, 9, nh, hs).transpose(1, 2)                     # noqa: E731
    rope = rope_of(9, hs)
    q, k = (apply_rope_interleaved(heads(x @ W.T), *rope) for W in (W_q, W_k))
    moved = [interleaved_to_half_split(W, nh) for W in (W_q, W_k)]
    q_half, k_half = (apply_rope(heads(x @ W.T), *rope) for W in moved)
    torch.testing.assert_close(q_half @ k_half.mT, q @ k.mT)
    mixed = apply_rope(heads(x @ W_q.T), *rope) @ apply_rope(heads(x @ W_k.T), *rope).mT
    if hs > 2:                                       # with one pair the layouts are the same
        assert (mixed - q @ k.mT).abs().max() > 0.1


@pytest.mark.parametrize("config", [CONFIGS["llama3 scaling"], CONFIGS["linear scaling"], replace(
    LONG, rope_base=500_000.0, head_size=64, rope_scaling=RopeScaling(32.0))],
    ids=["llama3", "linear", "Llama 3.2 1B"])
def test_frequencies_are_those_of_transformers(config: LlamaConfig) -> None:
    theirs = TheirConfig(**their_settings(config))
    expected, _ = ROPE_INIT_FUNCTIONS[config.rope_scaling.kind](theirs, torch.device("cpu"))
    found = rope_frequencies(config.head_size, config.rope_base, config.rope_scaling)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    plain = rope_frequencies(config.head_size, config.rope_base)
    assert found.dtype == torch.float32 and (found <= plain).all() and not found.equal(plain)


def test_rotary_tables_stay_in_float32_whatever_the_model_is() -> None:
    """In bfloat16 position 1001 would be 1000, and so would its neighbours."""
    positions, x = torch.tensor([1000, 1001]), torch.ones(1, 1, 2, 8)
    exact = apply_rope(x, *rope_tables(positions, rope_frequencies(8)))
    half = apply_rope(x.bfloat16(), *rope_tables(positions, rope_frequencies(8)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=1e-2, rtol=1e-2)
    model = perturb(Llama(replace(CONFIG, context_length=2048))).eval()
    tokens = ids(CONFIG, 1, 1500)
    with torch.no_grad():
        full, lower = model(tokens), copy.deepcopy(model).bfloat16()(tokens).float()
    assert (full - lower).square().mean() < 1e-3 * full.square().mean()
    assert list(model.buffers()) == []                       # nothing that .bfloat16() could round


def test_repeat_kv_is_repeat_interleave() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(repeat_kv(x, 4), x.repeat_interleave(4, dim=1))


def test_with_as_many_key_heads_and_no_rotation_it_is_chapter_3s_attention() -> None:
    torch.manual_seed(0)
    ours = GroupedQueryAttention(replace(CONFIG, n_kv_head=4))
    theirs = CausalSelfAttention(32, 4, qkv_bias=False)
    weights = [ours.q_projection.weight, ours.k_projection.weight, ours.v_projection.weight]
    theirs.load_state_dict({"qkv.weight": torch.cat(weights),
                            "output_projection.weight": ours.output_projection.weight,
                            "output_projection.bias": torch.zeros(32)})
    x, still = torch.randn(2, 7, 32), rope_tables(torch.zeros(7), rope_frequencies(8))
    torch.testing.assert_close(ours(x, still), theirs(x))


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_grouped_queries_are_attention_with_repeated_heads(n_kv_head: int) -> None:
    torch.manual_seed(0)
    layer = GroupedQueryAttention(replace(CONFIG, n_kv_head=n_kv_head))
    x, rope = torch.randn(2, 7, 32), rope_of(7, 8)
    heads = lambda y, n: y.view(2, 7, n, 8).transpose(1, 2)                    # noqa: E731
    q = apply_rope(heads(layer.q_projection(x), 4), *rope)
    k = apply_rope(heads(layer.k_projection(x), n_kv_head), *rope)
    v = heads(layer.v_projection(x), n_kv_head)
    k, v = (t.repeat_interleave(4 // n_kv_head, dim=1) for t in (k, v))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 32)
    torch.testing.assert_close(layer(x, rope), layer.output_projection(y))


def test_naive_attention_in_bfloat16_training_is_the_fused_form(monkeypatch) -> None:
    torch.manual_seed(0)
    layer, rope = GroupedQueryAttention(CONFIG).bfloat16(), rope_of(7, 8)
    x = torch.randn(2, 7, 32).bfloat16()
    naive = layer(x, rope)
    monkeypatch.setattr(llama, "prefer_naive_attention", lambda q: False)
    torch.testing.assert_close(naive, layer(x, rope), atol=2e-2, rtol=2e-2)


def test_the_window_mask() -> None:
    for T, S, window in ((1, 1, 1), (4, 4, 2), (3, 8, 5), (1, 9, 4)):
        mask = sliding_window_mask(T, S, window)
        expected = [[j > S - T + i - window for j in range(S)] for i in range(T)]
        assert mask.tolist() == expected


# ---------------------------------------------------------------------------------------------
# The configuration


def test_the_config_fills_in_what_is_not_given() -> None:
    config = LlamaConfig(vocab_size=9, context_length=4, n_embd=100, n_head=5, n_layer=1)
    assert (config.n_kv_head, config.head_size, config.intermediate_size) == (5, 20, 288)
    assert replace(config, eos_token_id=[1, 2]).eos_token_id == (1, 2)
    hash(config)


@pytest.mark.parametrize(("changes", "message"), [
    ({"n_kv_head": 3}, "n_head .4. must be a multiple of n_kv_head .3."),
    ({"n_kv_head": 0}, "n_kv_head must be a whole number"),
    ({"n_layer": 1.5}, "n_layer must be a whole number"),
    ({"head_size": 7}, "head_size must be even"),
    ({"head_size": None, "n_embd": 30}, "n_embd .30. must be a multiple of n_head"),
    ({"dropout": 1.0}, "dropout must be in"),
    ({"eos_token_id": (1, 50)}, "eos_token_id must be an id of the vocabulary of 50, not 50"),
    ({"bos_token_id": -1}, "bos_token_id must be an id"),
    ({"sliding_window": 0}, "sliding_window must be"),
    ({"rope_base": 0.0}, "rope_base must be"),
])
def test_a_wrong_config_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("wrong", [
    {"kind": "yarn"}, {"factor": 0.5}, {"low_freq_factor": 4.0}, {"original_context_length": 0}])
def test_a_wrong_scaling_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RopeScaling(**{"factor": 2.0} | wrong)


# ---------------------------------------------------------------------------------------------
# The model, by itself


def test_weights_are_tied_and_counted_once() -> None:
    tied, untied = Llama(CONFIG), Llama(replace(CONFIG, tie_word_embeddings=False))
    assert tied.lm_head.weight is tied.token_embedding.weight
    assert untied.n_params - tied.n_params == 50 * 32
    C, hidden = 32, 48
    block = C * C * 2 + C * 16 * 2 + 3 * C * hidden + 2 * C
    assert tied.n_params == 50 * C + 2 * block + C
    assert set(tied.state_dict()) == {n for n, _ in tied.named_parameters(remove_duplicate=False)}


def test_it_starts_as_gpt_does() -> None:
    torch.manual_seed(0)
    model = Llama(replace(CONFIG, n_embd=256, intermediate_size=512, head_size=64, n_layer=8))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scaled = "output_projection" in name or "down_projection" in name
            torch.testing.assert_close(p.std().item(), 0.02 / (4 if scaled else 1), rtol=0.1,
                                       atol=0)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_the_cache_holds_the_key_value_heads_only(n_kv_head: int) -> None:
    config = replace(CONFIG, n_kv_head=n_kv_head)
    model = Llama(config).eval()
    kv_cache = model.make_kv_cache(3)
    with torch.no_grad():
        model(ids(config, 3, 8), kv_cache)
    n_bytes = sum(c.keys.nbytes + c.values.nbytes for c in kv_cache)
    assert n_bytes == 2 * config.n_layer * 3 * n_kv_head * 8 * config.head_size * 4


CACHED = {"plain": CONFIG, "qk norm": replace(CONFIG, qk_norm=True),
          "window": replace(CONFIG, sliding_window=5),
          "scaled": replace(CONFIG, rope_scaling=RopeScaling(2.0, original_context_length=8))}


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
def test_logits_with_a_cache_are_those_without(config: LlamaConfig) -> None:
    model = perturb(Llama(config)).double().eval()
    tokens = ids(config, 2, 16)
    with torch.no_grad():
        at_once = model(tokens)
        for sizes in ([1] * 16, [7, 1, 3, 5], [16]):
            kv_cache = model.make_kv_cache(2)
            pieces = [model(piece, kv_cache) for piece in tokens.split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), at_once)


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
def test_a_padded_row_has_the_logits_that_it_has_alone(config: LlamaConfig) -> None:
    model = perturb(Llama(config)).double().eval()
    tokens, n_pad = ids(config, 3, 12), torch.tensor([0, 4, 11])
    kv_cache = model.make_kv_cache(3)
    with torch.no_grad():
        together = model(tokens, n_pad=n_pad)
        cached = [model(piece, kv_cache, n_pad) for piece in tokens.split([9, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(cached, dim=1), together)
        for row, logits, n in zip(tokens, together, n_pad.tolist(), strict=True):
            torch.testing.assert_close(logits[n:], model(row[None, n:])[0])


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
def test_generation_with_cache_is_generation_without(config: LlamaConfig) -> None:
    """For prompts of unequal length, and past the context length."""
    model = perturb(Llama(config), std=0.3).double()
    prompts = [[1, 2, 3], [4], list(range(5, 17))]
    cached = generate(model, prompts, 24)
    assert cached == generate(model, prompts, 24, use_cache=False)
    assert cached == [generate(model, p, 24) for p in prompts]
    assert len(set(cached[0][3:])) > 3                                   # not one token repeated


def test_a_token_sees_nothing_later_and_with_a_window_nothing_far() -> None:
    for window in (None, 3):
        model = perturb(Llama(replace(CONFIG, n_layer=1, sliding_window=window))).eval()
        embedded = []
        model.dropout.register_forward_hook(
            lambda _, __, x, keep=embedded: keep.append(x.requires_grad_()) or x)
        logits = model(ids(CONFIG, 1, 10))
        gradient = torch.autograd.grad(logits[0, 6].sum(), embedded[-1])[0][0]
        touched = (gradient.abs().sum(-1) > 0).tolist()
        assert touched == [(window is None or i > 3) and i <= 6 for i in range(10)]


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model, tokens = perturb(Llama(replace(CONFIG, dropout=0.3))), ids(CONFIG, 2, 8)
    assert not torch.allclose(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(("tokens", "error", "message"), [
    (torch.tensor([[50]]), ValueError, "outside the vocabulary"),
    (torch.zeros(1, 17, dtype=torch.long), ValueError, "context_length of 16"),
    (torch.zeros(3, dtype=torch.long), ValueError, "shape"),
    (torch.zeros(1, 3), TypeError, "int64"),
])
def test_wrong_input_is_refused(tokens: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Llama(CONFIG)(tokens)


# ---------------------------------------------------------------------------------------------
# What was made for GPT


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture
def model(tokenizer) -> Llama:
    torch.manual_seed(0)
    end = eos_token_id(tokenizer)
    return Llama(LlamaConfig(vocab_size=tokenizer.n_vocab, context_length=128, n_embd=32, n_head=4,
                             n_layer=2, n_kv_head=2, bos_token_id=end, eos_token_id=end))


def small_loader():
    tokens = [int(i) for i in torch.arange(400) * 7 % 50]
    return make_dataloader(TokenDataset(tokens, 16), batch_size=8, seed=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fit_trains_it(precision: str) -> None:
    torch.manual_seed(0)
    model, loader = Llama(CONFIG), small_loader()
    before = evaluate_loss(model, loader)
    fit(model, loader, TrainConfig(max_steps=60, lr=1e-2, precision=precision))
    assert before > 3.5 and evaluate_loss(model, loader) < 0.5


def test_muon_finds_its_matrices() -> None:
    groups = Muon(Llama(CONFIG)).param_groups
    sizes = [len(group["params"]) for group in groups]
    assert sum(sizes) == len(list(Llama(CONFIG).parameters()))
    assert any(len(group["params"]) == 2 * 7 for group in groups)          # seven a block


def test_samplers_and_streams() -> None:
    model = perturb(Llama(CONFIG))
    sample = make_sampler(temperature=0.9, top_k=10, top_p=0.9, seed=3)
    rows = list(generate_stream(model, [[1, 2], [3]], 20, sample))
    assert len(rows) == 20 and all(0 <= i < 50 for row in rows for i in row)
    end = generate(model, [1, 2], 5)[4]
    assert generate(model, [1, 2], 9, eos_token_id=(end, 49))[-1] in (end, 49)


def test_lora_starts_at_nothing_and_merges() -> None:
    torch.manual_seed(0)
    model, loader = perturb(Llama(CONFIG)), small_loader()
    tokens = ids(CONFIG, 2, 16)
    before = model.eval()(tokens)
    apply_lora(model, r=2, target_modules=LLAMA_LINEAR_LAYERS)
    assert len(lora_layers(model)) == 7 * CONFIG.n_layer
    assert torch.equal(model(tokens), before)
    trained, total = count_parameters(model)
    assert 0 < trained < total / 2
    fit(model, loader, TrainConfig(max_steps=5, lr=1e-2))
    after = model.eval()(tokens)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(merge_lora(model)(tokens), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_chapter_6_classifies_with_it(tied: bool) -> None:
    torch.manual_seed(0)
    model = perturb(Llama(replace(CONFIG, tie_word_embeddings=tied)))
    classifier = GPTForSequenceClassification(model, trainable="all")
    rows = [(torch.randint(25 * label, 25 * label + 25, (3 + i % 9,)), label)
            for i, label in enumerate([0, 1] * 16)]
    batch = collate_messages(rows, pad_token_id=0)
    fit(classifier, [batch], TrainConfig(max_steps=30, lr=1e-2), loss_fn=classification_loss)
    classifier.eval()
    with torch.no_grad():
        logits = classifier(*batch[:2])
        assert (logits.argmax(-1) == batch[2]).float().mean() > 0.9
        alone = classifier(rows[0][0][None], torch.tensor([3]))
    torch.testing.assert_close(logits[:1], alone, atol=1e-5, rtol=1e-5)


def test_chapter_7_tunes_it_to_answer(model: Llama, tokenizer) -> None:
    examples = [{"instruction": "Say yes.", "input": "", "output": "Yes."},
                {"instruction": "Name a colour.", "input": "", "output": "Blue is a colour."}]
    batch = collate(list(InstructionDataset(examples, tokenizer, 128)))
    fit(model, [batch], TrainConfig(max_steps=60, lr=1e-2), loss_fn=masked_lm_loss)
    responses, ended = generate_responses(model, tokenizer, examples, 20, return_ended=True)
    assert responses == ["Yes.", "Blue is a colour."] and all(ended)


def test_quantized_and_prepared_for_inference() -> None:
    model = perturb(Llama(replace(CONFIG, n_embd=64, intermediate_size=128, head_size=16)))
    prompt = [1, 2, 3]
    expected, tokens = generate(model, prompt, 10), ids(CONFIG, 2, 16)
    assert generate(optimize_for_inference(copy.deepcopy(model)), prompt, 10) == expected
    with torch.no_grad():
        exact = model.eval()(tokens)
        rough = quantize_linear_layers(model, nf4_codebook(), target_modules=LLAMA_LINEAR_LAYERS)(
            tokens)
    assert 0 < (rough - exact).square().mean() < 0.1 * exact.square().mean()


def test_the_interface_is_that_of_gpt() -> None:
    """Every public name of a GPT is one of a Llama, and the cache is of the same class."""
    gpt = GPT(GPTConfig(vocab_size=50, context_length=16, n_embd=32, n_head=4, n_layer=2))
    ours = Llama(CONFIG)
    public = {name for name in vars(GPT) if not name.startswith("_")}
    assert public <= set(dir(ours))
    modules = {name for name, _ in gpt.named_children()} - {"position_embedding"}
    assert modules == {name for name, _ in ours.named_children()}
    assert all(isinstance(c, KVCache) for c in ours.make_kv_cache(1))
