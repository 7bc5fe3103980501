"""Checks of the exercises of appendix B, LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

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
    expect_number,
    expect_tensor,
    is_started,
)

_SHAPES = {"qkv": (1, 3), "output_projection": (1, 1), "up_projection": (1, 4),
           "down_projection": (4, 1)}                   # inputs and outputs, in units of n_embd


def check_lora_count(my_lora_count: Callable[..., int]) -> None:
    """Exercise B.1: how many parameters LoRA trains on a GPT."""
    name = "my_lora_count"
    if not is_started(my_lora_count, name):
        return
    expect_function(my_lora_count, name)
    for n_layer, C, r, targets in ((1, 8, 2, ["output_projection"]), (1, 8, 2, ["qkv"]),
                                   (1, 8, 1, ["down_projection"]), (3, 16, 4, ["up_projection"]),
                                   (12, 768, 8, list(_SHAPES)), (2, 16, 3, ["qkv", "qkv"]),
                                   (2, 8, 3, [])):
        where = f"{name}({n_layer}, {C}, {r}, {targets})"
        given = list(targets)
        value = expect_number(call(my_lora_count, n_layer, C, r, given), where)
        expect(given == targets, f"{where}: the list of targets was changed.")

        def count(names: list[str], factor: Callable[[int, int], float], blocks: int = n_layer,
                  rank: int = r, n_embd: int = C) -> float:
            return blocks * rank * n_embd * sum(factor(*_SHAPES[n]) for n in names)

        once = list(dict.fromkeys(targets))
        right = count(once, lambda i, o: i + o)
        expect(not targets or value != count(once, lambda i, o: i * o) * C / r,
               f"{where}: {value:g} is the number of frozen weights. LoRA trains thin matrices.")
        expect(n_layer == 1 or value != right / n_layer or not targets,
               f"{where}: {value:g} is the number of one block; there are {n_layer}.")
        expect(len(once) == len(targets) or value != count(targets, lambda i, o: i + o),
               f"{where}: a name that comes twice counts once.")
        one = count(once, lambda i, o: i), count(once, lambda i, o: o)
        expect(not targets or value not in one,
               f"{where}: {value:g} is one of the two matrices alone. A is (r, in), B is (out, r).")
        expect("qkv" not in targets or value != count(once, lambda i, o: 2 if (i, o) == (1, 3)
                                                      else i + o),
               f"{where}: qkv makes queries, keys and values in one layer: its output has "
               "3 * n_embd components.")
        expect("up_projection" not in targets and "down_projection" not in targets
               or value != count(once, lambda i, o: 2 if 4 in (i, o) else i + o),
               f"{where}: the feed-forward network has 4 * n_embd components between its layers.")
        expect(value == right, f"{where}: expected {right:g}, got {value:g}.")
        expect(value == int(value) and not isinstance(value, bool), f"{where}: a whole number.")
    done(name)


def _call_with_hint(hint: str, answer: Callable, *arguments: Any) -> Any:
    """Run an answer; PyTorch's own words about shapes are followed by what to do."""
    try:
        return call(answer, *arguments)
    except CheckFailed as error:
        if isinstance(error.__cause__, RuntimeError):
            raise CheckFailed(f"{error} {hint}") from error.__cause__
        raise


