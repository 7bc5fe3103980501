"""Checks of the exercises of chapter 1, what a language model is."""

from __future__ import annotations

import math
import numbers
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

EXACT = {"rtol": 1e-6, "atol": 1e-9}      # of Python floats, which hold about 16 digits


def _count_ngrams(tokens: Sequence[str], context_length: int) -> dict[tuple, Counter]:
    """Context to counter of the tokens that follow it, as in the chapter."""
    counts: dict[tuple, Counter] = {}
    for i in range(len(tokens) - context_length):
        row = counts.setdefault(tuple(tokens[i:i + context_length]), Counter())
        row[tokens[i + context_length]] += 1
    return counts


def _copy(counts: dict[tuple, Counter]) -> dict[tuple, Counter]:
    return {context: Counter(row) for context, row in counts.items()}


def check_training_days(training_days: Callable[[float, float, float], float]) -> None:
    """Exercise 1.1: days of training, at six operations per parameter and token."""
    name = "training_days"
    if not is_started(training_days, name):
        return
    expect_function(training_days, name)
    for arguments in ((1e6, 1e9, 1e12), (124e6, 10e9, 1e13), (175e9, 300e9, 28e12)):
        n_parameters, n_tokens, flops_per_s = arguments
        days = expect_number(call(training_days, *arguments), name)
        expect(days > 0, f"{name}: the answer must be positive, got {days}.")
        seconds = 6 * n_parameters * n_tokens / flops_per_s
        for unit, length in (("seconds", 1), ("minutes", 60), ("hours", 3600),
                             ("years", 365 * 86_400), ("years", 365.25 * 86_400)):
            expect(not close(days, seconds / length, **EXACT),
                   f"{name}: this is the time in {unit}, and days were asked for. A day has "
                   "24 * 3600 seconds.")
        wanted = seconds / 86_400
        for factor in (1, 2, 4):
            expect(not close(days * 6 / factor, wanted, **EXACT),
                   f"{name}: training takes six operations per parameter and token, two in the "
                   f"forward pass and four in the backward pass; here they are {factor}.")
        twice = expect_number(call(training_days, n_parameters, n_tokens, 2 * flops_per_s), name)
        expect(close(2 * twice, days, **EXACT),
               f"{name}: a machine that does twice as many operations per second should need half "
               "the time. Divide by flops_per_s.")
        expect(close(days, wanted, **EXACT),
               f"{name}{arguments}: expected {wanted:.4g} days, got {days:.4g}. Multiply six, the "
               "parameters and the tokens, divide by the operations per second, then turn "
               "seconds into days.")
    done(name)


def check_back_off(back_off: Callable[[list[dict[tuple, Counter]], list[str]], str | None]) -> None:
    """Exercise 1.2: the most common token after the longest end of the context that was seen."""
    name = "back_off"
    if not is_started(back_off, name):
        return
    expect_function(back_off, name)
    # In the rows that decide, the most common token is neither the first nor the last one.
    text = """we saw the dog bark . we saw the dog run . they saw the dog run . she saw the dog eat
              . the dog sat . the dog sat . the dog sat . the dog sat . one dog fell . a cat lay .
              a cat sat . a cat sat . a cat fell . the cat hid . the cat ran . the cat ran .
              the cat ate . a bird . a cat . she fed the cat"""
    tables = [_count_ngrams(text.split(), n) for n in (1, 2, 3)]
    before = [_copy(table) for table in tables]
    cases = [
        (["saw", "the", "dog"], "run", "all three tokens were seen together"),
        (["fed", "the", "cat"], "ran", "only the last two tokens were seen with one after them"),
        (["run", "fed", "dog"], "sat", "only the last token was seen"),
        (["we", "saw", "a", "cat"], "sat", "the context is longer than the longest in the tables"),
        (["a"], "cat", "the context is shorter than the longest in the tables"),
        (["saw", "the", "piano"], None, "the last token was never seen, so nothing is known"),
    ]
    for context, wanted, why in cases:
        given = list(context)
        token = call(back_off, tables, given)
        expect(given == context,
               f"{name} changed the context it was given. Slice it, as in context[-2:], rather "
               "than popping from it.")
        expect(tables == before,
               f"{name} changed the tables it was given. Read them with table.get(context), which "
               "adds nothing.")
        expect(token is None or isinstance(token, str),
               f"{name}: expected a token or None, got {token!r}. Of a row, "
               "row.most_common(1)[0][0] is the token alone.")
        if token == wanted:
            continue
        expect(wanted is not None,
               f"{name}: after {context} expected None, got {token!r}: {why}. An end of the "
               "context holds its last token; its beginning does not count.")
        expect(token is not None,
               f"{name}: after {context} expected {wanted!r}, got None: {why}. "
               "tables[0] counts contexts of one token: is it tried as well?")
        row = next(tables[n - 1][tuple(context[-n:])] for n in (3, 2, 1)
                   if tuple(context[-n:]) in tables[n - 1])
        expect(token not in row,
               f"{name}: after {context} expected {wanted!r}, got {token!r}. The row is the right "
               f"one, {dict(row)}, and {token!r} is not its most common token: "
               "row.most_common(1)[0][0].")
        raise CheckFailed(f"{name}: after {context} expected {wanted!r}, got {token!r}: {why}. "
                          "Begin with the longest end of the context, and stop at the first that "
                          "is in its table.")
    done(name)


