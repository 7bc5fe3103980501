"""Checks of the exercises of appendix D, scaling."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor

from helpers.checks._core import (
    CheckFailed,
    call,
    close,
    done,
    expect,
    expect_function,
    expect_tensor,
    is_started,
)


def check_distributed_sampler(sampler: Callable[..., Iterable[int]]) -> None:
    """Exercise D.1: which windows a rank reads in an epoch."""
    name = "my_sampler"
    if not is_started(sampler, name):
        return
    expect_function(sampler, name)

    def by_rank(n: int, world_size: int, **named: int) -> list[list[int]]:
        found = []
        for rank in range(world_size):
            mine = call(sampler, n, rank, world_size, **named)
            expect(mine is not None, f"{name} returned None: is there a return at its end?")
            expect(isinstance(mine, Iterable) and not isinstance(mine, str),
                   f"{name}: expected a list of whole numbers, got {type(mine).__name__}.")
            found.append([as_index(i, name) for i in mine])
        return found

    for n, world_size in ((12, 3), (10, 3), (7, 1), (1001, 8)):
        found = by_rank(n, world_size)
        everything = [i for mine in found for i in mine]
        lengths = {len(mine) for mine in found}
        expect(len(lengths) == 1,
               f"{name}: of {n} windows the {world_size} ranks read {sorted(lengths)}. All must "
               "read equally many, or one waits for ever; leave the last few out.")
        expect(len(everything) == n // world_size * world_size,
               f"{name}: of {n} windows {len(everything)} are read; {n // world_size} for each of "
               f"{world_size} ranks are there.")
        expect(all(0 <= i < n for i in everything),
               f"{name}: there are windows 0 to {n - 1}, and it gave {min(everything)} to "
               f"{max(everything)}.")
        expect(len(set(everything)) == len(everything),
               f"{name}: two of the {world_size} ranks read the same window. Do all of them "
               "shuffle with the same seed? It must not depend on the rank.")
    first, again, later = by_rank(1000, 2), by_rank(1000, 2), by_rank(1000, 2, epoch=1)
    expect(first == again, f"{name}: two calls with the same numbers differ. Shuffle with a "
                           "generator of its own, seeded in the function.")
    expect(first[0] != sorted(first[0]), f"{name}: the windows are not shuffled.")
    expect(first != later, f"{name}: each epoch has the same order. Add the epoch to the seed.")
    expect(first != by_rank(1000, 2, seed=5), f"{name}: the seed changes nothing.")
    never = set(range(10)) - {i for epoch in range(60) for mine in by_rank(10, 4, epoch=epoch)
                              for i in mine}
    expect(not never,
           f"{name}: of 10 windows on 4 ranks the windows {sorted(never)} are never read, in 60 "
           "epochs. Leave out the last few of the shuffled order, not of the numbers before "
           "shuffling.")
    torch_order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    expect(first[0] != torch_order[:500],
           f"{name}: this is a block of neighbours in the shuffled order; take every "
           "world_size-th, as in order[rank::world_size].")
    done(name)


def as_index(value: Any, name: str) -> int:
    """A whole number, also from a tensor or from NumPy, or a message."""
    try:
        return operator.index(value)
    except TypeError:
        raise CheckFailed(f"{name}: expected whole numbers, and there is {value!r:.60} of type "
                          f"{type(value).__name__}.") from None


def check_global_gradient(global_gradient: Callable[[list[Tensor], list[int]], Tensor]) -> None:
    """Exercise D.2: the gradient of the mean over the targets of all ranks."""
    name = "my_global_gradient"
    if not is_started(global_gradient, name):
        return
    expect_function(global_gradient, name)
    generator = torch.Generator().manual_seed(0)
    for counts in ([4, 4], [30, 1, 9], [5, 0, 5]):
        gradients = [torch.randn(2, 3, generator=generator) for _ in counts]
        kept = [gradient.clone() for gradient in gradients]
        found = call(global_gradient, gradients, list(counts))
        found = expect_tensor(found, name, (2, 3), torch.float32)
        wanted = sum(g * n for g, n in zip(kept, counts, strict=True)) / sum(counts)
        expect(all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True)),
               f"{name} changed the gradients it was given; make a new tensor.")
        expect(not close(found, wanted * sum(counts)),
               f"{name}: this is the gradient of the sum of the losses. Divide by the number of "
               "all targets.")
        if len(set(counts)) > 1:
            expect(not close(found, torch.stack(kept).mean(dim=0)),
                   f"{name}: this is the plain mean, in which a rank with {min(counts)} "
                   f"targets weighs as much as one with {max(counts)}. Weigh each by its count.")
        expect(close(found, wanted),
               f"{name}: wrong for the counts {counts}. A mean times its count is a sum; add up "
               "the sums, and divide by the number of all targets.")
    done(name)


def check_exact_orthogonal(orthogonal: Callable[[Tensor], Tensor]) -> None:
    """Exercise D.3: all singular values to one, the directions kept."""
    name = "my_orthogonal"
    if not is_started(orthogonal, name):
        return
    expect_function(orthogonal, name)
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 4), (3, 5), (6, 2), (2, 3, 5)):
        matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
        found = expect_tensor(call(orthogonal, matrices.clone()), name, shape, torch.float64)
        values = torch.linalg.svdvals(found)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        expect(not close(found, matrices),
               f"{name} gives the matrix back as it was: leave the singular values out of the "
               "product.")
        expect(close(values, torch.ones_like(values)),
               f"{name}: the singular values for shape {shape} are not one but "
                f"{[round(v, 2) for v in values.flatten().tolist()][:4]}.")
        expect(close(found, u @ vh),
               f"{name}: the singular values are one, but the directions are others. "
               "torch.linalg.svd gives U, S and V transposed already: U @ Vh.")
    done(name)


def check_budget(budget: Callable[[float], tuple[float, float]]) -> None:
    """Exercise D.4: parameters and tokens for a number of operations."""
    name = "my_budget"
    if not is_started(budget, name):
        return
    expect_function(budget, name)
    for operations in (1.2e14, 3e18, 5.76e23):
        found = call(budget, operations)
        expect(found is not None, f"{name} returned None: is there a return at its end?")
        two = list(found) if isinstance(found, Sized) and isinstance(found, Iterable) else []
        expect(len(two) == 2 and not isinstance(found, (str, bytes, dict, set)),
               f"{name}: expected two numbers, of parameters and of tokens, got {found!r:.80}.")
        n, d = (as_number(value, name) for value in two)
        expect(n > 0 and d > 0, f"{name}: both numbers must be positive, got {n} and {d}.")
        expect(not close(n, 20 * d), f"{name}: the two are swapped; parameters come first, and "
                                     "there are twenty tokens for each.")
        expect(close(d, 20 * n),
               f"{name}: {d:.3g} tokens for {n:.3g} parameters; twenty for each were asked for.")
        expect(not close(2 * n * d, operations),
               f"{name}: two operations for each parameter and token are the forward pass; "
               "training takes six.")
        expect(close(6 * n * d, operations),
               f"{name}: {n:.3g} parameters and {d:.3g} tokens take {6 * n * d:.3g} operations, "
               f"and {operations:.3g} were given. With D = 20 N there are 6 N (20 N) of them.")
    done(name)


def as_number(value: Any, name: str) -> float:
    """A finite number, also from a tensor or from NumPy, or a message."""
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    expect(math.isfinite(number), f"{name}: expected two finite numbers, and there is "
                                  f"{value!r:.60} of type {type(value).__name__}.")
    return number
