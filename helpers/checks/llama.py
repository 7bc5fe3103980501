"""Checks of the exercises of chapter 8, the Llama."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.checks._core import (
    CheckFailed,
    call,
    close,
    done,
    draw,
    expect,
    expect_function,
    expect_number,
    expect_tensor,
    is_started,
    randomize,
)
from helpers.llama import Llama, LlamaConfig

_TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def _rotated(x: Tensor, positions: Tensor, n_rot: int, divisor: int, base: float, sign: float = 1.0,
             interleaved: bool = False, start: int = 0) -> Tensor:
    """Rotary positions on n_rot components from start, with the mistakes that a check looks for."""
    part = x[..., start:start + n_rot].double()
    first, second = ((part[..., 0::2], part[..., 1::2]) if interleaved
                     else part.chunk(2, dim=-1))
    angles = sign * positions[:, None].double() * base ** (
        -2 * torch.arange(n_rot // 2).double() / divisor)
    cos, sin = angles.cos(), angles.sin()
    pair = [first * cos - second * sin, second * cos + first * sin]
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    whole = x.double()
    return torch.cat([whole[..., :start], turned, whole[..., start + n_rot:]], dim=-1)


def check_partial_rope(my_partial_rope: Callable[..., Tensor]) -> None:
    """Exercise 8.1: rotary positions on a part of each head."""
    name = "my_partial_rope"
    if not is_started(my_partial_rope, name):
        return
    expect_function(my_partial_rope, name)
    cases = [(8, 4, 10_000.0, [0, 1, 2]), (8, 8, 100.0, [0, 1, 2]), (6, 2, 10.0, [5, 6, 7, 8]),
             (8, 4, 50.0, [3, 3, 0]), (4, 0, 10.0, [1, 2])]
    for hs, n_rot, base, places in cases:
        x, positions = draw(1, 2, 3, len(places), hs), torch.tensor(places)
        kept = x.clone()
        y = call(my_partial_rope, x, positions, n_rot, base)
        where = f"{name}, head size {hs}, n_rot {n_rot}, positions {places}"
        expect(torch.equal(x, kept), f"{name}: x has changed. Make a new tensor.")
        expect_tensor(y, where, tuple(x.shape))
        expect(y.dtype == torch.float32, f"{where}: x is float32, the result is {y.dtype}.")
        right = _rotated(x, positions, n_rot, max(n_rot, 1), base)
        arange = torch.arange(len(places))

        def says(wrong: Tensor, message: str, y: Tensor = y, right: Tensor = right,
                 where: str = where) -> None:
            expect(close(y, right.float()) or not close(y, wrong.float()), f"{where}: {message}")

        if n_rot:
            says(_rotated(x, positions, n_rot, hs, base), "the exponent is -2i / n_rot: only the "
                 "rotated components count, not the whole head.")
            says(_rotated(x, positions, n_rot, n_rot, base, sign=-1.0), "the rotation goes the "
                 "wrong way. The first component becomes x cos - y sin.")
            says(_rotated(x, positions, n_rot, n_rot, base, interleaved=True), "this is the "
                 "interleaved layout. Here component i and component i + n_rot / 2 are a pair.")
            says(_rotated(x, arange, n_rot, n_rot, base), "the positions are counted from 0, "
                 "instead of taken from the argument.")
            says(_rotated(x, positions, n_rot, n_rot, base, start=hs - n_rot), "the last "
                 "components are rotated. Rotate the first n_rot.")
        says(_rotated(x, positions, hs, hs, base), "the whole head is rotated. All after the first "
             "n_rot components stay as they are.")
        expect(close(y[..., n_rot:], x[..., n_rot:]),
               f"{where}: the components after the first n_rot have changed.")
        length = y[..., :n_rot].norm(dim=-1), x[..., :n_rot].norm(dim=-1)
        expect(close(*length), f"{where}: a rotation does not change the length of a vector, and "
                               "this one does. Is the pair of component i component i + n_rot / 2?")
        expect(close(y, right.float()), f"{where}: wrong values. The pair i turns by the angle "
                                        "position * base^(-2i / n_rot).")
    x = draw(2, 1, 1, 2, 4).bfloat16()
    y = call(my_partial_rope, x, torch.tensor([1, 2]), 2, 10.0)
    expect(isinstance(y, Tensor) and y.dtype == torch.bfloat16,
           f"{name}: x is bfloat16 and the result is {getattr(y, 'dtype', type(y).__name__)}. "
           "Return x's dtype.")
    done(name)


def check_kv_cache_bytes(my_cache_bytes: Callable[..., int]) -> None:
    """Exercise 8.2: the memory of a KV cache."""
    name = "my_cache_bytes"
    if not is_started(my_cache_bytes, name):
        return
    expect_function(my_cache_bytes, name)
    shape = {"vocab_size": 100, "context_length": 1000, "n_embd": 64, "n_head": 8, "n_layer": 3}
    cases = [(LlamaConfig(**shape), 1, 10, 4), (LlamaConfig(**shape, n_kv_head=2), 1, 10, 4),
             (LlamaConfig(**shape, n_kv_head=1), 5, 7, 2),
             (LlamaConfig(**shape, n_kv_head=4, head_size=24), 2, 9, 2),
             (LlamaConfig(**shape, n_kv_head=2, sliding_window=6), 2, 9, 2),
             (LlamaConfig(**shape, n_kv_head=2, sliding_window=60), 2, 9, 2),
             (LlamaConfig(**shape, n_kv_head=2), 1, 0, 2)]
    for c, B, T, size in cases:
        where = (f"{name} for n_layer {c.n_layer}, n_head {c.n_head}, n_kv_head {c.n_kv_head}, "
                 f"head_size {c.head_size}, sliding_window {c.sliding_window}, batch_size {B}, "
                 f"n_tokens {T}, {size} bytes an element")
        value = expect_number(call(my_cache_bytes, c, B, T, size), where)
        window = T if c.sliding_window is None else min(T, c.sliding_window)
        one = c.n_layer * B * c.head_size * window * size
        right = 2 * one * c.n_kv_head
        each = right / max(window, 1)                            # of a position
        wrong = {
            one * c.n_kv_head: "this is the size of the keys alone; the values are as many.",
            2 * one * c.n_head: "this counts a key and a value for each query head. The cache has "
                                "n_kv_head heads.",
            right / c.n_layer: f"this is the cache of one block; there are {c.n_layer}.",
            right / B: f"this is the cache of one row; there are {B}.",
            right / size: f"this is the number of elements; each takes {size} bytes.",
            8 * right: "these are bits; a byte has eight.",
            right / c.head_size * (c.n_embd // c.n_head): "head_size is a field of its own and "
                                                          "need not be n_embd / n_head.",
            each * T: "with a sliding window no more positions are kept than the window has.",
            each * (c.sliding_window or T): "the cache holds only the tokens that there are; the "
                                            "window is the most.",
            each * c.context_length: "the cache holds n_tokens positions, not the whole "
                                     "context_length.",
        }
        for found, message in wrong.items():
            expect(value == right or value != found, f"{where}: {value:g}: {message}")
        expect(value == right, f"{where}: expected {right:g}, got {value:g}.")
        expect(value == int(value), f"{where}: a whole number of bytes.")
    done(name)


def _model(seed: int, **changes: Any) -> Llama:
    """A tiny Llama in which no two weights are equal."""
    shape = {"vocab_size": 11, "context_length": 8, "n_embd": 16, "n_head": 4, "n_layer": 2,
             "n_kv_head": 2, "intermediate_size": 24}
    model = Llama(LlamaConfig(**shape | changes)).eval()
    randomize(model, 0.3, seed)
    return model


def _logits(model: Any, name: str) -> Tensor:
    """What the answer's model makes of two short rows."""
    expect(isinstance(model, Llama), f"{name}: expected a Llama, got {type(model).__name__}.")
    with torch.no_grad():
        logits = call(model.eval(), _TOKENS)
    expect(isinstance(logits, Tensor), f"{name}: the model returns no tensor of logits.")
    return logits


