"""Checks of the exercises of chapter 2, from text to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from helpers.checks._core import (
    CheckFailed,
    call,
    close,
    done,
    draw,
    expect,
    expect_function,
    expect_number,
    expect_tensor,
    is_started,
)


def check_bytes_per_token(answer: Callable) -> None:
    """Chapter 2, exercise 1: bytes of a text in UTF-8 for each token."""
    name = "bytes_per_token"
    if not is_started(answer, name):
        return
    from helpers.tokenizer import encode, load_tokenizer

    expect_function(answer, name)
    tokenizer = load_tokenizer("tiny")

    def compare(text: str, likely: dict[str, float], otherwise: str) -> None:
        n_tokens = len(encode(tokenizer, text))
        right = len(text.encode()) / n_tokens
        value = expect_number(call(answer, tokenizer, text), name)
        if close(value, right):
            return
        for what, wrong in likely.items():
            expect(not close(value, wrong), f"{name}: {what}")
        raise CheckFailed(f"{name}: expected {right:.4f} for {text!r}, got {value:.4f}. "
                          + otherwise)

    text = "The cat sat on the warm stairs."
    n_bytes, n_tokens = len(text), len(encode(tokenizer, text))
    compare(text, {
        "this is tokens for each byte; it is asked the other way round.": n_tokens / n_bytes,
        "this is rounded down; divide with /, not with //.": n_bytes // n_tokens,
        "this is rounded; return the quotient as it is.": round(n_bytes / n_tokens, 2),
        "this is rounded to a whole number; return the quotient.": round(n_bytes / n_tokens),
        "this counts one token too many: encode the text without the end token.":
            n_bytes / (n_tokens + 1),
    }, "It is the number of bytes divided by the number of tokens.")
    text = "猫坐在温暖的楼梯上。"
    n_tokens = len(encode(tokenizer, text))
    compare(text, {
        "len(text) counts characters (code points); the bytes are len(text.encode('utf-8')).":
            len(text) / n_tokens,
        "these are the bytes in UTF-16, not in UTF-8.": len(text.encode("utf-16")) / n_tokens,
    }, "The bytes of a text are len(text.encode('utf-8')).")
    text = "a<|endoftext|>"
    try:
        answer(tokenizer, text)
    except ValueError as error:
        raise CheckFailed(
            f"{name} refused {text!r}, which a user may write: tokenizer.encode raises a "
            "ValueError for special tokens. Use encode(tokenizer, text) of helpers.tokenizer."
        ) from error
    compare(text, {}, "In a user's text nothing is special: <|endoftext|> is thirteen characters.")
    done(name)


def check_all_windows(answer: Callable) -> None:
    """Chapter 2, exercise 2: windows in which every token but the first is a target once."""
    name = "all_windows"
    if not is_started(answer, name):
        return
    expect_function(answer, name)
    for n_tokens, T in ((10, 4), (9, 4), (8, 4), (2, 4), (7, 1)):
        tokens, rows = list(range(50, 50 + n_tokens)), -(-(n_tokens - 1) // T)
        case = f"{name} with {n_tokens} tokens and T = {T}"
        pair = call(answer, list(tokens), T)
        expect(isinstance(pair, tuple | list) and len(pair) == 2,
               f"{case}: expected (inputs, targets), got {type(pair).__name__}.")
        inputs = expect_tensor(pair[0], f"{case}, inputs", (rows, T), torch.int64)
        targets = expect_tensor(pair[1], f"{case}, targets", (rows, T), torch.int64)
        flat_inputs, flat_targets = inputs.flatten().tolist(), targets.flatten().tolist()
        rest = rows * T - (n_tokens - 1)
        expect(flat_targets[n_tokens - 1:] == [-100] * rest,
               f"{case}: the last {rest} targets stand for no token and must be -100, "
               f"got {flat_targets[n_tokens - 1:]}.")
        expect(flat_targets[:n_tokens - 1] == tokens[1:],
               f"{case}: each token but the first must be a target once, one place to the right "
               f"of its input; got targets {targets.tolist()}.")
        expect(flat_inputs[:n_tokens - 1] == tokens[:-1],
               f"{case}: the inputs are the tokens in order; got {inputs.tolist()}.")
        expect(flat_inputs[n_tokens - 1:] == [0] * rest,
               f"{case}: fill up the inputs with 0 where the target is -100; "
               f"got {flat_inputs[n_tokens - 1:]}.")
    done(name)


class _Watched(list):
    """A list that keeps how many of its items have been read, by a loop, an index or a slice."""

    n_read = 0

    def __iter__(self) -> Iterator:
        for i in range(len(self)):
            yield self[i]

    def __getitem__(self, index):
        last = index.indices(len(self))[1] if isinstance(index, slice) else index % len(self) + 1
        self.n_read = max(self.n_read, last)
        return super().__getitem__(index)


def check_stream(answer: Callable) -> None:
    """Chapter 2, exercise 3: text of ids as soon as its characters are whole."""
    name, mark = "stream", "\N{REPLACEMENT CHARACTER}"
    if not is_started(answer, name):
        return
    from helpers.tokenizer import encode, load_tokenizer

    expect_function(answer, name)
    tokenizer = load_tokenizer("tiny")
    text = "A 猫, a 🐈 and Zoë."
    ids = encode(tokenizer, text)
    given = call(answer, tokenizer, list(ids))
    expect(hasattr(given, "__next__"),
           f"{name}: expected a generator, got {type(given).__name__}. Use yield, not return.")
    parts = call(list, given)
    expect(all(isinstance(part, str) for part in parts), f"{name}: yield strings.")
    expect(mark not in "".join(parts),
           f"{name}: part of a character came out. A token may end inside a character: keep its "
           "bytes until the character is whole.")
    expect("".join(parts) == text,
           f"{name}: together the pieces are {''.join(parts)!r}, not {text!r}.")
    watched, n_out = _Watched(ids), 0
    for part in call(answer, tokenizer, watched):
        before = ids[:max(watched.n_read - 1, 0)]
        expect(n_out >= len(tokenizer.decode(before).rstrip(mark)),
               f"{name}: {part!r} came only after {watched.n_read} ids were read, although some "
               "text was certain before. Yield inside the loop, before the next id is read.")
        n_out += len(part)
    literal = f"a {mark} b"
    expect("".join(call(list, call(answer, tokenizer, encode(tokenizer, literal)))) == literal,
           f"{name}: a text that really holds the replacement character must come out whole.")
    cut = "".join(call(list, call(answer, tokenizer, encode(tokenizer, "x 猫")[:-1])))
    expect(cut.startswith("x ") and set(cut[2:]) <= {mark},
           f"{name}: where the ids end inside a character, {cut!r} came out.")
    expect(call(list, call(answer, tokenizer, [])) in ([], [""]),
           f"{name}: no ids have no text.")
    done(name)


def _rotated(x: Tensor, positions: Tensor, omega: Tensor) -> Tensor:
    """The rows of x (T, C), pairs 0 and 1, 2 and 3, ... rotated by positions times omega (C/2,)."""
    angle = positions[:, None] * omega
    a, b = x[:, 0::2], x[:, 1::2]
    pairs = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(pairs, dim=-1).flatten(1)


def _halves(x: Tensor) -> Tensor:
    """Components 0, 4, 1, 5, ...: as if the pairs were 0 and 4, 1 and 5, ... of C = 8."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(1)


