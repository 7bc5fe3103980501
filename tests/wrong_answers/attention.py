"""Typical wrong answers to the exercises of chapter 3."""

import torch
from torch.nn import functional as F


def attention(q, k, v, *, scale=None, dim=-1, diagonal=0, mask_last=False):
    """Attention with one mistake."""
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) * (hs**-0.5 if scale is None else scale)
    mask = torch.ones(T, T).tril(diagonal).bool()
    if mask_last:
        return (scores.softmax(dim=dim) * mask) @ v
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=dim) @ v


def forgotten_eval(layer, x):
    with torch.no_grad():
        return layer(x)


def left_in_eval(layer, x):
    layer.eval()
    with torch.no_grad():
        return layer(x)


def always_train(layer, x):
    layer.eval()
    with torch.no_grad():
        result = layer(x)
    layer.train()
    return result


def with_gradient(layer, x):
    mode = layer.training
    result = layer.eval()(x)
    layer.train(mode)
    return result


def half(x, n_head):
    """Split C as (hs, nh): each head gets every n_head-th number."""
    B, T, C = x.shape
    return x.view(B, T, C // n_head, n_head).permute(0, 3, 1, 2)


def grouped(q, k, v, *, repeat, **mistake):
    group = q.shape[1] // k.shape[1]
    return attention(q, repeat(k, group), repeat(v, group), **mistake)


def in_turn(t, group):
    return t.repeat(1, group, 1, 1)


def neighbours(t, group):
    return t.repeat_interleave(group, dim=1)


def triangle(T, diagonal=0):
    return torch.ones(T, T, dtype=torch.bool).tril(diagonal)


WRONG = [
    ("check_causal_mask", lambda T: triangle(T, -1), "off by one"),
    ("check_causal_mask", lambda T: triangle(T, 1), "off by one"),
    ("check_causal_mask", lambda T: ~triangle(T), "swapped"),
    ("check_causal_mask", lambda T: triangle(T).T, "upper triangle"),
    ("check_causal_mask", lambda T: torch.ones(T, T).tril(), "dtype"),
    ("check_causal_mask", lambda T: triangle(T + 1), "shape"),
    ("check_causal_mask", lambda T: triangle(T) & triangle(T).T, "past is hidden"),
    ("check_attention", lambda q, k, v: attention(q, k, v, dim=-2), "wrong dimension"),
    ("check_attention", lambda q, k, v: 2 * attention(q, k, v), "sum to one"),
    ("check_attention", lambda q, k, v: attention(q, k, v, scale=1), "scaling is missing"),
    ("check_attention", lambda q, k, v: attention(q, k, v, scale=1 / q.shape[-1]), "square root"),
    ("check_attention", lambda q, k, v: attention(q, k, v, scale=12**-0.5), "root of C"),
    ("check_attention", lambda q, k, v: attention(k, q, v), "swapped"),
    ("check_attention", lambda q, k, v: attention(q, k, v, diagonal=1), "not causal"),
    ("check_attention", lambda q, k, v: attention(q, k, v, diagonal=-1), "nan"),
    ("check_attention", lambda q, k, v: attention(q, k, v, mask_last=True), "shared out again"),
    ("check_attention", F.scaled_dot_product_attention, "not causal"),
    ("check_attention", lambda q, k, v: torch.matmul(q, k), "raised RuntimeError"),
    ("check_split_heads", lambda x, n: x.view(len(x), n, -1, x.shape[-1] // n), "wrong order"),
    ("check_split_heads", lambda x, n: x.view(*x.shape[:2], n, -1), "expected shape"),
    ("check_split_heads", half, "should get the numbers"),
    ("check_join_heads", lambda h: h.reshape(len(h), h.shape[2], -1), "without the swap"),
    ("check_join_heads", lambda h: h.permute(0, 2, 3, 1).flatten(2), "side by side"),
    ("check_join_heads", lambda h: h.transpose(1, 2).view(len(h), h.shape[2], -1), "raised"),
    ("check_peek", forgotten_eval, "eval()"),
    ("check_peek", left_in_eval, "left in eval mode"),
    ("check_peek", always_train, "left in train mode"),
    ("check_peek", with_gradient, "no_grad"),
    ("check_peek", lambda layer, x: torch.zeros_like(x), "not the layer's output"),
    ("check_grouped_attention", lambda q, k, v: grouped(q, k, v, repeat=in_turn), "neighbours"),
    ("check_grouped_attention",
     lambda q, k, v: grouped(q, k, v, repeat=neighbours, diagonal=99), "mask is missing"),
    ("check_grouped_attention",
     lambda q, k, v: grouped(q, k, v, repeat=neighbours, scale=1), "scaling"),
    ("check_grouped_attention",
     lambda q, k, v: grouped(q, k, v, repeat=neighbours, scale=2), "numbers differ"),
]