def check_expand_kv_heads(my_expand: Callable[[Llama], Llama]) -> None:
    """Exercise 8.3: grouped-query attention as multi-head attention."""
    name = "my_expand"
    if not is_started(my_expand, name):
        return
    expect_function(my_expand, name)
    cases = [{"n_kv_head": 2}, {"n_kv_head": 1}, {"n_kv_head": 2, "head_size": 6},
             {"n_kv_head": 2, "tie_word_embeddings": False}, {"n_kv_head": 2, "qk_norm": True},
             {"n_kv_head": 4}]
    for seed, changes in enumerate(cases):
        model, where = _model(seed, **changes), f"{name}, a model with {changes}"
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        expected, config = _logits(model, where), model.config
        found = call(my_expand, model)
        expect(model.config == config and model.state_dict().keys() == kept.keys() and all(
            torch.equal(value, kept[key]) for key, value in model.state_dict().items()),
            f"{name}: the model that it was given has changed. Make a new Llama.")
        expect(found is not model, f"{name}: this is the model that it was given. Make a new one.")
        expect(isinstance(found, Llama), f"{name}: expected a Llama, got {type(found).__name__}.")
        expect(found.config.n_kv_head == config.n_head,
               f"{where}: the config says n_kv_head {found.config.n_kv_head}, expected "
               f"{config.n_head}.")
        different = {key for key in vars(config)
                     if getattr(found.config, key) != getattr(config, key)} - {"n_kv_head"}
        expect(not different, f"{where}: the config differs in {', '.join(sorted(different))} too. "
                              "dataclasses.replace changes one field.")
        hs, n_rep = config.head_size, config.n_head // config.n_kv_head
        for i, block in enumerate(found.blocks):
            for which in ("k_projection", "v_projection"):
                old = kept[f"blocks.{i}.attention.{which}.weight"]
                new = getattr(block.attention, which).weight
                expect_tensor(new.detach(), f"{where}: {which}.weight",
                              (config.n_head * hs, config.n_embd))
                expect(n_rep == 1 or config.n_kv_head == 1 or not close(new, old.repeat(n_rep, 1)),
                       f"{where}: the heads of {which} are in the order 0, 1, 0, 1. Query heads "
                       "0 and 1 have key-value head 0 in common: the order is 0, 0, 1, 1.")
                expect(n_rep == 1 or not close(new, old.repeat_interleave(n_rep, dim=0)),
                       f"{where}: single rows of {which} are repeated. A head is a block of "
                       f"head_size = {hs} rows, which stay together.")
        expect(close(_logits(found, where), expected),
               f"{where}: the logits are not those of the model that was given.")
        tied = found.lm_head.weight is found.token_embedding.weight
        expect(tied == config.tie_word_embeddings,
               f"{where}: the output layer and the token embedding should "
               f"{'be one tensor' if config.tie_word_embeddings else 'be two tensors'}.")
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        expect(not own & {p.untyped_storage().data_ptr() for p in found.parameters()},
               f"{where}: the new model has memory in common with the old one: training one would "
               "change the other. Copy the weights.")
    done(name)


