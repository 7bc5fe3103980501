"""Typical wrong answers to the exercises of chapter 4."""

import torch
from torch import nn

# Layer norm


def layer_norm(x, scale, shift, eps=1e-5, *, unbiased=False, outside=False, dim=-1):
    """Layer norm with one mistake."""
    dims = tuple(range(x.dim())) if dim is None else dim
    variance = x.var(dim=dims, unbiased=unbiased, keepdim=True)
    spread = variance.sqrt() + eps if outside else (variance + eps).sqrt()
    return (x - x.mean(dim=dims, keepdim=True)) / spread * scale + shift


def norm_in_place(x, scale, shift, eps=1e-5):
    x -= x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * scale + shift


# Parameters


def count(config, *, head=None, positions=True, qkv_bias=None, last=True):
    """The number of parameters, with one mistake."""
    V, C, L = config.vocab_size, config.n_embd, config.n_layer
    n = V * C + (config.context_length * C if positions else 0) + L * (12 * C**2 + 13 * C)
    n += 2 * C if last else 0
    n += V * C if (not config.tie_word_embeddings if head is None else head) else 0
    return n - (0 if (config.qkv_bias if qkv_bias is None else qkv_bias) else 3 * C * L)


# Parallel block


def sequential(block, x):
    return block.forward(x)


def no_shortcut(block, x):
    n = block.norm_1(x)
    return block.attention(n) + block.feed_forward(n)


def normed_shortcut(block, x):
    n = block.norm_1(x)
    return n + block.attention(n) + block.feed_forward(n)


def two_norms(block, x):
    return x + block.attention(block.norm_1(x)) + block.feed_forward(block.norm_2(x))


def twice(block, x):
    n = block.norm_1(x)
    return (x + block.attention(n)) + (x + block.feed_forward(n))


def in_place(block, x):
    n = block.norm_1(x)
    x += block.attention(n)
    x += block.feed_forward(n)
    return x


# Tying


def copy_table(model):
    model.lm_head.weight = nn.Parameter(model.token_embedding.weight.detach().clone())


def copy_values(model):
    model.lm_head.weight.data.copy_(model.token_embedding.weight.data)


def share_memory(model):
    model.lm_head.weight.data = model.token_embedding.weight.data


def other_way(model):
    model.token_embedding.weight = model.lm_head.weight


def nothing(model):
    print(model.n_params)


# Generating


def generate(model, prompt, n, *, evaluate=True, restore=True, position=-1, slide=True,
             window=None):
    """Greedy generation with one mistake."""
    mode = model.training
    if evaluate:
        model.eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            seen = ids[-(window or model.config.context_length):] if slide else ids
            ids.append(int(model(torch.tensor([seen]))[0, position].argmax()))
    if restore:
        model.train(mode)
    return ids


def tensors(model, prompt, n):
    return [torch.tensor(i) for i in generate(model, prompt, n)]


def changes_prompt(model, prompt, n):
    prompt += generate(model, prompt, n)[len(prompt):]
    return list(prompt)


WRONG = [
    ("check_layer_norm", lambda *a: layer_norm(*a, unbiased=True), "C - 1"),
    ("check_layer_norm", lambda *a: layer_norm(*a, outside=True), "belongs under it"),
    ("check_layer_norm", lambda *a: layer_norm(*a, dim=None), "whole tensor"),
    ("check_layer_norm", lambda x, *_: layer_norm(x, 1, 0), "scale and shift are not applied"),
    ("check_layer_norm", lambda x, a, b, eps=0: layer_norm(x, a, b, 0), "eps is not used"),
    ("check_layer_norm", lambda x, a, b, eps=0: layer_norm(x, a, a * b, eps), "scale first"),
    ("check_layer_norm", lambda *a: layer_norm(*a).mean(-1), "expected shape"),
    ("check_layer_norm", lambda *a: layer_norm(*a).double(), "float64"),
    ("check_layer_norm", norm_in_place, "was changed"),
    ("check_parameter_count", lambda c: count(c, head=True), "though it is the token table"),
    ("check_parameter_count", lambda c: count(c, head=False), "output layer is not counted"),
    ("check_parameter_count", lambda c: count(c, qkv_bias=True), "qkv_bias"),
    ("check_parameter_count", lambda c: count(c, positions=False), "position table"),
    ("check_parameter_count", lambda c: count(c, last=False), "last norm"),
    ("check_parameter_count", lambda c: float(count(c)), "whole number"),
    ("check_parallel_block", sequential, "block as it was"),
    ("check_parallel_block", no_shortcut, "shortcut is forgotten"),
    ("check_parallel_block", normed_shortcut, "carries the normed x"),
    ("check_parallel_block", two_norms, "norm_2"),
    ("check_parallel_block", twice, "added twice"),
    ("check_parallel_block", in_place, "was changed"),
    ("check_tied", copy_table, "copied"),
    ("check_tied", copy_values, "copied"),
    ("check_tied", share_memory, "two parameters"),
    ("check_tied", other_way, "token table has changed"),
    ("check_tied", nothing, "does not hold"),
    ("check_own_generate", lambda *a: generate(*a, evaluate=False), "Dropout is on"),
    ("check_own_generate", lambda *a: generate(*a, restore=False), "Put it back"),
    ("check_own_generate", lambda *a: generate(*a, position=0), "last position"),
    ("check_own_generate", lambda *a: generate(*a, slide=False), "raised ValueError"),
    ("check_own_generate", lambda *a: generate(*a, window=11), "context of 12"),
    ("check_own_generate", lambda m, p, n: generate(m, p, n)[len(p):], "prompt is missing"),
    ("check_own_generate", lambda m, p, n: generate(m, p, n + 1), "should be"),
    ("check_own_generate", tensors, "whole numbers"),
    ("check_own_generate", changes_prompt, "copy it first"),
]
