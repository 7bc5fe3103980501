"""Typical wrong answers to the exercises of chapter 4, and right ones in other forms."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from helpers.generation import generate, generate_stream
from helpers.gpt import GPT

# Layer norm


def layer_norm(x, weight, bias, eps=1e-5, *, ddof=0, outside=False, variance=False, mean=True,
               whole=False):
    """Layer norm from sums, with one mistake."""
    n, dims = (x.numel(), tuple(range(x.dim()))) if whole else (x.shape[-1], (-1,))
    centred = x - x.sum(dim=dims, keepdim=True) / n
    var = (centred**2).sum(dim=dims, keepdim=True) / (n - ddof)
    divisor = var**0.5 + eps if outside else var + eps if variance else (var + eps) ** 0.5
    return (centred if mean else x) / divisor * weight + bias


def norm_in_place(x, weight, bias, eps=1e-5):
    x -= x.sum(dim=-1, keepdim=True) / x.shape[-1]
    return layer_norm(x, weight, bias, eps)


def with_mean(x, weight, bias, eps=1e-5):
    centred = x - x.mean(dim=-1, keepdim=True)
    return layer_norm(centred, weight, bias, eps)


def with_var(x, weight, bias, eps=1e-5):
    var = torch.var(x, dim=-1, unbiased=False, keepdim=True)
    return (x - x.sum(-1, keepdim=True) / x.shape[-1]) / (var + eps).sqrt() * weight + bias


def with_class(x, weight, bias, eps=1e-5):
    norm = nn.LayerNorm(x.shape[-1], eps)
    norm.weight.data, norm.bias.data = weight, bias
    return norm(x)


def with_rsqrt(x, weight, bias, eps=1e-5):
    """Right: the variance as the mean of the squares minus the square of the mean."""
    n = x.shape[-1]
    mean, square = torch.sum(x, -1, True) / n, torch.sum(x * x, -1, True) / n
    return torch.addcmul(bias, (x - mean) * torch.rsqrt(square - mean * mean + eps), weight)


# Parameters


def count(config, *, head=None, positions=True, qkv_bias=None, last=True, norm_bias=True):
    """The number of parameters, with one mistake."""
    V, C, L = config.vocab_size, config.n_embd, config.n_layer
    n = V * C + (config.context_length * C if positions else 0) + L * (12 * C**2 + 13 * C)
    n += 2 * C if last else 0
    n -= 0 if norm_bias else 2 * C * L + C
    n += V * C if (not config.tie_word_embeddings if head is None else head) else 0
    return n - (0 if (config.qkv_bias if qkv_bias is None else qkv_bias) else 3 * C * L)


def by_building(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def by_building_a_layer(config):
    return nn.LayerNorm(config.n_embd).weight.numel() + count(config) - config.n_embd


def count_by_parts(config):
    """Right: a list of shapes, multiplied out."""
    C, V = config.n_embd, config.vocab_size
    block = [(2, C), (3 * C, C + bool(config.qkv_bias)), (C, C + 1), (2, C), (4 * C, C + 1),
             (C, 4 * C + 1)]
    outside = [(V, C), (config.context_length, C), (2, C)]
    outside += [] if config.tie_word_embeddings else [(V, C)]
    return sum(rows * columns for rows, columns in block * config.n_layer + outside)


# Parallel block


def sequential(block, x):
    return block.forward(x)


def no_residual(block, x):
    n = block.norm_1(x)
    return block.attention(n) + block.feed_forward(n)


def normalized_residual(block, x):
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


def norm_as_a_formula(block, x):
    """Right: the norm by PyTorch's function, the sum in another order."""
    norm = block.norm_1
    n = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return block.feed_forward(n) + block.attention(n) + x


# Tying


def copy_parameter(model):
    model.lm_head.weight = nn.Parameter(model.token_embedding.weight.detach().clone())


def copy_values(model):
    model.lm_head.weight.data.copy_(model.token_embedding.weight.data)


def share_memory(model):
    model.lm_head.weight.data = model.token_embedding.weight.data


def other_way(model):
    model.token_embedding.weight = model.lm_head.weight


def new_tensor(model):
    weight = nn.Parameter(model.token_embedding.weight.detach().clone())
    model.token_embedding.weight = model.lm_head.weight = weight


def nothing(model):
    print(model.n_params)


def ask_the_model(model):
    object.__setattr__(model.config, "tie_word_embeddings", True)
    model.tie_weights()


def head_is_the_embedding(model):
    model.lm_head = model.token_embedding


def no_layer(model):
    model.lm_head = lambda h: h @ model.token_embedding.weight.T


def transposed(model):
    model.lm_head.weight = nn.Parameter(model.token_embedding.weight.T)


def another_model(model):
    other = copy.deepcopy(model)
    other.lm_head.weight = other.token_embedding.weight
    return other


def by_name(model):
    """Right: the parameter replaced in the table of the module; the model is returned as well."""
    del model.lm_head.weight
    model.lm_head.register_parameter("weight", model.token_embedding.weight)
    return model


# Generation


def loop(model, prompt, n, *, evaluate=True, restore=True, position=-1, slide=True, window=None):
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
    return [torch.tensor(i) for i in loop(model, prompt, n)]


def changes_prompt(model, prompt, n):
    prompt += loop(model, prompt, n)[len(prompt):]
    return list(prompt)


def ready_made(model, prompt, n):
    return generate(model, prompt, n)


def ready_made_stream(model, prompt, n):
    return [*prompt, *(new for new, in generate_stream(model, [prompt], n))]


