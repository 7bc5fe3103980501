"""Checks for the exercises: each takes your answer and says what is right or wrong with it.

A check looks at shape, dtype, properties and values, in that order, and names the likely mistake.
An untouched starter is told so and fails nothing. The answers are in `notebooks/solutions/`.
"""

from __future__ import annotations

import dis
import inspect
import math
import numbers
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
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
    code = inspect.unwrap(answer).__code__        # beneath a decorator such as torch.no_grad()
    # A body of nothing but a docstring, `...` or `pass` loads no value but None.
    loads = {i.opname for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")}
    return (loads <= {"LOAD_CONST", "LOAD_CONST_IMMORTAL", "LOAD_CONST_MORTAL"}
            and set(code.co_consts) <= {None, ..., answer.__doc__})


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
        name = getattr(answer, "__name__", "your answer")
        raise CheckFailed(f"{name} raised {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------------------------------
# Chapter 1: overview


def _function(answer: Any, name: str) -> None:
    _expect(callable(answer), f"{name}: expected a function, got {type(answer).__name__}. Give the "
                              "function itself to the check, without calling it.")


def _number(value: Any, name: str) -> float:
    """The value as a float, or a message about what it is instead."""
    _expect(value is not None, f"{name} returned None: is there a return at its end?")
    _expect(isinstance(value, numbers.Real) and not isinstance(value, bool),
            f"{name}: expected a number, got {type(value).__name__}.")
    return float(value)


def _equal(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9)


def _count_next(pieces: Sequence[str], order: int) -> dict[tuple, Counter]:
    """Context to counter of what came next, as in the chapter."""
    table: dict[tuple, Counter] = {}
    for i in range(len(pieces) - order):
        table.setdefault(tuple(pieces[i:i + order]), Counter())[pieces[i + order]] += 1
    return table


def check_training_days(training_days: Callable[[float, float, float], float]) -> None:
    """Exercise 1.1: days of training, at six operations per parameter and token."""
    name = "training_days"
    if not _start(training_days, name):
        return
    _function(training_days, name)
    for arguments in ((1e6, 1e9, 1e12), (124e6, 10e9, 1e13), (175e9, 300e9, 28e12)):
        n_parameters, n_tokens, rate = arguments
        days = _number(_call(training_days, *arguments), name)
        _expect(days > 0, f"{name}: the answer must be positive, got {days}.")
        seconds = 6 * n_parameters * n_tokens / rate
        for unit, length in (("seconds", 1), ("minutes", 60), ("hours", 3600),
                             ("years", 365 * 86_400), ("years", 365.25 * 86_400)):
            _expect(not _equal(days, seconds / length),
                    f"{name}: this is the time in {unit}, and days were asked for. A day has "
                    "24 * 3600 seconds.")
        wanted = seconds / 86_400
        for factor in (1, 2, 4):
            _expect(not _equal(days * 6 / factor, wanted),
                    f"{name}: the rule of thumb counts six operations per parameter and token, "
                    f"two to compute and four to learn; here they are {factor}.")
        twice = _number(_call(training_days, n_parameters, n_tokens, 2 * rate), name)
        _expect(_equal(2 * twice, days),
                f"{name}: a machine that does twice as many operations per second should need half "
                "the time. Divide by operations_per_second.")
        _expect(_equal(days, wanted),
                f"{name}{arguments}: expected {wanted:.4g} days, got {days:.4g}. Multiply six, the "
                "parameters and the tokens, divide by the operations per second, then turn "
                "seconds into days.")
    _done(name)


def check_back_off(back_off: Callable[[list[dict[tuple, Counter]], list[str]], str | None]) -> None:
    """Exercise 1.2: the likeliest word after the longest end of the context that was seen."""
    name = "back_off"
    if not _start(back_off, name):
        return
    _function(back_off, name)
    text = """we saw the dog run . they saw the dog run . the dog sat . the dog sat . the dog sat .
              a cat sat . a cat sat . one cat sat . the cat ran . the cat ran . she fed the cat"""
    tables = [_count_next(re.findall(r"\S+", text), order) for order in (1, 2, 3)]
    cases = [
        (["saw", "the", "dog"], "run", "all three words were seen together"),
        (["fed", "the", "cat"], "ran", "only the last two words were seen with one after them"),
        (["run", "fed", "dog"], "sat", "only the last word was seen"),
        (["we", "saw", "a", "cat"], "sat", "the context is longer than the longest in the tables"),
        (["a"], "cat", "the context is shorter than the longest in the tables"),
        (["saw", "the", "piano"], None, "the last word was never seen, so nothing is known"),
    ]
    for context, wanted, why in cases:
        given = list(context)
        word = _call(back_off, tables, given)
        _expect(given == context,
                f"{name} changed the context it was given, a surprise to whoever passed it. Slice "
                "it, as in context[-2:], rather than popping from it.")
        _expect(word is None or isinstance(word, str),
                f"{name}: expected a word or None, got {word!r}. Of a row, "
                "row.most_common(1)[0][0] is the word alone.")
        if word == wanted:
            continue
        _expect(wanted is not None,
                f"{name}: after {context} expected None, got {word!r}: {why}. An end of the "
                "context holds its last word; its beginning does not count.")
        _expect(word is not None, f"{name}: after {context} expected {wanted!r}, got None: {why}. "
                                  "tables[0] counts contexts of one word: is it tried as well?")
        raise CheckFailed(f"{name}: after {context} expected {wanted!r}, got {word!r}: {why}. "
                          "Begin with the longest end of the context, and stop at the first that "
                          "is in its table.")
    _done(name)


def check_mean_surprise(mean_surprise: Callable[..., float]) -> None:
    """Exercise 1.3: the mean of -log p over a text, with one added to each count."""
    name = "mean_surprise"
    if not _start(mean_surprise, name):
        return
    _function(mean_surprise, name)
    pieces, size = ["a", "b", "a", "b", "a", "c"], 4               # the fourth word is d
    table = _count_next(pieces, 1)
    before = {context: Counter(row) for context, row in table.items()}

    def loss(table: dict[tuple, Counter], order: int, words: list[str]) -> float:
        value = _number(_call(mean_surprise, table, order, words, size), name)
        _expect(value != math.inf,
                f"{name} is infinite for {words}: a word that was never counted has count 0 in its "
                "row, to which one is added too.")
        return value

    for context in "ad":                                           # seen, and never seen
        losses = [loss(table, 1, [context, word]) for word in "abcd"]
        _expect(min(losses) > 0, f"{name} is {min(losses):.3g} for a word that is not certain, and "
                                 "a surprise is positive: is the minus of -log p there?")
        for base, number in (("2", math.log(2)), ("10", math.log(10))):
            _expect(not _equal(sum(math.exp(-x * number) for x in losses), 1),
                    f"{name}: this is the logarithm to base {base}; math.log(p) is the natural "
                    "one.")
        _expect(not _equal(sum(math.exp(-x * 2) for x in losses), 1),
                f"{name}: divide by the number of words that were predicted, which is all but the "
                "first `order`, not by the length of the text.")
        total = sum(math.exp(-x) for x in losses)
        _expect(_equal(total, 1),
                f"{name}: after {context!r} the probabilities of all {size} words add up to "
                f"{total:.3f}, not to one. Each of them gets one more count, so the total of the "
                "row grows by vocab_size, also where the row is empty.")
    _expect(_equal(loss(table, 1, ["a", "b"]), math.log(7 / 3)),
            f"{name}: 'b' followed 'a' in two of three cases, so with one added for each of "
            f"{size} words its probability is 3 / 7, and the surprise -log(3 / 7).")
    words = ["a", "b", "c", "a"]
    parts = [math.log(7 / 3), math.log(6), math.log(4)]
    value = loss(table, 1, words)
    _expect(not _equal(value, sum(parts)), f"{name}: this is the sum of the surprises. Divide by "
                                           "the number of words that were predicted.")
    _expect(_equal(value, sum(parts) / 3),
            f"{name}: expected {sum(parts) / 3:.4f} for {words} at order 1, got {value:.4f}. "
            "The last word counts too, though nothing was ever seen after 'c'.")
    # Order two: the context is the pair of words before.
    value = loss(_count_next(pieces, 2), 2, ["b", "a", "b", "d"])
    parts = [math.log(3), math.log(6)]                              # 2 of 6, 1 of 6
    _expect(not _equal(value, math.log(size)),
            f"{name}: at order 2 no context is found in the table. Its contexts are tuples of two "
            "words, tuple(words[i - order : i]).")
    _expect(_equal(value, sum(parts) / 2),
            f"{name}: expected {sum(parts) / 2:.4f} for the text b a b d at order 2, got "
            f"{value:.4f}. The first `order` words are context only; each later one is predicted "
            "from the `order` words before it.")
    _expect(table == before, f"{name} changed the table it was given; add the one to the count "
                             "that you read, not in the table.")
    _done(name)


def check_order_of_half(order_of_half: Callable[[Sequence[str]], int]) -> None:
    """Exercise 1.4: the lowest order at which more than half of the contexts are unseen."""
    name = "order_of_half"
    if not _start(order_of_half, name):
        return
    _function(order_of_half, name)
    from helpers.setup import data_path

    def unseen(pieces: list[str], order: int) -> float:
        cut = int(len(pieces) * 0.9)
        table, rest = _count_next(pieces[:cut], order), pieces[cut:]
        contexts = [tuple(rest[i:i + order]) for i in range(len(rest) - order)]
        return sum(context not in table for context in contexts) / len(contexts)

    story = data_path("story.txt").read_text(encoding="utf-8")
    rng = random.Random(1)
    texts = {
        "the letters of the story": list(story),
        "the words of the story": story.lower().split(),
        "ten thousand coin tosses": rng.choices("01", k=10_000),
        "new words only": [str(i) for i in range(200)],
    }
    answers = {kind: _call(order_of_half, pieces) for kind, pieces in texts.items()}
    for kind, order in answers.items():
        _expect(order is not None, f"{name} returned None for {kind}: search on until an order is "
                                   "found, and return it.")
        _expect(isinstance(order, int) and not isinstance(order, bool),
                f"{name}: expected an order, which is an int, got {type(order).__name__} for "
                f"{kind}.")
        _expect(order >= 1, f"{name}: expected an order of at least 1, got {order} for {kind}.")
    _expect(len(set(answers.values())) > 1, f"{name} gives the same order for letters, words and "
                                            "coin tosses: does it look at `pieces`?")
    for kind, order in answers.items():
        share, shorter = unseen(texts[kind], order), unseen(texts[kind], order - 1)
        _expect(share > 0.5, f"{name}: at order {order}, {share:.2f} of the contexts of {kind} are "
                             "unseen, which is not more than half yet.")
        _expect(order == 1 or shorter <= 0.5,
                f"{name}: {order} is not the lowest order for {kind}; at order {order - 1} the "
                f"share is already {shorter:.2f}.")
    _done(name)


def check_my_filter(my_filter: Callable[[str], bool]) -> None:
    """Exercise 1.5: a spam filter that beats `by_weights` on the messages held back."""
    name = "my_filter"
    if not _start(my_filter, name):
        return
    _function(my_filter, name)
    from helpers.setup import data_path

    # The same messages, in the same order and with the same split as in the chapter.
    lines = data_path("sms.tsv").read_text(encoding="utf-8").splitlines()
    messages = [(label == "spam", text) for label, text in (line.split("\t") for line in lines)]
    random.Random(0).shuffle(messages)
    cut = len(messages) * 3 // 4
    known, new = messages[:cut], messages[cut:]

    def split_words(text: str) -> set[str]:
        return set(re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower()))

    counts = {kind: Counter(w for label, text in known if label == kind for w in split_words(text))
              for kind in (True, False)}
    words = set(counts[True]) | set(counts[False])
    size = {kind: row.total() + len(words) for kind, row in counts.items()}
    weights = {word: math.log((counts[True][word] + 1) / size[True])
               - math.log((counts[False][word] + 1) / size[False]) for word in sorted(words)}
    baseline = sum((sum(weights.get(word, 0) for word in sorted(split_words(text))) > 0) == label
                   for label, text in new)

    guesses = [_call(my_filter, text) for _, text in [*new, (False, ""), (False, "ß? 😀 \u3000")]]
    for guess in guesses:
        _expect(guess is not None, f"{name} returned None for a message: does each way through it "
                                   "end in a return?")
        _expect(isinstance(guess, bool), f"{name}: expected True or False, got {guess!r}. A sum of "
                                         "weights becomes one with > 0, a match with "
                                         "`is not None`.")
    again = [_call(my_filter, text) for _, text in new]
    guesses = guesses[:len(new)]
    _expect(again == guesses, f"{name} judges the same messages differently the second time. Draw "
                              "nothing at random in it, and let it change nothing outside.")
    _expect(len(set(guesses)) == 2, f"{name} says {guesses[0]} to every message.")
    truths = [label for label, _ in new]
    right = sum(guess == truth for guess, truth in zip(guesses, truths, strict=True))
    _expect(2 * right > len(new), f"{name}: {right} of {len(new)} held-back messages are right, no "
                                  "more than by tossing a coin. True means spam; is it the other "
                                  "way round?")
    missed = sum(truth and not guess for guess, truth in zip(guesses, truths, strict=True))
    result = (f"{right} of {len(new)} held-back messages right, {missed} spam missed, "
              f"{len(new) - right - missed} friends accused; by_weights gets {baseline} right")
    _expect(right > baseline, f"{name}: {result}. Not better yet: compare your ideas on a part of "
                              "`known` that they were not counted on, and change one at a time.")
    _done(name)
    print(result + ".")
    if right == len(new):
        print("All of them? Make sure that nothing was counted on the messages held back.")


# ---------------------------------------------------------------------------------------------
# Chapter 3: attention


def _close(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of one shape are equal up to rounding; nan equals nothing."""
    return torch.allclose(value.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)


def _draw(seed: int, *shape: int) -> Tensor:
    """Random numbers that are the same in every run, whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_causal_mask(my_mask: Callable[[int], Tensor]) -> None:
    """Exercise 3.1: `my_mask(T)` is a bool tensor (T, T), True on and below the diagonal."""
    name = "my_mask"
    if not _start(my_mask, name):
        return
    for T in (4, 1, 7):
        mask = _tensor(_call(my_mask, T), f"{name}({T})", (T, T))
        _expect(mask.dtype == torch.bool,
                f"{name}: expected dtype torch.bool, got {mask.dtype}. A mask of numbers would be "
                "added to the scores, not used to choose among them: end with .bool().")
        right = torch.ones(T, T, dtype=torch.bool).tril()
        if torch.equal(mask, right):
            continue
        _expect(not torch.equal(mask, ~right),
                f"{name}: True and False are swapped. Here True means: may be looked at.")
        _expect(not torch.equal(mask, right.T),
                f"{name}: this is the upper triangle, so each token looks at the future. "
                "Rows look, columns are looked at.")
        _expect(bool(mask.diagonal().all()),
                f"{name}: off by one. A token may look at itself, so the diagonal is True; "
                "otherwise the first row has nothing to look at.")
        future = mask & ~right
        _expect(not future.any(),
                f"{name}: row {future.nonzero()[:1, 0].tolist()} looks at the future; is the "
                "triangle off by one?")
        raise CheckFailed(f"{name}: part of the past is hidden. Every earlier token may be "
                          "looked at, however far away.")
    _done(name)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dim: int = -1,
               offset: int | None = 0) -> Tensor:
    """Attention by hand, with the usual mistakes as options."""
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) * (hs**-0.5 if scale is None else scale)
    if offset is not None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(offset)
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=dim) @ v


