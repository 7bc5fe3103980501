"""Attention equals a reference, is causal, and a cache changes nothing but the work."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.attention import (
    CausalSelfAttention,
    KVCache,
    causal_mask,
    naive_attention,
    prefer_naive_attention,
)

few = settings(deadline=None, max_examples=25)
SHAPES = [(8, 1), (8, 2), (12, 4), (6, 6)]                     # (n_embd, n_head)


def make(n_embd: int, n_head: int, dtype: torch.dtype = torch.float64, seed: int = 0,
         **options) -> CausalSelfAttention:
    """A layer in eval mode whose every parameter, biases too, is random."""
    torch.manual_seed(seed)
    layer = CausalSelfAttention(n_embd, n_head, **options).to(dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / n_embd**0.5)
    return layer


def make_x(B: int, T: int, C: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, C, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cache_for(layer: CausalSelfAttention, B: int, max_seq_len: int) -> KVCache:
    weight = layer.output_projection.weight
    head_size = weight.shape[1] // layer.n_head
    return KVCache(B, layer.n_head, max_seq_len, head_size, weight.dtype, weight.device)


@torch.no_grad()
def by_hand(layer: CausalSelfAttention, x: Tensor) -> Tensor:
    """The layer with loops over batch, heads and tokens, on slices, and no reshape at all."""
    B, T, C = x.shape
    nh = layer.n_head
    hs = C // nh
    weight, bias = layer.qkv.weight, layer.qkv.bias
    bias = torch.zeros(3 * C, dtype=x.dtype) if bias is None else bias
    rows = []
    for b in range(B):
        heads = []
        for h in range(nh):
            q, k, v = (x[b] @ weight[n * C + h * hs:n * C + (h + 1) * hs].T
                       + bias[n * C + h * hs:n * C + (h + 1) * hs] for n in range(3))
            context = []
            for t in range(T):
                exps = [math.exp(float(q[t] @ k[s]) / math.sqrt(hs)) for s in range(t + 1)]
                context.append(sum(e / sum(exps) * v[s] for s, e in enumerate(exps)))
            heads.append(torch.stack(context))                 # (T, hs)
        rows.append(torch.cat(heads, dim=-1))                  # (T, C)
    return torch.stack(rows) @ layer.output_projection.weight.T + layer.output_projection.bias


# ---------------------------------------------------------------------------------------------
# The same as others


@pytest.mark.parametrize(("n_embd", "n_head"), SHAPES)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_equals_loops(n_embd: int, n_head: int, qkv_bias: bool) -> None:
    layer, x = make(n_embd, n_head, qkv_bias=qkv_bias), make_x(2, 5, n_embd)
    torch.testing.assert_close(layer(x), by_hand(layer, x))


@pytest.mark.parametrize(("n_embd", "n_head"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_pytorch(n_embd: int, n_head: int, dtype: torch.dtype) -> None:
    layer, x = make(n_embd, n_head, dtype), make_x(3, 7, n_embd, dtype=dtype)
    theirs = nn.MultiheadAttention(n_embd, n_head, batch_first=True, dtype=dtype).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.qkv.weight)
        theirs.in_proj_bias.copy_(layer.qkv.bias)
        theirs.out_proj.load_state_dict(layer.output_projection.state_dict())
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
        expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
        torch.testing.assert_close(layer(x), expected)


def test_gradients_equal_those_of_pytorch() -> None:
    layer, x = make(8, 2), make_x(2, 5, 8)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data.copy_(layer.qkv.weight)
    theirs.in_proj_bias.data.copy_(layer.qkv.bias)
    theirs.out_proj.load_state_dict(layer.output_projection.state_dict())
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    goal = make_x(2, 5, 8, seed=2)
    (layer(x) * goal).sum().backward()
    (theirs(x, x, x, attn_mask=hidden)[0] * goal).sum().backward()
    torch.testing.assert_close(layer.qkv.weight.grad, theirs.in_proj_weight.grad)
    torch.testing.assert_close(layer.qkv.bias.grad, theirs.in_proj_bias.grad)
    torch.testing.assert_close(layer.output_projection.weight.grad, theirs.out_proj.weight.grad)


@pytest.mark.parametrize(("T", "dropout", "trains"), [(9, 0.0, True), (9, 0.1, False),
                                                      (1, 0.0, False), (513, 0.0, False)])
def test_bfloat16_training_on_the_cpu_uses_naive_attention(
    T: int, dropout: float, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(8, 2, torch.float32, dropout=dropout).train(), make_x(1, T, 8).float()
    calls = []
    monkeypatch.setattr("helpers.attention.naive_attention",
                        lambda q, k, v: calls.append(q.shape) or naive_attention(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        assert bool(calls) == trains
        layer(x, attn_mask=torch.ones(1, 1, T, T, dtype=torch.bool))
        with torch.no_grad():
            layer(x)
    layer(x)
    assert len(calls) == trains                                # not with a mask, nor without grad


@few
@given(B=st.integers(1, 2), T=st.integers(2, 9), shape=st.sampled_from(SHAPES))
def test_naive_attention_equals_the_fused_form_and_so_do_its_gradients(
    B: int, T: int, shape: tuple[int, int]
) -> None:
    nh, hs = shape[1], shape[0] // shape[1]
    forms = [naive_attention, lambda *qkv: nn.functional.scaled_dot_product_attention(
        *qkv, is_causal=True)]
    results = []
    for form in forms:
        qkv = [make_x(B * nh, T, hs, seed=n).view(B, nh, T, hs).requires_grad_() for n in range(3)]
        y = form(*qkv)
        (y * make_x(B * nh, T, hs, seed=4).view_as(y)).sum().backward()
        results.append([y, *(t.grad for t in qkv)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_training_in_bfloat16_stays_close_to_float32_and_causal() -> None:
    layer = make(64, 4, torch.float32).train()
    x = make_x(2, 16, 64, dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()
    exact = x.grad.clone()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y[:, :8].float().sum().backward()
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
    assert x.grad[:, 8:].count_nonzero() == 0                  # no gradient from before to later
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert nn.functional.cosine_similarity(x.grad.flatten(), exact.flatten(), dim=0) > 0.999


def test_when_naive_attention_is_preferred() -> None:
    q = torch.zeros(1, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    assert prefer_naive_attention(q)
    assert not prefer_naive_attention(q.detach()) and not prefer_naive_attention(q.float())


def test_a_single_token_is_its_value() -> None:
    layer, x = make(8, 2), make_x(2, 1, 8)
    value = layer.qkv(x)[..., 16:]
    torch.testing.assert_close(layer(x), layer.output_projection(value))


# ---------------------------------------------------------------------------------------------
# Properties


@few
@given(T=st.integers(2, 9), data=st.data(), shape=st.sampled_from(SHAPES))
def test_a_later_token_never_changes_an_earlier_output(
    T: int, data: st.DataObject, shape: tuple[int, int]
) -> None:
    at = data.draw(st.integers(1, T - 1))
    layer, x = make(*shape), make_x(2, T, shape[0])
    changed = x.clone()
    changed[:, at] += make_x(2, 1, shape[0], seed=3)[:, 0] * 10
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(after[:, :at], before[:, :at])
    for t in range(at, T):                                     # and every later one sees it
        assert not torch.allclose(after[:, t], before[:, t])


@few
@given(B=st.integers(1, 3), T=st.integers(1, 9), shape=st.sampled_from(SHAPES))
def test_the_attention_weights_of_a_row_sum_to_one(B: int, T: int, shape: tuple[int, int]) -> None:
    """Where every value is the same vector, each weighted sum of them is that vector."""
    layer, x = make(*shape), make_x(B, T, shape[0])
    C = shape[0]
    with torch.no_grad():
        layer.qkv.weight[2 * C:].zero_()                       # the values are the bias alone
        layer.output_projection.weight.copy_(torch.eye(C))
        layer.output_projection.bias.zero_()
        torch.testing.assert_close(layer(x), layer.qkv.bias[2 * C:].expand(B, T, C))


def test_the_scores_are_divided_by_the_root_of_the_head_size() -> None:
    layer = make(8, 2)                                         # hs = 4, so a score is halved
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.qkv.weight[:8, 0] = layer.qkv.weight[8:16, 0] = 1    # each score: 4 x_i x_j / 2
        layer.qkv.weight[16, 1] = 1
        layer.output_projection.weight.copy_(torch.eye(8))
        x = torch.zeros(1, 2, 8, dtype=torch.float64)
        x[0, 1, 0] = x[0, 1, 1] = 1
        weight = math.exp(2) / (math.exp(2) + 1)
        torch.testing.assert_close(layer(x)[0, 1, 0].item(), weight)


@few
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), B=st.integers(1, 3),
       spare=st.integers(0, 3), shape=st.sampled_from(SHAPES))
def test_a_cache_equals_no_cache_for_any_split(
    sizes: list[int], B: int, spare: int, shape: tuple[int, int]
) -> None:
    layer, x = make(*shape), make_x(B, sum(sizes), shape[0])
    kv_cache = cache_for(layer, B, sum(sizes) + spare)
    with torch.no_grad():
        pieces = [layer(piece, kv_cache) for piece in x.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x))
    assert kv_cache.seq_len == sum(sizes)


def left_padding_mask(pad: list[int], start: int, end: int) -> Tensor:
    """For the tokens from start to end: no later ones, no padding but oneself; (B, 1, T, S)."""
    mask = torch.zeros(len(pad), 1, end - start, end, dtype=torch.bool)
    for b, n in enumerate(pad):
        for t in range(start, end):
            mask[b, 0, t - start, n:t + 1] = True
            mask[b, 0, t - start, t] = True
    return mask


@few
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), more=st.integers(0, 3),
       data=st.data())
def test_padding_at_the_left_changes_nothing(
    lengths: list[int], more: int, data: st.DataObject
) -> None:
    """Each row equals its run alone, at once and through a cache in two pieces."""
    layer, T = make(8, 2), max(lengths) + more
    pad = [max(lengths) - n for n in lengths]
    first = data.draw(st.integers(1, T))
    x = make_x(len(pad), T, 8)
    kv_cache = cache_for(layer, len(pad), T)
    with torch.no_grad():
        at_once = layer(x, attn_mask=left_padding_mask(pad, 0, T))
        cuts = [(0, first), (first, T)] if first < T else [(0, T)]
        pieces = [layer(x[:, a:b], kv_cache, left_padding_mask(pad, a, b)) for a, b in cuts]
        assert not at_once.isnan().any()
        torch.testing.assert_close(torch.cat(pieces, dim=1), at_once)
        for b, n in enumerate(pad):
            torch.testing.assert_close(at_once[b, n:], layer(x[b:b + 1, n:])[0])


@few
@given(B=st.integers(1, 2), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
       data=st.data())
def test_an_attn_mask_is_combined_with_the_causal_one(
    B: int, sizes: list[int], data: st.DataObject
) -> None:
    """Whatever it allows, no later token is attended to; with and without a cache."""
    layer, T = make(8, 2), sum(sizes)
    x = make_x(B, T, 8)
    shape = data.draw(st.sampled_from([(B, 2, T, T), (B, 1, T, T), (1, 1, T, T), (T, T), (T,)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    attn_mask = torch.rand(shape, generator=generator) < 0.5
    full = attn_mask.expand(B, 2, T, T) & torch.ones(T, T, dtype=torch.bool).tril()
    for t in range(T):
        full[:, :, t, t] |= ~full[:, :, t].any(dim=-1)         # an empty row attends to itself
    C = 8
    q, k, v = (part.view(B, T, 2, 4).transpose(1, 2) for part in layer.qkv(x).split(C, dim=-1))
    scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~full, -math.inf)
    context = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, C)
    expected = layer.output_projection(context)
    torch.testing.assert_close(layer(x, attn_mask=attn_mask), expected)
    kv_cache, start, pieces = cache_for(layer, B, T), 0, []
    with torch.no_grad():
        for piece in x.split(sizes, dim=1):
            end = start + piece.shape[1]
            part = attn_mask.expand(B, 2, T, T)[:, :, start:end, :end]
            pieces.append(layer(piece, kv_cache, part))
            start = end
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)


def test_a_mask_that_allows_everything_changes_nothing() -> None:
    layer, x = make(8, 2), make_x(1, 4, 8)
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(layer(x, attn_mask=everything), layer(x))
    torch.testing.assert_close(layer(x, attn_mask=everything.tril()), layer(x))


@pytest.mark.parametrize("training", [False, True])
def test_a_fully_masked_row_gives_no_nan_forward_and_backward(training: bool) -> None:
    layer, x = make(8, 2, dropout=0.1).train(training), make_x(2, 5, 8).requires_grad_()
    real = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)   # an empty text too
    y = layer(x, attn_mask=real[:, None, None])                # (B, 1, 1, S)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    "attn_mask",
    [torch.ones(4, 4), torch.ones(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.float64),
     torch.ones(4, 5, dtype=torch.bool), torch.ones(1, 1, 3, 4, dtype=torch.bool)],
    ids=["float", "int", "additive", "too many keys", "too few queries"],
)
def test_a_mask_of_another_kind_is_refused(attn_mask: Tensor) -> None:
    layer, kv_cache = make(8, 2), KVCache(1, 2, 9, 4, torch.float64)
    with pytest.raises(ValueError, match=r"attn_mask must be bool and broadcastable.*T = 4.*S = 4"):
        layer(make_x(1, 4, 8), kv_cache, attn_mask)
    assert kv_cache.seq_len == 0                               # and the cache is as it was


@pytest.mark.parametrize(("T", "S"), [(1, 1), (4, 4), (1, 5), (3, 5)])
def test_the_causal_mask_ends_at_the_last_key(T: int, S: int) -> None:
    expected = torch.ones(S, S, dtype=torch.bool).tril()[S - T:]
    assert torch.equal(causal_mask(T, S), expected)
    assert torch.equal(causal_mask(T, S, expected[None]), expected[None])


# ---------------------------------------------------------------------------------------------
# The cache


def test_a_cache_returns_what_it_was_given() -> None:
    kv_cache = KVCache(2, 3, 5, 4)
    keys, values = torch.randn(2, 2, 3, 4, 4).unbind()
    for piece in range(4):
        now = slice(piece, piece + 1)
        held = kv_cache.update(keys[:, :, now], values[:, :, now])
        assert torch.equal(held[0], keys[:, :, :piece + 1])
        assert torch.equal(held[1], values[:, :, :piece + 1])
    assert kv_cache.seq_len == 4


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 2, 1, 4), "(3, 2, 1, 4)"), ((2, 3, 1, 4), "(2, 3, 1, 4)"), ((2, 2, 1, 8), "up to 5, 4)"),
     ((2, 2, 6, 4), "up to 5 tokens; 8")],
    ids=["another batch size", "other heads", "another head size", "too long"],
)
def test_a_cache_refuses_what_does_not_fit(shape: tuple[int, ...], words: str) -> None:
    kv_cache = KVCache(2, 2, 5, 4)
    kv_cache.update(torch.ones(2, 2, 2, 4), torch.ones(2, 2, 2, 4))
    before = kv_cache.keys.clone(), kv_cache.values.clone()
    with pytest.raises(ValueError) as error:
        kv_cache.update(torch.full(shape, 2.0), torch.full(shape, 2.0))
    assert words in str(error.value)
    assert kv_cache.seq_len == 2
    assert torch.equal(kv_cache.keys, before[0]) and torch.equal(kv_cache.values, before[1])


@pytest.mark.parametrize("which", ["keys", "values", "both"])
@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "cpu"),
                                               (torch.float32, "meta")])
def test_a_cache_refuses_another_dtype_or_device(dtype: torch.dtype, device: str,
                                                 which: str) -> None:
    kv_cache = KVCache(1, 2, 5, 4)
    right, wrong = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4, dtype=dtype, device=device)
    kv_cache.update(right, right)
    keys, values = right if which == "values" else wrong, right if which == "keys" else wrong
    with pytest.raises(ValueError) as error:
        kv_cache.update(keys, values)
    assert f"torch.float32 on cpu, but was given {dtype} on {device}" in str(error.value)
    assert kv_cache.seq_len == 1


@few
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), spare=st.integers(0, 40))
def test_a_cache_allocates_what_it_needs(sizes: list[int], spare: int) -> None:
    """Never more than twice what is held, nor than it may hold; and growing loses nothing."""
    total = sum(sizes)
    kv_cache = KVCache(1, 2, total + spare, 4)
    assert kv_cache.keys.numel() == 0
    keys, values = torch.randn(2, 1, 2, total, 4).unbind()
    for new_keys, new_values in zip(keys.split(sizes, dim=2), values.split(sizes, dim=2),
                                    strict=True):
        held = kv_cache.update(new_keys, new_values)
        capacity = kv_cache.keys.shape[2]
        assert kv_cache.seq_len <= capacity <= min(2 * kv_cache.seq_len, total + spare)
    assert torch.equal(held[0], keys) and torch.equal(held[1], values)


def test_a_cache_grows_rarely() -> None:
    kv_cache, buffers = KVCache(1, 1, 1000, 4), set()
    for _ in range(1000):
        kv_cache.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
        buffers.add(kv_cache.keys.shape[2])
    assert len(buffers) <= 11


def test_a_cache_filled_in_inference_mode_can_be_used_outside_of_it() -> None:
    layer, x = make(8, 2), make_x(1, 5, 8)
    kv_cache = cache_for(layer, 1, 5)
    with torch.inference_mode():
        first = layer(x[:, :3], kv_cache).clone()
    with torch.no_grad():
        rest = layer(x[:, 3:], kv_cache)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), layer(x))


def test_a_cache_refuses_keys_and_values_of_two_lengths() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 4\).*\(1, 2, 1, 4\)"):
        KVCache(1, 2, 5, 4).update(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 1, 4))


def test_a_layer_refuses_the_cache_of_another_batch_or_model() -> None:
    layer = make(8, 2)
    others = [(layer, 3), (make(8, 4), 2), (make(12, 2), 2)]
    for kv_cache in (cache_for(other, B, 9) for other, B in others):
        with pytest.raises(ValueError, match="made for"):
            layer(make_x(2, 1, 8), kv_cache)
        assert kv_cache.seq_len == 0


def test_a_cache_fills_to_its_last_position() -> None:
    layer, kv_cache = make(8, 2), KVCache(1, 2, 3, 4, torch.float64)
    with torch.no_grad():
        layer(make_x(1, 3, 8), kv_cache)
        with pytest.raises(ValueError, match="holds up to 3 tokens; 4"):
            layer(make_x(1, 1, 8), kv_cache)
    assert kv_cache.seq_len == 3


def test_a_cache_works_under_autocast() -> None:
    layer, x = make(8, 2, torch.float32), make_x(2, 5, 8, dtype=torch.float32)
    kv_cache = cache_for(layer, 2, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pieces = [layer(piece, kv_cache) for piece in x.split([2, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1).float(), layer(x), rtol=0.1, atol=0.1)


# ---------------------------------------------------------------------------------------------
# The module


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_state_dict_holds_what_is_learned_and_no_mask(qkv_bias: bool) -> None:
    layer = make(8, 2, qkv_bias=qkv_bias)
    names = {"qkv.weight", "output_projection.weight", "output_projection.bias"}
    names |= {"qkv.bias"} if qkv_bias else set()
    layer(make_x(1, 5, 8), KVCache(1, 2, 5, 4, torch.float64))
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} == names
    assert list(layer.buffers()) == []


def test_dropout_in_train_mode_only() -> None:
    layer, plain = make(8, 2, dropout=0.5), make(8, 2)
    x = make_x(2, 6, 8)
    torch.testing.assert_close(layer(x), plain(x))             # eval: as if there were none
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    assert (layer(x) == 0).any()                               # of the output
    layer.eval()
    torch.testing.assert_close(layer(x), plain(x))


def test_dropout_acts_on_the_attention_weights_too() -> None:
    layer, x = make(8, 2, dropout=0.5).train(), make_x(2, 6, 8)
    layer.residual_dropout.eval()                              # leaves that of the weights
    assert not torch.allclose(layer(x), layer(x))
    layer.train()
    layer.dropout = 0.0                                        # leaves that of the output
    kept = layer(x)
    torch.testing.assert_close(kept[kept != 0], 2 * layer.eval()(x)[kept != 0])


@pytest.mark.parametrize(("n_embd", "n_head"), [(8, 3), (0, 1), (8, 0), (-8, 2), (2, 4)])
def test_n_embd_must_be_a_multiple_of_n_head(n_embd: int, n_head: int) -> None:
    with pytest.raises(ValueError, match=f"n_embd {n_embd} and n_head {n_head}"):
        CausalSelfAttention(n_embd, n_head)


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_dropout_is_a_probability(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout"):
        CausalSelfAttention(8, 2, dropout)


def test_the_examples_in_the_docstrings() -> None:
    assert CausalSelfAttention(n_embd=8, n_head=2)(torch.zeros(1, 5, 8)).shape == (1, 5, 8)
    kv_cache = KVCache(1, 2, 8, 4)
    keys, _ = kv_cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    assert (kv_cache.seq_len, keys.shape) == (3, torch.Size([1, 2, 3, 4]))
