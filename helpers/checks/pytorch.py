"""Checks of the exercises of appendix A, PyTorch and autograd."""

from __future__ import annotations

import copy
import dis
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.checks._core import (
    CheckFailed,
    RecordCalls,
    call,
    close,
    done,
    expect,
    expect_function,
    expect_number,
    expect_tensor,
    is_started,
    randomize,
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
    """Exercise A.1: `my_distances(a, b)` is the matrix (n, m) of distances between rows."""
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
    with RecordCalls() as calls:
        value = call(my_log_sum_exp, x)
    ready = {"logsumexp", "logaddexp", "log_softmax", "cross_entropy", "logcumsumexp"}
    expect(not calls.names & ready,
           f"{name}: {', '.join(sorted(calls.names & ready))} does the whole exercise. Use exp, "
           "sum and log.")
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
    """Exercise A.3: `my_gradient(f, x, h)` is the gradient of f at x by central differences."""
    name = "my_gradient"
    if not is_started(my_gradient, name):
        return
    expect_function(my_gradient, name)
    scale = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]], dtype=torch.float64)
    whole = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3) / 4

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():                                       # autograd is no way out
            return (scale.view(x.shape) * x**3).sum()

    transposed = whole.T.contiguous().T                             # same numbers, other strides
    for x, kind in ((whole.clone(), ""), (transposed, " for a transposed x")):
        values = {}
        for h in (1e-3, 0.25):
            given = x.clone()
            value = call(my_gradient, f, x, h)
            expect(torch.equal(x, given),
                   f"{name}: x is not what it was before the call{kind}. Write x + step, a new "
                   "tensor, or change a copy; adding and subtracting leaves rounding errors.")
            values[h] = value = expect_tensor(value, name, (2, 3)).detach().double()
            expect(bool(value.isfinite().all()),
                   f"{name}: {value.flatten().tolist()} is not finite. Was the result filled?")
        exact, h, value = 3 * scale * x**2, 1e-3, values[1e-3]
        expect(not close(value, exact.sum().expand(2, 3)),
               f"{name}: all elements change at once, so that their derivatives add up. Change one "
               "at a time.")
        expect(not close(value, 2 * exact),
               f"{name}: twice too large. From x - h to x + h is a distance of two steps.")
        expect(not close(value, exact / 2),
               f"{name}: half of what it should be. Is one step divided by 2 h?")
        expect(not close(value, -exact), f"{name}: the sign is wrong: f(x + h) comes first.")
        bend = 3 * scale * x * h                                    # of a one-sided difference
        expect(not any(close(value, exact + side + scale * h**2) for side in (bend, -bend)),
               f"{name}: close, but with a step to one side only. With steps to both sides the "
               "error of order h cancels.")
        expect(not (kind and bool((value == 0).all())),
               f"{name}: zero everywhere{kind}. reshape and flatten copy such a tensor, so the "
               "step went into a copy that f never saw.")
        expect(not close(values[0.25], value),
               f"{name}: the same result for h = 0.001 and h = 0.25, which cannot be: the step `h` "
               "is ignored. Use the argument, not a number of your own.")
        for h, value in values.items():
            central = exact + scale * h**2                          # of a cube, for any h
            expect(close(value, central),
                   f"{name}: wrong values{kind} at h = {h}: expected "
                   f"{[round(v, 3) for v in central.flatten().tolist()]}, got "
                   f"{[round(v, 3) for v in value.flatten().tolist()]}.")
    done(name)


def check_training_step(my_step: Callable[..., float]) -> None:
    """Exercise A.4: `my_step(model, optimizer, points, labels)` trains once, returns the loss."""
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
        grads = torch.autograd.grad(loss_of(model, k, reduction), list(model.parameters()))
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * times * grad
        return model

    def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return all(close(p.detach(), q.detach()) for p, q in pairs)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    model.eval()
    for k in range(2):
        start = copy.deepcopy(model)
        right, wanted = step(start, k), loss_of(start, k).item()
        modes.clear()
        value = call(my_step, model, optimizer, *batches[k])
        mode = modes[0] if modes else None
        expect(mode is not None, f"{name}: the model was not called: logits = model(points).")
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
            expect(not equal(model, step(start, 0, times=-1)),
                   f"{name}: the loss rises: the step goes along the gradient, not against it.")
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
        expect(bool(mode), f"{name}: the model came in evaluation mode and computed its logits in "
                           "it: its dropout was off. model.train() first.")
        model.eval()
    done(name)


