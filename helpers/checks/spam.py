"""Checks of the exercises of chapter 6, spam classification."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

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


def _plain(value: Any) -> Any:
    """A tensor of one number as that number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def check_balanced_accuracy(my_balanced_accuracy: Callable[..., float]) -> None:
    """Exercise 6.1: `my_balanced_accuracy(labels, predictions)`, the mean recall of the classes."""
    name = "my_balanced_accuracy"
    if not is_started(my_balanced_accuracy, name):
        return
    expect_function(my_balanced_accuracy, name)
    cases = [([0] * 8 + [1] * 2, [0] * 5 + [1] * 3 + [1, 0]),
             ([1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]),
             ([0, 0, 0, 1], [0, 0, 0, 0]),
             ([0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 1, 2]),            # three classes
             ([0, 0, 2, 2, 2, 2], [0, 2, 2, 2, 1, 2])]            # class 1 is in no label
    for labels, predictions in cases:
        classes = sorted(set(labels))
        recalls = [sum(p == c for t, p in zip(labels, predictions, strict=True) if t == c)
                   / labels.count(c) for c in classes]
        precisions = [sum(t == c for t, p in zip(labels, predictions, strict=True) if p == c)
                      / max(1, predictions.count(c)) for c in classes]
        wanted = sum(recalls) / len(recalls)
        given = list(labels), list(predictions)
        value = expect_number(_plain(call(my_balanced_accuracy, *given)), name)
        expect(given == (labels, predictions), f"{name}: the lists it was given are changed.")
        if close(value, wanted):
            continue
        right = sum(t == p for t, p in zip(labels, predictions, strict=True))
        everything = set(labels) | set(predictions)
        mistakes = [
            (right / len(labels), "this is the accuracy, in which a frequent class counts more. "
             "Take the recall of each class first, then their mean."),
            (sum(precisions) / len(precisions), "this is the mean of the precisions: it divides by "
             "how often a class is predicted. Recall divides by how often it is the label."),
            (sum(r for c, r in zip(classes, recalls, strict=True) if c < 2) / 2, "only the classes "
             "0 and 1 are counted. Take all classes that are in the labels."),
            (recalls[-1], "this is the recall of one class. Take the mean over the classes."),
            (sum(recalls), "this is the sum of the recalls. Divide by the number of classes."),
            (sum(recalls) / len(everything) if everything else 0.0, "a class that is predicted "
             "and is no label is counted with a recall of 0. It has no recall: leave it out."),
            (sum(recalls) / 2, "this divides by 2. There may be more classes than two."),
            (sum(recalls) / (max(labels) + 1), "a class with no label is counted with a recall of "
             "0. It has no recall: leave it out."),
        ]
        what = f"{name} for labels {labels} and predictions {predictions}"
        for wrong, message in mistakes:
            expect(not close(value, wrong), f"{what}: {message}")
        expect(False, f"{what}: expected {wanted:.4g}, got {value:.4g}.")
    done(name)


def check_merge_classes(my_merge_classes: Callable[[Tensor], Tensor]) -> None:
    """Exercise 6.2: `my_merge_classes(logits)` of three classes (B, 3) as logits (B, 2)."""
    name = "my_merge_classes"
    if not is_started(my_merge_classes, name):
        return
    expect_function(my_merge_classes, name)
    for logits in (draw(0, 5, 3) * 2, draw(1, 1, 3), draw(2, 4, 3) * 300):
        given = logits.clone()
        merged = call(my_merge_classes, logits)
        merged = expect_tensor(merged, name, (len(logits), 2), torch.float32)
        expect(torch.equal(logits, given), f"{name}: the logits it was given are changed.")
        large = "with logits in the hundreds " if logits.abs().max() > 100 else ""
        expect(bool(merged.isfinite().all()), f"{name}: {large}the result holds inf or nan. An "
               "exponential overflows, or a logarithm is taken of 0: use logsumexp.")
        p = given.double().softmax(dim=-1)
        wanted = torch.stack([p[:, 0], p[:, 1] + p[:, 2]], dim=-1)
        found = merged.double().softmax(dim=-1)
        if close(found, wanted):
            continue
        top = given[:, 1:].max(dim=-1).values
        mistakes = [
            (torch.stack([given[:, 0], given[:, 1] + given[:, 2]], dim=-1), "the logits are added. "
             "It is the probabilities, exp(logit) up to a factor, that add up."),
            (torch.stack([given[:, 0], given[:, 1:].mean(dim=-1)], dim=-1), "this is the mean of "
             "the two logits. The probabilities of two classes add up."),
            (torch.stack([given[:, 0], top], dim=-1), "this keeps the larger of the two logits. "
             "Two classes of 0.3 each are 0.6 together."),
            (wanted, "these are the probabilities. Logits are wanted, whose softmax gives them; "
             "the logarithm of a probability is one."),
            (torch.stack([given[:, 2], torch.logsumexp(given[:, :2], dim=-1)], dim=-1), "the first "
             "class is ham; the second and the third are merged."),
        ]
        for wrong, message in mistakes:
            expect(not close(found, wrong.double().softmax(dim=-1)), f"{name}: {message}")
        expect(not close(merged.flip(-1).double().softmax(dim=-1), wanted),
               f"{name}: the two columns are exchanged: ham is 0, spam 1.")
        expect(False, f"{name}: {large}the softmax of the result is not "
               "p(ham), p(advert) + p(fraud).")
    done(name)


