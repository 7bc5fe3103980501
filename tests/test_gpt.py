"""Chapter 4: the model equals GPT-2, generates alike with and without a cache, and says no clearly.

The reference is `transformers`. Every tensor is perturbed before a comparison: fresh biases are
zero and fresh norms one, so a swap of two would pass unseen.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.attention import KVCache
from helpers.generation import generate, generate_stream, greedy, left_pad, next_token_logits
from helpers.gpt import (
    GELU,
    GPT,
    GPT2_CONFIGS,
    FeedForward,
    GPTConfig,
    LayerNorm,
    TransformerBlock,
    check_context_length,
    flops_per_token,
    init_weights,
    position_ids_and_mask,
    validate_token_ids,
)
from helpers.pretrained import hf_key_map

CONFIG = GPTConfig(vocab_size=50, context_length=16, n_embd=32, n_head=4, n_layer=2)
SMALL = GPTConfig(vocab_size=13, context_length=13, n_embd=8, n_head=2, n_layer=2)
QUICK = settings(deadline=None, max_examples=15)


def perturb(model: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Move every parameter away from its start, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def reference(config: GPTConfig) -> GPT2LMHeadModel:
    """A GPT-2 of transformers with random weights, in eval mode."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.n_embd,
        n_head=config.n_head, n_layer=config.n_layer, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=config.tie_word_embeddings))
    return perturb(theirs).eval()


def named(theirs: GPT2LMHeadModel, kind: str = "weight") -> dict[str, Tensor]:
    """The weights of a reference, or their gradients, under our names and in our shapes."""
    config = GPTConfig(
        theirs.config.vocab_size, theirs.config.n_positions, theirs.config.n_embd,
        theirs.config.n_head, theirs.config.n_layer,
        tie_word_embeddings=theirs.config.tie_word_embeddings)
    parameters, found = dict(theirs.named_parameters()), {}
    for ours, (name, transposed) in hf_key_map(config).items():
        tensor = parameters[name if name.startswith("lm_head") else f"transformer.{name}"]
        tensor = tensor.grad if kind == "gradient" else tensor.detach()
        found[ours] = tensor.T if transposed else tensor
    return found


def carry_over(theirs: GPT2LMHeadModel, config: GPTConfig) -> GPT:
    """Our model with the weights of the reference."""
    model, weights = GPT(config).to(theirs.dtype), named(theirs)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            assert p.shape == weights[name].shape, name
            p.copy_(weights[name])
    return model.eval()


def lively(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    """A model in float64 whose text is varied; with a fresh one, mistakes give the same token."""
    torch.manual_seed(seed)
    model = GPT(config).double().eval()
    for name, p in model.named_parameters():
        mean = float(p.dim() == 1 and name.endswith("weight"))          # of a norm
        nn.init.normal_(p, mean=mean, std=0.4 if p.dim() == 2 else 0.05)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return lively()


def random_tokens(config: GPTConfig, *shape: int) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


# Equal to the reference


def narrow(name: str) -> GPTConfig:
    """A size of GPT-2 with its layers and heads, 4 numbers each instead of 64."""
    size = GPT2_CONFIGS[name]
    return replace(size, vocab_size=97, context_length=24, n_embd=4 * size.n_head, dropout=0.0,
                   bos_token_id=None, eos_token_id=None)


HEAD_64 = GPTConfig(vocab_size=97, context_length=24, n_embd=192, n_head=3, n_layer=3)
SHAPES = [*map(narrow, GPT2_CONFIGS), HEAD_64, replace(HEAD_64, tie_word_embeddings=False)]


@pytest.mark.parametrize("config", SHAPES, ids=[*GPT2_CONFIGS, "head-64", "untied"])
def test_logits_and_gradients_equal_transformers(config: GPTConfig) -> None:
    theirs = reference(config)
    ours = carry_over(theirs, config)
    tokens = random_tokens(config, 2, config.context_length)
    with torch.no_grad():
        logits, expected = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.3                              # the comparison is of something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    ours, theirs = ours.double(), theirs.double()            # gradients of 48 layers, exactly
    for net in (ours, theirs):
        out = net(tokens)
        out = out if isinstance(out, Tensor) else out.logits
        F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = named(theirs, "gradient")
    for name, p in ours.named_parameters():
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert (p.grad - expected[name]).abs().max() < 1e-8 * scale + 1e-12, name


def test_any_swapped_pair_would_be_seen() -> None:
    """All pairs of tensors of one shape: exchanged, the logits differ clearly."""
    theirs = reference(SMALL)
    weights = named(theirs)
    model = carry_over(theirs, SMALL)
    parameters = dict(model.named_parameters())
    tokens = random_tokens(SMALL, 3, 13)
    with torch.no_grad():
        expected = theirs(tokens).logits
        pairs = [(a, b) for a, b in itertools.combinations(parameters, 2)
                 if parameters[a].shape == parameters[b].shape]
        assert ("token_embedding.weight", "position_embedding.weight") in pairs
        assert len(pairs) > 90
        for a, b in pairs:
            parameters[a].copy_(weights[b])
            parameters[b].copy_(weights[a])
            assert (model(tokens) - expected).abs().max() > 1e-3, (a, b)
            parameters[a].copy_(weights[a])
            parameters[b].copy_(weights[b])
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)


