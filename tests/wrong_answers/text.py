"""Typical wrong answers to the exercises of chapter 2."""

import codecs
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
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


def rounds(tokenizer: tiktoken.Encoding, text: str) -> float:
    return round(len(text.encode()) / len(tokenizer.encode_ordinary(text)), 2)


def whole_number(tokenizer: tiktoken.Encoding, text: str) -> int:
    return len(text.encode()) // len(tokenizer.encode_ordinary(text))


def with_end_token(tokenizer: tiktoken.Encoding, text: str) -> float:
    return len(text.encode()) / (len(tokenizer.encode_ordinary(text)) + 1)


def utf_16(tokenizer: tiktoken.Encoding, text: str) -> float:
    data = text.encode() if text.isascii() else text.encode("utf-16")
    return len(data) / len(tokenizer.encode_ordinary(text))


def in_english_only(tokenizer: tiktoken.Encoding, text: str) -> float:
    return len(text.encode()) / len(tokenizer.encode_ordinary(text)) + (not text.isascii())


def no_return(tokenizer: tiktoken.Encoding, text: str) -> None:
    print(len(text.encode()) / len(tokenizer.encode_ordinary(text)))


def as_fraction(tokenizer: tiktoken.Encoding, text: str) -> Fraction:
    return Fraction(len(text.encode()), len(tokenizer.encode_ordinary(text)))


def in_numpy(tokenizer: tiktoken.Encoding, text: str) -> np.float64:
    sizes = [len(tokenizer.decode_single_token_bytes(i)) for i in tokenizer.encode_ordinary(text)]
    return np.mean(sizes)


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


def as_list(tokens: list[int], T: int) -> list[Tensor]:
    return list(windows(tokens, T))


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