def check_attention(my_attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.2: `my_attention(q, k, v)` is causal attention, (B, nh, T, hs)."""
    name = "my_attention"
    if not _start(my_attention, name):
        return
    B, nh, T, hs = 2, 3, 5, 4
    q, k, v = 3 * _draw(0, B, nh, T, hs), _draw(1, B, nh, T, hs), _draw(2, B, nh, T, hs)
    mixed = _tensor(_call(my_attention, q, k, v), name, (B, nh, T, hs), q.dtype)
    _expect(not mixed.isnan().any(),
            f"{name}: there are nan. Mask the scores with float('-inf') before softmax, and let "
            "each token look at itself: a row without anything to look at divides by zero.")
    sums = _call(my_attention, q, k, torch.ones_like(v))       # rows of shares sum to one
    if not _close(sums, torch.ones_like(v)):
        _expect(not _close(mixed, _attention(q, k, v, dim=-2)),
                f"{name}: softmax over the wrong dimension. The shares of each row sum to one, so "
                "softmax goes over the keys, dim=-1.")
        raise CheckFailed(f"{name}: the shares of a row do not sum to one. Softmax goes over the "
                          "keys, dim=-1, after the mask; what is set to zero after softmax has "
                          "to be shared out again.")
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, -1] += 1
    changed_v[:, :, -1] += 1
    later = _call(my_attention, q, changed_k, changed_v)
    _expect(_close(later[:, :, :-1], mixed[:, :, :-1]),
            f"{name}: a change of the last token changes earlier outputs, so it is not causal. Is "
            "the mask there, is it off by one, and is it applied to the scores before softmax?")
    if not _close(mixed, _attention(q, k, v)):
        _expect(not _close(mixed, _attention(q, k, v, scale=1.0)),
                f"{name}: the scaling is missing. Divide the scores by the square root of hs.")
        _expect(not _close(mixed, _attention(q, k, v, scale=1 / hs)),
                f"{name}: divided by hs in place of its square root.")
        for size, what in ((nh * hs, "C"), (T, "T"), (nh, "nh")):
            _expect(not _close(mixed, _attention(q, k, v, scale=size**-0.5)),
                    f"{name}: the scores are divided by the root of {what}; it should be that of "
                    "the head size hs, the last dimension of q.")
        _expect(not _close(mixed, _attention(k, q, v)), f"{name}: queries and keys are swapped.")
        raise CheckFailed(f"{name}: the shape is right and it is causal, but the numbers differ. "
                          "Expected: softmax(q @ k.transpose(-2, -1) / hs**0.5, masked) @ v.")
    _done(name)


def check_split_heads(my_split: Callable[[Tensor, int], Tensor]) -> None:
    """Exercise 3.3: `my_split(x, n_head)` deals (B, T, C) out to the heads, (B, nh, T, hs)."""
    name = "my_split"
    if not _start(my_split, name):
        return
    B, T, nh, hs = 2, 3, 4, 5
    x = torch.arange(B * T * nh * hs, dtype=torch.float32).view(B, T, nh * hs)
    heads = _tensor(_call(my_split, x, nh), name, (B, nh, T, hs), x.dtype)
    _expect(not torch.equal(heads, x.reshape(B, nh, T, hs)),
            f"{name}: a view straight to (B, nh, T, hs) reads the numbers in the wrong order, and "
            "a head gets parts of other tokens. First (B, T, nh, hs), then swap T and nh.")
    for h in range(nh):
        _expect(torch.equal(heads[:, h], x[:, :, h * hs:(h + 1) * hs]),
                f"{name}: head {h} should get the numbers {h * hs} to {(h + 1) * hs - 1} of each "
                f"token, but the first token gives it {heads[0, h, 0].int().tolist()}. Is the "
                "order of the dimensions (B, T, nh, hs) before the swap?")
    _done(name)


def check_join_heads(my_join: Callable[[Tensor], Tensor]) -> None:
    """Exercise 3.3: `my_join(heads)` lays the heads (B, nh, T, hs) side by side, (B, T, C)."""
    name = "my_join"
    if not _start(my_join, name):
        return
    B, T, nh, hs = 2, 3, 4, 5
    x = torch.arange(B * T * nh * hs, dtype=torch.float32).view(B, T, nh * hs)
    heads = x.view(B, T, nh, hs).transpose(1, 2).contiguous()  # as attention returns it
    joined = _tensor(_call(my_join, heads), name, (B, T, nh * hs), x.dtype)
    _expect(not torch.equal(joined, heads.reshape(B, T, nh * hs)),
            f"{name}: reshaped without the swap, so a token gets parts of other tokens. Swap nh "
            "and T first, then reshape to (B, T, C).")
    _expect(torch.equal(joined, x),
            f"{name}: the first token should be {x[0, 0, :6].int().tolist()}..., but is "
            f"{joined[0, 0, :6].int().tolist()}...: the heads belong side by side, head 0 first.")
    _done(name)


def check_peek(my_peek: Callable[[torch.nn.Module, Tensor], Tensor]) -> None:
    """Exercise 3.4: `my_peek(layer, x)` is the output without dropout; the mode is put back."""
    from helpers.attention import CausalSelfAttention

    name = "my_peek"
    if not _start(my_peek, name):
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = CausalSelfAttention(8, 2, dropout=0.5)
        x = _draw(0, 2, 5, 8)
        with torch.no_grad():
            right = layer.eval()(x)
        layer.train()
        seen = _tensor(_call(my_peek, layer, x), name, (2, 5, 8), x.dtype)
        if not _close(seen.detach(), right):
            _expect(_close(_call(my_peek, layer, x).detach(), seen.detach()),
                    f"{name}: two calls give two answers: numbers are still dropped. A layer is "
                    "in train mode until eval() is called.")
            raise CheckFailed(f"{name}: this is not the layer's output without dropout. Call "
                              "layer.eval(), then layer(x).")
        _expect(layer.training and layer.output_dropout.training,
                f"{name}: the layer came in train mode and is left in eval mode, so training would "
                "go on without dropout. Put the mode back with layer.train().")
        _expect(not seen.requires_grad,
                f"{name}: the result still carries its gradient, and all that is kept for it. "
                "Compute it inside torch.no_grad().")
        layer.eval()
        _call(my_peek, layer, x)
        _expect(not layer.training,
                f"{name}: the layer came in eval mode and is left in train mode. Remember "
                "layer.training before you change it, and put that back.")
        was_on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)                           # whatever the answer did
        _expect(was_on,
                f"{name}: gradients are switched off for good. Use `with torch.no_grad():`.")
    _done(name)


def check_grouped_attention(my_grouped: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 3.5: causal attention in which neighbouring query heads share keys and values."""
    name = "my_grouped_attention"
    if not _start(my_grouped, name):
        return
    B, T, hs = 2, 5, 4
    for nh, nkv in ((4, 2), (6, 2), (3, 1), (4, 4)):
        q, k, v = (2 * _draw(0, B, nh, T, hs), _draw(1, B, nkv, T, hs),
                   _draw(2, B, nkv, T, hs))
        label = f"{name}, nh = {nh}, nkv = {nkv}"
        mixed = _tensor(_call(my_grouped, q, k, v), label, (B, nh, T, hs), q.dtype)
        repeated = [t.repeat_interleave(nh // nkv, dim=1) for t in (k, v)]
        if _close(mixed, _attention(q, *repeated)):
            continue
        tiled = [t.repeat(1, nh // nkv, 1, 1) for t in (k, v)]
        _expect(not _close(mixed, _attention(q, *tiled)),
                f"{label}: the key heads are dealt out in turn (0, 1, 0, 1), but neighbours share "
                "(0, 0, 1, 1): repeat_interleave, not repeat.")
        _expect(not _close(mixed, _attention(q, *repeated, offset=None)),
                f"{label}: the causal mask is missing.")
        _expect(not _close(mixed, _attention(q, *repeated, scale=1.0)),
                f"{label}: the scaling by the square root of hs is missing.")
        raise CheckFailed(f"{label}: the numbers differ from those of ordinary causal attention "
                          "in which each key and value head is repeated for its query heads.")
    _done(name)




# ---------------------------------------------------------------------------------------------
# Chapter 2


def check_bytes_per_token(answer: Callable) -> None:
    """Chapter 2, exercise 1: bytes of a text in UTF-8 for each token."""
    name = "bytes_per_token"
    if not _start(answer, name):
        return
    from helpers.text import encode, load_tokenizer

    tokenizer = load_tokenizer("tiny")
    text = "The cat sat on the warm stairs."
    value = _call(answer, tokenizer, text)
    _expect(isinstance(value, float), f"{name}: expected a float, got {type(value).__name__}.")
    right = len(text.encode()) / len(encode(tokenizer, text))
    _expect(abs(value * right - 1) > 1e-6,
            f"{name}: {value:.2f} is tokens for each byte; it is asked the other way round.")
    _expect(abs(value - right) < 1e-6,
            f"{name}: expected {right:.2f} for {text!r}, got {value:.2f}.")
    text = "猫坐在温暖的楼梯上。"
    value, right = _call(answer, tokenizer, text), len(text.encode()) / len(encode(tokenizer, text))
    _expect(abs(value - right) < 1e-6,
            f"{name}: expected {right:.2f} for Chinese, got {value:.2f}. len(text) counts "
            "characters; the bytes are len(text.encode('utf-8')).")
    text = "a<|endoftext|>"
    value, right = _call(answer, tokenizer, text), len(text) / len(encode(tokenizer, text))
    _expect(abs(value - right) < 1e-6,
            f"{name}: {text!r} was not encoded as a user's text, in which nothing is special.")
    _done(name)


def check_all_windows(answer: Callable) -> None:
    """Chapter 2, exercise 2: windows in which every token but the first is a target once."""
    name = "all_windows"
    if not _start(answer, name):
        return
    for n_tokens, T in ((10, 4), (9, 4), (8, 4), (2, 4), (7, 1)):
        tokens, rows = list(range(50, 50 + n_tokens)), -(-(n_tokens - 1) // T)
        case = f"{name} with {n_tokens} tokens and T = {T}"
        pair = _call(answer, tokens, T)
        _expect(isinstance(pair, tuple) and len(pair) == 2, f"{case}: expected (inputs, targets).")
        inputs = _tensor(pair[0], f"{case}, inputs", (rows, T), torch.int64)
        targets = _tensor(pair[1], f"{case}, targets", (rows, T), torch.int64)
        flat_inputs, flat_targets = inputs.flatten().tolist(), targets.flatten().tolist()
        rest = rows * T - (n_tokens - 1)
        _expect(flat_targets[n_tokens - 1:] == [-100] * rest,
                f"{case}: the last {rest} targets stand for no token and must be -100, "
                f"got {flat_targets[n_tokens - 1:]}.")
        _expect(flat_targets[:n_tokens - 1] == tokens[1:],
                f"{case}: each token but the first must be a target once, one place to the right "
                f"of its input; got targets {targets.tolist()}.")
        _expect(flat_inputs[:n_tokens - 1] == tokens[:-1],
                f"{case}: the inputs are the tokens in order; got {inputs.tolist()}.")
        _expect(flat_inputs[n_tokens - 1:] == [0] * rest,
                f"{case}: fill up the inputs with 0 where the target is -100; "
                f"got {flat_inputs[n_tokens - 1:]}.")
    _done(name)


def check_stream(answer: Callable) -> None:
    """Chapter 2, exercise 3: text of ids as soon as its characters are whole."""
    name = "stream"
    if not _start(answer, name):
        return
    from helpers.text import encode, load_tokenizer

    tokenizer = load_tokenizer("tiny")
    text = "A 猫, a 🐈 and Zoë."
    ids = encode(tokenizer, text)
    given = _call(answer, tokenizer, iter(ids))
    _expect(hasattr(given, "__next__"),
            f"{name}: expected a generator, got {type(given).__name__}. Use yield, not return.")
    parts = _call(list, given)
    _expect(all(isinstance(part, str) for part in parts), f"{name}: yield strings.")
    _expect("\N{REPLACEMENT CHARACTER}" not in "".join(parts),
            f"{name}: half a character came out. A token may end inside a character: keep its "
            "bytes until the character is whole.")
    _expect("".join(parts) == text,
            f"{name}: together the pieces are {''.join(parts)!r}, not {text!r}.")
    taken = []

    def watched() -> Any:
        for i in ids:
            taken.append(i)
            yield i

    first = next(part for part in _call(answer, tokenizer, watched()) if part)
    _expect(len(taken) == 1,
            f"{name}: the first piece, {first!r}, came after {len(taken)} tokens, and was certain "
            "after one. Yield inside the loop.")
    literal = "a \N{REPLACEMENT CHARACTER} b"
    _expect("".join(_call(list, _call(answer, tokenizer, encode(tokenizer, literal)))) == literal,
            f"{name}: a text that really holds the replacement character must come out whole.")
    cut = "".join(_call(list, _call(answer, tokenizer, encode(tokenizer, "x 猫")[:-1])))
    _expect(cut.startswith("x ") and set(cut[2:]) <= {"\N{REPLACEMENT CHARACTER}"},
            f"{name}: where the ids end inside a character, {cut!r} came out.")
    _done(name)


def check_rotate(answer: Callable) -> None:
    """Chapter 2, exercise 4: rotary positions."""
    name = "rotate"
    if not _start(answer, name):
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator)
    kept, positions = x.clone(), torch.arange(6)
    turned = _tensor(_call(answer, x, positions), name, (6, 8), torch.float32)
    _expect(torch.equal(x, kept), f"{name}: the given x was changed in place; return a new tensor.")
    _expect(torch.allclose(turned[0], x[0], atol=1e-5),
            f"{name}: at position 0 every angle is 0, so the row must stay as it is.")
    _expect(not torch.allclose(turned[1:], x[1:], atol=1e-3), f"{name}: nothing was turned.")
    _expect(torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-4),
            f"{name}: the length of a row changed. (a cos - b sin, a sin + b cos): look at the "
            "signs, and take both from the old a and b.")
    q, k = torch.randn(2, 1, 8, generator=generator)

    def score(i: int, j: int) -> Tensor:
        one, two = (_call(answer, v, torch.tensor([p])) for v, p in ((q, i), (k, j)))
        return (one * two).sum()

    _expect(torch.allclose(score(3, 1), score(40, 38), atol=1e-4),
            f"{name}: the product of two turned rows must depend on the distance only, but it "
            "differs between positions (3, 1) and (40, 38). Use the positions given.")
    _expect(not torch.allclose(score(3, 1), score(3, 2), atol=1e-3),
            f"{name}: the product does not depend on the distance at all.")
    right = torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]).cos(), torch.tensor([1.0]).sin()
    pair = _call(answer, right[0], torch.tensor([1]))[0]
    _expect(torch.allclose(pair, torch.cat(right[1:]), atol=1e-5),
            f"{name}: with two channels the speed is one radian a position, so (1, 0) at position "
            f"1 becomes (0.54, 0.84); got ({pair[0]:.2f}, {pair[1]:.2f}).")
    e = torch.eye(8)
    after = [_call(answer, row[None], torch.tensor([1]))[0] for row in e]
    angles = sorted(float(one.dot(row).acos()) for one, row in zip(after, e, strict=True))
    speeds = sorted(float(s) for s in 10_000 ** (-torch.arange(0, 8, 2) / 8) for _ in range(2))
    _expect(all(abs(a - b) < 2e-3 for a, b in zip(angles, speeds, strict=True)),
            f"{name}: each pair of channels has a speed of its own, 10000 ** (-2i / C) for pair i.")
    _done(name)


def check_split_pattern(answer: str) -> None:
    """Chapter 2, exercise 5: a pattern that cuts numbers to three digits and loses nothing."""
    name = "my_pattern"
    if not _start(answer, name):
        return
    import regex

    _expect(isinstance(answer, str), f"{name}: expected a pattern, a str, "
                                     f"got {type(answer).__name__}.")
    try:
        pattern = regex.compile(answer)
    except regex.error as error:
        raise CheckFailed(f"{name} is no regular expression: {error}.") from error
    samples = ("It's 3 o'clock,  isn't it?", "  \n\n x", "a1b22c", "猫🐈\0 \t", "x" * 50, "  ",
               "In 1984, 1234567 people", "e\u0301a\u200d", "f(x[0]) != 'y';\r\n")
    for sample in samples:
        pieces = [match.group() for match in pattern.finditer(sample)]
        _expect("".join(pieces) == sample,
                f"{name}: of {sample!r} only {''.join(pieces)!r} is left. Nothing in the pattern "
                "takes the rest: it needs an alternative for every character, white space too.")
        for piece in pieces:
            digits = sum(character.isdigit() for character in piece)
            _expect(digits <= 3, f"{name}: the piece {piece!r} has {digits} digits. A number of "
                                 "digits is written {1,3}.")
            _expect(len(regex.findall(r"\p{L}+", piece)) <= 1 or "'" in piece,
                    f"{name}: the piece {piece!r} holds more than one word.")
    pieces = [match.group() for match in pattern.finditer("the cats sat")]
    _expect(len(pieces) <= 5, f"{name}: 'the cats sat' became {pieces}; keep the letters of a word "
                              "together, or there is nothing to merge.")
    _done(name)


# ---------------------------------------------------------------------------------------------
# Chapter 4: the GPT


def _near(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of one shape are equal up to rounding; nan equals nothing."""
    return torch.allclose(value.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)


def _loud(module: torch.nn.Module, std: float, seed: int, norms: bool = True) -> None:
    """Move all parameters away from their start, so that no scale is one and no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if norms or parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def check_layer_norm(my_layer_norm: Callable[..., Tensor]) -> None:
    """Exercise 4.1: `my_layer_norm(x, scale, shift, eps)` is layer norm of the last dimension."""
    name = "my_layer_norm"
    if not _start(my_layer_norm, name):
        return
    generator = torch.Generator().manual_seed(0)
    for shape, eps in (((3, 4, 6), 1e-5), ((5, 9), 0.5), ((12,), 1e-5)):
        C = shape[-1]
        x = torch.randn(shape, generator=generator) * 2 + 1
        scale, shift = (torch.randn(C, generator=generator) for _ in range(2))
        given = x.clone()
        y = _tensor(_call(my_layer_norm, x, scale, shift, eps), name, shape, torch.float32)
        _expect(torch.equal(x, given), f"{name}: x itself was changed. Make a new tensor instead.")
        right = torch.nn.functional.layer_norm(x, (C,), scale, shift, eps)
        if _near(y, right):
            continue
        centred = x - x.mean(-1, keepdim=True)
        variance = x.var(-1, unbiased=False, keepdim=True)
        normed = centred / (variance + eps).sqrt()
        unbiased = centred / (x.var(-1, keepdim=True) + eps).sqrt()
        _expect(not _near(y, unbiased * scale + shift),
                f"{name}: the variance divides by C - 1. Layer norm divides by C, the count.")
        _expect(not _near(y, normed), f"{name}: scale and shift are not applied.")
        _expect(not _near(y, (normed + shift) * scale),
                f"{name}: scale first, then shift; the shift is not scaled.")
        _expect(not _near(y, centred / (variance.sqrt() + eps) * scale + shift),
                f"{name}: eps is added to the root; it belongs under it, to the variance.")
        _expect(not _near(y, centred / variance.sqrt() * scale + shift),
                f"{name}: eps is not used.")
        _expect(not _near(y, centred / (variance + eps) * scale + shift),
                f"{name}: it divides by the variance. The spread is its root.")
        _expect(not _near(y, x / (variance + eps).sqrt() * scale + shift),
                f"{name}: the mean is not taken away from x.")
        whole = (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt()
        _expect(not _near(y, whole * scale + shift),
                f"{name}: mean and variance are taken over the whole tensor. Each vector has its "
                "own: sum over dim=-1, with keepdim=True.")
        raise CheckFailed(f"{name}: wrong values for x of shape {shape} and eps {eps}. Take the "
                          "mean away, divide by the root of variance plus eps, scale, shift.")
    flat = _tensor(_call(my_layer_norm, torch.full((2, 4), 3.0), torch.ones(4), torch.zeros(4)),
                   name, (2, 4))
    _expect(bool(flat.isfinite().all()),
            f"{name}: a vector of equal entries gives {flat[0, 0].item()}. eps under the root "
            "prevents that.")
    _done(name)


def check_parameter_count(my_count: Callable[..., int]) -> None:
    """Exercise 4.2: `my_count(config)` is the number of parameters of GPT(config)."""
    from helpers.gpt import GPT, GPT2_SIZES, GPTConfig

    name = "my_count"
    if not _start(my_count, name):
        return
    shape = {"vocab_size": 101, "context_length": 23, "n_embd": 12, "n_head": 3, "n_layer": 5}
    configs = [GPTConfig(**shape), GPTConfig(**shape, tie_embeddings=False),
               GPTConfig(**shape, qkv_bias=False),
               GPTConfig(**shape, tie_embeddings=False, qkv_bias=False), *GPT2_SIZES.values()]
    for config in configs:
        value = _call(my_count, config)
        _expect(isinstance(value, int) and not isinstance(value, bool),
                f"{name}: expected a whole number (int), got {type(value).__name__}.")
        with torch.device("meta"):
            right = GPT(config).n_params
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        likely = {
            V * C: "the output layer is counted, though it is the token table" if value > right
            else "the token table or the output layer is not counted",
            config.context_length * C: "the position table",
            3 * C * L: "the bias of the qkv projection, which follows qkv_bias",
            4 * C * L: "the scales and shifts of the two norms in each block",
            2 * C: "the last norm, above the blocks",
            4 * C * L + 2 * C: "all the norms, a scale and a shift each",
            C * L: "the bias of one layer that writes to the stream",
            5 * C * L: "the biases of the feed-forward network",
            2 * C * L + 2 * C: "the shifts of the norms", 2 * C * L: "one norm in each block",
        }
        gap = value - right
        hint = likely.get(abs(gap), "")
        hint = f" That is the size of this: {hint}." if hint else " Go through the picture."
        which = f"tie_embeddings={config.tie_embeddings}, qkv_bias={config.qkv_bias}"
        _expect(gap == 0, f"{name}: {abs(gap):,} too {'many' if gap > 0 else 'few'} for a model of "
                f"{L} layers of width {C} with {which}.{hint}")
    _done(name)


def check_parallel_block(my_parallel: Callable[..., Tensor]) -> None:
    """Exercise 4.3: `my_parallel(block, x)` adds what both parts make of norm_1(x) to x."""
    from helpers.gpt import GPTConfig, TransformerBlock

    name = "my_parallel"
    if not _start(my_parallel, name):
        return
    config = GPTConfig(vocab_size=10, context_length=8, n_embd=12, n_head=3, n_layer=1)
    block = TransformerBlock(config).eval()
    _loud(block, 0.4, seed=0)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    given = x.clone()
    with torch.no_grad():
        y = _tensor(_call(my_parallel, block, x), name, (2, 5, 12), torch.float32)
        _expect(torch.equal(x, given), f"{name}: x itself was changed; += does that. Write x + ...")
        n, n_2 = block.norm_1(x), block.norm_2(x)
        attended, thought = block.attention(n), block.feed_forward(n)
        mistakes = [
            (attended + thought, "the shortcut is forgotten: x itself is part of the sum."),
            (n + attended + thought, "the shortcut carries the normed x. It carries x as it came."),
            (2 * x + attended + thought, "x is added twice. Both answers go onto one stream."),
            (block(x), "this is the block as it was: the second part reads what the first wrote."),
            (x + block.feed_forward(attended),
             "the feed-forward network reads what attention wrote, not the normed x."),
            (x + attended + block.feed_forward(n_2),
             "the feed-forward network reads norm_2. Here one norm serves both."),
            (x + attended + block.feed_forward(x),
             "the feed-forward network reads x without a norm."),
            (x + block.attention(x) + block.feed_forward(x), "nothing is normed."),
            (x + attended, "the feed-forward network is missing."),
            (x + thought, "attention is missing."),
        ]
        for wrong, message in mistakes:
            _expect(not _near(y, wrong), f"{name}: {message}")
        _expect(_near(y, x + attended + thought),
                f"{name}: wrong values. Norm x once with norm_1, give that to both parts, and add "
                "both answers to x.")
    _done(name)


def check_tied(my_tie: Callable[..., None]) -> None:
    """Exercise 4.4: after `my_tie(model)` output layer and token table are one tensor."""
    from helpers.gpt import GPT, GPTConfig

    name = "my_tie"
    if not _start(my_tie, name):
        return
    config = GPTConfig(vocab_size=30, context_length=8, n_embd=12, n_head=3, n_layer=1,
                       tie_embeddings=False)
    model = GPT(config)
    _loud(model, 0.4, seed=0)
    table, before = model.token_embedding.weight.detach().clone(), model.n_params
    _call(my_tie, model)
    embedding, output = model.token_embedding.weight, model.head.weight
    for part, weight in (("token_embedding", embedding), ("head", output)):
        _expect(tuple(weight.shape) == (30, 12),
                f"{name}: {part}.weight has shape {tuple(weight.shape)}, expected (30, 12). The "
                "two have one shape already: nothing is transposed.")
    _expect(torch.equal(embedding, table),
            f"{name}: the token table has changed. It stays; the output layer's own tensor goes.")
    _expect(torch.equal(output, table),
            f"{name}: the output layer does not hold the token table's numbers.")
    shared = output.data_ptr() == embedding.data_ptr()
    _expect(output is embedding or not shared,
            f"{name}: memory is shared, but there are still two parameters, each with a gradient "
            "of its own. Set the parameter itself: head.weight = ...")
    _expect(output is embedding,
            f"{name}: the numbers were copied. They are equal now and differ after the first step "
            "of training; the two must be one tensor.")
    _expect(model.n_params == before - 30 * 12, f"{name}: the model counts {model.n_params:,} "
            f"parameters, expected {before - 30 * 12:,}.")
    model(torch.tensor([[1, 2]])).sum().backward()
    _expect(embedding.grad is not None, f"{name}: the tied tensor gets no gradient; is it still a "
            "parameter that requires one?")
    _done(name)


def check_own_generate(my_generate: Callable[..., list[int]]) -> None:
    """Exercise 4.5: `my_generate(model, prompt, n)` is the prompt and n greedy ids."""
    from helpers.gpt import GPT, GPTConfig, generate

    name = "my_generate"
    if not _start(my_generate, name):
        return
    config = GPTConfig(vocab_size=50, context_length=12, n_embd=32, n_head=4, n_layer=2,
                       dropout=0.3)
    model = GPT(config).double()
    _loud(model, 0.4, seed=0, norms=False)
    for prompt, n in (([1, 2, 3], 6), ([4], 0), ([5, 6], 30)):
        right = generate(model, prompt, n)
        for training in (False, True):
            model.train(training)
            given = list(prompt)
            result = _call(my_generate, model, given, n)
            _expect(isinstance(result, list) and all(type(i) is int for i in result),
                    f"{name}: expected a list of whole numbers, got {result!r:.60}. int() makes "
                    "one of a tensor of one number, .tolist() a list.")
            _expect(given == prompt, f"{name}: it changed the prompt it was given; copy it first.")
            _expect(n == 0 or result != right[len(prompt):],
                    f"{name}: the prompt is missing from the answer.")
            _expect(len(result) == len(right), f"{name}: {len(prompt)} ids and {n} more should be "
                    f"{len(right)}, got {len(result)}.")
            _expect(result[:len(prompt)] == prompt, f"{name}: the answer begins with the prompt.")
            if result != right and training:
                raise CheckFailed(f"{name}: in eval mode it is right, in train mode it is not. "
                                  "Dropout is on: call model.eval() first.")
            _expect(result[:12] == right[:12], f"{name}: expected {right[:12]}, got {result[:12]}. "
                    "Take the scores of the last position, and the id with the highest.")
            _expect(result == right, f"{name}: right until the context of 12 is full, then not. "
                    "Feed the last 12 ids, without a cache.")
            _expect(model.training == training,
                    f"{name}: the model came in {'train' if training else 'eval'} mode and is in "
                    f"{'eval' if training else 'train'} mode now. Put it back.")
    _done(name)