def test_queries_and_values_swapped_would_be_seen() -> None:
    theirs = reference(SMALL)
    model = carry_over(theirs, SMALL)
    tokens = random_tokens(SMALL, 3, 13)
    with torch.no_grad():
        expected = theirs(tokens).logits
        for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
            wrong = copy.deepcopy(model)
            weight = wrong.blocks[1].attention.qkv.weight
            weight.copy_(torch.cat([weight.chunk(3)[i] for i in order]))
            assert (wrong(tokens) - expected).abs().max() > 1e-3, order


@pytest.mark.parametrize("config", SHAPES, ids=[*GPT2_CONFIGS, "head-64", "untied"])
def test_the_other_gelu_would_be_seen(config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = reference(config)
    model, tokens = carry_over(theirs, config), random_tokens(config, 2, config.context_length)
    monkeypatch.setattr(GELU, "forward", lambda self, x: F.gelu(x))
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() > 1e-4


@pytest.mark.parametrize("eos_token_id", [None, 5])
def test_greedy_generation_equals_transformers(eos_token_id: int | None) -> None:
    config = replace(SMALL, vocab_size=40, context_length=32, n_embd=32)
    theirs = perturb(reference(config).double(), std=0.3, seed=1)
    model = carry_over(theirs, config)
    assert model.lm_head.weight.dtype == torch.float64
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9]]
    expected = []
    for prompt in prompts:
        out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=26,
                              eos_token_id=eos_token_id, pad_token_id=0,
                              attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
        expected.append(out[0].tolist())
    assert [generate(model, p, 26, eos_token_id=eos_token_id) for p in prompts] == expected
    assert generate(model, prompts, 26, eos_token_id=eos_token_id) == expected
    assert len({i for row in expected for i in row}) > 8     # and it is no stammer


# Sizes


@pytest.mark.parametrize(("name", "count"), [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200)])
def test_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        assert GPT(GPT2_CONFIGS[name]).n_params == count


def test_parameter_count_untied_and_without_bias() -> None:
    config = replace(GPT2_CONFIGS["gpt2"], tie_word_embeddings=False, qkv_bias=False)
    with torch.device("meta"):
        assert GPT(config).n_params == 163_009_536
        assert GPT(replace(config, qkv_bias=True)).n_params == 124_439_808 + 50257 * 768


