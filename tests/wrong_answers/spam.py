"""Typical wrong answers to the exercises of chapter 6."""

import math
from collections import Counter

import numpy as np
import torch

# Balanced accuracy


def recalls(labels, predictions, classes=None):
    """The recall of each class."""
    classes = sorted(set(labels)) if classes is None else classes
    pairs = list(zip(labels, predictions, strict=True))
    return [sum(p == c for t, p in pairs if t == c) / max(1, labels.count(c)) for c in classes]


def balanced(labels, predictions):
    found = recalls(labels, predictions)
    return sum(found) / len(found)


def accuracy(labels, predictions):
    return sum(t == p for t, p in zip(labels, predictions, strict=True)) / len(labels)


def mean_precision(labels, predictions):
    return balanced(predictions, labels)


def precisions_of_labels(labels, predictions):
    classes = sorted(set(labels))
    pairs = list(zip(labels, predictions, strict=True))
    return sum(sum(t == c for t, p in pairs if p == c) / max(1, predictions.count(c))
               for c in classes) / len(classes)


def recall_of_spam(labels, predictions):
    return recalls(labels, predictions)[-1]


def sum_of_recalls(labels, predictions):
    return sum(recalls(labels, predictions))


def half_of_recalls(labels, predictions):
    return sum(recalls(labels, predictions)) / 2


def counts_absent(labels, predictions):
    found = recalls(labels, predictions, sorted(set(labels) | set(predictions)))
    return sum(found) / len(found)


def counts_every_number(labels, predictions):
    found = recalls(labels, predictions, range(max(labels) + 1))
    return sum(found) / len(found)


def no_return(labels, predictions):
    balanced(labels, predictions)


def sorts_in_place(labels, predictions):
    value = balanced(labels, predictions)
    labels.sort()
    return value


def balanced_with_tensors(labels, predictions):
    """Right, with tensors."""
    t, p = torch.tensor(labels), torch.tensor(predictions)
    return torch.stack([(p[t == c] == c).float().mean() for c in t.unique()]).mean().item()


# Three classes


def merged(logits, how):
    return torch.stack([logits[:, 0], how(logits[:, 1:])], dim=-1)


def merge_right(logits):
    return merged(logits, lambda z: z.logsumexp(dim=-1))


def merge_as_log_probs(logits):
    """Right: logarithms of probabilities are logits too."""
    log_p = logits.log_softmax(dim=-1)
    return torch.stack([log_p[:, 0], log_p[:, 1:].logsumexp(dim=-1)], dim=-1)


def merge_probs(logits):
    p = logits.softmax(dim=-1)
    return torch.stack([p[:, 0], p[:, 1:].sum(dim=-1)], dim=-1)


def merge_naively(logits):
    return merged(logits, lambda z: z.exp().sum(dim=-1).log())


def merge_first_two(logits):
    return torch.stack([logits[:, 2], logits[:, :2].logsumexp(dim=-1)], dim=-1)


def merge_in_place(logits):
    logits -= logits.max(dim=-1, keepdim=True).values
    return merge_right(logits)


# A threshold for given costs


def expected_cost(t, probabilities, labels, fp, fn, prevalence, strict=False):
    pairs = list(zip(probabilities, labels, strict=True))
    stopped = (lambda p: p > t) if strict else (lambda p: p >= t)
    n_spam = sum(labels)
    missed = sum(not stopped(p) for p, y in pairs if y) / n_spam
    false_alarms = sum(stopped(p) for p, y in pairs if not y) / (len(labels) - n_spam)
    return prevalence * missed * fn + (1 - prevalence) * false_alarms * fp


def threshold(probabilities, labels, fp, fn, prevalence, *, never=True, highest=True,
              strict=False):
    candidates = sorted({*probabilities, *([math.inf] if never else [])}, reverse=highest)
    return min(candidates, key=lambda t: round(
        expected_cost(t, probabilities, labels, fp, fn, prevalence, strict), 12))


def lowest(*given):
    return threshold(*given, highest=False)


def never_none(*given):
    return threshold(*given, never=False)


def exchanged(probabilities, labels, fp, fn, prevalence):
    return threshold(probabilities, labels, fn, fp, prevalence)


def no_prevalence(probabilities, labels, fp, fn, prevalence):
    return threshold(probabilities, labels, fp, fn, sum(labels) / len(labels))


def no_costs(probabilities, labels, fp, fn, prevalence):
    return threshold(probabilities, labels, 1.0, 1.0, prevalence)


