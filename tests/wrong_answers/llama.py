"""Typical wrong answers to the exercises of chapter 8, and right ones in other forms."""

import dataclasses
import json

import torch
from safetensors.torch import load_file
from torch import nn

from helpers.llama import (
    Llama,
    LlamaConfig,
    apply_rope,
    apply_rope_interleaved,
    interleaved_to_half_split,
    rope_frequencies,
    rope_tables,
)

# Rotary positions on a part of each head


def partial_rope(x, positions, n_rot, base, rotate=apply_rope, sign=1.0):
    if not n_rot:
        return x.clone()
    tables = rope_tables(positions, sign * rope_frequencies(n_rot, base))
    return torch.cat([rotate(x[..., :n_rot], *tables), x[..., n_rot:]], dim=-1)


def rope_backwards(x, positions, n_rot, base):
    return partial_rope(x, positions, n_rot, base, sign=-1.0)


def rope_interleaved(x, positions, n_rot, base):
    return partial_rope(x, positions, n_rot, base, rotate=apply_rope_interleaved)


def rope_from_zero(x, positions, n_rot, base):
    return partial_rope(x, torch.arange(len(positions)), n_rot, base)


def rope_whole_head(x, positions, n_rot, base):
    return partial_rope(x, positions, x.shape[-1], base)


def rope_last_components(x, positions, n_rot, base):
    rest = x.shape[-1] - n_rot
    return torch.cat([x[..., :rest], partial_rope(x[..., rest:], positions, n_rot, base)], dim=-1)


def rope_exponent_of_the_head(x, positions, n_rot, base):
    tables = rope_tables(positions, rope_frequencies(x.shape[-1], base)[:n_rot // 2])
    return torch.cat([apply_rope(x[..., :n_rot], *tables), x[..., n_rot:]], dim=-1)


def rope_without_the_rest(x, positions, n_rot, base):
    return partial_rope(x, positions, n_rot, base)[..., :n_rot]


def rope_scaled(x, positions, n_rot, base):
    y = partial_rope(x, positions, n_rot, base)
    y[..., :n_rot] *= 2
    return y


def rope_other_pairs(x, positions, n_rot, base):
    y = partial_rope(x.roll(1, dims=-1), positions, n_rot, base).roll(-1, dims=-1)
    return torch.cat([y[..., :n_rot], x[..., n_rot:]], dim=-1)


def rope_in_place(x, positions, n_rot, base):
    x[..., :n_rot] = partial_rope(x, positions, n_rot, base)[..., :n_rot]
    return x


def rope_float32(x, positions, n_rot, base):
    return partial_rope(x.float(), positions, n_rot, base)


def rope_by_complex_numbers(x, positions, n_rot, base):
    first, second = x[..., :n_rot].float().chunk(2, dim=-1)
    angles = positions[:, None] * base ** (-torch.arange(0, n_rot, 2) / max(n_rot, 1))
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., n_rot:]], dim=-1).to(x.dtype)


# The memory of a cache


def cache_bytes(config, batch_size, n_tokens, bytes_per_element):
    kept = min(n_tokens, config.sliding_window or n_tokens)
    return (2 * config.n_layer * batch_size * config.n_kv_head * config.head_size * kept
            * bytes_per_element)


def cache_keys_alone(c, B, T, size):
    return cache_bytes(c, B, T, size) // 2


def cache_of_all_heads(c, B, T, size):
    return cache_bytes(dataclasses.replace(c, n_kv_head=c.n_head), B, T, size)


def cache_of_one_block(c, B, T, size):
    return cache_bytes(c, B, T, size) // c.n_layer


def cache_of_one_row(c, B, T, size):
    return cache_bytes(c, 1, T, size)


def cache_numbers(c, B, T, size):
    return cache_bytes(c, B, T, 1)


def cache_bits(c, B, T, size):
    return 8 * cache_bytes(c, B, T, size)


def cache_of_n_embd(c, B, T, size):
    return cache_bytes(c, B, T, size) // c.head_size * (c.n_embd // c.n_head)


def cache_without_window(c, B, T, size):
    return cache_bytes(dataclasses.replace(c, sliding_window=None), B, T, size)