@pytest.mark.parametrize("config", [CONFIG, SMALL, *GPT2_CONFIGS.values()])
def test_flops_are_what_pytorch_counts(config: GPTConfig) -> None:
    """Up to the masked half of attention, which PyTorch counts and Kaplan et al. do not."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        GPT(config)(torch.empty(1, config.context_length, dtype=torch.long))
    masked_half = 2 * config.n_layer * config.context_length**2 * config.n_embd
    found = flops_per_token(config)
    assert type(found) is int
    assert counter.get_total_flops() - masked_half == found * config.context_length
    blocks = 12 * config.n_layer * config.n_embd**2          # Kaplan et al.: 2N + 2 n_layer T C
    kaplan = 2 * blocks + 2 * config.n_layer * config.context_length * config.n_embd
    assert found == kaplan + 2 * config.vocab_size * config.n_embd


# Parts


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_layer_norm_equals_pytorch(shape: tuple[int, ...]) -> None:
    ours, theirs = LayerNorm(8, eps=0.1), nn.LayerNorm(8, eps=0.1)
    perturb(ours, 0.5)
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1
    torch.testing.assert_close(ours(x), theirs(x))
    variance = x.var(-1, unbiased=False, keepdim=True)
    by_hand = (x - x.mean(-1, keepdim=True)) / (variance + 0.1).sqrt()
    torch.testing.assert_close(ours(x), by_hand * ours.weight + ours.bias)


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    by_hand = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(GELU()(x), by_hand)
    assert (GELU()(x) - F.gelu(x)).abs().max() > 1e-4


def test_feed_forward_treats_each_token_alone() -> None:
    ff, x = FeedForward(8), torch.randn(2, 5, 8)
    order = torch.randperm(5)
    torch.testing.assert_close(ff(x)[:, order], ff(x[:, order]))
    assert ff.up_projection.weight.shape == (32, 8) and ff.down_projection.weight.shape == (8, 32)
    assert FeedForward(8, dropout=0.5).train()(x).ne(ff(x)).any()


def test_block_adds_twice_and_norms_before() -> None:
    block, x = TransformerBlock(CONFIG), torch.randn(2, 5, 32)
    perturb(block, 0.3)
    y = x + block.attention(block.norm_1(x))
    torch.testing.assert_close(block(x), y + block.feed_forward(block.norm_2(y)))
    with torch.no_grad():                                    # parts that give 0 leave x
        for layer in (block.attention.output_projection, block.feed_forward.down_projection):
            layer.weight.zero_()
            layer.bias.zero_()
    assert torch.equal(block(x), x)


def test_norm_eps_reaches_every_norm() -> None:
    model = GPT(replace(CONFIG, norm_eps=0.25))
    norms = [m for m in model.modules() if isinstance(m, LayerNorm)]
    assert len(norms) == 2 * CONFIG.n_layer + 1 and all(m.eps == 0.25 for m in norms)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_start_as_gpt2s(tied: bool) -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=500, context_length=64, n_embd=128, n_head=4, n_layer=8,
                       tie_word_embeddings=tied)
    for name, p in GPT(config).named_parameters():
        if p.dim() == 1:
            is_one = "norm" in name and name.endswith("weight")
            assert torch.equal(p, torch.full_like(p, float(is_one))), name
        else:
            residual = name.endswith(("output_projection.weight", "down_projection.weight"))
            std = 0.02 / 4 if residual else 0.02             # the root of 2 x 8 is 4
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < std / 20, name


def test_init_weights_leaves_norms_alone() -> None:
    norm = LayerNorm(4)
    nn.init.constant_(norm.weight, 3.0)
    init_weights(norm)
    assert norm.weight.tolist() == [3.0] * 4


def test_tied_is_one_tensor_through_training_copying_and_moving() -> None:
    model = GPT(CONFIG)
    assert model.lm_head.weight is model.token_embedding.weight
    again = copy.deepcopy(model).double()
    assert again.lm_head.weight is again.token_embedding.weight
    again.load_state_dict(perturb(GPT(CONFIG)).state_dict())
    again(torch.tensor([[1, 2]])).sum().backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    assert torch.equal(again.lm_head.weight, again.token_embedding.weight)
    untied = GPT(replace(CONFIG, tie_word_embeddings=False))
    assert untied.n_params - model.n_params == 50 * 32
    assert untied.lm_head.weight.data_ptr() != untied.token_embedding.weight.data_ptr()


def test_state_dict_holds_parameters_only() -> None:
    model = GPT(replace(CONFIG, tie_word_embeddings=False))
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_qkv_bias_and_dropout_reach_attention() -> None:
    model = GPT(replace(CONFIG, qkv_bias=False, dropout=0.25))
    assert all(block.attention.qkv.bias is None for block in model.blocks)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.25] * (1 + 2 * CONFIG.n_layer)
    assert all(block.attention.dropout == 0.25 for block in model.blocks)


# Properties of the model


@QUICK
@given(seed=st.integers(0, 1000), length=st.integers(2, 16), data=st.data())
def test_no_token_sees_what_comes_after_it(model: GPT, seed: int, length: int,
                                           data: st.DataObject) -> None:
    t = data.draw(st.integers(0, length - 1))
    tokens = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(seed))
    changed = tokens.clone()
    changed[:, t:] = (changed[:, t:] + 1 + seed % 49) % 50
    with torch.no_grad():
        moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
        shorter = model(tokens[:, :t + 1])
        torch.testing.assert_close(shorter, model(tokens)[:, :t + 1])
    assert (moved[:t] < 1e-10).all() and moved[t] > 1e-6


def test_eval_is_deterministic_and_train_is_not() -> None:
    model = GPT(replace(CONFIG, dropout=0.3))
    tokens = random_tokens(CONFIG, 2, 8)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))


def test_hidden_states_are_what_lm_head_reads(model: GPT) -> None:
    tokens = random_tokens(CONFIG, 2, 8)
    with torch.no_grad():
        hidden = model.hidden_states(tokens)
        assert hidden.shape == (2, 8, 32)
        torch.testing.assert_close(hidden @ model.lm_head.weight.T, model(tokens))


def test_int32_ids_and_batch_rows_are_independent(model: GPT) -> None:
    tokens = random_tokens(CONFIG, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens.int()), model(tokens))
        torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]))


@QUICK
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_cache_filled_in_pieces_gives_the_same_logits(model: GPT, pieces: list[int]) -> None:
    tokens = random_tokens(CONFIG, 2, sum(pieces))
    kv_cache = model.make_kv_cache(2)
    with torch.no_grad():
        parts = [model(part, kv_cache) for part in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))
    assert all(c.seq_len == sum(pieces) for c in kv_cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_changes_nothing(model: GPT, use_cache: bool) -> None:
    alone = torch.tensor([[7, 8, 9]])
    padded = torch.tensor([[3, 1, 7, 8, 9], [1, 2, 3, 4, 5]])
    with torch.no_grad():
        kv_cache = model.make_kv_cache(2) if use_cache else None
        together = model(padded, kv_cache, n_pad=torch.tensor([2, 0]))
        torch.testing.assert_close(together[:1, 2:], model(alone))
        torch.testing.assert_close(together[1:], model(padded[1:]))
        assert together.isfinite().all()
        unaware = model(padded)
    assert (unaware[0, 2:] - together[0, 2:]).abs().max() > 0.1


# Generation

prompt_lists = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=16), min_size=1,
                        max_size=4)


def plainly(model: GPT, prompt: list[int], n: int, eos_token_id: int | None = None) -> list[int]:
    """The definition: feed all that fits, take the largest logit of the last position."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            window = torch.tensor([ids[-model.config.context_length:]])
            ids.append(int(model(window)[0, -1].argmax()))
            if ids[-1] == eos_token_id:
                break
    return ids