def _meta_weights(model: Llama) -> dict[str, Tensor]:
    """The weights under the names of Meta's release, rows of q and k in the interleaved layout."""
    names = {"attention.q_projection": "attention.wq", "attention.k_projection": "attention.wk",
             "attention.v_projection": "attention.wv", "attention.output_projection":
             "attention.wo", "feed_forward.gate_projection": "feed_forward.w1",
             "feed_forward.down_projection": "feed_forward.w2", "feed_forward.up_projection":
             "feed_forward.w3", "norm_1": "attention_norm", "norm_2": "ffn_norm"}
    weights, hs = {}, model.config.head_size
    for key, value in model.state_dict().items():
        if key.startswith("blocks."):
            _, i, *part, _ = key.split(".")
            if part[-1] in ("q_projection", "k_projection"):
                value = value.view(-1, 2, hs // 2, value.shape[-1]).transpose(1, 2).reshape(
                    value.shape)
            weights[f"layers.{i}.{names['.'.join(part)]}.weight"] = value
    weights |= {"tok_embeddings.weight": model.token_embedding.weight.detach(),
                "norm.weight": model.final_norm.weight.detach()}
    if not model.config.tie_word_embeddings:
        weights["output.weight"] = model.lm_head.weight.detach()
    return {key: value.clone().contiguous() for key, value in weights.items()}


