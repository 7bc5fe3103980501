"""What all checks share: how they look at an answer, and how they say what is wrong with it."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CheckFailed(AssertionError):
    """An answer that is not right yet; the message says what to look at."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the message alone, and not the check's own lines with the answer."""
        return [f"Not right yet. {self}"]


def guard(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The check, with any error inside it turned into a message about the answer."""
    @functools.wraps(check)
    def guarded(answer: Any) -> None:
        try:
            return check(answer)
        except CheckFailed:
            raise
        except Exception as error:
            raise CheckFailed(
                f"{check.__name__} could not use this answer ({type(error).__name__}: {error}). "
                "Compare what it takes and returns with the text of the exercise."
            ) from error
    return guarded


def is_unanswered(answer: Any) -> bool:
    """Whether the answer is still the starter: None, `...`, or a function that only says so.

    Example:
        >>> is_unanswered(None), is_unanswered(3)
        (True, False)
    """
    if answer is None or answer is ...:
        return True
    if not inspect.isfunction(answer):
        return False
    code = inspect.unwrap(answer).__code__        # beneath a decorator such as torch.no_grad()
    # A body of nothing but a docstring, `...` or `pass` loads no value but None.
    loads = {i.opname for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")}
    return (loads <= {"LOAD_CONST", "LOAD_CONST_IMMORTAL", "LOAD_CONST_MORTAL"}
            and set(code.co_consts) <= {None, ..., answer.__doc__})


def is_started(answer: Any, name: str) -> bool:
    """Say that an exercise is not answered yet, or return that there is something to check."""
    if is_unanswered(answer):
        print(f"{name}: not tried yet. Replace the ... and run the cell again.")
        return False
    return True


def done(name: str) -> None:
    print(f"{name}: correct.")


def expect(condition: bool, message: str) -> None:
    """Fail with a message that names the likely mistake."""
    if not condition:
        raise CheckFailed(message)


def expect_tensor(value: Any, name: str, shape: tuple[int, ...],
                  dtype: torch.dtype | None = None) -> Tensor:
    """The value as a tensor of this shape and dtype, or a message about the one that is wrong."""
    expect(isinstance(value, Tensor), f"{name}: expected a tensor, got {type(value).__name__}.")
    expect(tuple(value.shape) == shape,
           f"{name}: expected shape {shape}, got {tuple(value.shape)}.")
    if dtype is not None:
        expect(value.dtype == dtype, f"{name}: expected dtype {dtype}, got {value.dtype}.")
    return value


def call(answer: Callable, *arguments: Any, **named: Any) -> Any:
    """Run the answer; an error inside it is the answer's, and says so."""
    try:
        return answer(*arguments, **named)
    except CheckFailed:                           # of a check inside, already a message
        raise
    except Exception as error:
        name = getattr(answer, "__name__", "your answer")
        raise CheckFailed(f"{name} raised {type(error).__name__}: {error}") from error


class RecordCalls(TorchFunctionMode):
    """Collects the names of the PyTorch functions and methods that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def forbid(answer: Callable, function: Callable, message: str) -> Iterator[None]:
    """Within it, a call of the function fails with the message.

    The function is found under any global name of the answer and of the function's own module,
    and in the class that defines it.
    """
    def refuse(*_: Any, **__: Any) -> None:
        raise CheckFailed(message)

    home: Any = sys.modules[function.__module__]
    for part in function.__qualname__.split(".")[:-1]:
        home = getattr(home, part)
    kept = getattr(home, function.__name__)
    globals_of = getattr(inspect.unwrap(answer), "__globals__", {})
    names = [key for key, value in globals_of.items() if value is kept]
    setattr(home, function.__name__, refuse)
    globals_of.update(dict.fromkeys(names, refuse))
    try:
        yield
    finally:
        setattr(home, function.__name__, kept)
        globals_of.update(dict.fromkeys(names, kept))


def close(value: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Whether a number or a tensor equals what is expected, shape included, up to rounding.

    Example:
        >>> close(0.1 + 0.2, 0.3), close(torch.ones(2), torch.ones(3))
        (True, False)
    """
    if isinstance(expected, Tensor):
        return isinstance(value, Tensor) and value.shape == expected.shape and torch.allclose(
            value.detach().to(expected), expected.detach(), rtol=rtol, atol=atol)
    return math.isclose(value, expected, rel_tol=rtol, abs_tol=atol)


def expect_function(answer: Any, name: str) -> None:
    expect(callable(answer), f"{name}: expected a function, got {type(answer).__name__}. Give the "
                             "function itself to the check, without calling it.")


def expect_number(value: Any, name: str) -> float:
    """The value as a float, or a message about what it is instead."""
    expect(value is not None, f"{name} returned None: is there a return at its end?")
    expect(isinstance(value, numbers.Real) and not isinstance(value, bool),
           f"{name}: expected a number, got {type(value).__name__}.")
    return float(value)


def draw(seed: int, *shape: int) -> Tensor:
    """Random numbers that are the same in every run, whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomize(module: torch.nn.Module, std: float, seed: int, norms: bool = True) -> None:
    """Move all parameters away from their start, so that no scale is one and no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if norms or parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
