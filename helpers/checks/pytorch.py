"""Checks of the exercises of appendix A, PyTorch."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
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
    expect_number,
    expect_tensor,
    randomize,
    is_started,
)


def _has_loop(function: Any) -> bool:
    """Whether a function of the reader's holds a for or a while, those in a comprehension too."""
    if not inspect.isfunction(function):
        return False
    codes = [function.__code__]
    for code in codes:                                   # grows while it is read
        codes += [c for c in code.co_consts if inspect.iscode(c)]
    names = {i.opname for code in codes for i in dis.get_instructions(code)}
    return bool(names & {"FOR_ITER", "JUMP_BACKWARD"}) or any(
        name.startswith("POP_JUMP_BACKWARD") for name in names)     # a while, in Python 3.11


def check_distances(my_distances: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise A.1: `my_distances(a, b)` is the table (n, m) of distances between rows."""
    name = "my_distances"
    if not is_started(my_distances, name):
        return
    expect_function(my_distances, name)
    generator = torch.Generator().manual_seed(0)
    for n, m, d in ((4, 3, 2), (5, 5, 3), (1, 6, 6)):
        a, b = (torch.randn(k, d, generator=generator) for k in (n, m))
        given = a.clone(), b.clone()
        try:
            value = call(my_distances, a, b)
        except CheckFailed as error:
            raise CheckFailed(f"{error}\nOne way to line them up: a[:, None] is (n, 1, d), "
                              "b[None] is (1, m, d).") from error
        expect(isinstance(value, Tensor),
                f"{name}: expected a tensor, got {type(value).__name__}.")
        expect(value.shape != (n, m, d),
                f"{name}: the axis of the coordinates is still there; sum over it, dim=-1.")
        expect(n == m or value.shape != (m, n),
                f"{name}: this is (m, n), rows and columns swapped: a's rows come first.")
        expect_tensor(value, name, (n, m), torch.float32)
        expect(torch.equal(a, given[0]) and torch.equal(b, given[1]),
                f"{name}: a or b was changed. Make new tensors, without -= and **=.")
        gap = a[:, None] - b[None]                                  # (n, m, d)
        squares, right = gap.square().sum(-1), gap.square().sum(-1).sqrt()
        expect(not close(value, squares), f"{name}: these are the squares of the distances; the "
                                           "root is missing.")
        expect(d == 1 or not close(value, gap.abs().sum(-1)),
                f"{name}: the differences are added up, not their squares.")
        expect(not (n == m and close(value, right.T)),
                f"{name}: rows and columns are swapped: entry (i, j) belongs to a[i] and b[j].")
        expect(close(value, right),
                f"{name}: wrong values. Subtract, square, sum over the coordinates, take the root.")
    expect(not _has_loop(my_distances),
            f"{name}: the values are right, and there is a loop. Broadcasting does without.")
    done(name)


def check_log_sum_exp(my_log_sum_exp: Callable[[Tensor], Tensor]) -> None:
    """Exercise A.2: `my_log_sum_exp(x)` is log(sum(exp(x))) over the last axis, for any x."""
    name = "my_log_sum_exp"
    if not is_started(my_log_sum_exp, name):
        return
    expect_function(my_log_sum_exp, name)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 2
    given = x.clone()
    value = call(my_log_sum_exp, x)
    expect(not isinstance(value, Tensor) or value.shape != (2, 3, 1),
            f"{name}: the last axis is still there with length one. keepdim=True helps in between; "
            "take it out at the end, with squeeze(-1).")
    expect(not isinstance(value, Tensor) or value.ndim > 0 or value.shape == (2, 3),
            f"{name}: this is one number for the whole tensor. Each row has its own: dim=-1.")
    expect(not isinstance(value, Tensor) or value.shape != x.shape,
            f"{name}: the shape is that of x. Sum over the last axis; log_softmax is another "
            "function.")
    expect_tensor(value, name, (2, 3), torch.float32)
    expect(torch.equal(x, given), f"{name}: x was changed. Write x - ..., without -=.")
    right, top = x.logsumexp(-1), x.amax(-1)
    expect(not close(value, right.exp()), f"{name}: the logarithm is missing.")
    expect(not close(value, right - top),
            f"{name}: the maximum was taken out and not added again at the end.")
    expect(not close(value, right + top), f"{name}: the maximum was added and never taken out.")
    expect(not close(value, top), f"{name}: this is the maximum itself; the sum is missing.")
    expect(close(value, right), f"{name}: wrong values for small x. It is log(sum(exp(x))).")
    large = torch.tensor([[1000.0, 999.0, -1000.0]])
    value = expect_tensor(call(my_log_sum_exp, large), name, (1,))
    expect(bool(value.isfinite().all()),
            f"{name}: {value.tolist()} for logits of a thousand: exp of them is more than a "
            "float32 holds. Take the largest of each row out first.")
    rows = torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]])
    value = expect_tensor(call(my_log_sum_exp, rows), name, (2,))
    expect(bool(value.isfinite().all()),
            f"{name}: {value.tolist()} for a row of large and a row of small numbers. Each row "
            "needs its own maximum, amax(dim=-1, keepdim=True); that of the whole tensor is too "
            "much for the small row.")
    for x in (large, rows):
        expect(close(call(my_log_sum_exp, x), x.logsumexp(-1)),
                f"{name}: right for small numbers and wrong for {x.tolist()}.")
    done(name)


def check_numeric_gradient(my_gradient: Callable[..., Tensor]) -> None:
    """Exercise A.3: `my_gradient(f, x, nudge)` is the gradient of f at x, by nudging."""
    name = "my_gradient"
    if not is_started(my_gradient, name):
        return
    expect_function(my_gradient, name)
    scale = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]], dtype=torch.float64)
    whole = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3) / 4

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():                                       # autograd is no way out
            return (scale.view(x.shape) * x**2).sum()

    transposed = whole.T.contiguous().T                             # same numbers, other strides
    for x, kind in ((whole.clone(), ""), (transposed, " for a transposed x")):
        right = 2 * scale * x
        given = x.clone()
        value = call(my_gradient, f, x, 1e-2)
        expect(torch.equal(x, given),
                f"{name}: x is not what it was before the call{kind}. Add the nudge to a copy, or "
                "write x + step, a new tensor; to add and take away leaves rounding behind.")
        value = expect_tensor(value, name, (2, 3))
        expect(bool(value.isfinite().all()),
                f"{name}: {value.flatten().tolist()} is not finite. Was the result filled?")
        expect(not close(value, right.sum().expand(2, 3)),
                f"{name}: all entries are nudged at once, so that their slopes add up. Nudge one "
                "at a time.")
        expect(not close(value, 2 * right),
                f"{name}: twice too large. From x - nudge to x + nudge is a way of two nudges.")
        expect(not close(value, right / 2),
                f"{name}: half of what it should be. One nudge to one side is one nudge long.")
        expect(not close(value, -right), f"{name}: the sign is wrong: f(x + nudge) comes first.")
        one_sided = scale * 1e-2
        expect(not close(value, right + one_sided) and not close(value, right - one_sided),
                f"{name}: close, but nudged to one side only. With a nudge to both sides the bend "
                "of the curve cancels.")
        expect(not (kind and bool((value == 0).all())),
                f"{name}: zero everywhere{kind}. reshape and flatten copy such a tensor, so the "
                "nudge went into a copy that f never saw.")
        expect(close(value, right),
                f"{name}: wrong slopes{kind}: expected {right.flatten().tolist()}, got "
                f"{[round(v, 3) for v in value.flatten().tolist()]}.")
    done(name)


def check_training_step(my_step: Callable[..., float]) -> None:
    """Exercise A.4: `my_step(model, optimizer, points, labels)` trains once, returns the loss."""
    import copy

    name = "my_step"
    if not is_started(my_step, name):
        return
    expect_function(my_step, name)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    randomize(model, 0.7, seed=1)
    batches = [(torch.randn(6, 2, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0]))
               for _ in range(2)]

    def loss_of(model: torch.nn.Module, k: int, reduction: str = "mean") -> Tensor:
        return torch.nn.functional.cross_entropy(model(batches[k][0]), batches[k][1],
                                                 reduction=reduction)

    def step(model: torch.nn.Module, k: int, reduction: str = "mean", times: int = 1) -> Any:
        """A model after a step of gradient descent on batch k, for comparison."""
        model = copy.deepcopy(model)
        slopes = torch.autograd.grad(loss_of(model, k, reduction), list(model.parameters()))
        with torch.no_grad():
            for p, slope in zip(model.parameters(), slopes, strict=True):
                p -= 0.1 * times * slope
        return model

    def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return all(close(p.detach(), q.detach()) for p, q in pairs)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    for k in range(2):
        start = copy.deepcopy(model)
        right, wanted = step(start, k), loss_of(start, k).item()
        value = call(my_step, model, optimizer, *batches[k])
        expect(not isinstance(value, Tensor),
                f"{name} returns a tensor, which keeps its whole graph alive for as long as "
                "somebody keeps the loss. loss.item() is the number.")
        value = expect_number(value, name)
        expect(not equal(model, start),
                f"{name}: no parameter moved. Is there a backward, then a step, and no zero_grad "
                "between the two?")
        if k == 0:
            expect(not equal(model, step(start, 0, "sum")),
                    f"{name}: the step is that of the sum of the losses; their mean does not grow "
                    "with the batch.")
            expect(not equal(model, step(start, 0, times=-1)), f"{name}: it climbs.")
            expect(not equal(model, step(start, 0, times=2)),
                    f"{name}: a step twice as long as it should be: is there a second backward?")
            expect(equal(model, right),
                    f"{name}: the parameters moved to the wrong place. The model gives logits, and "
                    "F.cross_entropy takes logits: no softmax before it.")
        else:
            expect(equal(model, right),
                    f"{name}: the first call is right, the second is not. The gradients of the "
                    "first are still there and add up: optimizer.zero_grad() before backward.")
        expect(close(value, wanted) or not close(value,
                                                                    loss_of(model, k).item()),
                f"{name}: this is the loss after the step; the one before it was asked for, and it "
                "is there already.")
        expect(close(value, wanted),
                f"{name}: expected the loss {wanted:.4f}, got {value:.4f}.")
        expect(model.training, f"{name}: the model came in eval mode, and trained in it: its "
                                "dropout was off. model.train() first.")
        model.eval()
    done(name)


def check_division(answer: type) -> None:
    """Exercise A.5: a class of Values that can be divided, a / b, gradients included."""
    name = "Divisible"
    if not is_started(getattr(answer, "__truediv__", answer), name):
        return
    expect(inspect.isclass(answer), f"{name}: expected the class itself, got "
                                     f"{type(answer).__name__}.")

    def run(formula: Callable, *point: float) -> tuple[float, list[float]]:
        values = [answer(number) for number in point]
        result = call(formula, *values)
        expect(isinstance(result, answer),
                f"{name}: a / b is a {type(result).__name__}, expected a {name}. Make it with "
                "self.make(data, parents, slopes), so that it can be divided again.")
        call(result.backward)
        return result.data, [value.grad for value in values]

    data, (above, below) = run(lambda a, b: a / b, 3.0, 4.0)
    expect(close(data, 0.75), f"{name}: 3 / 4 gives {data}, expected 0.75.")
    expect(above != 0 or below != 0,
            f"{name}: neither number gets a gradient. Parents and slopes go to self.make.")
    expect(not (close(above, -3 / 16) and close(below, 1 / 4)),
            f"{name}: the two slopes are swapped; they come in the order of the parents.")
    expect(close(above, 1 / 4), f"{name}: in a / b, a nudge of a counts 1 / b times: at 3 / 4 "
                                  f"expected 0.25, got {above:.4g}.")
    expect(below != 0, f"{name}: the number below the line gets no gradient, but the quotient "
                        "changes with it.")
    expect(not close(below, 3 / 16),
            f"{name}: the quotient falls when b grows, so the slope for b is negative.")
    expect(close(below, -3 / 16), f"{name}: the slope for b is -a / b², at 3 / 4 -0.1875; got "
                                    f"{below:.4g}.")
    for point in ((0.7, -1.3, 2.0), (-2.0, 0.5, 1.5)):
        def formula(a: Any, b: Any, c: Any) -> Any:
            return (a * b + c) / (b / c + a) + a / a

        tensors = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in point]
        expected = formula(*tensors)
        expected.backward()
        data, slopes = run(formula, *point)
        right = [t.grad.item() for t in tensors]
        expect(close(data, expected.item())
                and all(close(x, y) for x, y in zip(slopes, right, strict=True)),
                f"{name}: right for a / b alone, wrong inside a longer formula: expected slopes "
                f"{[round(x, 4) for x in right]}, got {[round(x, 4) for x in slopes]}. Do the "
                "slopes depend on the numbers at hand?")
    done(name)