def _config_json(config: LlamaConfig) -> str:
    return json.dumps({
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.n_embd,
        "max_position_embeddings": config.context_length, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_size, "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base, "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings})


def _open(answer: Callable[[Path], Any], model: Llama, weights: dict[str, Tensor]) -> Any:
    """What the answer makes of a folder with the config of the model and these weights."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "config.json").write_text(_config_json(model.config), encoding="utf-8")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return answer(folder)


def check_load_meta(my_load_meta: Callable[[Path], Llama]) -> None:
    """Exercise 8.4: a folder whose weights have other names and another layout."""
    name = "my_load_meta"
    if not is_started(my_load_meta, name):
        return
    expect_function(my_load_meta, name)
    for seed, changes in enumerate(({"head_size": 8},
                                    {"tie_word_embeddings": False, "n_kv_head": 1},
                                    {"head_size": 6, "n_kv_head": 4, "n_layer": 12})):
        model, where = _model(seed, **changes), f"{name}, a model with {changes}"
        weights = _meta_weights(model) | {"rope.freqs": draw(0, model.config.head_size // 2)}
        found = call(partial(_open, my_load_meta), model, weights)
        logits = _logits(found, where)
        expect(found.config == model.config, f"{where}: the config of the model is not that of "
                                             "config.json.")
        state = found.state_dict()
        for key, right in model.state_dict().items():
            value = state[key]
            if close(value, right):
                continue
            kind = key.split(".")[-2]
            if kind in ("q_projection", "k_projection"):
                theirs = weights[f"layers.{key.split('.')[1]}.attention.w{kind[0]}.weight"]
                expect(not close(value, theirs), f"{where}: {key} is in the interleaved layout: "
                       "reorder its rows with interleaved_to_half_split.")
                expect(kind == "q_projection", f"{where}: the rows of {key} are in a wrong order. "
                       "It has n_kv_head heads, not n_head.")
            swaps = {"gate_projection": "up_projection", "up_projection": "gate_projection",
                     "norm_1": "norm_2", "norm_2": "norm_1", "v_projection": "output_projection"}
            other = key.replace(kind, swaps.get(kind, kind))
            expect(other == key or not close(value, model.state_dict()[other]),
                   f"{where}: {key} holds the weights of {other}. w1 is the gate, w3 the other "
                   "projection upwards; attention_norm comes first.")
            raise CheckFailed(f"{where}: {key} does not have its weights.")
        expect(close(logits, _logits(model, where)), f"{where}: the logits are wrong.")
        tied = found.lm_head.weight is found.token_embedding.weight
        expect(tied == model.config.tie_word_embeddings,
               f"{where}: output layer and token embedding should be "
               f"{'one tensor' if not tied else 'two tensors'}.")
    model = _model(9)
    weights = _meta_weights(model)
    missing = {k: v for k, v in weights.items() if k != "layers.1.feed_forward.w3.weight"}
    for which, changed, key in (("lacks", missing, "layers.1.feed_forward.w3.weight"),
                                ("has an unknown", weights | {"layers.0.attention.wz.weight":
                                 torch.ones(2)}, "layers.0.attention.wz.weight")):
        try:
            _open(my_load_meta, model, changed)
        except Exception as error:
            expect(isinstance(error, ValueError), f"{name}: the file {which} {key}; expected a "
                   f"ValueError, got {type(error).__name__}.")
            expect(key in str(error), f"{name}: the file {which} {key}, and the message of the "
                                      f"ValueError does not say so: {error}")
        else:
            raise CheckFailed(f"{name}: the file {which} {key}, and no error was raised.")
    done(name)


def check_router(my_route: Callable[[Tensor, int, int], Tensor]) -> None:
    """Exercise 8.5: a router whose experts have a capacity."""
    name = "my_route"
    if not is_started(my_route, name):
        return
    expect_function(my_route, name)
    same = torch.tensor([[0.0, 2.0, 1.0]] * 4) + draw(5, 4, 3) * 0.01      # all prefer expert 1
    cases = [(draw(1, 6, 4), 2, 6), (draw(2, 5, 3), 1, 5), (draw(3, 4, 3), 3, 4),
             (same, 1, 2), (same, 2, 1), (draw(8, 9, 4), 2, 3), (draw(6, 5, 4) * 4, 2, 0)]
    for logits, top_k, capacity in cases:
        N, E = logits.shape
        where = f"{name}, {N} tokens, {E} experts, top_k {top_k}, capacity {capacity}"
        kept = logits.clone()
        gates = call(my_route, logits, top_k, capacity)
        expect(torch.equal(logits, kept), f"{name}: the logits that it was given have changed.")
        expect(not isinstance(gates, Tensor) or gates.shape != (N, top_k) or top_k == E,
               f"{where}: a routing weight for each choice, {(N, top_k)}; expected one for each "
               f"expert, {(N, E)}, zero where the token does not go.")
        expect_tensor(gates, where, (N, E))
        expect(gates.is_floating_point(), f"{where}: the routing weights are {gates.dtype}.")
        expect(bool(gates.isfinite().all()), f"{where}: a routing weight is not finite.")
        chosen = logits >= logits.topk(top_k, dim=-1).values[:, -1:]
        right = logits.masked_fill(~chosen, float("-inf")).softmax(dim=-1)
        over_all = logits.softmax(dim=-1) * chosen
        fits = chosen & (chosen.cumsum(dim=0) <= capacity)
        mask = gates != 0
        expect(bool((mask <= chosen).all()), f"{where}: a token goes to an expert that is not "
                                             "among its top_k.")
        load = mask.sum(dim=0)
        expect(not torch.equal(mask, chosen) or torch.equal(chosen, fits),
               f"{where}: an expert gets {int(load.max())} tokens. Drop those over the capacity.")
        expect(int(load.max()) <= capacity,
               f"{where}: an expert gets {int(load.max())} tokens; {capacity} is the most.")
        last = chosen & (chosen.flip(0).cumsum(dim=0).flip(0) <= capacity)
        expect(torch.equal(mask, fits) or not torch.equal(mask, last),
               f"{where}: the last tokens are kept. The first ones come first.")
        expect(torch.equal(mask, fits), f"{where}: wrong tokens are kept. Each expert takes, in "
               "the order of the tokens, the first `capacity` ones that chose it.")
        expect(close(gates, right * fits) or not close(gates, over_all * fits),
               f"{where}: the routing weights are probabilities over all experts. Take the "
               "softmax over the chosen logits alone.")
        again = right * fits / (right * fits).sum(dim=-1, keepdim=True).clamp(min=1e-9)
        expect(close(gates, right * fits) or not close(gates, again),
               f"{where}: the routing weights were normalized again after the drop. A dropped "
               "choice is lost; the others keep their value.")
        expect(close(gates, right * fits), f"{where}: wrong routing weights. Take the softmax "
                                           "over the chosen logits of each token.")
    done(name)

