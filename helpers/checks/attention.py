"""Checks of the exercises of chapter 3, attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.checks._core import CheckFailed, call, close, done, draw, expect, expect_tensor, is_started


def check_causal_mask(my_mask: Callable[[int], Tensor]) -> None:
    """Exercise 3.1: `my_mask(T)` is a bool tensor (T, T), True on and below the diagonal."""
    name = "my_mask"
    if not is_started(my_mask, name):
        return
    for T in (4, 1, 7):
        mask = expect_tensor(call(my_mask, T), f"{name}({T})", (T, T))
        expect(mask.dtype == torch.bool,
                f"{name}: expected dtype torch.bool, got {mask.dtype}. A mask of numbers would be "
                "added to the scores, not used to choose among them: end with .bool().")
        right = torch.ones(T, T, dtype=torch.bool).tril()
        if torch.equal(mask, right):
            continue
        expect(not torch.equal(mask, ~right),
                f"{name}: True and False are swapped. Here True means: may be looked at.")
        expect(not torch.equal(mask, right.T),
                f"{name}: this is the upper triangle, so each token looks at the future. "
                "Rows look, columns are looked at.")
        expect(bool(mask.diagonal().all()),
                f"{name}: off by one. A token may look at itself, so the diagonal is True; "
                "otherwise the first row has nothing to look at.")
        future = mask & ~right
        expect(not future.any(),
                f"{name}: row {future.nonzero()[:1, 0].tolist()} looks at the future; is the "
                "triangle off by one?")
        raise CheckFailed(f"{name}: part of the past is hidden. Every earlier token may be "
                          "looked at, however far away.")
    done(name)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dim: int = -1,
               offset: int | None = 0) -> Tensor:
    """Attention by hand, with the usual mistakes as options."""
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) * (hs**-0.5 if scale is None else scale)
    if offset is not None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(offset)
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=dim) @ v


def check_attention(my_attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.2: `my_attention(q, k, v)` is causal attention, (B, nh, T, hs)."""
    name = "my_attention"
    if not is_started(my_attention, name):
        return
    B, nh, T, hs = 2, 3, 5, 4
    q, k, v = 3 * draw(0, B, nh, T, hs), draw(1, B, nh, T, hs), draw(2, B, nh, T, hs)
    mixed = expect_tensor(call(my_attention, q, k, v), name, (B, nh, T, hs), q.dtype)
    expect(not mixed.isnan().any(),
            f"{name}: there are nan. Mask the scores with float('-inf') before softmax, and let "
            "each token look at itself: a row without anything to look at divides by zero.")
    sums = call(my_attention, q, k, torch.ones_like(v))       # rows of shares sum to one
    if not close(sums, torch.ones_like(v)):
        expect(not close(mixed, _attention(q, k, v, dim=-2)),
                f"{name}: softmax over the wrong dimension. The shares of each row sum to one, so "
                "softmax goes over the keys, dim=-1.")
        raise CheckFailed(f"{name}: the shares of a row do not sum to one. Softmax goes over the "
                          "keys, dim=-1, after the mask; what is set to zero after softmax has "
                          "to be shared out again.")
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, -1] += 1
    changed_v[:, :, -1] += 1
    later = call(my_attention, q, changed_k, changed_v)
    expect(close(later[:, :, :-1], mixed[:, :, :-1]),
            f"{name}: a change of the last token changes earlier outputs, so it is not causal. Is "
            "the mask there, is it off by one, and is it applied to the scores before softmax?")
    if not close(mixed, _attention(q, k, v)):
        expect(not close(mixed, _attention(q, k, v, scale=1.0)),
                f"{name}: the scaling is missing. Divide the scores by the square root of hs.")
        expect(not close(mixed, _attention(q, k, v, scale=1 / hs)),
                f"{name}: divided by hs in place of its square root.")
        for size, what in ((nh * hs, "C"), (T, "T"), (nh, "nh")):
            expect(not close(mixed, _attention(q, k, v, scale=size**-0.5)),
                    f"{name}: the scores are divided by the root of {what}; it should be that of "
                    "the head size hs, the last dimension of q.")
        expect(not close(mixed, _attention(k, q, v)), f"{name}: queries and keys are swapped.")
        raise CheckFailed(f"{name}: the shape is right and it is causal, but the numbers differ. "
                          "Expected: softmax(q @ k.transpose(-2, -1) / hs**0.5, masked) @ v.")
    done(name)