def _cost(threshold: float, probabilities: list[float], labels: list[int], fp: float, fn: float,
          prevalence: float) -> float:
    """Expected cost of a message at a threshold and a prevalence."""
    spam = [p for p, t in zip(probabilities, labels, strict=True) if t == 1]
    ham = [p for p, t in zip(probabilities, labels, strict=True) if t == 0]
    missed = sum(p < threshold for p in spam) / len(spam)
    false_alarms = sum(p >= threshold for p in ham) / len(ham)
    return prevalence * missed * fn + (1 - prevalence) * false_alarms * fp


def check_threshold(my_threshold: Callable[..., float]) -> None:
    """Exercise 6.3: `my_threshold(probabilities, labels, cost_fp, cost_fn, prevalence)`."""
    name = "my_threshold"
    if not is_started(my_threshold, name):
        return
    expect_function(my_threshold, name)
    p = [0.05, 0.2, 0.3, 0.35, 0.45, 0.6, 0.7, 0.8, 0.9, 0.97]
    y = [0, 0, 1, 0, 0, 1, 1, 0, 1, 1]
    cases = [(p, y, 1.0, 1.0, 0.5), (p, y, 10.0, 1.0, 0.5), (p, y, 1.0, 10.0, 0.5),
             (p, y, 1.0, 1.0, 0.05), ([0.2, 0.9, 0.9, 0.4], [0, 0, 1, 1], 5.0, 1.0, 0.5),
             ([0.6, 0.6, 0.1, 0.3, 0.3], [1, 1, 0, 1, 0], 1.0, 1.0, 0.5),
             ([0.9, 0.8, 0.1, 0.2], [0, 0, 1, 1], 3.0, 1.0, 0.1),
             ([0.1, 0.4, 0.6, 0.9], [0, 1, 0, 1], 1.0, 1.0, 0.5)]
    for probabilities, labels, fp, fn, prevalence in cases:
        def cost(t: float, of: tuple = (probabilities, labels, fp, fn, prevalence)) -> float:
            return _cost(t, *of)

        candidates = [*sorted(set(probabilities)), math.inf]
        least = min(map(cost, candidates))
        wanted = max(t for t in candidates if close(cost(t), least, atol=1e-9))
        given = list(probabilities), list(labels)
        value = expect_number(_plain(call(my_threshold, *given, fp, fn, prevalence)), name)
        expect(given == (probabilities, labels), f"{name}: the lists it was given are changed.")
        if value == wanted or close(value, wanted):
            continue
        what = (f"{name} for costs {fp:g} (false positive) and {fn:g} (false negative) at a "
                f"prevalence of {prevalence:g}")
        expect(any(value == t or close(value, t) for t in candidates),
               f"{what}: {value:.4g} is neither one of the probabilities nor infinity.")
        if close(cost(value), least, atol=1e-9):
            expect(False, f"{what}: {value:g} costs as little as {wanted:g}. Of equal costs the "
                   "highest threshold is wanted, which stops the fewest messages.")
        same = [_cost(t, probabilities, labels, fn, fp, prevalence) for t in candidates]
        count = [_cost(t, probabilities, labels, fp, fn, sum(labels) / len(labels))
                 for t in candidates]
        plain = [_cost(t, probabilities, labels, 1.0, 1.0, prevalence) for t in candidates]
        index = min(range(len(candidates)), key=lambda i: abs(candidates[i] - value)
                    if math.isfinite(candidates[i]) and math.isfinite(value)
                    else 0.0 if candidates[i] == value else math.inf)
        expect(wanted != math.inf, f"{what}: no threshold among the probabilities is as cheap as "
               "stopping nothing, a threshold of infinity.")
        expect(not (prevalence != 0.5 and close(count[index], min(count), atol=1e-9)),
               f"{what}: this is best at the prevalence of the given messages. Weigh the two "
               "error rates with the prevalence that was asked for.")
        expect(not (fp != fn and close(same[index], min(same), atol=1e-9)),
               f"{what}: the two costs are exchanged.")
        expect(not close(plain[index], min(plain), atol=1e-9),
               f"{what}: the costs are not used: this makes the fewest errors.")
        expect(False, f"{what}: {value:g} has an expected cost of {cost(value):.4g} a message, "
               f"{wanted:g} has {least:.4g}. A message is stopped from the threshold on (>=).")
    done(name)