@QUICK
@given(prompts=prompt_lists, n=st.integers(0, 24), ends=st.booleans(), seed=st.integers(0, 3))
def test_cached_equals_uncached_equals_each_row_alone(prompts: list[list[int]], n: int, ends: bool,
                                                      seed: int) -> None:
    model = lively(seed=seed)
    expected = [plainly(model, p, n) for p in prompts]
    eos_token_id = None
    if ends and n:
        eos_token_id = random.Random(n).choice([i for row, p in zip(expected, prompts, strict=True)
                                          for i in row[len(p):]])
        expected = [plainly(model, p, n, eos_token_id) for p in prompts]
    for use_cache in (True, False):
        got = generate(model, prompts, n, eos_token_id=eos_token_id, use_cache=use_cache)
        assert got == expected
    assert [generate(model, p, n, eos_token_id=eos_token_id) for p in prompts] == expected


def test_the_comparison_is_of_varied_text(model: GPT) -> None:
    rows = generate(model, [[1], [2, 3], [4, 5, 6]], 40)
    assert all(len(set(row)) > 5 for row in rows)


def test_ending_keeps_the_end_and_the_others_go_on(model: GPT) -> None:
    free = generate(model, [[1, 2, 3], [4]], 30)
    end = free[0][5]
    steps: list[list[int | None]] = []
    rows = generate(model, [[1, 2, 3], [4]], 30, eos_token_id=end, on_token=steps.append)
    assert rows[0] == free[0][:free[0].index(end, 3) + 1] and rows[0].count(end) >= 1
    for i, (row, n) in enumerate(zip(rows, (3, 1), strict=True)):
        said = [step[i] for step in steps]
        assert [token for token in said if token is not None] == row[n:]
        first_none = said.index(None) if None in said else len(said)
        assert all(token is None for token in said[first_none:])
    assert len(steps) == max(len(rows[0]) - 3, len(rows[1]) - 1)