def check_smoothed_cross_entropy(smoothed_cross_entropy: Callable[..., float]) -> None:
    """Exercise 1.3: the mean of -log P over a text, with one added to each count."""
    name = "smoothed_cross_entropy"
    if not is_started(smoothed_cross_entropy, name):
        return
    expect_function(smoothed_cross_entropy, name)
    known, size = ["a", "b", "a", "b", "a", "c"], 4               # the fourth token is d
    counts = _count_ngrams(known, 1)
    before = _copy(counts)

    def loss(counts: dict[tuple, Counter], context_length: int, tokens: list[str]) -> float:
        value = expect_number(
            call(smoothed_cross_entropy, counts, context_length, list(tokens), size), name)
        expect(value != math.inf,
               f"{name} is infinite for {tokens}: a token that was never counted has count 0 in "
               "its row, to which one is added too.")
        return value

    for context in "ad":                                           # seen, and never seen
        losses = [loss(counts, 1, [context, token]) for token in "abcd"]
        expect(min(losses) > 0,
               f"{name} is {min(losses):.3g} for a token that is not certain, and a negative "
               "log-likelihood is positive: is the minus of -log P there?")
        for base, number in (("2", math.log(2)), ("10", math.log(10))):
            expect(not close(sum(math.exp(-x * number) for x in losses), 1),
                   f"{name}: this is the logarithm to base {base}; math.log(p) is the natural "
                   "one.")
        expect(not close(sum(math.exp(-x * 2) for x in losses), 1),
               f"{name}: divide by the number of tokens that were predicted, which is all but the "
               "first `context_length`, not by the length of the text.")
        total = sum(math.exp(-x) for x in losses)
        expect(close(total, 1, **EXACT),
               f"{name}: after {context!r} the probabilities of all {size} tokens add up to "
               f"{total:.3f}, not to one. Each of them gets one more count, so the total of the "
               "row grows by vocab_size, also where the row is empty.")
    expect(close(loss(counts, 1, ["a", "b"]), math.log(7 / 3), **EXACT),
           f"{name}: 'b' followed 'a' in two of three cases, so with one added for each of "
           f"{size} tokens its probability is 3 / 7, and the loss -log(3 / 7).")
    tokens = ["a", "b", "c", "a"]
    parts = [math.log(7 / 3), math.log(6), math.log(4)]
    value = loss(counts, 1, tokens)
    expect(not close(value, sum(parts), **EXACT),
           f"{name}: this is the sum of the losses. Divide by the number of tokens that were "
           "predicted.")
    expect(close(value, sum(parts) / 3, **EXACT),
           f"{name}: expected {sum(parts) / 3:.4f} for {tokens} at context length 1, got "
           f"{value:.4f}. The last token counts too, though nothing was ever seen after 'c'.")
    # Context length two: the context is the pair of tokens before.
    value = loss(_count_ngrams(known, 2), 2, ["b", "a", "b", "d"])
    parts = [math.log(3), math.log(6)]                              # 2 of 6, 1 of 6
    expect(not close(value, math.log(size), **EXACT),
           f"{name}: at context length 2 no context is found in the counts. The contexts are "
           "tuples of two tokens, tuple(tokens[i - context_length : i]).")
    expect(close(value, sum(parts) / 2, **EXACT),
           f"{name}: expected {sum(parts) / 2:.4f} for the text b a b d at context length 2, got "
           f"{value:.4f}. The first `context_length` tokens are context only; each later one is "
           "predicted from the `context_length` tokens before it.")
    expect(counts == before, f"{name} changed the counts it was given; add the one to the count "
                             "that you read, not in the table.")
    done(name)


