"""Checks of the exercises of chapter 4, the GPT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.checks._core import (
    CheckFailed,
    call,
    close,
    done,
    expect,
    expect_tensor,
    randomize,
    is_started,
)


def check_layer_norm(my_layer_norm: Callable[..., Tensor]) -> None:
    """Exercise 4.1: `my_layer_norm(x, scale, shift, eps)` is layer norm of the last dimension."""
    name = "my_layer_norm"
    if not is_started(my_layer_norm, name):
        return
    generator = torch.Generator().manual_seed(0)
    for shape, eps in (((3, 4, 6), 1e-5), ((5, 9), 0.5), ((12,), 1e-5)):
        C = shape[-1]
        x = torch.randn(shape, generator=generator) * 2 + 1
        scale, shift = (torch.randn(C, generator=generator) for _ in range(2))
        given = x.clone()
        y = expect_tensor(call(my_layer_norm, x, scale, shift, eps), name, shape, torch.float32)
        expect(torch.equal(x, given), f"{name}: x itself was changed. Make a new tensor instead.")
        right = torch.nn.functional.layer_norm(x, (C,), scale, shift, eps)
        if close(y, right):
            continue
        centred = x - x.mean(-1, keepdim=True)
        variance = x.var(-1, unbiased=False, keepdim=True)
        normed = centred / (variance + eps).sqrt()
        unbiased = centred / (x.var(-1, keepdim=True) + eps).sqrt()
        expect(not close(y, unbiased * scale + shift),
                f"{name}: the variance divides by C - 1. Layer norm divides by C, the count.")
        expect(not close(y, normed), f"{name}: scale and shift are not applied.")
        expect(not close(y, (normed + shift) * scale),
                f"{name}: scale first, then shift; the shift is not scaled.")
        expect(not close(y, centred / (variance.sqrt() + eps) * scale + shift),
                f"{name}: eps is added to the root; it belongs under it, to the variance.")
        expect(not close(y, centred / variance.sqrt() * scale + shift),
                f"{name}: eps is not used.")
        expect(not close(y, centred / (variance + eps) * scale + shift),
                f"{name}: it divides by the variance. The spread is its root.")
        expect(not close(y, x / (variance + eps).sqrt() * scale + shift),
                f"{name}: the mean is not taken away from x.")
        whole = (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt()
        expect(not close(y, whole * scale + shift),
                f"{name}: mean and variance are taken over the whole tensor. Each vector has its "
                "own: sum over dim=-1, with keepdim=True.")
        raise CheckFailed(f"{name}: wrong values for x of shape {shape} and eps {eps}. Take the "
                          "mean away, divide by the root of variance plus eps, scale, shift.")
    flat = expect_tensor(call(my_layer_norm, torch.full((2, 4), 3.0), torch.ones(4), torch.zeros(4)),
                   name, (2, 4))
    expect(bool(flat.isfinite().all()),
            f"{name}: a vector of equal entries gives {flat[0, 0].item()}. eps under the root "
            "prevents that.")
    done(name)


def check_parameter_count(my_count: Callable[..., int]) -> None:
    """Exercise 4.2: `my_count(config)` is the number of parameters of GPT(config)."""
    from helpers.gpt import GPT, GPT2_CONFIGS, GPTConfig

    name = "my_count"
    if not is_started(my_count, name):
        return
    shape = {"vocab_size": 101, "context_length": 23, "n_embd": 12, "n_head": 3, "n_layer": 5}
    configs = [GPTConfig(**shape), GPTConfig(**shape, tie_word_embeddings=False),
               GPTConfig(**shape, qkv_bias=False),
               GPTConfig(**shape, tie_word_embeddings=False, qkv_bias=False), *GPT2_CONFIGS.values()]
    for config in configs:
        value = call(my_count, config)
        expect(isinstance(value, int) and not isinstance(value, bool),
                f"{name}: expected a whole number (int), got {type(value).__name__}.")
        with torch.device("meta"):
            right = GPT(config).n_params
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        likely = {
            V * C: "the output layer is counted, though it is the token table" if value > right
            else "the token table or the output layer is not counted",
            config.context_length * C: "the position table",
            3 * C * L: "the bias of the qkv projection, which follows qkv_bias",
            4 * C * L: "the scales and shifts of the two norms in each block",
            2 * C: "the last norm, above the blocks",
            4 * C * L + 2 * C: "all the norms, a scale and a shift each",
            C * L: "the bias of one layer that writes to the stream",
            5 * C * L: "the biases of the feed-forward network",
            2 * C * L + 2 * C: "the shifts of the norms", 2 * C * L: "one norm in each block",
        }
        gap = value - right
        hint = likely.get(abs(gap), "")
        hint = f" That is the size of this: {hint}." if hint else " Go through the picture."
        which = f"tie_word_embeddings={config.tie_word_embeddings}, qkv_bias={config.qkv_bias}"
        expect(gap == 0, f"{name}: {abs(gap):,} too {'many' if gap > 0 else 'few'} for a model of "
                f"{L} layers of width {C} with {which}.{hint}")
    done(name)


def check_parallel_block(my_parallel: Callable[..., Tensor]) -> None:
    """Exercise 4.3: `my_parallel(block, x)` adds what both parts make of norm_1(x) to x."""
    from helpers.gpt import GPTConfig, TransformerBlock

    name = "my_parallel"
    if not is_started(my_parallel, name):
        return
    config = GPTConfig(vocab_size=10, context_length=8, n_embd=12, n_head=3, n_layer=1)
    block = TransformerBlock(config).eval()
    randomize(block, 0.4, seed=0)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    given = x.clone()
    with torch.no_grad():
        y = expect_tensor(call(my_parallel, block, x), name, (2, 5, 12), torch.float32)
        expect(torch.equal(x, given), f"{name}: x itself was changed; += does that. Write x + ...")
        n, n_2 = block.norm_1(x), block.norm_2(x)
        attended, thought = block.attention(n), block.feed_forward(n)
        mistakes = [
            (attended + thought, "the shortcut is forgotten: x itself is part of the sum."),
            (n + attended + thought, "the shortcut carries the normed x. It carries x as it came."),
            (2 * x + attended + thought, "x is added twice. Both answers go onto one stream."),
            (block(x), "this is the block as it was: the second part reads what the first wrote."),
            (x + block.feed_forward(attended),
             "the feed-forward network reads what attention wrote, not the normed x."),
            (x + attended + block.feed_forward(n_2),
             "the feed-forward network reads norm_2. Here one norm serves both."),
            (x + attended + block.feed_forward(x),
             "the feed-forward network reads x without a norm."),
            (x + block.attention(x) + block.feed_forward(x), "nothing is normed."),
            (x + attended, "the feed-forward network is missing."),
            (x + thought, "attention is missing."),
        ]
        for wrong, message in mistakes:
            expect(not close(y, wrong), f"{name}: {message}")
        expect(close(y, x + attended + thought),
                f"{name}: wrong values. Norm x once with norm_1, give that to both parts, and add "
                "both answers to x.")
    done(name)


def check_tied(my_tie: Callable[..., None]) -> None:
    """Exercise 4.4: after `my_tie(model)` output layer and token table are one tensor."""
    from helpers.gpt import GPT, GPTConfig

    name = "my_tie"
    if not is_started(my_tie, name):
        return
    config = GPTConfig(vocab_size=30, context_length=8, n_embd=12, n_head=3, n_layer=1,
                       tie_word_embeddings=False)
    model = GPT(config)
    randomize(model, 0.4, seed=0)
    table, before = model.token_embedding.weight.detach().clone(), model.n_params
    call(my_tie, model)
    embedding, output = model.token_embedding.weight, model.lm_head.weight
    for part, weight in (("token_embedding", embedding), ("head", output)):
        expect(tuple(weight.shape) == (30, 12),
                f"{name}: {part}.weight has shape {tuple(weight.shape)}, expected (30, 12). The "
                "two have one shape already: nothing is transposed.")
    expect(torch.equal(embedding, table),
            f"{name}: the token table has changed. It stays; the output layer's own tensor goes.")
    expect(torch.equal(output, table),
            f"{name}: the output layer does not hold the token table's numbers.")
    shared = output.data_ptr() == embedding.data_ptr()
    expect(output is embedding or not shared,
            f"{name}: memory is shared, but there are still two parameters, each with a gradient "
            "of its own. Set the parameter itself: head.weight = ...")
    expect(output is embedding,
            f"{name}: the numbers were copied. They are equal now and differ after the first step "
            "of training; the two must be one tensor.")
    expect(model.n_params == before - 30 * 12, f"{name}: the model counts {model.n_params:,} "
            f"parameters, expected {before - 30 * 12:,}.")
    model(torch.tensor([[1, 2]])).sum().backward()
    expect(embedding.grad is not None, f"{name}: the tied tensor gets no gradient; is it still a "
            "parameter that requires one?")
    done(name)


def check_own_generate(my_generate: Callable[..., list[int]]) -> None:
    """Exercise 4.5: `my_generate(model, prompt, n)` is the prompt and n greedy ids."""
    from helpers.generation import generate
    from helpers.gpt import GPT, GPTConfig

    name = "my_generate"
    if not is_started(my_generate, name):
        return
    config = GPTConfig(vocab_size=50, context_length=12, n_embd=32, n_head=4, n_layer=2,
                       dropout=0.3)
    model = GPT(config).double()
    randomize(model, 0.4, seed=0, norms=False)
    for prompt, n in (([1, 2, 3], 6), ([4], 0), ([5, 6], 30)):
        right = generate(model, prompt, n)
        for training in (False, True):
            model.train(training)
            given = list(prompt)
            result = call(my_generate, model, given, n)
            expect(isinstance(result, list) and all(type(i) is int for i in result),
                    f"{name}: expected a list of whole numbers, got {result!r:.60}. int() makes "
                    "one of a tensor of one number, .tolist() a list.")
            expect(given == prompt, f"{name}: it changed the prompt it was given; copy it first.")
            expect(n == 0 or result != right[len(prompt):],
                    f"{name}: the prompt is missing from the answer.")
            expect(len(result) == len(right), f"{name}: {len(prompt)} ids and {n} more should be "
                    f"{len(right)}, got {len(result)}.")
            expect(result[:len(prompt)] == prompt, f"{name}: the answer begins with the prompt.")
            if result != right and training:
                raise CheckFailed(f"{name}: in eval mode it is right, in train mode it is not. "
                                  "Dropout is on: call model.eval() first.")
            expect(result[:12] == right[:12], f"{name}: expected {right[:12]}, got {result[:12]}. "
                    "Take the scores of the last position, and the id with the highest.")
            expect(result == right, f"{name}: right until the context of 12 is full, then not. "
                    "Feed the last 12 ids, without a kv_cache.")
            expect(model.training == training,
                    f"{name}: the model came in {'train' if training else 'eval'} mode and is in "
                    f"{'eval' if training else 'train'} mode now. Put it back.")
    done(name)