def test_an_end_token_in_the_prompt_ends_nothing(model: GPT) -> None:
    for end in range(50):
        prompt = [end, 2, end]
        assert generate(model, prompt, 3, eos_token_id=end) == plainly(model, prompt, 3, end)
        assert len(generate(model, prompt, 3, eos_token_id=end)) > 3


def test_stream_is_what_generate_collects(model: GPT) -> None:
    prompts = [[1, 2, 3], [4]]
    steps = list(generate_stream(model, prompts, 20))
    rows = generate(model, prompts, 20)
    assert [list(row) for row in zip(*steps, strict=True)] == [rows[0][3:], rows[1][1:]]
    assert all(type(i) is int for row in rows for i in row)


def test_sample_gets_the_logits_of_the_last_position(model: GPT) -> None:
    seen = []

    def second(logits: Tensor) -> Tensor:
        seen.append(logits.shape)
        return logits.topk(2, dim=-1).indices[:, 1]

    first = generate(model, [[1, 2], [3]], 1, second)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2]]))[0, -1].topk(2).indices[1]
    assert first[0][-1] == int(expected) and seen == [(2, 50)]


@pytest.mark.parametrize("tokens", [
    [1, 2, 3], (1, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.int32),
    [torch.tensor(1), torch.tensor(2), torch.tensor(3)], range(1, 4)],
    ids=["list", "tuple", "tensor", "int32", "tensors", "range"])
def test_one_prompt_in_any_form(model: GPT, tokens: object) -> None:
    result = generate(model, tokens, 5)
    assert result == plainly(model, [1, 2, 3], 5)
    assert all(type(i) is int for i in result)


@pytest.mark.parametrize("tokens", [
    [[1, 2, 3], [4, 5, 6]], ((1, 2, 3), (4, 5, 6)), torch.tensor([[1, 2, 3], [4, 5, 6]]),
    [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])], [torch.tensor([1, 2, 3]), [4, 5, 6]]],
    ids=["lists", "tuples", "tensor", "tensors", "mixed"])
def test_several_prompts_in_any_form(model: GPT, tokens: object) -> None:
    result = generate(model, tokens, 5)
    assert result == [plainly(model, [1, 2, 3], 5), plainly(model, [4, 5, 6], 5)]
    assert all(type(i) is int for row in result for i in row)


def test_the_prompt_is_not_changed_and_zero_tokens_give_it_back(model: GPT) -> None:
    prompt, prompts = [1, 2, 3], [[1, 2], [3]]
    assert generate(model, prompt, 0) == prompt and generate(model, prompts, 0) == prompts
    generate(model, prompt, 3)
    generate(model, prompts, 3)
    assert prompt == [1, 2, 3] and prompts == [[1, 2], [3]]


def test_the_cache_computes_one_token_a_step(model: GPT) -> None:
    for use_cache, expected in ((True, [3, *[1] * 13, *[16] * 4]),
                                (False, [*range(3, 17), *[16] * 4])):
        fed: list[int] = []
        hook = model.blocks[0].register_forward_pre_hook(
            lambda _, args, fed=fed: fed.append(args[0].shape[1]))
        generate(model, [1, 2, 3], 18, use_cache=use_cache)
        hook.remove()
        assert fed == expected


def test_next_token_logits_equal_the_model(model: GPT) -> None:
    tokens = random_tokens(CONFIG, 2, 20)
    with torch.no_grad():
        torch.testing.assert_close(next_token_logits(model, tokens[:, :9], None, None),
                                   model(tokens[:, :9])[:, -1])
        torch.testing.assert_close(next_token_logits(model, tokens, None, None),
                                   model(tokens[:, 4:])[:, -1])


