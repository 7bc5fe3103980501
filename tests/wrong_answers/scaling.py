"""Typical wrong answers to the exercises of appendix D, and right ones in other forms."""

import math
import random

import numpy as np
import torch
from torch import Tensor


def sampler(n: int, rank: int, world_size: int, epoch: int = 0, seed: int = 0, *,
            own: bool = False, shuffle: bool = True, epoch_counts: bool = True,
            seed_counts: bool = True, block: bool = False, rest: bool = False,
            cut_first: bool = False) -> list[int]:
    """The windows of a rank, with one mistake."""
    start = (seed if seed_counts else 0) + (epoch if epoch_counts else 0) + (rank if own else 0)
    generator = torch.Generator().manual_seed(start)
    each = n // world_size
    n = each * world_size if cut_first else n
    order = (torch.randperm(n, generator=generator) if shuffle else torch.arange(n)).tolist()
    if block:
        return order[rank * each:(rank + 1) * each]
    return order[rank::world_size] if rest else order[rank:each * world_size:world_size]


def never_the_same(n, rank, world_size, epoch=0, seed=0):
    if rank == 0:
        never_the_same.calls += 1
    return sampler(n, rank, world_size, epoch, seed + never_the_same.calls)


def only_the_first(n, rank, world_size, epoch=0, seed=0):
    """The numbers beyond the last multiple of the world size are never read."""
    return sampler(n, rank, world_size, epoch, seed, cut_first=True)


def with_python(n, rank, world_size, epoch=0, seed=0):
    """Another generator, another order, and a tuple."""
    order = list(range(n))
    random.Random(1000 * seed + epoch).shuffle(order)
    return tuple(order[rank::world_size][:n // world_size])


never_the_same.calls = 0


def joint(gradients: list[Tensor], counts: list[int]) -> Tensor:
    return sum(g * n for g, n in zip(gradients, counts, strict=True)) / sum(counts)


def joint_in_place(gradients, counts):
    for gradient, n in zip(gradients, counts, strict=True):
        gradient *= n
    return sum(gradients) / sum(counts)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(x, full_matrices=False)


def spend(operations: float, each: float = 20, factor: float = 6) -> tuple[float, float]:
    n = (operations / (factor * each)) ** 0.5
    return n, each * n


def other_directions(x: Tensor) -> Tensor:
    return torch.eye(*x.shape[-2:], dtype=x.dtype).expand(x.shape)


WRONG = [
    ("check_distributed_sampler", lambda *a, **k: sampler(*a, **k, own=True), "same seed"),
    ("check_distributed_sampler", lambda *a, **k: sampler(*a, **k, rest=True), "equally many"),
    ("check_distributed_sampler", lambda *a, **k: sampler(*a, **k, shuffle=False), "not shuffled"),
    ("check_distributed_sampler", lambda *a, **k: sampler(*a, **k, epoch_counts=False),
     "add the epoch"),
    ("check_distributed_sampler", lambda *a, **k: sampler(*a, **k, seed_counts=False),
     "seed changes nothing"),
    ("check_distributed_sampler", lambda *a, **k: sampler(*a, **k, block=True),
     "every world_size-th"),
    ("check_distributed_sampler", never_the_same, "two calls"),
    ("check_distributed_sampler", only_the_first, "never read"),
    ("check_distributed_sampler", lambda *a, **k: len(a), "expected a list"),
    ("check_distributed_sampler", lambda *a, **k: [i + 1 for i in sampler(*a, **k)],
     "there are windows"),
    ("check_distributed_sampler", lambda *a, **k: sampler(*a, **k)[1:], "are read"),
    ("check_global_gradient", lambda g, n: torch.stack(g).mean(0), "plain mean"),
    ("check_global_gradient", lambda g, n: joint(g, n) * sum(n), "of the sum"),
    ("check_global_gradient", lambda g, n: joint(g, n) / 2, "wrong for the counts"),
    ("check_global_gradient", joint_in_place, "changed the gradients"),
    ("check_global_gradient", lambda g, n: joint(g, n).sum(), "shape"),
    ("check_exact_orthogonal", lambda x: svd(x)[0] @ svd(x)[1].diag_embed() @ svd(x)[2],
     "gives the matrix back"),
    ("check_exact_orthogonal", lambda x: x / x.norm(dim=(-2, -1), keepdim=True), "are not one"),
    ("check_exact_orthogonal", lambda x: svd(x)[0] @ svd(x)[2].mT, "directions are others"),
    ("check_exact_orthogonal", other_directions, "directions are others"),
    ("check_exact_orthogonal", lambda x: x[0], "expected shape"),
    ("check_budget", lambda c: spend(c)[::-1], "swapped"),
    ("check_budget", lambda c: spend(c, each=1), "twenty for each"),
    ("check_budget", lambda c: spend(c, factor=2), "forward pass"),
    ("check_budget", lambda c: spend(c, factor=3), "operations"),
    ("check_budget", lambda c: spend(c)[0], "two numbers"),
    ("check_budget", lambda c: (-1.0, -20.0), "positive"),
    ("check_distributed_sampler", lambda *a, **k: [i / 1 for i in sampler(*a, **k)],
     "whole numbers"),
    ("check_distributed_sampler", lambda *a, **k: [str(i) for i in sampler(*a, **k)],
     "whole numbers"),
    ("check_distributed_sampler", lambda *a, **k: print(end=""), "returned None"),
    ("check_global_gradient", lambda g, n: sum(x * m for x, m in zip(g, n, strict=True)) / len(n),
     "wrong for the counts"),
    ("check_budget", lambda c: ("many", "more"), "two finite numbers"),
    ("check_budget", lambda c: "ab", "two numbers"),
    ("check_budget", lambda c: (10**400, 20 * 10**400), "two finite numbers"),
    ("check_budget", lambda c: (math.nan, math.nan), "two finite numbers"),
    ("check_budget", lambda c: (torch.ones(2), torch.ones(2)), "two finite numbers"),
    ("check_budget", lambda c: (None, 20.0), "two finite numbers"),
    ("check_budget", lambda c: {"N": 1.0, "D": 20.0}, "two numbers"),
    ("check_budget", lambda c: print(end=""), "returned None"),
    ("check_budget", lambda c: (math.sqrt(c / 6), 20 * math.sqrt(c / 6)), "operations"),
]

RIGHT = [
    ("check_distributed_sampler", with_python),
    ("check_distributed_sampler", lambda *a, **k: torch.tensor(sampler(*a, **k))),
    ("check_distributed_sampler", lambda *a, **k: iter(sampler(*a, **k))),
    ("check_distributed_sampler", lambda *a, **k: np.array(sampler(*a, **k))),
    ("check_global_gradient", lambda g, n: torch.einsum(
        "nij,n->ij", torch.stack(g), torch.tensor(n) / sum(n))),
    ("check_exact_orthogonal", lambda x: svd(x)[0].matmul(svd(x)[2])),
    ("check_budget", lambda c: list(spend(c))),
    ("check_budget", lambda c: torch.tensor(spend(c), dtype=torch.float64)),
    ("check_budget", lambda c: np.array(spend(c))),
    ("check_budget", lambda c: tuple(round(value) for value in spend(c))),
]
