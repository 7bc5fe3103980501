"""Typical wrong answers to the exercises of appendix A."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gap(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] - b[None]


def with_a_loop(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([(row - b).square().sum(-1).sqrt() for row in a])


def in_place(a: Tensor, b: Tensor) -> Tensor:
    result = torch.cdist(a, b)
    a -= a.mean()
    return result


def naive(x: Tensor) -> Tensor:
    return x.exp().sum(-1).log()


def one_maximum(x: Tensor) -> Tensor:
    return (x - x.max()).exp().sum(-1).log() + x.max()


def never_added(x: Tensor) -> Tensor:
    return (x - x.amax(-1, keepdim=True)).exp().sum(-1).log()


def axis_left(x: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    return (x - top).exp().sum(-1, keepdim=True).log() + top


def difference(f: Callable, x: Tensor, h: float = 1e-4, *, back: float = 1, ways: float = 2,
               together: bool = False) -> Tensor:
    grads = torch.zeros(x.numel(), dtype=x.dtype)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[slice(None) if together else i] = h
        step = step.view(x.shape)
        grads[i] = (f(x + step) - f(x - back * step)) / (ways * h)
    return grads.view(x.shape)


def one_sided(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    return difference(f, x, h, back=0, ways=1)


def divided_by_one_step(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    return difference(f, x, h, ways=1)


def all_at_once(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    return difference(f, x, h, together=True)


def flat(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    return difference(f, x, h).flatten()


def ignores_h(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    return difference(f, x, 1e-4)


def ignores_h_coarsely(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    return difference(f, x, 1e-2)


def leaves_the_step(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    grads, numbers = torch.zeros_like(x), x.view(-1)
    for i in range(x.numel()):
        numbers[i] += h
        up = f(x)
        numbers[i] -= 2 * h
        grads.view(-1)[i] = (up - f(x)) / (2 * h)
    return grads


def changes_a_copy(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    grads, numbers = torch.zeros(x.numel(), dtype=x.dtype), x.reshape(-1)
    for i in range(x.numel()):
        kept = numbers[i].clone()
        numbers[i] = kept + h
        up = f(x)
        numbers[i] = kept - h
        grads[i] = (up - f(x)) / (2 * h)
        numbers[i] = kept
    return grads.view(x.shape)


def in_a_clone(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    """Right: an index for each axis, in a copy, into a float32 result."""
    grads = torch.zeros(x.shape)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            up, down = x.clone(), x.clone()
            up[i, j] += h
            down[i, j] -= h
            grads[i, j] = (f(up) - f(down)).item() / (2 * h)
    return grads


def by_autograd(f: Callable, x: Tensor, h: float = 1e-4) -> Tensor:
    x = x.clone().requires_grad_()
    f(x).backward()
    return x.grad


Model, Optimizer = nn.Module, torch.optim.Optimizer


def never_cleared(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    model.train()
    loss = F.cross_entropy(model(points), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def cleared_too_late(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    model.train()
    loss = F.cross_entropy(model(points), labels)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


def keeps_the_graph(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> Tensor:
    model.train()
    loss = F.cross_entropy(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def in_eval_mode(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    loss = F.cross_entropy(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def softmax_twice(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    return keeps_the_graph(nn.Sequential(model, nn.Softmax(-1)), optimizer, points, labels).item()


def the_sum(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    model.train()
    loss = F.cross_entropy(model(points), labels, reduction="sum")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item() / len(labels)


def loss_after(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    keeps_the_graph(model, optimizer, points, labels)
    return F.cross_entropy(model(points), labels).item()


def returns_nothing(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> None:
    keeps_the_graph(model, optimizer, points, labels)


def trains_too_late(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    loss = in_eval_mode(model, optimizer, points, labels)
    model.train()
    return loss


def never_called(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> float:
    optimizer.step()
    return 1.0


def returns_a_pair(model: Model, optimizer: Optimizer, points: Tensor, labels: Tensor) -> tuple:
    return keeps_the_graph(model, optimizer, points, labels).item(), model


def clears_with_the_model(model: Model, optimizer: Optimizer, points: Tensor,
                          labels: Tensor) -> float:
    """Right: the model clears its gradients, after the step."""
    model.train()
    loss = F.cross_entropy(model(points), labels)
    loss.backward()
    optimizer.step()
    model.zero_grad()
    return float(loss.detach())


def quotient(local_grads: Callable[[float, float], tuple], both: bool = True) -> Callable:
    """A division with these local gradients, given the two numbers."""
    def my_truediv(self, other):
        parents = (self, other) if both else (self,)
        return self.make(self.data / other.data, parents, local_grads(self.data, other.data))
    return my_truediv


def number_only(self, other):
    return self.data / other.data


def without_parents(self, other):
    return self.make(self.data / other.data, (), ())


def in_place_division(self, other):
    self.data /= other.data
    return self


def by_power(self, other):
    """Right: times the reciprocal, in two nodes of the graph."""
    b = other.data
    return self * other.make(1 / b, (other,), (-1 / b**2,))


WRONG = [
    ("check_distances", lambda a, b: (a - b).square().sum(-1).sqrt(), "a[:, None]"),
    ("check_distances", lambda a, b: gap(a, b).abs(), "coordinates is still there"),
    ("check_distances", lambda a, b: gap(b, a).square().sum(-1).sqrt(), "a's rows come first"),
    ("check_distances", lambda a, b: gap(a, b).square().sum(-1), "the root is missing"),
    ("check_distances", lambda a, b: gap(a, b).abs().sum(-1), "not their squares"),
    ("check_distances", lambda a, b: gap(a, b).square().sum(-1).sqrt() + 1, "wrong values"),
    ("check_distances", with_a_loop, "there is a loop"),
    ("check_distances", in_place, "was changed"),
    ("check_distances", lambda a, b: torch.cdist(a, b).tolist(), "expected a tensor"),
    ("check_log_sum_exp", lambda x: x.logsumexp(-1), "logsumexp does the whole exercise"),
    ("check_log_sum_exp", lambda x: torch.logsumexp(x, -1), "does the whole exercise"),
    ("check_log_sum_exp", lambda x: x[..., 0] - x.log_softmax(-1)[..., 0], "whole exercise"),
    ("check_log_sum_exp", naive, "largest of each row out first"),
    ("check_log_sum_exp", one_maximum, "its own maximum"),
    ("check_log_sum_exp", never_added, "not added again"),
    ("check_log_sum_exp", axis_left, "squeeze(-1)"),
    ("check_log_sum_exp", lambda x: x.exp().sum().log(), "one number for the whole"),
    ("check_log_sum_exp", lambda x: x.exp().sum(-1), "logarithm is missing"),
    ("check_log_sum_exp", lambda x: x.softmax(-1).log(), "another function"),
    ("check_log_sum_exp", lambda x: x.amax(-1), "the maximum itself"),
    ("check_log_sum_exp", lambda x: x.sum(-1), "wrong values"),
    ("check_numeric_gradient", one_sided, "one side only"),
    ("check_numeric_gradient", divided_by_one_step, "two steps"),
    ("check_numeric_gradient", all_at_once, "one at a time"),
    ("check_numeric_gradient", leaves_the_step, "not what it was"),
    ("check_numeric_gradient", changes_a_copy, "f never saw"),
    ("check_numeric_gradient", ignores_h, "is ignored"),
    ("check_numeric_gradient", ignores_h_coarsely, "is ignored"),
    ("check_numeric_gradient", lambda f, x, h: f(x), "expected shape (2, 3)"),
    ("check_numeric_gradient", lambda f, x, h: x.tolist(), "expected a tensor"),
    ("check_numeric_gradient", flat, "expected shape (2, 3)"),
    ("check_numeric_gradient", by_autograd, "does not require grad"),
    ("check_training_step", never_cleared, "zero_grad() before backward"),
    ("check_training_step", cleared_too_late, "no zero_grad between"),
    ("check_training_step", keeps_the_graph, "loss.item()"),
    ("check_training_step", in_eval_mode, "model.train() first"),
    ("check_training_step", softmax_twice, "no softmax"),
    ("check_training_step", the_sum, "their mean"),
    ("check_training_step", loss_after, "the loss after the step"),
    ("check_training_step", returns_nothing, "is there a return"),
    ("check_training_step", trains_too_late, "model.train() first"),
    ("check_training_step", never_called, "was not called"),
    ("check_training_step", returns_a_pair, "expected a number, got tuple"),
    ("check_division", number_only, "self.make"),
    ("check_division", without_parents, "neither number"),
    ("check_division", in_place_division, "changed the data"),
    ("check_division", quotient(lambda a, b: (-a / b**2, 1 / b)), "swapped"),
    ("check_division", quotient(lambda a, b: (1.0, -1.0)), "is 1 / b"),
    ("check_division", quotient(lambda a, b: (1 / b,), both=False), "no gradient"),
    ("check_division", quotient(lambda a, b: (1 / b,)), "each parent needs one"),
    ("check_division", quotient(lambda a, b: (1 / b, a / b**2)), "is negative"),
    ("check_division", quotient(lambda a, b: (1 / b, -math.log(b))), "-a / b²"),
    ("check_division", quotient(lambda a, b: (1 / 4, -3 / 16)), "longer formula"),
]

# Other forms of right answers than those in the solutions.
RIGHT = [
    ("check_distances", torch.cdist),
    ("check_distances", lambda a, b: (a.unsqueeze(1) - b.unsqueeze(0)).norm(dim=-1)),
    ("check_log_sum_exp",
     lambda x: x.max(-1).values + torch.log(torch.sum(torch.exp(x - x.max(-1, True).values), -1))),
    ("check_numeric_gradient", in_a_clone),
    ("check_training_step", clears_with_the_model),
    ("check_division", by_power),
    ("check_division", quotient(lambda a, b: [1 / b, -a / b**2])),
]