def check_combine_adapters(my_combine: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Exercise B.2: one pair A, B for the sum of two updates."""
    name = "my_combine"
    if not is_started(my_combine, name):
        return
    expect_function(my_combine, name)
    for r1, r2, out, in_, s1, s2 in ((2, 3, 5, 4, 2.0, 0.5), (1, 1, 4, 4, 1.0, 1.0),
                                     (2, 1, 3, 6, -1.0, 4.0), (3, 1, 4, 4, 0.0, 1.5)):
        A1, B1, A2, B2 = draw(1, r1, in_), draw(2, out, r1), draw(3, r2, in_), draw(4, out, r2)
        kept = [t.clone() for t in (A1, B1, A2, B2)]
        found = _call_with_hint("Write A1 above A2 and B1 beside B2; ranks add up.", my_combine,
                                A1, B1, s1, A2, B2, s2)
        expect(all(torch.equal(t, k) for t, k in zip((A1, B1, A2, B2), kept, strict=True)),
               f"{name}: a tensor that it was given has changed. Write s * B, not B *= s.")
        expect(isinstance(found, tuple | list) and len(found) == 2,
               f"{name}: expected two tensors, A and B, got {type(found).__name__}.")
        A, B = found
        expect(isinstance(A, Tensor) and isinstance(B, Tensor), f"{name}: A and B must be tensors.")
        r = r1 + r2
        expect(not (A.shape == (out, r) and B.shape == (r, in_)) or out == r == in_,
               f"{name}: A and B are swapped: A is (r, in) and comes first.")
        expect(r1 != r2 or A.shape != (r1, in_),
               f"{name}: the rank is still {r1}. The product of sums is not the sum of products: "
               "(B1 + B2)(A1 + A2) also has the terms B1 A2 and B2 A1.")
        expect_tensor(A, f"{name}, A of ranks {r1} and {r2}", (r, in_))
        expect_tensor(B, f"{name}, B of ranks {r1} and {r2}", (out, r))
        value = B @ A
        first, second = B1 @ A1, B2 @ A2
        expect(close(value, s1 * first + s2 * second) or not close(value, first + second),
               f"{name}: the scales are missing: multiply each update by its own.")
        for wrong in (s1**2 * first + s2**2 * second,):
            expect(close(value, s1 * first + s2 * second) or not close(value, wrong),
                   f"{name}: the scales count twice. Multiply one of the two matrices, A or B.")
        expect(close(value, s1 * first + s2 * second),
               f"{name}: B A is not s1 B1 A1 + s2 B2 A2. Write A1 above A2 and B1 beside B2.")
    done(name)


def check_extract_lora(my_extract: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Exercise B.3: the best A and B for the difference of two weights."""
    name = "my_extract"
    if not is_started(my_extract, name):
        return
    expect_function(my_extract, name)
    for out, in_, r in ((6, 4, 2), (4, 7, 1), (5, 5, 3), (3, 4, 5)):
        before, after = draw(1, out, in_), draw(2, out, in_) * 2
        kept = before.clone(), after.clone()
        found = call(my_extract, before, after, r)
        expect(torch.equal(before, kept[0]) and torch.equal(after, kept[1]),
               f"{name}: a weight that it was given has changed.")
        expect(isinstance(found, tuple | list) and len(found) == 2,
               f"{name}: expected two tensors, A and B, got {type(found).__name__}.")
        A, B = found
        expect(isinstance(A, Tensor) and isinstance(B, Tensor), f"{name}: A and B must be tensors.")
        where = f"{name}, weights ({out}, {in_}), r {r}"
        expect(A.shape != (out, r) or B.shape != (r, in_) or out == in_ == r,
               f"{where}: A and B are swapped: A is (r, in) and comes first.")
        expect(r <= min(out, in_) or A.shape[0] == r,
               f"{where}: A has {A.shape[0]} rows. There are only {min(out, in_)} singular values; "
               "fill up with zeros.")
        expect_tensor(A, f"{where}: A", (r, in_))
        expect_tensor(B, f"{where}: B", (out, r))
        delta = after - before
        U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
        k = min(r, len(S))
        best, value = (U[:, :k] * S[:k]) @ Vt[:k], B.detach() @ A.detach()
        expect(not close(value, -best), f"{where}: this is the update from after to before. The "
                                        "difference is after - before.")
        expect(not close(value, U[:, :k] @ Vt[:k]), f"{where}: the singular values are missing.")
        expect(not close(value, (U[:, :k] * S[:k]**2) @ Vt[:k]),
               f"{where}: the singular values are in A and in B. Give them to one, or their square "
               "roots to both.")
        for weight, which in ((after, "after"), (before, "before")):
            P, T, Q = torch.linalg.svd(weight, full_matrices=False)
            expect(not close(value, (P[:, :k] * T[:k]) @ Q[:k]) or close(delta, weight),
                   f"{where}: this is the SVD of `{which}`. The update is the difference.")
        error, least = (value - delta).norm().item(), (best - delta).norm().item()
        expect(error <= least * 1.001 + 1e-4,
               f"{where}: the distance to the whole update is {error:.3f}, and {least:.3f} is "
               "possible. Keep the r largest singular values, with their vectors: the columns of "
               "U, the rows of Vh.")
    done(name)


def check_int8(my_int8: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Exercise B.4: block-wise int8 quantization by rounding."""
    name = "my_int8"
    if not is_started(my_int8, name):
        return
    expect_function(my_int8, name)
    cases = [(torch.tensor([[12.7, -1.26, 0.04, 0.06], [1.0, 0.5, 0.25, -1.0]]), 4),
             (draw(1, 4, 6), 8), (draw(2, 3, 3), 4), (draw(3, 2, 5) * 1e-3, 16),
             (torch.cat([draw(4, 4), torch.zeros(4)]), 4)]
    for weight, size in cases:
        kept = weight.clone()
        found = _call_with_hint("The last block may be short: fill it up with zeros.", my_int8,
                                weight, size)
        where = f"{name}, a weight {tuple(weight.shape)} in blocks of {size}"
        expect(torch.equal(weight, kept), f"{name}: the weight that it was given has changed.")
        expect(isinstance(found, tuple | list) and len(found) == 2,
               f"{name}: expected codes and scales, got {type(found).__name__}.")
        codes, scales = found
        expect(isinstance(codes, Tensor) and isinstance(scales, Tensor),
               f"{name}: codes and scales must be tensors.")
        n_blocks = -(-weight.numel() // size)
        expect(codes.dtype == torch.int8, f"{name}: the codes are {codes.dtype}, expected int8.")
        expect(n_blocks == 1 or scales.numel() != 1,
               f"{where}: one scale for the whole weight; each block has its own.")
        expect_tensor(codes, f"{where}: codes", (n_blocks, size))
        expect_tensor(scales, f"{where}: scales", (n_blocks, 1), torch.float32)
        blocks = torch.zeros(n_blocks * size)
        blocks[:weight.numel()] = weight.flatten()
        blocks = blocks.view(n_blocks, size)
        expect(bool(scales.isfinite().all()), f"{where}: a scale is not finite.")
        top = blocks.abs().amax(dim=1, keepdim=True)
        expect(not close(scales, top, atol=1e-9),
               f"{where}: the scale is the largest absolute value divided by 127: code times scale "
               "must give the weight.")
        expect(not close(scales, top / 128, atol=1e-9)
               and not close(scales, top / 255, atol=1e-9),
               f"{where}: codes go from -127 to 127, so the divisor is 127.")
        signed = blocks.amax(dim=1, keepdim=True) / 127
        expect(close(scales, top / 127, atol=1e-9) or not close(scales, signed, atol=1e-9),
               f"{where}: the largest value may be negative: take absolute values first.")
        expect(close(scales, top / 127, atol=1e-9), f"{where}: expected the scales "
               f"{[round(v, 5) for v in (top / 127).flatten().tolist()[:3]]}, got "
               f"{[round(v, 5) for v in scales.flatten().tolist()[:3]]} at the start.")
        exact = blocks / torch.where(top > 0, top / 127, 1.0)
        near = (codes.float() - exact).abs()
        expect(bool((codes[(top == 0).flatten()] == 0).all()),
               f"{where}: a block of zeros has codes that are not 0. 0 / 0 is nan.")
        expect(not (torch.equal(codes.float(), exact.trunc()) and bool((near > 0.51).any())),
               f"{where}: int8 cuts the fraction off. Round to the nearest first.")
        expect(not (torch.equal(codes.float(), exact.floor()) and bool((near > 0.51).any())),
               f"{where}: floor rounds down. Round to the nearest.")
        expect(bool((near < 0.51).all()), f"{where}: a code is {near.max():.1f} away from "
                                          "weight / scale.")
    done(name)


def check_dora(my_dora: type) -> None:
    """Exercise B.5: DoRA, a weight in magnitude and direction."""
    name = "MyDoRALinear"
    if inspect.isclass(my_dora):
        if not is_started(getattr(my_dora, "forward", None), name):
            return
    elif not is_started(my_dora, name):
        return
    expect(inspect.isclass(my_dora) and issubclass(my_dora, nn.Module),
           f"{name}: expected the class, a subclass of nn.Module.")
    for bias in (True, False):
        base = nn.Linear(4, 3, bias=bias)
        with torch.no_grad():
            for i, p in enumerate(base.parameters()):
                p.copy_(draw(10 + i, *p.shape))
        weight, x = base.weight.detach().clone(), draw(3, 2, 5, 4)
        right = x @ weight.T + (base.bias.detach() if bias else 0)
        layer = call(my_dora, base, 2, 6.0)
        trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        expect(set(trained) == {"lora_A", "lora_B", "magnitude"},
               f"{name}: trained parameters should be lora_A, lora_B and magnitude, found "
               f"{sorted(trained)}. Freeze the linear layer with requires_grad_(False), and make "
               "the three nn.Parameter.")
        A, B, m = (trained[n] for n in ("lora_A", "lora_B", "magnitude"))
        expect_tensor(A, f"{name}.lora_A", (2, 4))
        expect_tensor(B, f"{name}.lora_B", (3, 2))
        norms = weight.norm(dim=1)
        expect(tuple(m.shape) != (4,), f"{name}.magnitude has one number for each input; each row "
                                       "of the weight, an output, has its norm: dim=1.")
        expect_tensor(m, f"{name}.magnitude", (3,))
        expect(close(m, norms), f"{name}.magnitude should start as the norms of the rows of the "
                                "weight.")
        expect(bool((B == 0).all()) and bool((A != 0).any()),
               f"{name}: lora_B starts at zero and lora_A at random.")
        y = call(layer, x)
        expect_tensor(y, f"{name}, its output for x (2, 5, 4)", (2, 5, 3))
        expect(not bias or not close(y, x @ weight.T), f"{name}: the bias is missing.")
        expect(close(y, right), f"{name}: at the start the output is not that of the linear layer.")
        with torch.no_grad():
            A.copy_(draw(5, 2, 4))
            B.copy_(draw(6, 3, 2))
            m.copy_(draw(7, 3).abs() + 0.5)
        y = call(layer, x)

        def output(V: Tensor, divisor: Tensor, m: Tensor = m, x: Tensor = x,
                   b: Tensor | None = base.bias) -> Tensor:
            return nn.functional.linear(x, m[:, None] * V / divisor, b)

        V = weight + 3.0 * B @ A
        expect(not close(y, output(weight + B @ A, (weight + B @ A).norm(dim=1, keepdim=True))),
               f"{name}: the factor alpha / r of the update is missing.")
        expect(not close(y, output(weight + 6.0 * B @ A,
                                   (weight + 6.0 * B @ A).norm(dim=1, keepdim=True))),
               f"{name}: the update is multiplied by alpha; divide by r as well.")
        expect(not close(y, output(V, norms[:, None])),
               f"{name}: V is divided by the norms of the frozen weight. Its own norms change with "
               "A and B.")
        if bias:
            scaled = m / V.norm(dim=1) * (x @ V.T + base.bias)
            expect(not close(y, scaled), f"{name}: the bias is scaled too; only the weight is.")
        expected = output(V, V.norm(dim=1, keepdim=True))
        expect(close(y, expected), f"{name}: wrong output after A, B and magnitude have changed. "
                                   "The weight is magnitude * V / norm of V's rows.")
        expect(torch.equal(base.weight, weight), f"{name}: the frozen weight was changed.")
        found = torch.autograd.grad(y.square().sum(), [A, B, m], allow_unused=True)
        wanted = torch.autograd.grad(expected.square().sum(), [A, B, m])
        for gradient, want, which in zip(found, wanted, ("lora_A", "lora_B", "magnitude"),
                                         strict=True):
            expect(gradient is not None and close(gradient, want, rtol=1e-3, atol=1e-3),
                   f"{name}: the output is right and the gradient of {which} is not. Was the norm, "
                   "or a part of the weight, computed without gradients (detach, no_grad, .data)?")
    done(name)
