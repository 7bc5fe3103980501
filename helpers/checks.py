"""Checks for the exercises: each takes your answer and says what is right or wrong with it.

A check looks at shape, dtype, properties and values, in that order, and names the likely mistake.
An untouched starter is told so and fails nothing. The answers are in `notebooks/solutions/`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CheckFailed(AssertionError):
    """An answer that is not right yet; the message says what to look at."""


def untouched(answer: Any) -> bool:
    """Whether the answer is still the starter: None, `...`, or a function that only says so.

    Example:
        >>> untouched(None), untouched(3)
        (True, False)
    """
    if answer is None or answer is ...:
        return True
    if not inspect.isfunction(answer):
        return False
    code = answer.__code__
    # A body of nothing but a docstring, `...` or `pass` loads only constants and returns None.
    return set(code.co_consts) <= {None, ..., answer.__doc__} and not code.co_names


def _start(answer: Any, name: str) -> bool:
    """Say that an exercise is untouched, and return whether there is something to check."""
    if untouched(answer):
        print(f"{name}: not tried yet. Replace the ... and run the cell again.")
        return False
    return True


def _done(name: str) -> None:
    print(f"{name}: correct.")


def _expect(condition: bool, message: str) -> None:
    """Fail with a message that names the likely mistake."""
    if not condition:
        raise CheckFailed(message)


def _tensor(value: Any, name: str, shape: tuple[int, ...],
            dtype: torch.dtype | None = None) -> Tensor:
    """The value as a tensor of this shape and dtype, or a message about the one that is wrong."""
    _expect(isinstance(value, Tensor), f"{name}: expected a tensor, got {type(value).__name__}.")
    _expect(tuple(value.shape) == shape,
            f"{name}: expected shape {shape}, got {tuple(value.shape)}.")
    if dtype is not None:
        _expect(value.dtype == dtype, f"{name}: expected dtype {dtype}, got {value.dtype}.")
    return value


def _call(answer: Callable, *arguments: Any, **named: Any) -> Any:
    """Run the answer; an error inside it is the answer's, and says so."""
    try:
        return answer(*arguments, **named)
    except Exception as error:
        raise CheckFailed(f"{answer.__name__} raised {type(error).__name__}: {error}") from error