def _bayes(texts: list[str], labels: list[int], new: list[str], *, prior: bool = True,
           smooth: float = 1.0, repeat: bool = True, unknown: bool = False) -> list[int]:
    """Multinomial naive Bayes with add-one smoothing, with one thing changed."""
    words = {c: Counter() for c in (0, 1)}
    for text, label in zip(texts, labels, strict=True):
        words[label].update(text.lower().split())
    vocabulary = set(words[0]) | set(words[1])
    size = len(vocabulary) * smooth
    found = []
    for text in new:
        score = math.log(labels.count(1) / labels.count(0)) if prior else 0.0
        listed = text.lower().split() if repeat else set(text.lower().split())
        for word in listed:
            if word in vocabulary or unknown:
                on, off = ((words[c][word] + smooth) / (words[c].total() + size) for c in (1, 0))
                score += math.log(on / off) if on > 0 and off > 0 else \
                    math.inf * (on - off) if on != off else 0.0
        found.append(int(score > 0))
    return found


def check_naive_bayes(my_naive_bayes: Callable[..., list[int]]) -> None:
    """Exercise 6.4: `my_naive_bayes(texts, labels, new_texts)` gives a label for each new text."""
    name = "my_naive_bayes"
    if not is_started(my_naive_bayes, name):
        return
    expect_function(my_naive_bayes, name)
    texts = ["win a boat now", "see you now", "win cash now now", "is the boat in", "the cat sat",
             "see the cat", "free cash win", "lunch on friday then", "on friday i see the boat"]
    labels = [1, 0, 1, 0, 0, 0, 1, 0, 0]
    new = ["Win the boat", "see the CAT", "zebra", "", "cash cash the the the", "free lunch now",
           "now now now the boat", "now the boat", "boat", "zebra zebra zebra free",
           "win win on friday i see", "now free then", "zebra zebra zebra", "WIN CASH Win"]
    wanted = _bayes(texts, labels, new)
    given = list(texts), list(labels), list(new)
    try:
        found = call(my_naive_bayes, *given)
    except CheckFailed as error:
        if isinstance(error.__cause__, ValueError | ZeroDivisionError):
            raise CheckFailed(f"{error}. A word that occurs in one class only has a count of 0 in "
                              "the other: add one to each count.") from error.__cause__
        raise
    expect(given == (texts, labels, new), f"{name}: the lists it was given are changed.")
    expect(isinstance(found, Iterable) and not isinstance(found, str),
           f"{name}: expected a list of labels, got {type(found).__name__}.")
    found = [int(x) if isinstance(x, bool | int | Tensor) or hasattr(x, "item") else x
             for x in (found.tolist() if isinstance(found, Tensor) else found)]
    expect(len(found) == len(new), f"{name}: expected {len(new)} labels, got {len(found)}.")
    expect(set(found) <= {0, 1}, f"{name}: expected labels 0 and 1, got {found}.")
    if found != wanted:
        mistakes = [
            (_bayes(texts, labels, new, prior=False), "the prior is missing: the logarithm of how "
             "much more spam there is than ham."),
            (_bayes(texts, labels, new, repeat=False), "a word that stands twice in a new message "
             "counts once. Each occurrence counts."),
            (_bayes(texts, labels, new, unknown=True), "words that are in no training message "
             "count. They say nothing: leave them out."),
            (_bayes(texts, labels, new, smooth=0.0), "one is not added to the counts: a word of "
             "one class alone decides by itself."),
            ([1 - x for x in wanted], "the labels are exchanged: 1 is spam."),
        ]
        for wrong, message in mistakes:
            expect(found != wrong, f"{name}: {message}")
        lower = _bayes(texts, labels, [" ".join(word for word in text.split()
                                                if word == word.lower()) for text in new])
        expect(found != lower, f"{name}: capitals make another word. Compare in lower case.")
        i = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        expect(False, f"{name}: {new[i]!r} should get {wanted[i]}, got {found[i]}. Is one "
                      "added to each count, and the number of different words to its divisor?")
    done(name)