def check_sparse_length(sparse_length: Callable[[Sequence[str]], int]) -> None:
    """Exercise 1.4: the lowest context length with more than half of the contexts unseen."""
    name = "sparse_length"
    if not is_started(sparse_length, name):
        return
    expect_function(sparse_length, name)
    from helpers.common import data_path

    def unseen(tokens: list[str], context_length: int) -> float:
        cut = int(len(tokens) * 0.9)
        counts, rest = _count_ngrams(tokens[:cut], context_length), tokens[cut:]
        contexts = [tuple(rest[i:i + context_length]) for i in range(len(rest) - context_length)]
        return sum(context not in counts for context in contexts) / max(1, len(contexts))

    story = data_path("story.txt").read_text(encoding="utf-8")
    rng = random.Random(1)
    texts = {
        "the characters of the story": list(story),
        "the words of the story": story.lower().split(),
        "ten thousand coin tosses": rng.choices("01", k=10_000),
        "new words only": [str(i) for i in range(200)],
    }
    answers = {kind: call(sparse_length, list(tokens)) for kind, tokens in texts.items()}
    for kind, length in answers.items():
        expect(length is not None, f"{name} returned None for {kind}: search on until a length is "
                                   "found, and return it.")
        expect(isinstance(length, numbers.Integral) and not isinstance(length, bool),
               f"{name}: expected a context length, which is an int, got "
               f"{type(length).__name__} for {kind}.")
        expect(length >= 1, f"{name}: expected a length of at least 1, got {length} for {kind}.")
    expect(len(set(answers.values())) > 1, f"{name} gives the same length for characters, words "
                                           "and coin tosses: does it look at `tokens`?")
    for kind, length in answers.items():
        fraction, shorter = unseen(texts[kind], length), unseen(texts[kind], length - 1)
        expect(fraction > 0.5,
               f"{name}: at context length {length}, {fraction:.2f} of the contexts of {kind} are "
               "unseen, which is not more than half yet.")
        expect(length == 1 or shorter <= 0.5,
               f"{name}: {length} is not the lowest context length for {kind}; at {length - 1} the "
               f"fraction is already {shorter:.2f}.")
    done(name)


Filter = Callable[[str], bool]


def _naive_bayes(messages: list[tuple[str, str]]) -> Filter:
    """The filter of the chapter, with the words of a message as its features."""
    def words_of(text: str) -> set[str]:
        return set(re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower()))

    counts = {"spam": Counter(), "ham": Counter()}
    for label, text in messages:
        counts[label].update(words_of(text))
    words = set(counts["spam"]) | set(counts["ham"])
    total = {label: row.total() + len(words) for label, row in counts.items()}
    weights = {word: math.log((counts["spam"][word] + 1) / total["spam"])
               - math.log((counts["ham"][word] + 1) / total["ham"]) for word in words}
    n_spam = sum(label == "spam" for label, _ in messages)
    bias = math.log(n_spam / (len(messages) - n_spam))
    return lambda text: bias + math.fsum(weights.get(word, 0) for word in words_of(text)) > 0


def check_train_filter(train_filter: Callable[[list[tuple[str, str]]], Filter]) -> None:
    """Exercise 1.5: learns a spam filter that beats naive Bayes on words in cross-validation."""
    name = "train_filter"
    if not is_started(train_filter, name):
        return
    expect_function(train_filter, name)
    from helpers.common import data_path

    # The same messages in the same order as in the chapter.
    lines = data_path("sms.tsv").read_text(encoding="utf-8").splitlines()
    messages = [(label, text) for label, text in (line.split("\t") for line in lines)]
    random.Random(0).shuffle(messages)

    def predict(is_spam: Filter, text: str) -> bool:
        guess = call(is_spam, text)
        expect(guess is not None, f"{name}: the filter returned None for a message: does each way "
                                  "through it end in a return?")
        expect(isinstance(guess, bool) or type(guess).__name__ in ("bool_", "bool"),
               f"{name}: the filter must return True or False, got {guess!r}. A sum of weights "
               "becomes one with > 0, a match with `is not None`.")
        return bool(guess)

    folds, baseline, pairs, counts = 5, 0, [], Counter()
    for fold in range(folds):
        known = [m for i, m in enumerate(messages) if i % folds != fold]
        given, held_out = list(known), messages[fold::folds]
        is_spam = call(train_filter, given)
        expect(callable(is_spam),
               f"{name}: expected a function that takes a text and returns True or False, got "
               f"{type(is_spam).__name__}. Define it inside {name} and return it, without calling "
               "it.")
        expect(given == known, f"{name} changed the list of messages; work on a copy.")
        pairs += [(label == "spam", predict(is_spam, text)) for label, text in held_out]
        again = [predict(is_spam, text) for _, text in held_out]
        expect(again == [guess for _, guess in pairs[-len(held_out):]],
               f"{name}: the filter judges the same messages differently the second time. Draw "
               "nothing at random in it, and let it change nothing outside.")
        for text in ("", "ß? 😀 \u3000"):
            predict(is_spam, text)
        reference = _naive_bayes(known)
        baseline += sum(reference(text) == (label == "spam") for label, text in held_out)
    counts.update(guess for _, guess in pairs)
    expect(len(counts) == 2, f"{name}: the filter says {pairs[0][1]} to every message.")
    correct = sum(truth == guess for truth, guess in pairs)
    expect(2 * correct > len(pairs),
           f"{name}: {correct} of {len(pairs)} messages are correct, no more than by tossing a "
           "coin. True means spam; is it the other way round?")
    missed = sum(truth and not guess for truth, guess in pairs)
    result = (f"{correct} of {len(pairs)} messages correct, {missed} false negatives, "
              f"{len(pairs) - correct - missed} false positives; naive Bayes on the words has "
              f"{baseline} correct")
    expect(correct > baseline, f"{name}: {result}. Not better yet: change one feature at a time, "
                               "and compare.")
    done(name)
    print(result + ".")
