"""Typical wrong answers to the exercises of chapter 1."""

import itertools
import math
import random
import re
from collections import Counter


def days_in_seconds(n_parameters, n_tokens, rate):
    return 6 * n_parameters * n_tokens / rate


def days_of_computing_only(n_parameters, n_tokens, rate):
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


def commonest_of_all(tables, context):
    word = back_off(tables, context)
    return word or max(tables[0], key=lambda seen: tables[0][seen].total())[0]


def surprise(table, order, words, size, *, add=1, grow=True, first=None, divide=True, by_all=False,
             log=math.log, sign=1, window=None):
    """Mean surprise with one mistake."""
    total, first = 0.0, order if first is None else first
    for i in range(first, len(words)):
        row = table.get(tuple(words[i - (window or order) : i]), Counter())
        n, of = row[words[i]] + add, row.total() + (size if grow else 1)
        total -= sign * (log(n / of) if n else -math.inf)
    return total / ((len(words) if by_all else len(words) - first) if divide else 1)


def nothing_added(table, order, words, size):
    return surprise(table, order, words, size, add=0)


def total_not_grown(table, order, words, size):
    return surprise(table, order, words, size, grow=False)


def no_minus(table, order, words, size):
    return surprise(table, order, words, size, sign=-1)


def in_bits(table, order, words, size):
    return surprise(table, order, words, size, log=math.log2)


def summed(table, order, words, size):
    return surprise(table, order, words, size, divide=False)


def by_length(table, order, words, size):
    return surprise(table, order, words, size, by_all=True)


def one_word_window(table, order, words, size):
    return surprise(table, order, words, size, window=1)


def skips_unseen(table, order, words, size):
    found = [i for i in range(order, len(words)) if tuple(words[i - order : i]) in table]
    losses = [surprise(table, order, words[i - order : i + 1], size) for i in found]
    return sum(losses) / len(losses) if losses else math.log(size)


def key_error(table, order, words, size):
    losses = []
    for i in range(order, len(words)):
        row = table[tuple(words[i - order : i])]
        losses.append(-math.log((row[words[i]] + 1) / (row.total() + size)))
    return sum(losses) / len(losses)


def fills_the_table(table, order, words, size):
    for i in range(order, len(words)):
        table.setdefault(tuple(words[i - order : i]), Counter())
    return surprise(table, order, words, size)


def unseen(pieces, order):
    cut = int(len(pieces) * 0.9)
    known = {tuple(pieces[i : i + order]) for i in range(cut - order)}
    rest = pieces[cut:]
    contexts = [tuple(rest[i : i + order]) for i in range(len(rest) - order)]
    return sum(context not in known for context in contexts) / len(contexts)


def the_share(pieces):
    return next(s for s in (unseen(pieces, n) for n in itertools.count(1)) if s > 0.5)


def gives_up(pieces):
    return next((n for n in range(1, 6) if unseen(pieces, n) > 0.5), None)


def counts_from_zero(pieces):
    return [unseen(pieces, n) > 0.5 for n in range(1, 20)].index(True)


def one_too_far(pieces):
    return next(n for n in itertools.count(1) if unseen(pieces, n) > 0.5) + 1


def one_too_few(pieces):
    return max(1, next(n for n in itertools.count(1) if unseen(pieces, n) > 0.5) - 1)


def always_three(pieces):
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


WRONG = [
    ("check_training_days", 8.6, "expected a function"),
    ("check_training_days", days_printed, "return"),
    ("check_training_days", days_as_text, "expected a number"),
    ("check_training_days", days_in_seconds, "time in seconds"),
    ("check_training_days", days_of_computing_only, "here they are 2"),
    ("check_training_days", days_times_rate, "half the time"),
    ("check_back_off", shortest_first, "begin with the longest"),
    ("check_back_off", from_the_beginning, "longest end"),
    ("check_back_off", a_list_as_key, "unhashable"),
    ("check_back_off", pair_with_count, "the word alone"),
    ("check_back_off", only_the_longest, "got None"),
    ("check_back_off", without_one_word, "tables[0]"),
    ("check_back_off", popping, "changed the context"),
    ("check_back_off", commonest_of_all, "expected None"),
    ("check_mean_surprise", nothing_added, "infinite"),
    ("check_mean_surprise", total_not_grown, "not to one"),
    ("check_mean_surprise", no_minus, "minus"),
    ("check_mean_surprise", in_bits, "base 2"),
    ("check_mean_surprise", summed, "the sum of the surprises"),
    ("check_mean_surprise", by_length, "not by the length"),
    ("check_mean_surprise", one_word_window, "tuples of two"),
    ("check_mean_surprise", skips_unseen, "last word counts too"),
    ("check_mean_surprise", key_error, "KeyError"),
    ("check_mean_surprise", fills_the_table, "changed the table"),
    ("check_order_of_half", the_share, "int"),
    ("check_order_of_half", gives_up, "search on"),
    ("check_order_of_half", counts_from_zero, "at least 1"),
    ("check_order_of_half", one_too_far, "not the lowest"),
    ("check_order_of_half", one_too_few, "more than half"),
    ("check_order_of_half", always_three, "look at `pieces`"),
    ("check_my_filter", by_rule, "not better yet"),
    ("check_my_filter", the_match, "returned None"),
    ("check_my_filter", score, "True or False"),
    ("check_my_filter", upside_down, "other way round"),
    ("check_my_filter", by_chance, "second time"),
    ("check_my_filter", first_letter, "IndexError"),
    ("check_my_filter", lambda text: True, "to every message"),
]
