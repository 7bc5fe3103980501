"""Typical wrong answers to the exercises of chapter 1."""

import itertools
import math
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np


def days_in_seconds(n_parameters, n_tokens, rate):
    return 6 * n_parameters * n_tokens / rate


def days_of_the_forward_pass(n_parameters, n_tokens, rate):
    return 2 * n_parameters * n_tokens / rate / 86_400


def days_times_rate(n_parameters, n_tokens, rate):
    return 6 * n_parameters * n_tokens * rate / 86_400


def days_printed(n_parameters, n_tokens, rate):
    print(6 * n_parameters * n_tokens / rate / 86_400)


def days_as_text(n_parameters, n_tokens, rate):
    return f"{6 * n_parameters * n_tokens / rate / 86_400:.1f}"


def back_off(tables, context, *, orders=None, slice_=lambda c, n: c[-n:], key=tuple, pick=None):
    """Back off with one mistake."""
    pick = pick or (lambda row: row.most_common(1)[0][0])
    for n in orders or range(len(tables), 0, -1):
        row = tables[n - 1].get(key(slice_(context, n)))
        if row:
            return pick(row)
    return None


def shortest_first(tables, context):
    return back_off(tables, context, orders=(1, 2, 3))


def from_the_beginning(tables, context):
    return back_off(tables, context, slice_=lambda c, n: c[:n])


def a_list_as_key(tables, context):
    return back_off(tables, context, key=list)


def pair_with_count(tables, context):
    return back_off(tables, context, pick=lambda row: row.most_common(1)[0])


def only_the_longest(tables, context):
    return back_off(tables, context, orders=(3,))


def without_one_word(tables, context):
    return back_off(tables, context, orders=(3, 2))


def popping(tables, context):
    while context:
        if len(context) <= len(tables) and tuple(context) in tables[len(context) - 1]:
            return tables[len(context) - 1][tuple(context)].most_common(1)[0][0]
        context.pop(0)
    return None


def last_of_the_row(tables, context):
    return back_off(tables, context, pick=lambda row: list(row)[-1])


def first_of_the_row(tables, context):
    return back_off(tables, context, pick=lambda row: next(iter(row)))


def fills_the_tables(tables, context):
    for n in range(len(tables), 0, -1):
        row = tables[n - 1].setdefault(tuple(context[-n:]), Counter())
        if row:
            return row.most_common(1)[0][0]
    return None


def commonest_of_all(tables, context):
    word = back_off(tables, context)
    return word or max(tables[0], key=lambda seen: tables[0][seen].total())[0]


def cross_entropy(counts, context_length, tokens, size, *, add=1, grow=True, divide=True,
                  by_all=False, log=math.log, sign=1, window=None):
    """Smoothed cross-entropy, right or with one mistake."""
    total = 0.0
    for i in range(context_length, len(tokens)):
        row = counts.get(tuple(tokens[i - (window or context_length) : i]), Counter())
        n, of = row[tokens[i]] + add, row.total() + (size if grow else 1)
        total -= sign * (log(n / of) if n else -math.inf)
    return total / ((len(tokens) if by_all else len(tokens) - context_length) if divide else 1)


def nothing_added(counts, context_length, tokens, size):
    return cross_entropy(counts, context_length, tokens, size, add=0)


def total_not_grown(counts, context_length, tokens, size):
    return cross_entropy(counts, context_length, tokens, size, grow=False)


def no_minus(counts, context_length, tokens, size):
    return cross_entropy(counts, context_length, tokens, size, sign=-1)


def in_bits(counts, context_length, tokens, size):
    return cross_entropy(counts, context_length, tokens, size, log=math.log2)


def summed(counts, context_length, tokens, size):
    return cross_entropy(counts, context_length, tokens, size, divide=False)


def by_length(counts, context_length, tokens, size):
    return cross_entropy(counts, context_length, tokens, size, by_all=True)


def one_token_window(counts, context_length, tokens, size):
    return cross_entropy(counts, context_length, tokens, size, window=1)


def skips_unseen(counts, n, tokens, size):
    found = [i for i in range(n, len(tokens)) if tuple(tokens[i - n : i]) in counts]
    losses = [cross_entropy(counts, n, tokens[i - n : i + 1], size) for i in found]
    return sum(losses) / len(losses) if losses else math.log(size)


def key_error(counts, n, tokens, size):
    losses = []
    for i in range(n, len(tokens)):
        row = counts[tuple(tokens[i - n : i])]
        losses.append(-math.log((row[tokens[i]] + 1) / (row.total() + size)))
    return sum(losses) / len(losses)


def fills_the_table(counts, n, tokens, size):
    for i in range(n, len(tokens)):
        counts.setdefault(tuple(tokens[i - n : i]), Counter())
    return cross_entropy(counts, n, tokens, size)


def unseen(tokens, n):
    cut = int(len(tokens) * 0.9)
    known = {tuple(tokens[i : i + n]) for i in range(cut - n)}
    rest = tokens[cut:]
    contexts = [tuple(rest[i : i + n]) for i in range(len(rest) - n)]
    return sum(context not in known for context in contexts) / len(contexts)


def the_fraction(tokens):
    return next(s for s in (unseen(tokens, n) for n in itertools.count(1)) if s > 0.5)


def gives_up(tokens):
    return next((n for n in range(1, 6) if unseen(tokens, n) > 0.5), None)


def counts_from_zero(tokens):
    return [unseen(tokens, n) > 0.5 for n in range(1, 20)].index(True)


def sparse_length(tokens):
    return next(n for n in itertools.count(1) if unseen(tokens, n) > 0.5)


def one_too_far(tokens):
    return sparse_length(tokens) + 1


def one_too_few(tokens):
    return max(1, sparse_length(tokens) - 1)


