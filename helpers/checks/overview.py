"""Checks of the exercises of chapter 1, what a language model is."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

from helpers.checks._core import (
    CheckFailed,
    call,
    close,
    done,
    expect,
    expect_function,
    expect_number,
    is_started,
)


def _count_next(pieces: Sequence[str], order: int) -> dict[tuple, Counter]:
    """Context to counter of what came next, as in the chapter."""
    table: dict[tuple, Counter] = {}
    for i in range(len(pieces) - order):
        table.setdefault(tuple(pieces[i:i + order]), Counter())[pieces[i + order]] += 1
    return table


def check_training_days(training_days: Callable[[float, float, float], float]) -> None:
    """Exercise 1.1: days of training, at six operations per parameter and token."""
    name = "training_days"
    if not is_started(training_days, name):
        return
    expect_function(training_days, name)
    for arguments in ((1e6, 1e9, 1e12), (124e6, 10e9, 1e13), (175e9, 300e9, 28e12)):
        n_parameters, n_tokens, rate = arguments
        days = expect_number(call(training_days, *arguments), name)
        expect(days > 0, f"{name}: the answer must be positive, got {days}.")
        seconds = 6 * n_parameters * n_tokens / rate
        for unit, length in (("seconds", 1), ("minutes", 60), ("hours", 3600),
                             ("years", 365 * 86_400), ("years", 365.25 * 86_400)):
            expect(not close(days, seconds / length, 1e-6, 1e-9),
                    f"{name}: this is the time in {unit}, and days were asked for. A day has "
                    "24 * 3600 seconds.")
        wanted = seconds / 86_400
        for factor in (1, 2, 4):
            expect(not close(days * 6 / factor, wanted, 1e-6, 1e-9),
                    f"{name}: the rule of thumb counts six operations per parameter and token, "
                    f"two to compute and four to learn; here they are {factor}.")
        twice = expect_number(call(training_days, n_parameters, n_tokens, 2 * rate), name)
        expect(close(2 * twice, days, 1e-6, 1e-9),
                f"{name}: a machine that does twice as many operations per second should need half "
                "the time. Divide by operations_per_second.")
        expect(close(days, wanted, 1e-6, 1e-9),
                f"{name}{arguments}: expected {wanted:.4g} days, got {days:.4g}. Multiply six, the "
                "parameters and the tokens, divide by the operations per second, then turn "
                "seconds into days.")
    done(name)


def check_back_off(back_off: Callable[[list[dict[tuple, Counter]], list[str]], str | None]) -> None:
    """Exercise 1.2: the likeliest word after the longest end of the context that was seen."""
    name = "back_off"
    if not is_started(back_off, name):
        return
    expect_function(back_off, name)
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
        word = call(back_off, tables, given)
        expect(given == context,
                f"{name} changed the context it was given, a surprise to whoever passed it. Slice "
                "it, as in context[-2:], rather than popping from it.")
        expect(word is None or isinstance(word, str),
                f"{name}: expected a word or None, got {word!r}. Of a row, "
                "row.most_common(1)[0][0] is the word alone.")
        if word == wanted:
            continue
        expect(wanted is not None,
                f"{name}: after {context} expected None, got {word!r}: {why}. An end of the "
                "context holds its last word; its beginning does not count.")
        expect(word is not None, f"{name}: after {context} expected {wanted!r}, got None: {why}. "
                                  "tables[0] counts contexts of one word: is it tried as well?")
        raise CheckFailed(f"{name}: after {context} expected {wanted!r}, got {word!r}: {why}. "
                          "Begin with the longest end of the context, and stop at the first that "
                          "is in its table.")
    done(name)


def check_mean_surprise(mean_surprise: Callable[..., float]) -> None:
    """Exercise 1.3: the mean of -log p over a text, with one added to each count."""
    name = "mean_surprise"
    if not is_started(mean_surprise, name):
        return
    expect_function(mean_surprise, name)
    pieces, size = ["a", "b", "a", "b", "a", "c"], 4               # the fourth word is d
    table = _count_next(pieces, 1)
    before = {context: Counter(row) for context, row in table.items()}

    def loss(table: dict[tuple, Counter], order: int, words: list[str]) -> float:
        value = expect_number(call(mean_surprise, table, order, words, size), name)
        expect(value != math.inf,
                f"{name} is infinite for {words}: a word that was never counted has count 0 in its "
                "row, to which one is added too.")
        return value

    for context in "ad":                                           # seen, and never seen
        losses = [loss(table, 1, [context, word]) for word in "abcd"]
        expect(min(losses) > 0, f"{name} is {min(losses):.3g} for a word that is not certain, and "
                                 "a surprise is positive: is the minus of -log p there?")
        for base, number in (("2", math.log(2)), ("10", math.log(10))):
            expect(not close(sum(math.exp(-x * number) for x in losses), 1),
                    f"{name}: this is the logarithm to base {base}; math.log(p) is the natural "
                    "one.")
        expect(not close(sum(math.exp(-x * 2) for x in losses), 1),
                f"{name}: divide by the number of words that were predicted, which is all but the "
                "first `order`, not by the length of the text.")
        total = sum(math.exp(-x) for x in losses)
        expect(close(total, 1, 1e-6, 1e-9),
                f"{name}: after {context!r} the probabilities of all {size} words add up to "
                f"{total:.3f}, not to one. Each of them gets one more count, so the total of the "
                "row grows by vocab_size, also where the row is empty.")
    expect(close(loss(table, 1, ["a", "b"]), math.log(7 / 3), 1e-6, 1e-9),
            f"{name}: 'b' followed 'a' in two of three cases, so with one added for each of "
            f"{size} words its probability is 3 / 7, and the surprise -log(3 / 7).")
    words = ["a", "b", "c", "a"]
    parts = [math.log(7 / 3), math.log(6), math.log(4)]
    value = loss(table, 1, words)
    expect(not close(value, sum(parts), 1e-6, 1e-9), f"{name}: this is the sum of the surprises. Divide by "
                                           "the number of words that were predicted.")
    expect(close(value, sum(parts) / 3, 1e-6, 1e-9),
            f"{name}: expected {sum(parts) / 3:.4f} for {words} at order 1, got {value:.4f}. "
            "The last word counts too, though nothing was ever seen after 'c'.")
    # Order two: the context is the pair of words before.
    value = loss(_count_next(pieces, 2), 2, ["b", "a", "b", "d"])
    parts = [math.log(3), math.log(6)]                              # 2 of 6, 1 of 6
    expect(not close(value, math.log(size), 1e-6, 1e-9),
            f"{name}: at order 2 no context is found in the table. Its contexts are tuples of two "
            "words, tuple(words[i - order : i]).")
    expect(close(value, sum(parts) / 2, 1e-6, 1e-9),
            f"{name}: expected {sum(parts) / 2:.4f} for the text b a b d at order 2, got "
            f"{value:.4f}. The first `order` words are context only; each later one is predicted "
            "from the `order` words before it.")
    expect(table == before, f"{name} changed the table it was given; add the one to the count "
                             "that you read, not in the table.")
    done(name)


def check_order_of_half(order_of_half: Callable[[Sequence[str]], int]) -> None:
    """Exercise 1.4: the lowest order at which more than half of the contexts are unseen."""
    name = "order_of_half"
    if not is_started(order_of_half, name):
        return
    expect_function(order_of_half, name)
    from helpers.common import data_path

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
    answers = {kind: call(order_of_half, pieces) for kind, pieces in texts.items()}
    for kind, order in answers.items():
        expect(order is not None, f"{name} returned None for {kind}: search on until an order is "
                                   "found, and return it.")
        expect(isinstance(order, int) and not isinstance(order, bool),
                f"{name}: expected an order, which is an int, got {type(order).__name__} for "
                f"{kind}.")
        expect(order >= 1, f"{name}: expected an order of at least 1, got {order} for {kind}.")
    expect(len(set(answers.values())) > 1, f"{name} gives the same order for letters, words and "
                                            "coin tosses: does it look at `pieces`?")
    for kind, order in answers.items():
        share, shorter = unseen(texts[kind], order), unseen(texts[kind], order - 1)
        expect(share > 0.5, f"{name}: at order {order}, {share:.2f} of the contexts of {kind} are "
                             "unseen, which is not more than half yet.")
        expect(order == 1 or shorter <= 0.5,
                f"{name}: {order} is not the lowest order for {kind}; at order {order - 1} the "
                f"share is already {shorter:.2f}.")
    done(name)


def check_my_filter(my_filter: Callable[[str], bool]) -> None:
    """Exercise 1.5: a spam filter that beats `by_weights` on the messages held back."""
    name = "my_filter"
    if not is_started(my_filter, name):
        return
    expect_function(my_filter, name)
    from helpers.common import data_path

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

    guesses = [call(my_filter, text) for _, text in [*new, (False, ""), (False, "ß? 😀 \u3000")]]
    for guess in guesses:
        expect(guess is not None, f"{name} returned None for a message: does each way through it "
                                   "end in a return?")
        expect(isinstance(guess, bool), f"{name}: expected True or False, got {guess!r}. A sum of "
                                         "weights becomes one with > 0, a match with "
                                         "`is not None`.")
    again = [call(my_filter, text) for _, text in new]
    guesses = guesses[:len(new)]
    expect(again == guesses, f"{name} judges the same messages differently the second time. Draw "
                              "nothing at random in it, and let it change nothing outside.")
    expect(len(set(guesses)) == 2, f"{name} says {guesses[0]} to every message.")
    truths = [label for label, _ in new]
    right = sum(guess == truth for guess, truth in zip(guesses, truths, strict=True))
    expect(2 * right > len(new), f"{name}: {right} of {len(new)} held-back messages are right, no "
                                  "more than by tossing a coin. True means spam; is it the other "
                                  "way round?")
    missed = sum(truth and not guess for guess, truth in zip(guesses, truths, strict=True))
    result = (f"{right} of {len(new)} held-back messages right, {missed} spam missed, "
              f"{len(new) - right - missed} friends accused; by_weights gets {baseline} right")
    expect(right > baseline, f"{name}: {result}. Not better yet: compare your ideas on a part of "
                              "`known` that they were not counted on, and change one at a time.")
    done(name)
    print(result + ".")
    if right == len(new):
        print("All of them? Make sure that nothing was counted on the messages held back.")