def cache_of_the_whole_window(c, B, T, size):
    return cache_bytes(c, B, c.sliding_window or T, size)


def cache_of_the_context(c, B, T, size):
    return cache_bytes(c, B, c.context_length, size)


def cache_measured(c, B, T, size):
    """Right: by the shape of a cache that is filled."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[size]
    kept = T if c.sliding_window is None else min(T, c.sliding_window)
    keys = torch.zeros(c.n_layer, 2, B, c.n_kv_head, kept, c.head_size, dtype=dtype)
    return keys.nbytes


# Key-value heads expanded


def repeat_heads(weight, n_rep, head_size):
    heads = weight.view(-1, head_size, weight.shape[-1])
    return heads.repeat_interleave(n_rep, dim=0).flatten(0, 1)


def expand(model, repeat=repeat_heads, **changes):
    config = dataclasses.replace(model.config, n_kv_head=model.config.n_head, **changes)
    n_rep, state = model.config.n_head // model.config.n_kv_head, model.state_dict()
    for key, value in state.items():
        if "k_projection" in key or "v_projection" in key:
            state[key] = repeat(value, n_rep, config.head_size)
    new = Llama(config)
    new.load_state_dict(state)
    return new


def expand_tiled(model):
    return expand(model, lambda weight, n_rep, hs: weight.repeat(n_rep, 1))


def expand_rows(model):
    return expand(model, lambda weight, n_rep, hs: weight.repeat_interleave(n_rep, dim=0))


def expand_untied(model):
    return expand(model, tie_word_embeddings=False)


def expand_other_config(model):
    return expand(model, context_length=16)


def expand_in_place(model):
    new = expand(model)
    model.load_state_dict({k: v * 0 for k, v in model.state_dict().items()})
    return new


def expand_config_as_before(model):
    new = expand(model)
    new.config = model.config
    return new


def expand_not_at_all(model):
    return Llama(model.config)


def expand_keys_alone(model):
    new = expand(model)
    for block in new.blocks:
        nn.init.normal_(block.attention.v_projection.weight)
    return new


def expand_same_memory(model):
    new = expand(model)
    new.token_embedding.weight = model.token_embedding.weight
    new.tie_weights()
    return new


def expand_the_same(model):
    return model


def expand_state(model):
    return expand(model).state_dict()


def expand_by_index(model):
    """Right: each query head takes the rows of its key-value head."""
    c = model.config
    rows = torch.cat([torch.arange(c.head_size) + i * c.n_kv_head // c.n_head * c.head_size
                      for i in range(c.n_head)])
    return expand(model, lambda weight, n_rep, hs: weight[rows])


# A folder with Meta's names


PARTS = {"attention.wq": "attention.q_projection", "attention.wk": "attention.k_projection",
         "attention.wv": "attention.v_projection", "attention.wo": "attention.output_projection",
         "feed_forward.w1": "feed_forward.gate_projection", "attention_norm": "norm_1",
         "feed_forward.w2": "feed_forward.down_projection", "ffn_norm": "norm_2",
         "feed_forward.w3": "feed_forward.up_projection"}


def load(folder, parts=PARTS, reorder=("wq", "wk"), kv_heads=True, strict=True, tie=None,
         **changes):
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(raw["vocab_size"], raw["max_position_embeddings"], raw["hidden_size"],
                         raw["num_attention_heads"], raw["num_hidden_layers"],
                         raw["num_key_value_heads"], raw["intermediate_size"],
                         head_size=raw["head_dim"], tie_word_embeddings=raw["tie_word_embeddings"])
    found = load_file(folder / "model.safetensors")
    found.pop("rope.freqs", None)
    model = Llama(dataclasses.replace(config, **changes))
    names = {"tok_embeddings.weight": "token_embedding.weight", "norm.weight": "final_norm.weight"}
    if not config.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for i in range(config.n_layer):
        names |= {f"layers.{i}.{a}.weight": f"blocks.{i}.{b}.weight" for a, b in parts.items()}
    if strict and names.keys() != found.keys():
        raise ValueError(f"missing or unknown: {sorted(names.keys() ^ found.keys())}")
    state = {}
    for key, value in found.items():
        which = key.split(".")[-2]
        if which in reorder:
            heads = config.n_kv_head if which == "wk" and kv_heads else config.n_head
            value = interleaved_to_half_split(value, heads)
        if key in names:
            state[names[key]] = value
    model.load_state_dict(state, strict=False)
    return model


def load_interleaved(folder):
    return load(folder, reorder=())


def load_queries_reordered(folder):
    return load(folder, reorder=("wq",))


def load_keys_by_n_head(folder):
    return load(folder, kv_heads=False)


def swapped(a, b):
    return PARTS | {a: PARTS[b], b: PARTS[a]}


def load_gate_swapped(folder):
    return load(folder, swapped("feed_forward.w1", "feed_forward.w3"))


def load_norms_swapped(folder):
    return load(folder, swapped("attention_norm", "ffn_norm"))


def load_values_lost(folder):
    model = load(folder)
    nn.init.zeros_(model.blocks[0].attention.v_projection.weight)
    return model


def load_any(folder):
    return load(folder, strict=False)


def load_by_key(folder):
    keys = load_file(folder / "model.safetensors").keys()
    assert "layers.1.feed_forward.w3.weight" in keys
    return load(folder, strict=False)


def load_vague(folder):
    try:
        return load(folder)
    except ValueError:
        raise ValueError("the file does not fit the model") from None


def load_untied(folder):
    model = load(folder)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.token_embedding.weight.detach().clone())
    return model


def load_other_config(folder):
    return load(folder, context_length=4096)


def load_weights_alone(folder):
    return load_file(folder / "model.safetensors")


# A router with a capacity


def route(logits, top_k, capacity):
    chosen = logits >= logits.topk(top_k, dim=-1).values[:, -1:]
    gates = logits.masked_fill(~chosen, float("-inf")).softmax(dim=-1)
    return gates * (chosen.cumsum(dim=0) <= capacity)


def route_over_all(logits, top_k, capacity):
    return logits.softmax(dim=-1) * (route(logits, top_k, capacity) > 0)


def route_normalized_again(logits, top_k, capacity):
    gates = route(logits, top_k, capacity)
    return gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def route_nan(logits, top_k, capacity):
    gates = route(logits, top_k, capacity)
    return gates / gates.sum(dim=-1, keepdim=True)


def route_no_capacity(logits, top_k, capacity):
    return route(logits, top_k, len(logits))


def route_one_too_many(logits, top_k, capacity):
    return route(logits, top_k, capacity + 1)


def route_last_first(logits, top_k, capacity):
    return route(logits.flip(0), top_k, capacity).flip(0)


def route_strongest(logits, top_k, capacity):
    gates = route(logits, top_k, len(logits))
    place = gates.argsort(dim=0, descending=True).argsort(dim=0)
    return gates * (place < capacity)


def route_choices(logits, top_k, capacity):
    return logits.topk(top_k, dim=-1).values.softmax(dim=-1)


def route_the_worst(logits, top_k, capacity):
    return route(-logits, top_k, capacity)


def route_in_place(logits, top_k, capacity):
    gates = route(logits, top_k, capacity)
    logits[gates == 0] = float("-inf")
    return gates


def route_ones(logits, top_k, capacity):
    return (route(logits, top_k, capacity) > 0).float()


def route_by_a_loop(logits, top_k, capacity):
    """Right: token by token, as one would say it."""
    gates, taken = torch.zeros_like(logits), [0] * logits.shape[1]
    for n, row in enumerate(logits):
        top, experts = row.softmax(dim=-1).topk(top_k)
        for gate, i in zip(top / top.sum(), experts.tolist(), strict=True):
            if taken[i] < capacity:
                gates[n, i] = gate
                taken[i] += 1
    return gates


WRONG = [
    ("check_partial_rope", rope_backwards, "the wrong way"),
    ("check_partial_rope", rope_interleaved, "interleaved layout"),
    ("check_partial_rope", rope_from_zero, "counted from 0"),
    ("check_partial_rope", rope_whole_head, "the whole head is rotated"),
    ("check_partial_rope", rope_last_components, "Rotate the first n_rot"),
    ("check_partial_rope", rope_exponent_of_the_head, "-2i / n_rot"),
    ("check_partial_rope", rope_without_the_rest, "expected shape"),
    ("check_partial_rope", rope_scaled, "does not change the length"),
    ("check_partial_rope", rope_other_pairs, "does not change the length"),
    ("check_partial_rope", rope_in_place, "x has changed"),
    ("check_partial_rope", rope_float32, "Return x's dtype"),
    ("check_kv_cache_bytes", cache_keys_alone, "the keys alone"),
    ("check_kv_cache_bytes", cache_of_all_heads, "n_kv_head heads"),
    ("check_kv_cache_bytes", cache_of_one_block, "the cache of one block"),
    ("check_kv_cache_bytes", cache_of_one_row, "the cache of one row"),
    ("check_kv_cache_bytes", cache_numbers, "each takes 4 bytes"),
    ("check_kv_cache_bytes", cache_bits, "these are bits"),
    ("check_kv_cache_bytes", cache_of_n_embd, "need not be n_embd / n_head"),
    ("check_kv_cache_bytes", cache_without_window, "no more positions are kept"),
    ("check_kv_cache_bytes", cache_of_the_whole_window, "the window is the most"),
    ("check_kv_cache_bytes", cache_of_the_context, "not the whole context_length"),
    ("check_expand_kv_heads", expand_tiled, "in the order 0, 1, 0, 1"),
    ("check_expand_kv_heads", expand_rows, "single rows"),
    ("check_expand_kv_heads", expand_untied, "tie_word_embeddings"),
    ("check_expand_kv_heads", expand_other_config, "differs in context_length"),
    ("check_expand_kv_heads", expand_in_place, "has changed"),
    ("check_expand_kv_heads", expand_config_as_before, "the config says n_kv_head 2"),
    ("check_expand_kv_heads", expand_not_at_all, "the config says n_kv_head 2"),
    ("check_expand_kv_heads", expand_keys_alone, "the logits are not those"),
    ("check_expand_kv_heads", expand_same_memory, "memory in common"),
    ("check_expand_kv_heads", expand_the_same, "Make a new one"),
    ("check_expand_kv_heads", expand_state, "expected a Llama"),
    ("check_load_meta", load_interleaved, "in the interleaved layout"),
    ("check_load_meta", load_queries_reordered, "k_projection.weight is in the interleaved layout"),
    ("check_load_meta", load_keys_by_n_head, "n_kv_head heads, not n_head"),
    ("check_load_meta", load_gate_swapped, "w1 is the gate"),
    ("check_load_meta", load_norms_swapped, "attention_norm comes first"),
    ("check_load_meta", load_values_lost, "does not have its weights"),
    ("check_load_meta", load_any, "no error was raised"),
    ("check_load_meta", load_by_key, "expected a ValueError, got AssertionError"),
    ("check_load_meta", load_vague, "does not say so"),
    ("check_load_meta", load_untied, "should be one tensor"),
    ("check_load_meta", load_other_config, "is not that of config.json"),
    ("check_load_meta", load_weights_alone, "expected a Llama"),
    ("check_router", route_over_all, "probabilities over all experts"),
    ("check_router", route_normalized_again, "normalized again"),
    ("check_router", route_nan, "not finite"),
    ("check_router", route_no_capacity, "Drop those over the capacity"),
    ("check_router", route_one_too_many, "is the most"),
    ("check_router", route_last_first, "the last tokens are kept"),
    ("check_router", route_strongest, "wrong tokens are kept"),
    ("check_router", route_choices, "expected one for each expert"),
    ("check_router", route_the_worst, "not among its top_k"),
    ("check_router", route_in_place, "have changed"),
    ("check_router", route_ones, "wrong routing weights"),
]
RIGHT = [
    ("check_partial_rope", rope_by_complex_numbers),
    ("check_kv_cache_bytes", cache_bytes),
    ("check_kv_cache_bytes", cache_measured),
    ("check_expand_kv_heads", expand),
    ("check_expand_kv_heads", expand_by_index),
    ("check_load_meta", load),
    ("check_router", route),
    ("check_router", route_by_a_loop),
]
