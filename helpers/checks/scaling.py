"""Checks of the exercises of appendix D, scaling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from helpers.checks._core import (
    call,
    close,
    done,
    expect,
    expect_function,
    expect_number,
    expect_tensor,
    is_started,
)


def check_share(share: Callable[..., list[int]]) -> None:
    """Exercise C.1: which windows a process reads in a pass."""
    name = "my_share"
    if not is_started(share, name):
        return
    expect_function(share, name)

    def shares(n: int, ranks: int, **named: int) -> list[list[int]]:
        found = [call(share, n, rank, ranks, **named) for rank in range(ranks)]
        for mine in found:
            expect(isinstance(mine, (list, tuple)),
                    f"{name}: expected a list of whole numbers, got {type(mine).__name__}.")
        return [[int(i) for i in mine] for mine in found]

    for n, ranks in ((12, 3), (10, 3), (7, 1), (1001, 8)):
        found = shares(n, ranks)
        everything = [i for mine in found for i in mine]
        lengths = {len(mine) for mine in found}
        expect(len(lengths) == 1,
                f"{name}: of {n} windows the {ranks} processes read {sorted(lengths)}. All must "
                "read equally many, or one waits for ever; leave the rest over.")
        expect(all(0 <= i < n for i in everything),
                f"{name}: there are windows 0 to {n - 1}, and it gave {max(everything)}.")
        expect(len(set(everything)) == len(everything),
                f"{name}: two of the {ranks} processes read the same window. Do all of them "
                "shuffle with the same seed? It must not depend on the rank.")
        expect(len(everything) == n // ranks * ranks,
                f"{name}: of {n} windows {len(everything)} are read; {n // ranks} for each of "
                f"{ranks} processes are there.")
    first, again, later = shares(1000, 2), shares(1000, 2), shares(1000, 2, epoch=1)
    expect(first == again, f"{name}: two calls with the same numbers differ. Shuffle with a "
                            "generator of its own, seeded in the function.")
    expect(first[0] != sorted(first[0]), f"{name}: the windows are not shuffled.")
    expect(first != later, f"{name}: each pass has the same order. Add the epoch to the seed.")
    expect(first != shares(1000, 2, seed=5), f"{name}: the seed changes nothing.")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    expect(first[0] != order[:500],
            f"{name}: this is a block of neighbours in the shuffled order; take every ranks-th, "
            "as in order[rank::ranks].")
    done(name)


def check_joint_gradient(joint_gradient: Callable[[list[Tensor], list[int]], Tensor]) -> None:
    """Exercise C.2: the gradient of the mean over the targets of all processes."""
    name = "my_joint_gradient"
    if not is_started(joint_gradient, name):
        return
    expect_function(joint_gradient, name)
    generator = torch.Generator().manual_seed(0)
    for counts in ([4, 4], [30, 1, 9], [5, 0, 5]):
        gradients = [torch.randn(2, 3, generator=generator) for _ in counts]
        kept = [gradient.clone() for gradient in gradients]
        found = call(joint_gradient, gradients, list(counts))
        found = expect_tensor(found, name, (2, 3), torch.float32)
        wanted = sum(g * n for g, n in zip(kept, counts, strict=True)) / sum(counts)
        expect(all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True)),
                f"{name} changed the gradients it was given; make a new tensor.")
        mean = torch.stack(kept).mean(dim=0)
        expect(not torch.allclose(found, wanted * sum(counts)),
                f"{name}: this is the gradient of the sum of the losses. Divide by the number of "
                "all targets.")
        if len(set(counts)) > 1:
            expect(not torch.allclose(found, mean),
                    f"{name}: this is the plain mean, in which a process with {min(counts)} "
                    f"targets weighs as much as one with {max(counts)}. Weigh each by its count.")
        expect(torch.allclose(found, wanted, atol=1e-6),
                f"{name}: wrong for the counts {counts}. A mean times its count is a sum; add up "
                "the sums, and divide by the number of all targets.")
    done(name)


def check_exact_orthogonal(orthogonal: Callable[[Tensor], Tensor]) -> None:
    """Exercise C.3: all singular values to one, the directions kept."""
    name = "my_orthogonal"
    if not is_started(orthogonal, name):
        return
    expect_function(orthogonal, name)
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 4), (3, 5), (6, 2), (2, 3, 5)):
        matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
        found = expect_tensor(call(orthogonal, matrices.clone()), name, shape, torch.float64)
        values = torch.linalg.svdvals(found)
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        expect(not torch.allclose(found, matrices),
                f"{name} gives the matrix back as it was: leave the singular values out of the "
                "product.")
        expect(torch.allclose(values, torch.ones_like(values)),
                f"{name}: the singular values for shape {shape} are not one but "
                f"{[round(v, 2) for v in values.flatten().tolist()][:4]}.")
        expect(torch.allclose(found, u @ vh),
                f"{name}: the singular values are one, but the directions are others. "
                "torch.linalg.svd gives U, S and V transposed already: U @ Vh.")
    done(name)


def check_budget(budget: Callable[[float], tuple[float, float]]) -> None:
    """Exercise C.4: parameters and tokens for a number of operations."""
    name = "my_budget"
    if not is_started(budget, name):
        return
    expect_function(budget, name)
    for operations in (1.2e14, 3e18, 5.76e23):
        found = call(budget, operations)
        expect(isinstance(found, (tuple, list)) and len(found) == 2,
                f"{name}: expected two numbers, of parameters and of tokens, got {found!r}.")
        n, d = (expect_number(value, name) for value in found)
        expect(n > 0 and d > 0, f"{name}: both numbers must be positive, got {n} and {d}.")
        expect(not close(n, 20 * d), f"{name}: the two are swapped; parameters come first, and "
                                       "there are twenty tokens for each.")
        expect(math.isclose(d, 20 * n, rel_tol=1e-4),
                f"{name}: {d / n:.3g} tokens for each parameter; twenty were asked for.")
        expect(not math.isclose(2 * n * d, operations, rel_tol=1e-4),
                f"{name}: two operations for each parameter and token are the forward pass; "
                "training takes six.")
        expect(math.isclose(6 * n * d, operations, rel_tol=1e-4),
                f"{name}: {n:.3g} parameters and {d:.3g} tokens take {6 * n * d:.3g} operations, "
                f"and {operations:.3g} were given. With D = 20 N there are 6 N (20 N) of them.")
    done(name)