def check_prevalence(my_prevalence: Callable[..., float | None]) -> None:
    """Exercise 6.5: `my_prevalence(confusion, predictions)`, without labels of the new messages."""
    name = "my_prevalence"
    if not is_started(my_prevalence, name):
        return
    expect_function(my_prevalence, name)
    cases = [([[90, 10], [20, 80]], [1] * 45 + [0] * 55), ([[45, 5], [2, 48]], [1] * 16 + [0] * 84),
             ([[99, 1], [30, 70]], [1] * 40 + [0] * 60), ([[90, 10], [20, 80]], [0] * 30),
             ([[90, 10], [20, 80]], [1] * 30), ([[170, 30], [5, 45]], [1] * 33 + [0] * 67)]
    for rows, predictions in cases:
        confusion = torch.tensor(rows)
        (tn, fp), (fn, tp) = rows
        q, fpr, tpr = sum(predictions) / len(predictions), fp / (tn + fp), tp / (tp + fn)
        raw = (q - fpr) / (tpr - fpr)
        wanted = min(1.0, max(0.0, raw))
        value = call(my_prevalence, confusion, list(predictions))
        value = expect_number(_plain(value), name)
        expect(torch.equal(confusion, torch.tensor(rows)), f"{name}: the matrix is changed.")
        if close(value, wanted):
            continue
        what = f"{name} for {rows} and {q:.0%} predicted as spam"
        precision, missed = tp / (tp + fp), fn / (fn + tn)
        mistakes = [
            (raw, "this is outside of 0 to 1. Cut it off there."),
            (min(1.0, max(0.0, (q - fn / (tn + fn)) / (tp / (fp + tp) - fn / (tn + fn) or 1.0))),
             "rows are the true labels, columns the predictions: here they are exchanged."),
            (q, "this is the fraction that is predicted as spam, with the false positives in it "
             "and without the spam that is missed."),
            (q - fpr, "the false positives are taken off, and the spam that is missed is not "
             "added: divide by TPR - FPR."),
            (q / tpr, "the spam that is missed is added, and the false positives are not taken "
             "off."),
            (q * precision + (1 - q) * missed, "this uses the precision, which depends on the "
             "prevalence of the collection it was measured on. TPR and FPR do not."),
            (sum(rows[1]) / confusion.sum().item(), "this is the prevalence in the confusion "
             "matrix."),
            (min(1.0, max(0.0, (q - fn / (fn + tp)) / (tpr - fn / (fn + tp)))), "rows are the true "
             "labels: FPR = confusion[0, 1] / confusion[0].sum()."),
        ]
        for wrong, message in mistakes:
            expect(not close(value, wrong), f"{what}: {message}")
        expect(False, f"{what}: expected {wanted:.4g}, got {value:.4g}. Solve "
               "q = TPR x + FPR (1 - x) for x.")
    value = call(my_prevalence, torch.tensor([[20, 80], [90, 10]]), [1] * 45 + [0] * 55)
    expect(value is not None, f"{name}: None where TPR is below FPR. The equation can be solved "
           "there too; only where they are equal it cannot.")
    expect(close(expect_number(_plain(value), name), 0.5), f"{name}: where TPR (0.1) is below FPR "
           f"(0.8), 45% predicted as spam mean a prevalence of 0.5, got {value}.")
    value = call(my_prevalence, torch.tensor([[5, 5], [10, 10]]), [0, 1, 1])
    expect(value is None, f"{name}: where TPR equals FPR the predictions say nothing about the "
           f"prevalence, and None is wanted, got {value}.")
    done(name)