def check_rotate(answer: Callable) -> None:
    """Chapter 2, exercise 4: rotary positional embedding."""
    name, C = "rotate", 8
    if not is_started(answer, name):
        return
    expect_function(answer, name)
    x = draw(0, 6, C)
    kept, positions = x.clone(), torch.arange(6)
    turned = expect_tensor(call(answer, x, positions), name, (6, C))
    expect(turned.is_floating_point(), f"{name}: expected real numbers, got {turned.dtype}.")
    expect(torch.equal(x, kept), f"{name}: the given x was changed in place; return a new tensor.")
    expect(close(turned[0], x[0]),
           f"{name}: at position 0 every angle is 0, so the row must stay as it is.")
    expect(not close(turned[1:], x[1:], atol=1e-3), f"{name}: nothing was rotated.")
    expect(close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-4),
           f"{name}: the norm of a row changed. (a cos - b sin, a sin + b cos): look at the signs, "
           "and take both from the old a and b.")
    later = positions + 37
    right_later = call(answer, x, later)
    i, j = call(answer, x[:1], torch.tensor([3])), call(answer, x[1:2], torch.tensor([1]))
    m, n = call(answer, x[:1], torch.tensor([40])), call(answer, x[1:2], torch.tensor([38]))
    expect(close((i * j).sum(), (m * n).sum(), atol=1e-4),
           f"{name}: the dot product of two rotated rows must depend on the distance only, but it "
           "differs between positions (3, 1) and (40, 38). Use the positions given.")
    omega = 10_000 ** (-torch.arange(0, C, 2) / C)
    likely = {
        "each pair turns the other way round: (a, b) becomes (a cos - b sin, a sin + b cos).":
            _rotated(x, -positions, omega),
        "the pairs are components 0 and 4, 1 and 5, ...; here they are neighbours, 0 and 1, "
        "2 and 3, ...": torch.cat([_rotated(_halves(x), positions, omega)[:, k::2]
                                   for k in (0, 1)], dim=-1),
        "the frequencies are in the opposite order: the first pair turns fastest.":
            _rotated(x, positions, omega.flip(0)),
        "all pairs have the same frequency; each has one of its own, 10000 ** (-2i / C) for "
        "pair i.": _rotated(x, positions, torch.ones(C // 2)),
    }
    for what, wrong in likely.items():
        expect(not close(turned, wrong, atol=1e-3), f"{name}: {what}")
    right = _rotated(x, positions, omega)
    pair = int((turned - right).abs().amax(dim=0).argmax()) // 2
    expect(close(turned, right, atol=1e-3),
           f"{name}: components {2 * pair} and {2 * pair + 1} are not rotated by position times "
           f"10000 ** (-{2 * pair} / {C}). Each pair has a frequency of its own, "
           "10000 ** (-2i / C) for pair i.")
    expect(close(right_later, _rotated(x, later, omega), atol=1e-3),
           f"{name}: right for positions 0 to 5, but not for 37 to 42. Use the positions given.")
    done(name)


def check_split_pattern(answer: str) -> None:
    """Chapter 2, exercise 5: a pattern that cuts numbers to three digits and loses nothing."""
    name = "my_pattern"
    if not is_started(answer, name):
        return
    import regex

    expect(isinstance(answer, str), f"{name}: expected a pattern, a str, "
                                    f"got {type(answer).__name__}.")
    try:
        pattern = regex.compile(answer)
    except regex.error as error:
        raise CheckFailed(f"{name} is no regular expression: {error}.") from error
    expect(pattern.groups == 0,
           f"{name} has a capturing group, so regex.findall returns the group in place of the "
           "whole piece. Write (?:...) for a group.")
    samples = ("It's 3 o'clock,  isn't it?", "  \n\n x", "a1b22c", "猫🐈\0 \t", "x" * 50, "  ",
               "In 1984, 1234567 people", "e\u0301a\u200d", "f(x[0]) != 'y';\r\n", "don't' 'tis it",
               "١٢٣٤٥")
    for sample in samples:
        pieces = regex.findall(answer, sample)
        expect("".join(pieces) == sample,
               f"{name}: of {sample!r} only {''.join(pieces)!r} is left. Nothing in the pattern "
               "takes the rest: it needs an alternative for every character, white space too.")
        for piece in pieces:
            digits = sum(character.isdigit() for character in piece)
            expect(digits <= 3, f"{name}: the piece {piece!r} has {digits} digits. A number of "
                                "digits is written {1,3}.")
            expect(len(regex.findall(r"\p{L}[\p{L}\p{M}\p{Cf}]*(?:'\p{L}+)*", piece)) <= 1,
                   f"{name}: the piece {piece!r} holds more than one word.")
    pieces = regex.findall(answer, "the cats sat")
    expect(len(pieces) <= 5, f"{name}: 'the cats sat' became {pieces}; keep the letters of a word "
                             "together, or there is nothing to merge.")
    done(name)