# The mode


@pytest.mark.parametrize("training", [True, False])
def test_generate_uses_eval_and_restores_the_mode(training: bool) -> None:
    config = replace(CONFIG, dropout=0.5)
    model = lively(config)
    expected = generate(model, [1, 2, 3], 20)
    model.train(training)
    assert generate(model, [1, 2, 3], 20) == expected
    assert all(m.training == training for m in model.modules())

    def broken(logits: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [1, 2, 3], 5, broken)
    assert model.training == training
    with pytest.raises(ValueError, match="outside the vocabulary"):
        generate(model, [50], 5)
    assert model.training == training


def test_a_stream_that_is_left_early_restores_the_mode() -> None:
    model = lively().train()
    for _ in generate_stream(model, [[1]], 10):
        assert not model.training
        break
    assert model.training
    steps = generate_stream(model, [[1]], 10)             # never started: nothing has happened
    assert model.training
    next(steps)
    steps.close()
    assert model.training


def test_a_stream_stays_in_eval_whatever_happens_between_its_steps() -> None:
    model = lively(replace(CONFIG, dropout=0.5))
    expected = generate(model, [1, 2, 3], 10)[3:]
    said = []
    for (token,) in generate_stream(model, [[1, 2, 3]], 10):
        said.append(token)
        model.train()
    assert said == expected


