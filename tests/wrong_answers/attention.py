"""Typical wrong answers to the exercises of chapter 3, and right ones in other forms."""

import torch
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from helpers.attention import KVCache, naive_attention

# ---------------------------------------------------------------------------------------------
# 1 Shapes


def shapes(**changes):
    """The right shapes, with those of `changes` computed otherwise."""
    def my_shapes(B, T, C, nh, past):
        hs, S = C // nh, past + T
        right = {"q": (B, nh, T, hs), "keys": (B, nh, S, hs), "scores": (B, nh, T, S),
                 "context": (B, nh, T, hs), "y": (B, T, C), "weight": (3 * C, C)}
        return right | {key: f(B, T, C, nh, hs, S) for key, f in changes.items()}
    return my_shapes


# ---------------------------------------------------------------------------------------------
# 2 Attention and the gradient of softmax


def attention(q, k, v, *, scale=None, dim=-1, diagonal=0, zeroing=None, fill=float("-inf")):
    """Attention with one mistake."""
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) * (hs**-0.5 if scale is None else scale)
    mask = torch.ones(T, T).tril(diagonal).bool()
    if zeroing:
        weights = scores.softmax(dim=dim) * mask
        if zeroing == "divided":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if zeroing == "divided, no nan":
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-9)
        return weights @ v
    return scores.masked_fill(~mask, fill).softmax(dim=dim) @ v


def naive_exponentials(q, k, v):
    T, hs = q.shape[-2:]
    exponentials = (q @ k.transpose(-2, -1) / hs**0.5).exp().tril()
    return exponentials / exponentials.sum(dim=-1, keepdim=True) @ v


def in_place(q, k, v):
    q /= q.shape[-1] ** 0.5
    return attention(q, k, v, scale=1)


def fixed_mask(q, k, v):
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


def fixed_scale(q, k, v):
    return attention(q, k, v, scale=0.5)


def by_loops(q, k, v):
    """Row by row, with no mask at all."""
    rows = [((k[..., : t + 1, :] @ q[..., t, :, None] / q.shape[-1] ** 0.5).softmax(dim=-2)
             * v[..., : t + 1, :]).sum(dim=-2) for t in range(q.shape[-2])]
    return torch.stack(rows, dim=-2)


def stable_exponentials(q, k, v):
    scores = q @ k.mT / q.size(-1) ** 0.5
    scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    e = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return (e @ v) / e.sum(dim=-1, keepdim=True)


def by_jacobian(p, g):
    jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return (g.unsqueeze(-2) @ jacobian).squeeze(-2)


# ---------------------------------------------------------------------------------------------
# 3 Find the bugs


def corrected(layer, x, *, split=True, join=True, scale=None, dim=-1, causal=True):
    """Multi-head attention, with the bugs of the exercise as options."""
    B, T, C = x.shape
    nh, hs = layer.n_head, C // layer.n_head
    q, k, v = (part.reshape(B, T, nh, hs).transpose(1, 2) if split else part.reshape(B, nh, T, hs)
               for part in layer.qkv(x).split(C, dim=-1))
    context = attention(q, k, v, scale=scale and scale(C, hs), dim=dim,
                        diagonal=0 if causal else T)
    return layer.output_projection((context.transpose(1, 2) if join else context).reshape(B, T, C))


def all_bugs(layer, x):
    return corrected(layer, x, split=False, join=False, scale=lambda C, hs: C**-0.5, dim=-2)


def three_heads(layer, x):
    context = [part.reshape(*x.shape[:2], 3, -1).transpose(1, 2)
               for part in layer.qkv(x).split(x.shape[-1], dim=-1)]
    return layer.output_projection(attention(*context).transpose(1, 2).reshape(x.shape))


# ---------------------------------------------------------------------------------------------
# 4 Decode with the cache


def decode(layer, x, n_new, *, mode="restore", no_grad=True, first=None, take=-1, cached=True,
           whole=False, append=True, new_cache=False, dtype=None):
    """Decoding, with one mistake."""
    B, T, C = x.shape
    was_training = layer.training
    if mode != "train":
        layer.eval()
    make = lambda: KVCache(B, layer.n_head, 2 * (T + n_new) ** 2, C // layer.n_head,   # noqa: E731
                           dtype or x.dtype)
    with torch.set_grad_enabled(not no_grad):
        kv_cache, text = make() if cached else None, x
        for step in range(n_new):
            new = text if whole or not cached or step == 0 else text[:, -1:]
            if new_cache:
                kv_cache = make()
            if first == "by position" and step == 0:
                y = torch.cat([layer(new[:, t:t + 1], kv_cache) for t in range(T)], dim=1)
            else:
                y = layer(new, kv_cache)
            text = torch.cat([text, y[:, take][:, None] if append else x[:, -1:]], dim=1)
    if mode == "restore":
        layer.train(was_training)
    if mode == "always train":
        layer.train()
    return text


