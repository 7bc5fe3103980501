"""Checks of the exercises of chapter 3, attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from unittest import mock

import torch
from torch import Tensor, nn

from helpers.checks._core import (
    CheckFailed,
    call,
    close,
    done,
    draw,
    expect,
    expect_function,
    expect_tensor,
    is_started,
    randomize,
)


def check_attention_shapes(my_shapes: Callable[..., Mapping[str, tuple[int, ...]]]) -> None:
    """Exercise 3.1: the shapes inside a layer of multi-head attention with a cache."""
    name = "my_shapes"
    if not is_started(my_shapes, name):
        return
    expect_function(my_shapes, name)
    for B, T, C, nh, past in ((2, 5, 12, 3, 7), (3, 1, 8, 2, 4), (1, 6, 20, 4, 0)):
        hs, S = C // nh, past + T
        label = f"{name}(B={B}, T={T}, C={C}, nh={nh}, past={past})"
        answer = call(my_shapes, B, T, C, nh, past)
        expect(isinstance(answer, Mapping),
               f"{name}: expected a dict of name to shape, got {type(answer).__name__}.")
        right = {"q": (B, nh, T, hs), "keys": (B, nh, S, hs), "scores": (B, nh, T, S),
                 "context": (B, nh, T, hs), "y": (B, T, C), "weight": (3 * C, C)}
        missing = sorted(set(right) - set(answer))
        expect(not missing, f"{name}: no shape for {', '.join(missing)}.")
        for key, shape in right.items():
            given = answer[key]
            expect(isinstance(given, (tuple, list)) and all(
                isinstance(n, int) or (isinstance(n, float) and n.is_integer()) for n in given),
                f"{label}, {key}: expected a tuple of integers, got {given!r}.")
            if tuple(given) == shape:
                continue
            hints = {
                "q": "queries are made for the new tokens only, one for each head: (B, nh, T, hs)",
                "keys": "the cache returns the keys of the earlier tokens too, and hs is C / nh",
                "scores": "each of the T queries has a score for each of the past + T keys",
                "context": "there is one context vector for each query and head",
                "y": "the heads are joined again, and the cached tokens give no output",
                "weight": "nn.Linear stores (outputs, inputs), and the outputs are q, k and v",
            }
            raise CheckFailed(f"{label}: {key} is not {tuple(given)}. Think again: {hints[key]}.")
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


def _forbidden(name: str, what: str) -> Callable:
    def refuse(*_: object, **__: object) -> None:
        raise CheckFailed(f"{name}: this calls {what}. The exercise is to write it with matrix "
                          "products and a softmax.")
    return refuse


def check_attention(my_attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.2 (a): `my_attention(q, k, v)` is causal attention, (B, nh, T, hs)."""
    name = "my_attention"
    if not is_started(my_attention, name):
        return
    expect_function(my_attention, name)
    ready = nn.functional.scaled_dot_product_attention
    expect(my_attention is not ready, f"{name}: this is PyTorch's scaled_dot_product_attention.")
    B, nh, T, hs = 2, 3, 5, 4
    q, k, v = 3 * draw(0, B, nh, T, hs), draw(1, B, nh, T, hs), draw(2, B, nh, T, hs)
    given = [t.clone() for t in (q, k, v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        used = []
        names = getattr(getattr(my_attention, "__globals__", None), "get", lambda _: None)
        patches = [mock.patch.object(nn.functional, ready.__name__,
                                     _forbidden(name, ready.__name__))]
        for other in (ready.__name__, "naive_attention", "fused_attention"):
            if callable(names(other)):
                patches.append(mock.patch.dict(my_attention.__globals__,
                                               {other: _forbidden(name, other)}))
        patches.append(mock.patch("helpers.attention.naive_attention",
                                  _forbidden(name, "naive_attention")))
        try:
            for patch in patches:
                patch.start()
                used.append(patch)
            return my_attention(q, k, v)
        except CheckFailed:
            raise
        except Exception as error:
            raise CheckFailed(f"{name} raised {type(error).__name__}: {error}") from error
        finally:
            for patch in reversed(used):
                patch.stop()

    context = expect_tensor(attend(q, k, v), name, (B, nh, T, hs), q.dtype)
    expect(all(torch.equal(a, b) for a, b in zip(given, (q, k, v), strict=True)),
           f"{name}: q, k or v are changed in place; make new tensors instead.")
    expect(not context.isnan().any(),
           f"{name}: there are nan. Mask the scores with float('-inf') before softmax, and let "
           "each token attend to itself: a row with nothing to attend to divides by zero.")
    sums = attend(q, k, torch.ones_like(v))                    # rows of weights sum to one
    if not close(sums, torch.ones_like(v)):
        expect(not close(context, _attention(q, k, v, dim=-2)),
               f"{name}: softmax over the wrong dimension. The weights of each row sum to one, so "
               "softmax goes over the keys, dim=-1.")
        raise CheckFailed(f"{name}: the weights of a row do not sum to one. Softmax goes over the "
                          "keys, dim=-1, after the mask; weights set to zero after softmax leave "
                          "the rest of the row too small.")
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, -1] += 1
    changed_v[:, :, -1] += 1
    later = attend(q, changed_k, changed_v)
    expect(close(later[:, :, :-1], context[:, :, :-1]),
           f"{name}: a change of the last token changes earlier outputs, so it is not causal. Is "
           "the mask there, is it off by one, and is it applied to the scores before softmax?")
    if not close(context, _attention(q, k, v)):
        expect(not close(context, _attention(q, k, v, scale=1.0)),
               f"{name}: the scaling is missing. Divide the scores by the square root of hs.")
        expect(not close(context, _attention(q, k, v, scale=1 / hs)),
               f"{name}: divided by hs in place of its square root.")
        for size, what in ((nh * hs, "C"), (T, "T"), (nh, "nh")):
            expect(not close(context, _attention(q, k, v, scale=size**-0.5)),
                   f"{name}: the scores are divided by the root of {what}; it should be that of "
                   "the head size hs, the last dimension of q.")
        expect(not close(context, _attention(k, q, v)), f"{name}: queries and keys are swapped.")
        raise CheckFailed(f"{name}: the shape is right and it is causal, but the values differ. "
                          "Expected: softmax(q @ k.transpose(-2, -1) / hs**0.5, masked) @ v.")
    # Scores of a few hundred: in the future, in the past, and all of them, of either sign.
    for row, size in ((-1, 400.0), (0, 400.0), (slice(None), 400.0), (slice(None), -400.0)):
        steep = k.clone()
        steep[:, :, row] = size
        positive = q.abs() + 1
        large = attend(positive, steep, v)
        expect(not large.isnan().any(),
               f"{name}: with large scores there are nan. Zeroing the weights of the future after "
               "softmax loses the past where a future score is large, and exponentials without the "
               "largest score subtracted overflow. Mask before softmax.")
        expect(close(large, _attention(positive, steep, v), 1e-3, 1e-3),
               f"{name}: with large scores in the future, the past loses its weights. Mask the "
               "scores with float('-inf') before softmax; zeroing after it, dividing again, or a "
               "mask value such as -100 is not the same.")
    for shape in ((1, 1, 1, 4), (2, 1, 7, 3)):
        q, k, v = (draw(seed, *shape) for seed in range(3))
        result = expect_tensor(attend(q, k, v), f"{name} for {shape}", shape, q.dtype)
        expect(close(result, _attention(q, k, v)),
               f"{name}: right for one shape, but not for q, k and v of shape {shape}. Read the "
               "sizes from q.")
    done(name)


def check_softmax_gradient(my_softmax_gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.2 (b): `my_softmax_gradient(p, g)` is the gradient with respect to the scores."""
    name = "my_softmax_gradient"
    if not is_started(my_softmax_gradient, name):
        return
    expect_function(my_softmax_gradient, name)
    for shape in ((5,), (2, 3, 4)):
        s, g = draw(0, *shape).double(), draw(1, *shape).double()
        p = s.softmax(dim=-1)
        given = expect_tensor(call(my_softmax_gradient, p.clone(), g.clone()),
                              f"{name} for {shape}", shape)
        difference = torch.zeros_like(s)                       # by central differences
        for place in torch.ones_like(s).nonzero().tolist():
            step = torch.zeros_like(s)
            step[tuple(place)] = 1e-5
            up, down = ((s + sign * step).softmax(dim=-1) for sign in (1, -1))
            difference[tuple(place)] = ((up - down) * g).sum() / 2e-5
        if close(given, difference, 1e-4, 1e-6):
            continue
        expect(not close(given, p * g, 1e-4, 1e-6),
               f"{name}: this is p * g, the first half. The scores of a row influence each other "
               "through the sum z, so the terms with i != j are missing.")
        expect(not close(given, p * (1 - p) * g, 1e-4, 1e-6),
               f"{name}: this is the diagonal of the Jacobian, i = j, alone. The terms with i != j "
               "are missing.")
        expect(not close(given, -difference, 1e-4, 1e-6), f"{name}: the sign is wrong.")
        if len(shape) > 1:
            expect(not close(given, p * (g - (p * g).sum()), 1e-4, 1e-6),
                   f"{name}: the sum runs over all dimensions. Each row has its own softmax: sum "
                   "over dim=-1, with keepdim=True.")
        raise CheckFailed(f"{name}, shape {shape}: the result differs from finite differences. "
                          "Write down the sum over i of g_i * p_i * (delta_ij - p_j) and split it "
                          "into two sums.")
    done(name)


def _layer(C: int, nh: int, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """A layer with random parameters, biases too, in float64."""
    from helpers.attention import CausalSelfAttention

    with torch.random.fork_rng():
        layer = CausalSelfAttention(C, nh, dropout).double().eval()
    randomize(layer, C**-0.5, seed)
    return layer


def _variant(layer: nn.Module, x: Tensor, *, split: bool = True, join: bool = True,
             scale: str = "hs", dim: int = -1, causal: bool = True) -> Tensor:
    """Multi-head attention with the bugs of exercise 3.3 as options; by default without any."""
    B, T, C = x.shape
    nh = layer.n_head
    q, k, v = (part.reshape(B, T, nh, C // nh).transpose(1, 2) if split
               else part.reshape(B, nh, T, C // nh) for part in layer.qkv(x).split(C, dim=-1))
    size = {"hs": C // nh, "C": C, "none": 1}[scale]
    context = _attention(q, k, v, scale=size**-0.5, dim=dim, offset=0 if causal else None)
    joined = (context.transpose(1, 2) if join else context).reshape(B, T, C)
    return layer.output_projection(joined)


def check_corrected_attention(my_corrected: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Exercise 3.3: `my_corrected_attention(layer, x)` without the four bugs."""
    name = "my_corrected_attention"
    if not is_started(my_corrected, name):
        return
    expect_function(my_corrected, name)
    B, T, C, nh = 2, 5, 12, 3
    layer, x = _layer(C, nh), 3 * draw(3, B, T, C).double()
    with torch.no_grad():
        y = expect_tensor(call(my_corrected, layer, x), name, (B, T, C), x.dtype)
        expect(not y.isnan().any(), f"{name}: there are nan.")
        right = _variant(layer, x)
        if not close(y, right):
            says = {
                "split": "each head must get hs components of every token: name the dimensions "
                         "(B, T, nh, hs) first, then transpose",
                "join": "before the heads are joined, T and nh must be exchanged again",
                "scale": "the scores are not divided by the square root of the head size hs",
                "dim": "softmax must make the weights of each query sum to one, over the keys",
            }
            bugs = {"split": False, "join": False, "scale": "C", "dim": -2}
            subsets = sorted((tuple(n for i, n in enumerate(bugs) if code >> i & 1)
                              for code in range(1, 16)), key=len)
            for left in subsets:
                if close(y, _variant(layer, x, **{n: bugs[n] for n in left})):
                    raise CheckFailed(f"{name}: {len(left)} of the 4 bugs "
                                      f"{'is' if len(left) == 1 else 'are'} left. One of them: "
                                      f"{says[left[0]]}.")
            expect(not close(y, _variant(layer, x, scale="none")),
                   f"{name}: the scaling by the square root of hs is missing now.")
            expect(not close(y, _variant(layer, x, causal=False)),
                   f"{name}: the causal mask is missing now.")
            raise CheckFailed(f"{name}: the values differ from those of the layer, and not by the "
                              "four bugs alone. Start again from attention_with_bugs.")
        layer, x = _layer(12, 4, seed=5), draw(4, 1, 3, 12).double()
        expect(close(call(my_corrected, layer, x), _variant(layer, x)),
               f"{name}: right for one layer and wrong for another. Read all sizes from x and "
               "layer.n_head.")
    done(name)


def check_decode(my_decode: Callable[[nn.Module, Tensor, int], Tensor]) -> None:
    """Exercise 3.4: `my_decode(layer, x, n_new)` decodes with a cache, each position once."""
    name = "my_decode"
    if not is_started(my_decode, name):
        return
    expect_function(my_decode, name)
    B, T, C, nh, n_new = 2, 4, 8, 2, 5
    x = draw(6, B, T, C)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = _layer(C, nh, dropout=0.5).float()
        with torch.no_grad():
            right = x
            for _ in range(n_new):
                right = torch.cat([right, layer(right)[:, -1:]], dim=1)
        lengths: list[int] = []
        hook = layer.qkv.register_forward_pre_hook(
            lambda _, inputs: lengths.append(inputs[0].shape[1]))
        layer.train()
        was_on = torch.is_grad_enabled()
        try:
            y = expect_tensor(call(my_decode, layer, x.clone(), n_new), name, (B, T + n_new, C),
                              x.dtype)
            grad_left = torch.is_grad_enabled() == was_on
        finally:
            torch.set_grad_enabled(was_on)                     # whatever the answer did
            hook.remove()
        if not close(y, right):
            expect(close(y[:, :T], x),
                   f"{name}: the first {T} vectors should be the prompt itself.")
            again = call(my_decode, layer.train(), x.clone(), n_new)
            expect(close(again, y),
                   f"{name}: two calls give two answers, so dropout is still on. Call layer.eval() "
                   "first.")
            expect(not close(y[:, T + 1:], y[:, T:-1]),
                   f"{name}: all new vectors are the same one.")
            if not close(y[:, T], right[:, T]):
                raise CheckFailed(f"{name}: the first new vector is not the layer's output at the "
                                  "last position of the prompt.")
            raise CheckFailed(f"{name}: the first new vector is right and a later one is not. Feed "
                              "the newest vector alone, and keep one cache for the whole text.")
        expect(max(lengths) > 1 or T == 1,
               f"{name}: the prompt was fed position by position; the layer takes it in one call.")
        expect(sum(lengths) <= T + n_new,
               f"{name}: the layer computed {sum(lengths)} positions for a text of {T + n_new}. "
               "With a cache it needs each position once: first the prompt, then the newest "
               "vector alone.")
        expect(layer.training and layer.residual_dropout.training,
               f"{name}: the layer came in train mode and is left in eval mode, so training would "
               "go on without dropout. Put the mode back with layer.train(mode).")
        expect(not y.requires_grad,
               f"{name}: the result carries a gradient, and all that is kept for it. Compute it "
               "inside torch.no_grad().")
        expect(grad_left,
               f"{name}: gradients are switched off for good. Use `with torch.no_grad():`.")
        layer.eval()
        call(my_decode, layer, x.clone(), 1)
        expect(not layer.training,
               f"{name}: the layer came in eval mode and is left in train mode. Remember "
               "layer.training before you change it, and put that back.")
        same = call(my_decode, layer, x.clone(), 0)
        expect(isinstance(same, Tensor) and close(same, x),
               f"{name}: with n_new = 0 the result is the prompt.")
        double = expect_tensor(call(my_decode, layer.double(), x.double(), n_new), name,
                               (B, T + n_new, C), torch.float64)
        expect(close(double, right, 1e-3, 1e-4), f"{name}: wrong for a layer in float64.")
    done(name)


def check_grouped_attention(my_grouped: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.5: causal attention in which neighbouring query heads use one key head."""
    name = "my_grouped_attention"
    if not is_started(my_grouped, name):
        return
    expect_function(my_grouped, name)
    B, T, hs = 2, 5, 4
    for nh, nkv in ((4, 2), (6, 2), (3, 1), (4, 4)):
        q, k, v = 2 * draw(0, B, nh, T, hs), draw(1, B, nkv, T, hs), draw(2, B, nkv, T, hs)
        label = f"{name}, nh = {nh}, nkv = {nkv}"
        context = expect_tensor(call(my_grouped, q, k, v), label, (B, nh, T, hs), q.dtype)
        repeated = [t.repeat_interleave(nh // nkv, dim=1) for t in (k, v)]
        if close(context, _attention(q, *repeated)):
            continue
        tiled = [t.repeat(1, nh // nkv, 1, 1) for t in (k, v)]
        expect(not close(context, _attention(q, *tiled)),
               f"{label}: the key heads are used in turn (0, 1, 0, 1), but neighbours use the same "
               "(0, 0, 1, 1): repeat_interleave, not repeat.")
        expect(not close(context, _attention(q, *repeated, offset=None)),
               f"{label}: the causal mask is missing.")
        expect(not close(context, _attention(q, *repeated, scale=1.0)),
               f"{label}: the scaling by the square root of hs is missing.")
        raise CheckFailed(f"{label}: the values differ from those of ordinary causal attention "
                          "in which each key and value head is repeated for its query heads.")
    done(name)