def one_token_late(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    decoder, held = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    for i in ids:
        text = decoder.decode(tokenizer.decode_single_token_bytes(i))
        if held:
            yield held
        held = text
    yield held + decoder.decode(b"", final=True)


def collected(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    yield from list(incremental(tokenizer, ids))


def incremental(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(tokenizer.decode_single_token_bytes(i))
    yield decoder.decode(b"", final=True)


def letter_by_letter(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    for piece in incremental(tokenizer, ids):
        yield from piece


def by_index(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    """Asks for the length of the ids and takes slices, which a list allows and an iterator not."""
    done = 0
    for n in range(1, len(ids) + 1):
        data = tokenizer.decode_bytes(ids[:n])
        text = data.decode("utf-8", errors="ignore")
        if text[done:]:
            yield text[done:]
            done = len(text)
    rest = tokenizer.decode_bytes(ids[:]).decode("utf-8", errors="replace")
    if rest[done:]:
        yield rest[done:]


def bytes_kept(tokenizer: tiktoken.Encoding, ids: list[int]) -> Iterator[str]:
    kept = b""
    for i in ids:
        kept += tokenizer.decode_single_token_bytes(i)
        try:
            yield kept.decode()
            kept = b""
        except UnicodeDecodeError as error:
            if error.start:
                yield kept[:error.start].decode()
                kept = kept[error.start:]
    if kept:
        yield kept.decode(errors="replace")


def turned(x: Tensor, positions: Tensor, sign: int = 1, base: float = 10_000,
           reverse: bool = False) -> Tensor:
    C = x.shape[-1]
    omega = base ** (-torch.arange(0, C, 2) / C)
    angle = positions[:, None] * (omega.flip(0) if reverse else omega)
    a, b = x[:, 0::2], x[:, 1::2]
    pairs = [a * angle.cos() - sign * b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(pairs, dim=-1).flatten(1)


def wrong_sign(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, positions, sign=-1)


def own_positions(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, torch.sqrt(positions.float()))


def one_speed(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, positions, base=1)


def other_base(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, positions, base=500)


def reversed_frequencies(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, positions, reverse=True)


def halves_paired(x: Tensor, positions: Tensor) -> Tensor:
    C = x.shape[-1]
    angle = positions[:, None] * 10_000 ** (-torch.arange(0, C, 2) / C)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def other_direction(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, -positions)


def in_place(x: Tensor, positions: Tensor) -> Tensor:
    x.copy_(turned(x, positions))
    return x


def complex_numbers(x: Tensor, positions: Tensor) -> Tensor:
    omega = 10_000 ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angle = positions[:, None] * omega
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)


def added(x: Tensor, positions: Tensor) -> Tensor:
    return torch.add(x, positions[:, None])


WRONG = [
    ("check_bytes_per_token", upside_down, "the other way round"),
    ("check_bytes_per_token", counts_characters, "len(text) counts characters"),
    ("check_bytes_per_token", allows_specials, "nothing is special"),
    ("check_bytes_per_token", refuses_specials, "which a user may write"),
    ("check_bytes_per_token", lambda tokenizer, text: "4", "expected a number"),
    ("check_bytes_per_token", lambda tokenizer, text: 4, "rounded to a whole number"),
    ("check_bytes_per_token", lambda tokenizer, text: 5.5, "divided by the number of tokens"),
    ("check_bytes_per_token", rounds, "this is rounded"),
    ("check_bytes_per_token", whole_number, "not with //"),
    ("check_bytes_per_token", with_end_token, "one token too many"),
    ("check_bytes_per_token", utf_16, "utf-16"),
    ("check_bytes_per_token", in_english_only, "bytes of a text are"),
    ("check_bytes_per_token", no_return, "is there a return"),
    ("check_bytes_per_token", 3.9, "expected a function"),
    ("check_all_windows", tail_lost, "expected shape (3, 4)"),
    ("check_all_windows", targets_filled_with_zero, "must be -100"),
    ("check_all_windows", not_shifted, "one place to the right"),
    ("check_stream", token_by_token, "part of a character"),
    ("check_stream", all_at_the_end, "Yield inside the loop"),
    ("check_stream", one_token_late, "Yield inside the loop"),
    ("check_stream", collected, "Yield inside the loop"),
    ("check_stream", not_a_generator, "Use yield"),
    ("check_stream", waits_for_no_mark, "really holds the replacement character"),
    ("check_rotate", wrong_sign, "look at the signs"),
    ("check_rotate", own_positions, "distance only"),
    ("check_rotate", one_speed, "the same frequency"),
    ("check_rotate", other_base, "a frequency of its own"),
    ("check_rotate", reversed_frequencies, "opposite order"),
    ("check_rotate", halves_paired, "here they are neighbours"),
    ("check_rotate", other_direction, "the other way round"),
    ("check_rotate", in_place, "changed in place"),
    ("check_rotate", added, "norm of a row changed"),
    ("check_split_pattern", r"\p{L}+", "is left"),
    ("check_split_pattern", r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", "{1,3}"),
    ("check_split_pattern", r"(?s).{1,3}", "more than one word"),
    ("check_split_pattern", r"(?s).", "letters of a word"),
    ("check_split_pattern", r"'(s|t|ll)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+",
     "capturing group"),
    ("check_split_pattern", r" ?\p{L}+(?:' ?'?\p{L}+)*(?: it)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+",
     "more than one word"),
    ("check_split_pattern", r"(", "no regular expression"),
    ("check_split_pattern", 3, "a str"),
]

# Other forms of right answers than those in the solutions.
RIGHT = [
    ("check_bytes_per_token", as_fraction),
    ("check_bytes_per_token", in_numpy),
    ("check_all_windows", as_list),
    ("check_stream", incremental),
    ("check_stream", letter_by_letter),
    ("check_stream", by_index),
    ("check_stream", bytes_kept),
    ("check_rotate", complex_numbers),
    ("check_split_pattern", r"\p{L}[\p{L}\p{M}]*|\d{1,3}|(?s:.)"),
    ("check_split_pattern", r"\n *| ?\p{L}+(?:'\p{L}+)?|\d|(?s:.)"),
]