def far_too_far(tokens):
    return len(tokens)


def always_three(tokens):
    return 3


SUSPICIOUS = r"free|won|winner|prize|claim|urgent|offer|cash|£|\$|http"


def by_rule(text):
    return re.search(SUSPICIOUS, text.lower()) is not None


def the_match(text):
    return re.search(SUSPICIOUS, text.lower())


def score(text):
    return len(re.findall(SUSPICIOUS, text.lower())) - 0.5


def upside_down(text):
    return not by_rule(text)


def by_chance(text):
    return random.random() > 0.5


def first_letter(text):
    return text[0].isupper()


def always(is_spam):
    """A train_filter that learns nothing."""
    return lambda messages: is_spam


def words_of(text):
    return set(re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower()))


def characters(text):
    return {text.lower()[i:i + 4] for i in range(len(text) - 3)}


def without_marks(text):
    return {word for word in with_length(text) if not isinstance(word, str) or word[0].isalnum()}


def with_length(text):
    return words_of(text) | {("length", len(text.split()) // 8)}


def naive_bayes(features):
    """A train_filter: naive Bayes with these features."""
    def train_filter(messages):
        counts = {"spam": Counter(), "ham": Counter()}
        for label, text in messages:
            counts[label].update(features(text))
        known = set(counts["spam"]) | set(counts["ham"])
        size = {label: row.total() + len(known) for label, row in counts.items()}
        n_spam = sum(label == "spam" for label, _ in messages)
        bias = math.log(n_spam / (len(messages) - n_spam))

        def is_spam(text):
            found = features(text) & known
            return bias + math.fsum(math.log((counts["spam"][f] + 1) / size["spam"])
                                    - math.log((counts["ham"][f] + 1) / size["ham"])
                                    for f in found) > 0

        return is_spam
    return train_filter


def sorts_in_place(messages):
    messages.sort()
    return naive_bayes(with_length)(messages)


WRONG = [
    ("check_training_days", 8.6, "expected a function"),
    ("check_training_days", days_printed, "return"),
    ("check_training_days", days_as_text, "expected a number"),
    ("check_training_days", days_in_seconds, "time in seconds"),
    ("check_training_days", days_of_the_forward_pass, "here they are 2"),
    ("check_training_days", days_times_rate, "half the time"),
    ("check_back_off", shortest_first, "begin with the longest"),
    ("check_back_off", from_the_beginning, "longest end"),
    ("check_back_off", a_list_as_key, "unhashable"),
    ("check_back_off", pair_with_count, "the token alone"),
    ("check_back_off", only_the_longest, "got None"),
    ("check_back_off", without_one_word, "tables[0]"),
    ("check_back_off", popping, "changed the context"),
    ("check_back_off", last_of_the_row, "not its most common token"),
    ("check_back_off", first_of_the_row, "not its most common token"),
    ("check_back_off", fills_the_tables, "changed the tables"),
    ("check_back_off", commonest_of_all, "expected None"),
    ("check_smoothed_cross_entropy", nothing_added, "infinite"),
    ("check_smoothed_cross_entropy", total_not_grown, "not to one"),
    ("check_smoothed_cross_entropy", no_minus, "minus"),
    ("check_smoothed_cross_entropy", in_bits, "base 2"),
    ("check_smoothed_cross_entropy", summed, "the sum of the losses"),
    ("check_smoothed_cross_entropy", by_length, "not by the length"),
    ("check_smoothed_cross_entropy", one_token_window, "tuples of two"),
    ("check_smoothed_cross_entropy", skips_unseen, "last token counts too"),
    ("check_smoothed_cross_entropy", key_error, "KeyError"),
    ("check_smoothed_cross_entropy", fills_the_table, "changed the counts"),
    ("check_sparse_length", the_fraction, "int"),
    ("check_sparse_length", gives_up, "search on"),
    ("check_sparse_length", counts_from_zero, "at least 1"),
    ("check_sparse_length", one_too_far, "not the lowest"),
    ("check_sparse_length", one_too_few, "more than half"),
    ("check_sparse_length", far_too_far, "not more than half"),
    ("check_sparse_length", always_three, "look at `tokens`"),
    ("check_train_filter", naive_bayes(words_of), "not better yet"),
    ("check_train_filter", always(by_rule), "not better yet"),
    ("check_train_filter", by_rule, "AttributeError"),
    ("check_train_filter", lambda messages: True, "expected a function"),
    ("check_train_filter", always(lambda text: None), "returned None"),
    ("check_train_filter", always(the_match), "the filter"),        # a match or None, by message
    ("check_train_filter", always(score), "True or False"),
    ("check_train_filter", always(upside_down), "other way round"),
    ("check_train_filter", always(by_chance), "second time"),
    ("check_train_filter", always(first_letter), "IndexError"),
    ("check_train_filter", always(lambda text: True), "to every message"),
    ("check_train_filter", sorts_in_place, "changed the list"),
]

# Other forms of right answers than those in the solutions.
RIGHT = [
    ("check_training_days", lambda n, d, r: np.float64(6) * n * d / r / 86_400),
    ("check_training_days", lambda n, d, r: Fraction(6 * int(n) * int(d), int(r) * 86_400)),
    ("check_back_off", lambda tables, context: back_off(tables, context,
                                                        pick=lambda row: max(row, key=row.get))),
    ("check_smoothed_cross_entropy", lambda *given: np.float64(cross_entropy(*given))),
    ("check_sparse_length", lambda tokens: np.int64(sparse_length(tokens))),
    ("check_train_filter", naive_bayes(without_marks)),
    ("check_train_filter", naive_bayes(characters)),
    ("check_train_filter", naive_bayes(with_length)),
]