def from_theory(probabilities, labels, fp, fn, prevalence):
    return fp / (fp + fn)


def strictly_above(*given):
    return threshold(*given, strict=True)


def with_a_tensor(probabilities, labels, fp, fn, prevalence):
    """Right, all candidates at once."""
    p, y = torch.tensor(probabilities).double(), torch.tensor(labels).bool()
    t = torch.cat([p.unique(), torch.tensor([math.inf]).double()])
    stopped = p >= t[:, None]
    cost = (prevalence * fn * (~stopped[:, y]).double().mean(dim=1)
            + (1 - prevalence) * fp * stopped[:, ~y].double().mean(dim=1))
    best = t[(cost <= cost.min() + 1e-12).nonzero()[-1]].item()
    return min([*probabilities, math.inf], key=lambda q: 0 if q == best else abs(q - best))


# Naive Bayes


def bayes(texts, labels, new_texts, *, prior=True, add=1.0, repeat=True, unknown=False,
          lower=True, flip=False):
    words = {0: Counter(), 1: Counter()}
    for text, label in zip(texts, labels, strict=True):
        words[label].update(text.lower().split())
    vocabulary = {*words[0], *words[1]}
    found = []
    for text in new_texts:
        listed = (text.lower() if lower else text).split()
        score = math.log(labels.count(1)) - math.log(labels.count(0)) if prior else 0.0
        for word in listed if repeat else set(listed):
            if word not in vocabulary and not unknown:
                continue
            p = [(words[c][word] + add) / (words[c].total() + add * len(vocabulary))
                 for c in (0, 1)]
            score += (math.log(p[1]) if p[1] else -math.inf) - (math.log(p[0]) if p[0]
                                                                 else -math.inf)
        found.append(int(score > 0) if not flip else int(score <= 0))
    return found


def bayes_in_numpy(texts, labels, new_texts):
    """Right, and returns an array."""
    return np.array(bayes(texts, labels, new_texts))


# Prevalence


def prevalence(confusion, predictions, *, clip=True):
    fpr = (confusion[0, 1] / confusion[0].sum()).item()
    tpr = (confusion[1, 1] / confusion[1].sum()).item()
    if tpr == fpr:
        return None
    value = (sum(predictions) / len(predictions) - fpr) / (tpr - fpr)
    return min(1.0, max(0.0, value)) if clip else value


def fraction_predicted(confusion, predictions):
    return sum(predictions) / len(predictions)


def minus_fpr(confusion, predictions):
    fpr = (confusion[0, 1] / confusion[0].sum()).item()
    return fraction_predicted(confusion, predictions) - fpr


def over_tpr(confusion, predictions):
    tpr = (confusion[1, 1] / confusion[1].sum()).item()
    return fraction_predicted(confusion, predictions) / tpr


def by_precision(confusion, predictions):
    q = fraction_predicted(confusion, predictions)
    precision = (confusion[1, 1] / confusion[:, 1].sum()).item()
    return q * precision + (1 - q) * (confusion[1, 0] / confusion[:, 0].sum()).item()


def of_the_matrix(confusion, predictions):
    return (confusion[1].sum() / confusion.sum()).item()


def divides_by_zero(confusion, predictions):
    fpr, tpr = confusion[0, 1] / confusion[0].sum(), confusion[1, 1] / confusion[1].sum()
    value = (sum(predictions) / len(predictions) - fpr) / (tpr - fpr)
    return float(value.clamp(0, 1))


def as_a_tensor(confusion, predictions):
    """Right, as a tensor of one number."""
    value = prevalence(confusion, predictions)
    return None if value is None else torch.tensor(value)


def none_where_below(confusion, predictions):
    fpr, tpr = confusion[0, 1] / confusion[0].sum(), confusion[1, 1] / confusion[1].sum()
    return None if tpr <= fpr else prevalence(confusion, predictions)


def two_classes(labels, predictions):
    hits = [[p == c for t, p in zip(labels, predictions, strict=True) if t == c] for c in (0, 1)]
    return sum(sum(of) / max(1, len(of)) for of in hits) / 2


def bayes_log_of_zero(texts, labels, new_texts):
    counts = Counter(word for text, label in zip(texts, labels, strict=True) if label
                     for word in text.lower().split())
    return [int(sum(math.log(counts[word]) for word in text.lower().split()) > 0)
            for text in new_texts]


