"""Checks of the exercises of chapter 4, the GPT."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from helpers.checks._core import (
    CheckFailed,
    RecordCalls,
    call,
    close,
    done,
    draw,
    expect,
    expect_function,
    expect_tensor,
    forbid,
    is_started,
    randomize,
)


def check_layer_norm(my_layer_norm: Callable[..., Tensor]) -> None:
    """Exercise 4.1: `my_layer_norm(x, weight, bias, eps)` is layer norm of the last dimension."""
    name = "my_layer_norm"
    if not is_started(my_layer_norm, name):
        return
    expect_function(my_layer_norm, name)
    for shape, eps in (((3, 4, 6), 1e-5), ((5, 9), 0.5), ((12,), 1e-5)):
        C = shape[-1]
        x, weight, bias = draw(0, *shape) * 2 + 1, draw(1, C), draw(2, C)
        given = x.clone()
        with RecordCalls() as calls:
            y = call(my_layer_norm, x, weight, bias, eps)
        ready = calls.names & {"mean", "nanmean", "var", "std", "var_mean", "std_mean", "norm",
                               "vector_norm", "layer_norm", "native_layer_norm", "rms_norm",
                               "batch_norm", "group_norm", "instance_norm", "normalize"}
        expect(not ready, f"{name}: it calls {', '.join(sorted(ready))}. The exercise allows sum, "
                          "arithmetic and powers.")
        y = expect_tensor(y, name, shape, torch.float32)
        expect(torch.equal(x, given),
               f"{name}: x itself was changed. Make a new tensor, without -= and **=.")
        centred = x - x.mean(-1, keepdim=True)
        variance = x.var(-1, unbiased=False, keepdim=True)
        std = (variance + eps).sqrt()
        unbiased = (x.var(-1, keepdim=True) + eps).sqrt()
        whole = (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt()
        if close(y, centred / std * weight + bias):
            continue
        mistakes = [
            (centred / unbiased * weight + bias,
             "the variance divides by C - 1. Layer norm divides by C, the count."),
            (centred / std, "weight and bias are not applied."),
            (centred / std * weight, "the bias is not added."),
            (centred / std + bias, "the weight is not applied."),
            ((centred / std + bias) * weight,
             "the bias is added before the multiplication; it comes last."),
            (centred / (variance.sqrt() + eps) * weight + bias,
             "eps is added to the root; it belongs under it, to the variance."),
            (centred / variance.sqrt() * weight + bias, "eps is not used."),
            (centred / (variance + eps) * weight + bias,
             "it divides by the variance; the standard deviation is its root."),
            (x / std * weight + bias, "the mean is not subtracted from x."),
            (centred / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias,
             "the variance is the mean of the squared distances from the mean, not of x squared."),
            (whole * weight + bias,
             "mean and variance are taken over the whole tensor. Each vector has its own: sum over "
             "dim=-1, with keepdim=True."),
        ]
        for wrong, message in mistakes:
            expect(not close(y, wrong), f"{name}: {message}")
        raise CheckFailed(f"{name}: wrong values for x of shape {shape} and eps {eps}. Subtract "
                          "the mean, divide by the root of variance plus eps, multiply by the "
                          "weight, add the bias.")
    flat = call(my_layer_norm, torch.full((2, 4), 3.0), torch.ones(4), torch.zeros(4))
    flat = expect_tensor(flat, name, (2, 4))
    expect(bool(flat.isfinite().all()), f"{name}: a vector of equal components gives "
                                        f"{flat[0, 0].item()}. eps under the root prevents that.")
    done(name)


def check_parameter_count(my_count: Callable[..., int]) -> None:
    """Exercise 4.2: `my_count(config)` is the number of parameters of GPT(config)."""
    from helpers.gpt import GPT, GPT2_CONFIGS, GPTConfig

    name = "my_count"
    if not is_started(my_count, name):
        return
    expect_function(my_count, name)

    def refuse(*_: Any, **__: Any) -> None:
        raise CheckFailed(f"{name}: a module of PyTorch is built. The exercise is to count from "
                          "the hyperparameters alone.")

    shape = {"vocab_size": 101, "context_length": 23, "n_embd": 12, "n_head": 3, "n_layer": 5}
    configs = [GPTConfig(**shape), GPTConfig(**shape, tie_word_embeddings=False),
               GPTConfig(**shape, qkv_bias=False),
               GPTConfig(**shape, tie_word_embeddings=False, qkv_bias=False),
               *GPT2_CONFIGS.values()]
    for config in configs:
        with mock.patch.object(nn.Module, "__init__", refuse):
            value = call(my_count, config)
        expect(value is not None, f"{name} returned None: is there a return at its end?")
        expect(isinstance(value, numbers.Integral) and not isinstance(value, bool),
               f"{name}: expected a whole number (int), got {type(value).__name__}. // divides "
               "without making a float.")
        with torch.device("meta"):
            right = GPT(config).n_params
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        likely = {
            V * C: "the output layer is counted, though it is the token embedding"
            if value > right else "the token embedding or the untied output layer",
            config.context_length * C: "the position embedding",
            3 * C * L: "the biases of the qkv projections, which qkv_bias switches",
            4 * C * L: "weight and bias of the two norms in each block",
            2 * C: "the final norm, above the blocks",
            4 * C * L + 2 * C: "all the norms, a weight and a bias each",
            C * L: "the bias of the output projection, or of the down projection",
            2 * C * L + 2 * C: "the biases of the norms", 2 * C * L: "one norm in each block",
            5 * C * L: "the biases of the feed-forward networks",
        }
        difference = value - right
        hint = likely.get(abs(difference), "")
        hint = f" That is the size of this: {hint}." if hint else " Go through the figure."
        which = f"tie_word_embeddings={config.tie_word_embeddings}, qkv_bias={config.qkv_bias}"
        expect(difference == 0, f"{name}: {abs(difference):,} too "
                                f"{'many' if difference > 0 else 'few'} for a model with "
                                f"n_layer={L}, n_embd={C}, {which}.{hint}")
    done(name)


def check_parallel_block(my_parallel: Callable[..., Tensor]) -> None:
    """Exercise 4.3: `my_parallel(block, x)` adds attention and feed-forward of norm_1(x) to x."""
    from helpers.gpt import GPTConfig, TransformerBlock

    name = "my_parallel"
    if not is_started(my_parallel, name):
        return
    expect_function(my_parallel, name)
    config = GPTConfig(vocab_size=10, context_length=8, n_embd=12, n_head=3, n_layer=1)
    with torch.random.fork_rng(devices=[]):
        block = TransformerBlock(config).eval()
    randomize(block, 0.4, seed=0)
    x = draw(1, 2, 5, 12)
    given = x.clone()
    with torch.no_grad():
        y = expect_tensor(call(my_parallel, block, x), name, (2, 5, 12), torch.float32)
        expect(torch.equal(x, given), f"{name}: x itself was changed; += does that. Write x + ...")
        n, n_2 = block.norm_1(x), block.norm_2(x)
        attended, computed = block.attention(n), block.feed_forward(n)
        mistakes = [
            (attended + computed, "the residual connection is missing: x itself is a term of the "
                                  "sum."),
            (n + attended + computed, "the residual connection carries the normalized x. It "
                                      "carries x as it came."),
            (2 * x + attended + computed, "x is added twice; both outputs go onto one stream."),
            (block(x), "this is the block as it was: the feed-forward network reads the output of "
                       "attention."),
            (x + block.feed_forward(attended),
             "the feed-forward network reads the output of attention, not the normalized x."),
            (x + attended + block.feed_forward(n_2),
             "the feed-forward network reads norm_2. Here one norm serves both."),
            (x + attended + block.feed_forward(x),
             "the feed-forward network reads x without a norm."),
            (x + block.attention(x) + block.feed_forward(x), "nothing is normalized."),
            (x + attended, "the feed-forward network is missing."),
            (x + computed, "attention is missing."),
        ]
        for wrong, message in mistakes:
            expect(not close(y, wrong), f"{name}: {message}")
        expect(close(y, x + attended + computed),
               f"{name}: wrong values. Normalize x once with norm_1, give the result to attention "
               "and to the feed-forward network, and add both outputs to x.")
    done(name)


def check_tied(my_tie: Callable[..., None]) -> None:
    """Exercise 4.4: after `my_tie(model)` the output layer uses the token embedding's tensor."""
    from helpers.gpt import GPT, GPTConfig

    name = "my_tie"
    if not is_started(my_tie, name):
        return
    expect_function(my_tie, name)
    config = GPTConfig(vocab_size=30, context_length=8, n_embd=12, n_head=3, n_layer=1,
                       tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        model = GPT(config)
    randomize(model, 0.4, seed=0)
    original, before = model.token_embedding.weight, model.n_params
    values = original.detach().clone()
    with forbid(my_tie, GPT.tie_weights, f"{name}: it calls GPT.tie_weights, which the exercise "
                                         "asks to do without."):
        result = call(my_tie, model)
    expect(isinstance(getattr(model, "lm_head", None), nn.Linear),
           f"{name}: the output layer is not a linear layer any more. Leave the layer, and replace "
           "its weight.")
    weights = {}
    for part in ("token_embedding", "lm_head"):
        weights[part] = getattr(getattr(model, part, None), "weight", None)
        expect(isinstance(weights[part], Tensor),
               f"{name}: model.{part} has no weight any more. Both layers stay; one of their "
               "tensors is replaced.")
        expect(tuple(weights[part].shape) == (30, 12),
               f"{name}: {part}.weight has shape {tuple(weights[part].shape)}, expected (30, 12). "
               "The two have the same shape already: nothing is transposed.")
    embedding, output = weights["token_embedding"], weights["lm_head"]
    tied_elsewhere = isinstance(result, GPT) and result is not model
    expect(not tied_elsewhere, f"{name}: it returns another model. The one that it was given is to "
                               "be changed.")
    expect(torch.equal(embedding, values),
           f"{name}: the token embedding has changed. It stays; the output layer's own tensor "
           "goes.")
    expect(torch.equal(output, values),
           f"{name}: the output layer does not hold the values of the token embedding.")
    shared = output.data_ptr() == embedding.data_ptr()
    expect(output is embedding or not shared,
           f"{name}: memory is shared, but there are still two parameters, each with a gradient "
           "of its own. Assign the parameter itself: model.lm_head.weight = ...")
    expect(output is embedding,
           f"{name}: the values were copied. They are equal now and differ after the first step "
           "of training; the two must be one tensor.")
    expect(embedding is original,
           f"{name}: one tensor, but a new one. An optimizer that was made before would go on with "
           "the old token embedding; that tensor is the one to use.")
    expect(model.n_params == before - 30 * 12, f"{name}: the model counts {model.n_params:,} "
                                               f"parameters, expected {before - 30 * 12:,}.")
    model(torch.tensor([[1, 2]])).sum().backward()
    expect(embedding.grad is not None, f"{name}: the tied tensor gets no gradient. Is it still a "
                                       "parameter that requires one?")
    done(name)


def check_own_generate(my_generate: Callable[..., list[int]]) -> None:
    """Exercise 4.5: `my_generate(model, prompt, n)` is the prompt and n greedy ids."""
    from helpers import generation
    from helpers.gpt import GPT, GPTConfig

    name = "my_generate"
    if not is_started(my_generate, name):
        return
    expect_function(my_generate, name)
    config = GPTConfig(vocab_size=50, context_length=12, n_embd=32, n_head=4, n_layer=2,
                       dropout=0.3)
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).double()
    randomize(model, 0.4, seed=0, norms=False)
    for prompt, n in (([1, 2, 3], 6), ([4], 0), ([5, 6], 30)):
        right = generation.generate(model, prompt, n)
        for training in (False, True):
            model.train(training)
            given = list(prompt)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)                       # of dropout, where it was left on
                result = _generate_alone(my_generate, model, given, n)
            expect(result is not None, f"{name} returned None: is there a return at its end?")
            expect(isinstance(result, list) and all(type(i) is int for i in result),
                   f"{name}: expected a list of whole numbers, got {result!r:.60}. int() makes "
                   "one of a tensor with one element, .tolist() a list.")
            expect(given == prompt, f"{name}: it changed the prompt it was given; copy it first.")
            expect(n == 0 or result != right[len(prompt):],
                   f"{name}: the prompt is missing from the answer.")
            expect(len(result) == len(right), f"{name}: {len(prompt)} ids and {n} more should be "
                                              f"{len(right)}, got {len(result)}.")
            expect(result[:len(prompt)] == prompt, f"{name}: the answer begins with the prompt.")
            expect(result == right or not training,
                   f"{name}: in eval mode it is right, in train mode it is not. Dropout is on: "
                   "call model.eval() first.")
            expect(result[:12] == right[:12], f"{name}: expected {right[:12]}, got {result[:12]}. "
                   "Take the logits of the last position, and the id with the largest.")
            expect(result == right, f"{name}: right until the context of 12 is full, then not. "
                                    "Feed the last 12 ids, without a kv_cache.")
            expect(model.training == training,
                   f"{name}: the model came in {'train' if training else 'eval'} mode and is in "
                   f"{'eval' if training else 'train'} mode now. Put it back.")
    done(name)


def _generate_alone(my_generate: Callable, model: nn.Module, prompt: list[int], n: int) -> Any:
    """Call the answer while the functions that the exercise excludes refuse to work."""
    from helpers import generation

    name = "my_generate"
    excluded = generation.generate, generation.generate_stream, generation.next_token_logits
    with (forbid(my_generate, excluded[0], f"{name}: it calls generate. Write the loop yourself."),
          forbid(my_generate, excluded[1], f"{name}: it calls generate_stream."),
          forbid(my_generate, excluded[2],
                 f"{name}: it calls next_token_logits. Call the model: model(tokens)[0, -1].")):
        return call(my_generate, model, prompt, n)
