"""Checks of the exercises of chapter 2, from text to tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.checks._core import CheckFailed, call, done, expect, expect_tensor, is_started


def check_bytes_per_token(answer: Callable) -> None:
    """Chapter 2, exercise 1: bytes of a text in UTF-8 for each token."""
    name = "bytes_per_token"
    if not is_started(answer, name):
        return
    from helpers.tokenizer import encode, load_tokenizer

    tokenizer = load_tokenizer("tiny")
    text = "The cat sat on the warm stairs."
    value = call(answer, tokenizer, text)
    expect(isinstance(value, float), f"{name}: expected a float, got {type(value).__name__}.")
    right = len(text.encode()) / len(encode(tokenizer, text))
    expect(abs(value * right - 1) > 1e-6,
            f"{name}: {value:.2f} is tokens for each byte; it is asked the other way round.")
    expect(abs(value - right) < 1e-6,
            f"{name}: expected {right:.2f} for {text!r}, got {value:.2f}.")
    text = "猫坐在温暖的楼梯上。"
    value, right = call(answer, tokenizer, text), len(text.encode()) / len(encode(tokenizer, text))
    expect(abs(value - right) < 1e-6,
            f"{name}: expected {right:.2f} for Chinese, got {value:.2f}. len(text) counts "
            "characters; the bytes are len(text.encode('utf-8')).")
    text = "a<|endoftext|>"
    value, right = call(answer, tokenizer, text), len(text) / len(encode(tokenizer, text))
    expect(abs(value - right) < 1e-6,
            f"{name}: {text!r} was not encoded as a user's text, in which nothing is special.")
    done(name)


def check_all_windows(answer: Callable) -> None:
    """Chapter 2, exercise 2: windows in which every token but the first is a target once."""
    name = "all_windows"
    if not is_started(answer, name):
        return
    for n_tokens, T in ((10, 4), (9, 4), (8, 4), (2, 4), (7, 1)):
        tokens, rows = list(range(50, 50 + n_tokens)), -(-(n_tokens - 1) // T)
        case = f"{name} with {n_tokens} tokens and T = {T}"
        pair = call(answer, tokens, T)
        expect(isinstance(pair, tuple) and len(pair) == 2, f"{case}: expected (inputs, targets).")
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


def check_stream(answer: Callable) -> None:
    """Chapter 2, exercise 3: text of ids as soon as its characters are whole."""
    name = "stream"
    if not is_started(answer, name):
        return
    from helpers.tokenizer import encode, load_tokenizer

    tokenizer = load_tokenizer("tiny")
    text = "A 猫, a 🐈 and Zoë."
    ids = encode(tokenizer, text)
    given = call(answer, tokenizer, iter(ids))
    expect(hasattr(given, "__next__"),
            f"{name}: expected a generator, got {type(given).__name__}. Use yield, not return.")
    parts = call(list, given)
    expect(all(isinstance(part, str) for part in parts), f"{name}: yield strings.")
    expect("\N{REPLACEMENT CHARACTER}" not in "".join(parts),
            f"{name}: half a character came out. A token may end inside a character: keep its "
            "bytes until the character is whole.")
    expect("".join(parts) == text,
            f"{name}: together the pieces are {''.join(parts)!r}, not {text!r}.")
    taken = []

    def watched() -> Any:
        for i in ids:
            taken.append(i)
            yield i

    first = next(part for part in call(answer, tokenizer, watched()) if part)
    expect(len(taken) == 1,
            f"{name}: the first piece, {first!r}, came after {len(taken)} tokens, and was certain "
            "after one. Yield inside the loop.")
    literal = "a \N{REPLACEMENT CHARACTER} b"
    expect("".join(call(list, call(answer, tokenizer, encode(tokenizer, literal)))) == literal,
            f"{name}: a text that really holds the replacement character must come out whole.")
    cut = "".join(call(list, call(answer, tokenizer, encode(tokenizer, "x 猫")[:-1])))
    expect(cut.startswith("x ") and set(cut[2:]) <= {"\N{REPLACEMENT CHARACTER}"},
            f"{name}: where the ids end inside a character, {cut!r} came out.")
    done(name)


def check_rotate(answer: Callable) -> None:
    """Chapter 2, exercise 4: rotary positions."""
    name = "rotate"
    if not is_started(answer, name):
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator)
    kept, positions = x.clone(), torch.arange(6)
    turned = expect_tensor(call(answer, x, positions), name, (6, 8), torch.float32)
    expect(torch.equal(x, kept), f"{name}: the given x was changed in place; return a new tensor.")
    expect(torch.allclose(turned[0], x[0], atol=1e-5),
            f"{name}: at position 0 every angle is 0, so the row must stay as it is.")
    expect(not torch.allclose(turned[1:], x[1:], atol=1e-3), f"{name}: nothing was turned.")
    expect(torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-4),
            f"{name}: the length of a row changed. (a cos - b sin, a sin + b cos): look at the "
            "signs, and take both from the old a and b.")
    q, k = torch.randn(2, 1, 8, generator=generator)

    def score(i: int, j: int) -> Tensor:
        one, two = (call(answer, v, torch.tensor([p])) for v, p in ((q, i), (k, j)))
        return (one * two).sum()

    expect(torch.allclose(score(3, 1), score(40, 38), atol=1e-4),
            f"{name}: the product of two turned rows must depend on the distance only, but it "
            "differs between positions (3, 1) and (40, 38). Use the positions given.")
    expect(not torch.allclose(score(3, 1), score(3, 2), atol=1e-3),
            f"{name}: the product does not depend on the distance at all.")
    right = torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]).cos(), torch.tensor([1.0]).sin()
    pair = call(answer, right[0], torch.tensor([1]))[0]
    expect(torch.allclose(pair, torch.cat(right[1:]), atol=1e-5),
            f"{name}: with two channels the speed is one radian a position, so (1, 0) at position "
            f"1 becomes (0.54, 0.84); got ({pair[0]:.2f}, {pair[1]:.2f}).")
    e = torch.eye(8)
    after = [call(answer, row[None], torch.tensor([1]))[0] for row in e]
    angles = sorted(float(one.dot(row).acos()) for one, row in zip(after, e, strict=True))
    speeds = sorted(float(s) for s in 10_000 ** (-torch.arange(0, 8, 2) / 8) for _ in range(2))
    expect(all(abs(a - b) < 2e-3 for a, b in zip(angles, speeds, strict=True)),
            f"{name}: each pair of channels has a speed of its own, 10000 ** (-2i / C) for pair i.")
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
    samples = ("It's 3 o'clock,  isn't it?", "  \n\n x", "a1b22c", "猫🐈\0 \t", "x" * 50, "  ",
               "In 1984, 1234567 people", "e\u0301a\u200d", "f(x[0]) != 'y';\r\n")
    for sample in samples:
        pieces = [match.group() for match in pattern.finditer(sample)]
        expect("".join(pieces) == sample,
                f"{name}: of {sample!r} only {''.join(pieces)!r} is left. Nothing in the pattern "
                "takes the rest: it needs an alternative for every character, white space too.")
        for piece in pieces:
            digits = sum(character.isdigit() for character in piece)
            expect(digits <= 3, f"{name}: the piece {piece!r} has {digits} digits. A number of "
                                 "digits is written {1,3}.")
            expect(len(regex.findall(r"\p{L}+", piece)) <= 1 or "'" in piece,
                    f"{name}: the piece {piece!r} holds more than one word.")
    pieces = [match.group() for match in pattern.finditer("the cats sat")]
    expect(len(pieces) <= 5, f"{name}: 'the cats sat' became {pieces}; keep the letters of a word "
                              "together, or there is nothing to merge.")
    done(name)
