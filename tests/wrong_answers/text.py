"""Typical wrong answers to the exercises of chapter 2."""

from collections.abc import Iterator

import tiktoken
import torch
from torch import Tensor


def counts_characters(tokenizer: tiktoken.Encoding, text: str) -> float:
    return len(text) / len(tokenizer.encode_ordinary(text))


def upside_down(tokenizer: tiktoken.Encoding, text: str) -> float:
    return len(tokenizer.encode_ordinary(text)) / len(text.encode())


def allows_specials(tokenizer: tiktoken.Encoding, text: str) -> float:
    return len(text.encode()) / len(tokenizer.encode(text, allowed_special="all"))


def refuses_specials(tokenizer: tiktoken.Encoding, text: str) -> float:
    return len(text.encode()) / len(tokenizer.encode(text))


def windows(tokens: list[int], T: int, fill: int = -100, shift: int = 1) -> tuple[Tensor, Tensor]:
    n = -(-(len(tokens) - 1) // T)
    rest = n * T - len(tokens) + 1
    targets = tokens[shift:][:len(tokens) - 1]
    targets = targets + [fill] * (n * T - len(targets))
    return (torch.tensor(tokens[:-1] + [0] * rest).view(n, T), torch.tensor(targets).view(n, T))


def targets_filled_with_zero(tokens: list[int], T: int) -> tuple[Tensor, Tensor]:
    return windows(tokens, T, fill=0)


def tail_lost(tokens: list[int], T: int) -> tuple[Tensor, Tensor]:
    n = (len(tokens) - 1) // T
    return (torch.tensor(tokens[:n * T]).view(n, T), torch.tensor(tokens[1:n * T + 1]).view(n, T))


def not_shifted(tokens: list[int], T: int) -> tuple[Tensor, Tensor]:
    inputs, targets = windows(tokens, T)
    return inputs, torch.where(targets == -100, targets, inputs)


def token_by_token(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    for i in ids:
        yield tokenizer.decode([i])


def all_at_the_end(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    yield tokenizer.decode(list(ids))


def not_a_generator(tokenizer: tiktoken.Encoding, ids: list[int]) -> str:
    return tokenizer.decode(list(ids))


def waits_for_no_mark(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    kept: list[int] = []
    for i in ids:
        kept.append(i)
        if "\N{REPLACEMENT CHARACTER}" not in (piece := tokenizer.decode(kept)):
            yield piece
            kept = []


def turned(x: Tensor, positions: Tensor, sign: int = 1, base: float = 10_000) -> Tensor:
    C = x.shape[-1]
    angle = positions[:, None] * base ** (-torch.arange(0, C, 2) / C)
    a, b = x[:, 0::2], x[:, 1::2]
    pairs = [a * angle.cos() - sign * b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(pairs, dim=-1).flatten(1)


def wrong_sign(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, positions, sign=-1)


def own_positions(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, torch.sqrt(positions.float()))


def one_speed(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, positions, base=1)


def added(x: Tensor, positions: Tensor) -> Tensor:
    return torch.add(x, positions[:, None])


WRONG = [
    ("check_bytes_per_token", upside_down, "the other way round"),
    ("check_bytes_per_token", counts_characters, "len(text) counts characters"),
    ("check_bytes_per_token", allows_specials, "nothing is special"),
    ("check_bytes_per_token", refuses_specials, "raised ValueError"),
    ("check_bytes_per_token", lambda tokenizer, text: 4, "expected a float"),
    ("check_all_windows", tail_lost, "expected shape (3, 4)"),
    ("check_all_windows", targets_filled_with_zero, "must be -100"),
    ("check_all_windows", not_shifted, "one place to the right"),
    ("check_stream", token_by_token, "half a character"),
    ("check_stream", all_at_the_end, "Yield inside the loop"),
    ("check_stream", not_a_generator, "Use yield"),
    ("check_stream", waits_for_no_mark, "really holds the replacement character"),
    ("check_rotate", wrong_sign, "look at the signs"),
    ("check_rotate", own_positions, "distance only"),
    ("check_rotate", one_speed, "a speed of its own"),
    ("check_rotate", added, "length of a row changed"),
    ("check_split_pattern", r"\p{L}+", "is left"),
    ("check_split_pattern", r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", "{1,3}"),
    ("check_split_pattern", r"(?s).{1,3}", "more than one word"),
    ("check_split_pattern", r"(?s).", "letters of a word"),
    ("check_split_pattern", r"(", "no regular expression"),
    ("check_split_pattern", 3, "a str"),
]