class _Value:
    """The appendix's engine, as far as quotients need it."""

    def __init__(self, data: float, parents: tuple = (), local_grads: tuple = ()) -> None:
        self.data, self.grad = data, 0.0
        self.parents, self.local_grads = parents, local_grads

    def make(self, data: float, parents: tuple, local_grads: tuple) -> _Value:
        return type(self)(data, parents, local_grads)

    def __add__(self, other: _Value) -> _Value:
        return self.make(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other: _Value) -> _Value:
        return self.make(self.data * other.data, (self, other), (other.data, self.data))

    def tanh(self) -> _Value:
        t = math.tanh(self.data)
        return self.make(t, (self,), (1 - t * t,))

    def exp(self) -> _Value:
        e = math.exp(self.data)
        return self.make(e, (self,), (e,))

    def backward(self) -> None:
        order: list[_Value] = []

        def visit(value: _Value) -> None:
            if value not in order:
                for parent in value.parents:
                    visit(parent)
                order.append(value)

        visit(self)
        self.grad = 1.0
        for value in reversed(order):
            for parent, local_grad in zip(value.parents, value.local_grads, strict=True):
                parent.grad += local_grad * value.grad


def check_division(my_truediv: Callable[[Any, Any], Any]) -> None:
    """Exercise A.5: `my_truediv(self, other)` divides two Values, gradients included."""
    name = "my_truediv"
    if not is_started(my_truediv, name):
        return
    expect_function(my_truediv, name)

    class Value(_Value):
        def __truediv__(self, other: Any) -> Any:
            data = self.data, other.data
            result = call(my_truediv, self, other)
            expect(isinstance(result, Value),
                   f"{name}: a / b is a {type(result).__name__}, expected a Value. Make it with "
                   "self.make(data, parents, local_grads), so that it can be divided again.")
            expect((self.data, other.data) == data, f"{name} changed the data of a or b.")
            expect(len(result.parents) == len(result.local_grads),
                   f"{name}: {len(result.parents)} parents and {len(result.local_grads)} local "
                   "gradients: each parent needs one.")
            return result

    def run(formula: Callable, *point: float) -> tuple[float, list[float]]:
        values = [Value(number) for number in point]
        result = formula(*values)
        call(result.backward)
        return result.data, [value.grad for value in values]

    data, (above, below) = run(lambda a, b: a / b, 3.0, 4.0)
    expect(close(data, 0.75), f"{name}: 3 / 4 gives {data}, expected 0.75.")
    expect(above != 0 or below != 0,
           f"{name}: neither number gets a gradient. Parents and local gradients go to self.make.")
    expect(not (close(above, -3 / 16) and close(below, 1 / 4)),
           f"{name}: the two local gradients are swapped; they come in the order of the parents.")
    expect(close(above, 1 / 4), f"{name}: the derivative of a / b with respect to a is 1 / b, at "
                                f"3 / 4 it is 0.25; got {above:.4g}.")
    expect(below != 0, f"{name}: the denominator gets no gradient, but the quotient depends on it.")
    expect(not close(below, 3 / 16),
           f"{name}: the quotient falls when b grows, so the derivative for b is negative.")
    expect(close(below, -3 / 16), f"{name}: the derivative with respect to b is -a / b², at 3 / 4 "
                                  f"it is -0.1875; got {below:.4g}.")
    for point in ((0.7, -1.3, 2.0), (-2.0, 0.5, 1.5)):
        def formula(a: Any, b: Any, c: Any) -> Any:
            return (a * b + c) / (b / c + a) + a / a

        tensors = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in point]
        expected = formula(*tensors)
        expected.backward()
        data, grads = run(formula, *point)
        right = [t.grad.item() for t in tensors]
        expect(close(data, expected.item())
               and all(close(x, y) for x, y in zip(grads, right, strict=True)),
               f"{name}: right for 3 / 4, wrong inside a longer formula: expected the gradients "
               f"{[round(x, 4) for x in right]}, got {[round(x, 4) for x in grads]}. Do the local "
               "gradients depend on the numbers at hand?")
    done(name)