def ready_made_logits(model, prompt, n):
    from helpers import generation

    ids = list(prompt)
    for _ in range(n):
        logits = generation.next_token_logits(model, torch.tensor([ids]), None, None)
        ids.append(int(logits.argmax()))
    return ids


def with_a_cache(model, prompt, n):
    """Right: with a cache as long as the text fits, and the window as a tensor."""
    was_training, context = model.training, model.config.context_length
    tokens, cache = torch.tensor([prompt]), model.eval().make_kv_cache(1)
    with torch.inference_mode():
        for _ in range(n):
            if tokens.shape[1] <= context:
                logits = model(tokens[:, cache[0].seq_len:], cache)
            else:
                logits = model(tokens[:, -context:])
            tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    model.train(was_training)
    return tokens[0].tolist()


WRONG = [
    ("check_layer_norm", lambda *a: layer_norm(*a, ddof=1), "C - 1"),
    ("check_layer_norm", lambda *a: layer_norm(*a, outside=True), "belongs under it"),
    ("check_layer_norm", lambda *a: layer_norm(*a, variance=True), "standard deviation"),
    ("check_layer_norm", lambda *a: layer_norm(*a, mean=False), "not subtracted"),
    ("check_layer_norm", lambda *a: layer_norm(*a, whole=True), "whole tensor"),
    ("check_layer_norm", lambda x, *_: layer_norm(x, 1, 0), "weight and bias are not applied"),
    ("check_layer_norm", lambda x, a, b, e=0: layer_norm(x, a, 0, e), "bias is not added"),
    ("check_layer_norm", lambda x, a, b, e=0: layer_norm(x, 1, b, e), "weight is not applied"),
    ("check_layer_norm", lambda x, a, b, eps=0: layer_norm(x, a, b, 0), "eps is not used"),
    ("check_layer_norm", lambda x, a, b, eps=0: layer_norm(x, a, a * b, eps), "it comes last"),
    ("check_layer_norm", lambda *a: layer_norm(*a).sum(-1), "expected shape"),
    ("check_layer_norm", lambda *a: layer_norm(*a).double(), "float64"),
    ("check_layer_norm", norm_in_place, "was changed"),
    ("check_layer_norm", with_mean, "calls mean"),
    ("check_layer_norm", with_var, "calls var"),
    ("check_layer_norm", with_class, "calls layer_norm"),
    ("check_layer_norm", lambda x, a, b, eps=0: [x, a][2:] or None, "NoneType"),
    ("check_parameter_count", lambda c: count(c, head=True), "though it is the token embedding"),
    ("check_parameter_count", lambda c: count(c, head=False), "untied output layer"),
    ("check_parameter_count", lambda c: count(c, qkv_bias=True), "qkv_bias"),
    ("check_parameter_count", lambda c: count(c, positions=False), "position embedding"),
    ("check_parameter_count", lambda c: count(c, last=False), "final norm"),
    ("check_parameter_count", lambda c: count(c, norm_bias=False), "too few"),
    ("check_parameter_count", lambda c: float(count(c)), "whole number"),
    ("check_parameter_count", by_building, "hyperparameters alone"),
    ("check_parameter_count", by_building_a_layer, "hyperparameters alone"),
    ("check_parallel_block", sequential, "block as it was"),
    ("check_parallel_block", no_residual, "residual connection is missing"),
    ("check_parallel_block", normalized_residual, "carries the normalized x"),
    ("check_parallel_block", two_norms, "norm_2"),
    ("check_parallel_block", twice, "added twice"),
    ("check_parallel_block", in_place, "was changed"),
    ("check_tied", copy_parameter, "copied"),
    ("check_tied", copy_values, "copied"),
    ("check_tied", share_memory, "two parameters"),
    ("check_tied", other_way, "token embedding has changed"),
    ("check_tied", new_tensor, "but a new one"),
    ("check_tied", nothing, "does not hold"),
    ("check_tied", ask_the_model, "GPT.tie_weights"),
    ("check_tied", head_is_the_embedding, "output layer is not a linear layer"),
    ("check_tied", no_layer, "raised TypeError"),
    ("check_tied", transposed, "nothing is transposed"),
    ("check_tied", another_model, "returns another model"),
    ("check_own_generate", lambda *a: loop(*a, evaluate=False), "Dropout is on"),
    ("check_own_generate", lambda *a: loop(*a, restore=False), "Put it back"),
    ("check_own_generate", lambda *a: loop(*a, position=0), "last position"),
    ("check_own_generate", lambda *a: loop(*a, slide=False), "raised ValueError"),
    ("check_own_generate", lambda *a: loop(*a, window=11), "context of 12"),
    ("check_own_generate", lambda m, p, n: loop(m, p, n)[len(p):], "prompt is missing"),
    ("check_own_generate", lambda m, p, n: loop(m, p, n + 1), "should be"),
    ("check_own_generate", tensors, "whole numbers"),
    ("check_own_generate", changes_prompt, "copy it first"),
    ("check_own_generate", ready_made, "calls generate."),
    ("check_own_generate", ready_made_stream, "calls generate_stream"),
    ("check_own_generate", ready_made_logits, "calls next_token_logits"),
]

RIGHT = [
    ("check_layer_norm", layer_norm),
    ("check_layer_norm", with_rsqrt),
    ("check_parameter_count", count_by_parts),
    ("check_parallel_block", norm_as_a_formula),
    ("check_tied", by_name),
    ("check_own_generate", with_a_cache),
]