WRONG = [
    ("check_balanced_accuracy", accuracy, "this is the accuracy"),
    ("check_balanced_accuracy", mean_precision, "mean of the precisions"),
    ("check_balanced_accuracy", precisions_of_labels, "mean of the precisions"),
    ("check_balanced_accuracy", recall_of_spam, "the recall of one class"),
    ("check_balanced_accuracy", sum_of_recalls, "the sum of the recalls"),
    ("check_balanced_accuracy", half_of_recalls, "divides by 2"),
    ("check_balanced_accuracy", counts_absent, "leave it out"),
    ("check_balanced_accuracy", counts_every_number, "leave it out"),
    ("check_balanced_accuracy", two_classes, "only the classes 0 and 1"),
    ("check_balanced_accuracy", sorts_in_place, "are changed"),
    ("check_balanced_accuracy", no_return, "is there a return"),
    ("check_merge_classes", lambda z: merged(z, lambda s: s.sum(dim=-1)), "logits are added"),
    ("check_merge_classes", lambda z: merged(z, lambda s: s.mean(dim=-1)), "mean of the two"),
    ("check_merge_classes", lambda z: merged(z, lambda s: s.amax(dim=-1)), "larger of the two"),
    ("check_merge_classes", merge_probs, "these are the probabilities"),
    ("check_merge_classes", merge_naively, "use logsumexp"),
    ("check_merge_classes", merge_first_two, "the first class is ham"),
    ("check_merge_classes", lambda z: merge_right(z).flip(-1), "exchanged"),
    ("check_merge_classes", merge_in_place, "are changed"),
    ("check_merge_classes", lambda z: merge_right(z)[:, 1], "expected shape"),
    ("check_threshold", lowest, "the highest threshold is wanted"),
    ("check_threshold", never_none, "infinity"),
    ("check_threshold", exchanged, "the two costs are exchanged"),
    ("check_threshold", no_prevalence, "at the prevalence of the given messages"),
    ("check_threshold", no_costs, "the costs are not used"),
    ("check_threshold", from_theory, "neither one of the probabilities nor infinity"),
    ("check_threshold", strictly_above, "expected cost"),
    ("check_naive_bayes", lambda *a: bayes(*a, prior=False), "the prior is missing"),
    ("check_naive_bayes", lambda *a: bayes(*a, repeat=False), "each occurrence counts"),
    ("check_naive_bayes", lambda *a: bayes(*a, unknown=True), "in no training message"),
    ("check_naive_bayes", lambda *a: bayes(*a, add=0.0), "one is not added"),
    ("check_naive_bayes", lambda *a: bayes(*a, add=0.1), "is one added to each count"),
    ("check_naive_bayes", bayes_log_of_zero, "add one to each count"),
    ("check_naive_bayes", lambda *a: bayes(*a, flip=True), "1 is spam"),
    ("check_naive_bayes", lambda *a: bayes(*a, lower=False), "lower case"),
    ("check_naive_bayes", lambda *a: bayes(*a)[:-1], "expected 14 labels"),
    ("check_naive_bayes", lambda *a: ["spam"] * 14, "labels 0 and 1"),
    ("check_naive_bayes", lambda *a: [1] * 14, "should get"),
    ("check_prevalence", fraction_predicted, "predicted as spam, with the false positives"),
    ("check_prevalence", minus_fpr, "divide by TPR - FPR"),
    ("check_prevalence", over_tpr, "false positives are not taken off"),
    ("check_prevalence", by_precision, "uses the precision"),
    ("check_prevalence", of_the_matrix, "the prevalence in the confusion matrix"),
    ("check_prevalence", lambda *a: prevalence(*a, clip=False), "outside of 0 to 1"),
    ("check_prevalence", lambda c, p: prevalence(c.T, p), "here they are exchanged"),
    ("check_prevalence", none_where_below, "none where tpr is below fpr"),
    ("check_prevalence", divides_by_zero, "none is wanted"),
]

RIGHT = [
    ("check_balanced_accuracy", balanced_with_tensors),
    ("check_merge_classes", merge_right),
    ("check_merge_classes", merge_as_log_probs),
    ("check_threshold", threshold),
    ("check_threshold", with_a_tensor),
    ("check_naive_bayes", bayes),
    ("check_naive_bayes", bayes_in_numpy),
    ("check_naive_bayes", lambda *a: torch.tensor(bayes(*a))),
    ("check_prevalence", prevalence),
    ("check_prevalence", as_a_tensor),
]