def test_generation_makes_no_gradients_and_draws_nothing() -> None:
    model = GPT(replace(CONFIG, dropout=0.5))
    state = torch.get_rng_state()
    generate(model, [1, 2, 3], 5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(model(torch.tensor([[1, 2]]))[0], torch.tensor([2, 3])).backward()


# What is refused


@pytest.mark.parametrize(("wrong", "says"), [
    ({"n_embd": 10}, r"n_embd \(10\) must be a multiple of n_head \(4\)"),
    ({"n_layer": 0}, "n_layer must be .* not 0"), ({"vocab_size": -1}, "vocab_size"),
    ({"n_head": 0}, "n_head"), ({"context_length": 0}, "context_length"),
    ({"n_embd": 32.0}, "n_embd must be a whole number"), ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"), ({"eos_token_id": 50}, "eos_token_id 50 is outside"),
    ({"bos_token_id": -1}, "bos_token_id -1 is outside"),
    ({"eos_token_id": [1, 2]}, r"eos_token_id must be one id, a whole number, not \[1, 2\]")])
def test_a_wrong_config_is_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize(("tokens", "error", "says"), [
    (torch.tensor([[1, 50]]), ValueError, "Token id 50 is outside the vocabulary: .* 0 to 49"),
    (torch.tensor([[-3, 1]]), ValueError, "Token id -3 is outside"),
    (torch.tensor([[0.5]]), TypeError, "torch.float32"),
    (torch.tensor([[True]]), TypeError, "torch.bool"),
    (torch.tensor([1, 2]), ValueError, r"shape \(B, T\).*\(2,\)"),
    (torch.zeros(1, 0, dtype=torch.long), ValueError, r"\(1, 0\)"),
    (torch.zeros(0, 3, dtype=torch.long), ValueError, r"\(0, 3\)"),
    ([[1, 2]], TypeError, "must be a tensor .* not a list"),
    (torch.zeros(1, 17, dtype=torch.long), ValueError, "17 tokens .* context_length of 16")])
def test_forward_refuses(tokens: object, error: type[Exception], says: str) -> None:
    model = GPT(CONFIG)
    for call in (model, model.hidden_states):
        with pytest.raises(error, match=says):
            call(tokens)
    if "context" not in says:
        with pytest.raises(error, match=says):
            validate_token_ids(tokens, 50)


@pytest.mark.parametrize(("tokens", "error", "says"), [
    ([], ValueError, r"1 to 16 tokens .*\[0\]"), ([[1], []], ValueError, r"\[1, 0\]"),
    (torch.zeros(0, dtype=torch.long), ValueError, "1 to 16"),
    (torch.zeros(2, 0, dtype=torch.long), ValueError, r"\[0, 0\]"),
    ([1] * 17, ValueError, r"1 to 16 tokens \(the context_length\), got \[17\]"),
    ([[1], [2] * 20], ValueError, r"got \[1, 20\]"),
    ([1, 50], ValueError, "Token id 50 is outside"), ([[1], [-1]], ValueError, "Token id -1"),
    ([1.5], TypeError, "torch.float32"), (torch.tensor([[1.0]]), TypeError, "torch.float32"),
    ([True], TypeError, "torch.bool"), ("hello", TypeError, "list of token ids"),
    ([[1], "a"], TypeError, r"list of token ids, not \['a'\]"), ([[[1]]], ValueError, "shape"),
    ([2**70], TypeError, "list of token ids")])
def test_generate_refuses_a_prompt(tokens: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        generate(GPT(CONFIG), tokens, 3)


@pytest.mark.parametrize("call", [generate, lambda m, t, n: generate_stream(m, [t], n)])
def test_negative_counts_are_refused_at_the_call(call) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must not be negative, got -1"):
        call(GPT(CONFIG), [1], -1)


def test_stream_refuses_at_the_call_not_at_the_first_step() -> None:
    with pytest.raises(ValueError, match="Token id 50"):
        generate_stream(GPT(CONFIG), [[50]], 3)
    with pytest.raises(ValueError, match="1 to 16"):
        generate_stream(GPT(CONFIG), [], 3)


def fresh_cache(config: GPTConfig, batch_size: int) -> list[KVCache]:
    return GPT(config).make_kv_cache(batch_size)


@pytest.mark.parametrize(("changes", "batch_size", "says"), [
    ({}, 1, r"made for .*= \(1, 4"), ({}, 3, r"made for .*= \(3, 4"),
    ({"n_head": 2}, 2, "made for"), ({"n_embd": 64}, 2, "made for"),
    ({"n_layer": 1}, 2, "model of 1 layers; this one has 2"),
    ({"n_layer": 3}, 2, "model of 3 layers; this one has 2"),
    ({"context_length": 4}, 2, "holds up to 4")])
def test_a_foreign_cache_is_refused(changes: dict[str, int], batch_size: int, says: str) -> None:
    kv_cache = fresh_cache(replace(CONFIG, **changes), batch_size)
    with pytest.raises(ValueError, match=says):
        GPT(CONFIG)(random_tokens(CONFIG, 2, 5), kv_cache)
    assert all(c.seq_len == 0 for c in kv_cache)                 # and nothing is half done


def test_a_full_cache_is_refused(model: GPT) -> None:
    kv_cache = model.make_kv_cache(1)
    with torch.no_grad():
        model(random_tokens(CONFIG, 1, 16), kv_cache)
        with pytest.raises(ValueError, match="17 tokens .* context_length of 16"):
            model(torch.tensor([[1]]), kv_cache)


def test_left_pad() -> None:
    tokens, n_pad = left_pad([[1, 2, 3], [4]], CONFIG)
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4]] and n_pad.tolist() == [0, 2]
    tokens, n_pad = left_pad([[1, 2], [3, 4]], CONFIG)
    assert tokens.tolist() == [[1, 2], [3, 4]] and n_pad is None


def test_position_ids_and_mask() -> None:
    positions, mask = position_ids_and_mask(3, 6, None)
    assert positions.tolist() == [3, 4, 5] and mask is None
    positions, mask = position_ids_and_mask(2, 4, torch.tensor([0, 3]))    # the second: padding
    assert positions.tolist() == [[2, 3], [0, 0]] and mask.shape == (2, 1, 1, 4)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]


def test_check_context_length() -> None:
    kv_cache = GPT(CONFIG).make_kv_cache(1)
    assert check_context_length(CONFIG, 16, None) == check_context_length(CONFIG, 16, kv_cache) == 0
    kv_cache[0].seq_len = 10
    assert check_context_length(CONFIG, 6, kv_cache) == 10
    with pytest.raises(ValueError, match="17 tokens"):
        check_context_length(CONFIG, 7, kv_cache)


def test_greedy() -> None:
    assert greedy(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])).tolist() == [1, 0]


@pytest.fixture(autouse=True)
def _no_stray_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