def option(**mistake):
    return lambda layer, x, n_new: decode(layer, x, n_new, **mistake)


def prompt_left_out(layer, x, n_new):
    return decode(layer, x, n_new)[:, x.shape[1]:]


def reversed_text(layer, x, n_new):
    return decode(layer, x, n_new).flip(1)


def grad_off_for_good(layer, x, n_new):
    torch.set_grad_enabled(False)
    return decode(layer, x, n_new)


def one_new_vector_too_many(layer, x, n_new):
    return decode(layer, x, n_new + 1)


def never_zero(layer, x, n_new):
    return decode(layer, x, max(n_new, 1))


@torch.no_grad()
def by_update(layer, x, n_new):
    """Another right form: a list of pieces, the last output is not fed."""
    mode, cache = layer.training, KVCache(len(x), layer.n_head, 99, 8 // layer.n_head, x.dtype)
    layer.eval()
    pieces = [x]
    try:
        for _ in range(n_new):
            pieces.append(layer(pieces[-1], cache)[:, -1:])
    finally:
        layer.train(mode)
    return torch.cat(pieces, dim=1)


# ---------------------------------------------------------------------------------------------
# 5 Grouped-query attention


def grouped(q, k, v, *, repeat, **mistake):
    group = q.shape[1] // k.shape[1]
    return attention(q, repeat(k, group), repeat(v, group), **mistake)


def in_turn(t, group):
    return t.repeat(1, group, 1, 1)


def neighbours(t, group):
    return t.repeat_interleave(group, dim=1)


def by_five_dimensions(q, k, v):
    """No copy: the group is a dimension of its own."""
    B, nh, T, hs = q.shape
    q = q.view(B, k.shape[1], -1, T, hs)
    return attention(q, k[:, :, None], v[:, :, None]).reshape(B, nh, T, hs)


WRONG = [
    ("check_attention_shapes", {"q": (2, 3, 5, 4)}, "expected a function"),
    ("check_attention_shapes", lambda B, T, C, nh, past: (B, T, C), "expected a dict"),
    ("check_attention_shapes",
     lambda B, T, C, nh, past: {"q": (B, nh, T, C // nh)}, "no shape for"),
    ("check_attention_shapes",
     shapes(q=lambda B, T, C, nh, hs, S: (B, T, nh, hs)), "for each head"),
    ("check_attention_shapes",
     shapes(q=lambda B, T, C, nh, hs, S: "B nh T hs"), "tuple of integers"),
    ("check_attention_shapes", shapes(keys=lambda B, T, C, nh, hs, S: (B, nh, T, hs)), "earlier"),
    ("check_attention_shapes",
     shapes(scores=lambda B, T, C, nh, hs, S: (B, nh, S, S)), "T queries"),
    ("check_attention_shapes", shapes(context=lambda B, T, C, nh, hs, S: (B, nh, S, hs)),
     "one context vector"),
    ("check_attention_shapes", shapes(y=lambda B, T, C, nh, hs, S: (B, S, C)), "no output"),
    ("check_attention_shapes", shapes(weight=lambda B, T, C, nh, hs, S: (C, 3 * C)), "nn.Linear"),
    ("check_attention", lambda q, k, v: attention(q, k, v, dim=-2), "wrong dimension"),
    ("check_attention", lambda q, k, v: 2 * attention(q, k, v), "sum to one"),
    ("check_attention", lambda q, k, v: attention(q, k, v, scale=1), "scaling is missing"),
    ("check_attention", lambda q, k, v: attention(q, k, v, scale=1 / q.shape[-1]), "square root"),
    ("check_attention", lambda q, k, v: attention(q, k, v, scale=12**-0.5), "root of C"),
    ("check_attention", lambda q, k, v: attention(k, q, v), "swapped"),
    ("check_attention", lambda q, k, v: attention(q, k, v, diagonal=1), "not causal"),
    ("check_attention", lambda q, k, v: attention(q, k, v, diagonal=-1), "nan"),
    ("check_attention", lambda q, k, v: attention(q, k, v, diagonal=9), "not causal"),
    ("check_attention", lambda q, k, v: attention(q, k, v, zeroing="left"), "too small"),
    ("check_attention", lambda q, k, v: attention(q, k, v, zeroing="divided"), "large scores"),
    ("check_attention",
     lambda q, k, v: attention(q, k, v, zeroing="divided, no nan"), "sum to one"),
    ("check_attention", lambda q, k, v: attention(q, k, v, fill=-100.0), "large scores"),
    ("check_attention", naive_exponentials, "overflow"),
    ("check_attention", F.scaled_dot_product_attention, "PyTorch's"),
    ("check_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
     "this calls scaled_dot_product_attention"),
    ("check_attention", lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
     "this calls scaled_dot_product_attention"),
    ("check_attention", lambda q, k, v: naive_attention(q, k, v), "this calls naive_attention"),
    ("check_attention", lambda q, k, v: torch.matmul(q, k), "raised RuntimeError"),
    ("check_attention", in_place, "in place"),
    ("check_attention", fixed_mask, "raised RuntimeError"),
    ("check_attention", fixed_scale, "right for one shape"),
    ("check_softmax_gradient", lambda p, g: p * g, "p * g"),
    ("check_softmax_gradient", lambda p, g: p * (1 - p) * g, "diagonal"),
    ("check_softmax_gradient", lambda p, g: p * ((g * p).sum(dim=-1, keepdim=True) - g), "sign"),
    ("check_softmax_gradient", lambda p, g: p * (g - (g * p).sum()), "all dimensions"),
    ("check_softmax_gradient", lambda p, g: p - g, "finite differences"),
    ("check_softmax_gradient", lambda p, g: (p * g).sum(), "expected shape"),
    ("check_corrected_attention", all_bugs, "4 of the 4 bugs are left"),
    ("check_corrected_attention", lambda layer, x: corrected(layer, x, split=False), "1 of the 4"),
    ("check_corrected_attention",
     lambda layer, x: corrected(layer, x, join=False), "exchanged again"),
    ("check_corrected_attention", lambda layer, x: corrected(layer, x, dim=-2), "over the keys"),
    ("check_corrected_attention",
     lambda layer, x: corrected(layer, x, scale=lambda C, hs: C**-0.5), "head size hs"),
    ("check_corrected_attention",
     lambda layer, x: corrected(layer, x, scale=lambda C, hs: C**-0.5, dim=-2), "2 of the 4"),
    ("check_corrected_attention",
     lambda layer, x: corrected(layer, x, scale=lambda C, hs: 1), "missing now"),
    ("check_corrected_attention",
     lambda layer, x: corrected(layer, x, causal=False), "causal mask is missing"),
    ("check_corrected_attention", lambda layer, x: 2 * corrected(layer, x), "Start again"),
    ("check_corrected_attention", lambda layer, x: layer.qkv(x), "expected shape"),
    ("check_corrected_attention", three_heads, "another"),
    ("check_decode", prompt_left_out, "expected shape"),
    ("check_decode", one_new_vector_too_many, "expected shape"),
    ("check_decode", reversed_text, "the prompt itself"),
    ("check_decode", option(mode="train"), "dropout"),
    ("check_decode", option(mode="leave"), "left in eval mode"),
    ("check_decode", option(mode="always train"), "left in train mode"),
    ("check_decode", option(no_grad=False), "no_grad"),
    ("check_decode", grad_off_for_good, "for good"),
    ("check_decode", option(cached=False), "each position once"),
    ("check_decode", option(whole=True), "one cache for the whole text"),
    ("check_decode", option(new_cache=True), "one cache for the whole text"),
    ("check_decode", option(whole=True, new_cache=True), "each position once"),
    ("check_decode", option(first="by position"), "position by position"),
    ("check_decode", option(take=0), "last position of the prompt"),
    ("check_decode", option(append=False), "the same one"),
    ("check_decode", never_zero, "n_new = 0"),
    ("check_decode", option(dtype=torch.float32), "torch.float32 on cpu"),
    ("check_grouped_attention", lambda q, k, v: grouped(q, k, v, repeat=in_turn), "neighbours"),
    ("check_grouped_attention",
     lambda q, k, v: grouped(q, k, v, repeat=neighbours, diagonal=99), "mask is missing"),
    ("check_grouped_attention",
     lambda q, k, v: grouped(q, k, v, repeat=neighbours, scale=1), "scaling"),
    ("check_grouped_attention",
     lambda q, k, v: grouped(q, k, v, repeat=neighbours, scale=2), "values differ"),
]

RIGHT = [
    ("check_attention_shapes", lambda *sizes: {k: list(v) for k, v in shapes()(*sizes).items()}),
    ("check_attention_shapes",
     lambda *sizes: {k: torch.Size(v) for k, v in shapes()(*sizes).items()}),
    ("check_attention", by_loops),
    ("check_attention", stable_exponentials),
    ("check_attention", lambda q, k, v: attention(q, k, v, fill=torch.finfo(q.dtype).min)),
    ("check_softmax_gradient", by_jacobian),
    ("check_corrected_attention", corrected),
    ("check_corrected_attention", lambda layer, x: layer(x)),
    ("check_decode", decode),
    ("check_decode", by_update),
    ("check_grouped_attention", by_five_dimensions),
    ("check_grouped_attention", lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True)),
]