def check_split_heads(my_split: Callable[[Tensor, int], Tensor]) -> None:
    """Exercise 3.3: `my_split(x, n_head)` deals (B, T, C) out to the heads, (B, nh, T, hs)."""
    name = "my_split"
    if not is_started(my_split, name):
        return
    B, T, nh, hs = 2, 3, 4, 5
    x = torch.arange(B * T * nh * hs, dtype=torch.float32).view(B, T, nh * hs)
    heads = expect_tensor(call(my_split, x, nh), name, (B, nh, T, hs), x.dtype)
    expect(not torch.equal(heads, x.reshape(B, nh, T, hs)),
            f"{name}: a view straight to (B, nh, T, hs) reads the numbers in the wrong order, and "
            "a head gets parts of other tokens. First (B, T, nh, hs), then swap T and nh.")
    for h in range(nh):
        expect(torch.equal(heads[:, h], x[:, :, h * hs:(h + 1) * hs]),
                f"{name}: head {h} should get the numbers {h * hs} to {(h + 1) * hs - 1} of each "
                f"token, but the first token gives it {heads[0, h, 0].int().tolist()}. Is the "
                "order of the dimensions (B, T, nh, hs) before the swap?")
    done(name)


def check_join_heads(my_join: Callable[[Tensor], Tensor]) -> None:
    """Exercise 3.3: `my_join(heads)` lays the heads (B, nh, T, hs) side by side, (B, T, C)."""
    name = "my_join"
    if not is_started(my_join, name):
        return
    B, T, nh, hs = 2, 3, 4, 5
    x = torch.arange(B * T * nh * hs, dtype=torch.float32).view(B, T, nh * hs)
    heads = x.view(B, T, nh, hs).transpose(1, 2).contiguous()  # as attention returns it
    joined = expect_tensor(call(my_join, heads), name, (B, T, nh * hs), x.dtype)
    expect(not torch.equal(joined, heads.reshape(B, T, nh * hs)),
            f"{name}: reshaped without the swap, so a token gets parts of other tokens. Swap nh "
            "and T first, then reshape to (B, T, C).")
    expect(torch.equal(joined, x),
            f"{name}: the first token should be {x[0, 0, :6].int().tolist()}..., but is "
            f"{joined[0, 0, :6].int().tolist()}...: the heads belong side by side, head 0 first.")
    done(name)


def check_peek(my_peek: Callable[[torch.nn.Module, Tensor], Tensor]) -> None:
    """Exercise 3.4: `my_peek(layer, x)` is the output without dropout; the mode is put back."""
    from helpers.attention import CausalSelfAttention

    name = "my_peek"
    if not is_started(my_peek, name):
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = CausalSelfAttention(8, 2, dropout=0.5)
        x = draw(0, 2, 5, 8)
        with torch.no_grad():
            right = layer.eval()(x)
        layer.train()
        seen = expect_tensor(call(my_peek, layer, x), name, (2, 5, 8), x.dtype)
        if not close(seen.detach(), right):
            expect(close(call(my_peek, layer, x).detach(), seen.detach()),
                    f"{name}: two calls give two answers: numbers are still dropped. A layer is "
                    "in train mode until eval() is called.")
            raise CheckFailed(f"{name}: this is not the layer's output without dropout. Call "
                              "layer.eval(), then layer(x).")
        expect(layer.training and layer.residual_dropout.training,
                f"{name}: the layer came in train mode and is left in eval mode, so training would "
                "go on without dropout. Put the mode back with layer.train().")
        expect(not seen.requires_grad,
                f"{name}: the result still carries its gradient, and all that is kept for it. "
                "Compute it inside torch.no_grad().")
        layer.eval()
        call(my_peek, layer, x)
        expect(not layer.training,
                f"{name}: the layer came in eval mode and is left in train mode. Remember "
                "layer.training before you change it, and put that back.")
        was_on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)                           # whatever the answer did
        expect(was_on,
                f"{name}: gradients are switched off for good. Use `with torch.no_grad():`.")
    done(name)


def check_grouped_attention(my_grouped: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.5: causal attention in which neighbouring query heads share keys and values."""
    name = "my_grouped_attention"
    if not is_started(my_grouped, name):
        return
    B, T, hs = 2, 5, 4
    for nh, nkv in ((4, 2), (6, 2), (3, 1), (4, 4)):
        q, k, v = (2 * draw(0, B, nh, T, hs), draw(1, B, nkv, T, hs),
                   draw(2, B, nkv, T, hs))
        label = f"{name}, nh = {nh}, nkv = {nkv}"
        mixed = expect_tensor(call(my_grouped, q, k, v), label, (B, nh, T, hs), q.dtype)
        repeated = [t.repeat_interleave(nh // nkv, dim=1) for t in (k, v)]
        if close(mixed, _attention(q, *repeated)):
            continue
        tiled = [t.repeat(1, nh // nkv, 1, 1) for t in (k, v)]
        expect(not close(mixed, _attention(q, *tiled)),
                f"{label}: the key heads are dealt out in turn (0, 1, 0, 1), but neighbours share "
                "(0, 0, 1, 1): repeat_interleave, not repeat.")
        expect(not close(mixed, _attention(q, *repeated, offset=None)),
                f"{label}: the causal mask is missing.")
        expect(not close(mixed, _attention(q, *repeated, scale=1.0)),
                f"{label}: the scaling by the square root of hs is missing.")
        raise CheckFailed(f"{label}: the numbers differ from those of ordinary causal attention "
                          "in which each key and value head is repeated for its query heads.")
    done(name)
