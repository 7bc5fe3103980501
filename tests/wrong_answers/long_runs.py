"""Typical wrong answers to the exercises of appendix C, and right ones in other forms."""

import math
import re

import numpy as np

# Position in the data


def position_of_steps(step, n_batches, grad_accum_steps=1):
    return divmod(step, n_batches)


def position_full_epoch(step, n_batches, grad_accum_steps=1):
    read = step * grad_accum_steps
    epochs = max(0, (read - 1) // n_batches)
    return epochs, read - epochs * n_batches


def position_fraction(step, n_batches, grad_accum_steps=1):
    read = step * grad_accum_steps
    return read / n_batches, read % n_batches


def position_read_in_all(step, n_batches, grad_accum_steps=1):
    read = step * grad_accum_steps
    return read // n_batches, read


def position_per_epoch_steps(step, n_batches, grad_accum_steps=1):
    steps = math.ceil(n_batches / grad_accum_steps)          # as if no step crossed an epoch's end
    return step // steps, step % steps * grad_accum_steps


def position_one_number(step, n_batches, grad_accum_steps=1):
    return step * grad_accum_steps


def position_no_default(step, n_batches, grad_accum_steps=2):
    return divmod(step * grad_accum_steps, n_batches)


# Early stopping


class Stopping:
    """Right; with mistakes in its heirs."""

    def __init__(self, patience, min_delta=0.0):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = math.inf, 0

    def is_better(self, loss):
        return loss < self.best - self.min_delta

    def on_step_end(self, state):
        if "val_loss" in state.record:
            self.see(state.record["val_loss"])
            if self.waited >= self.patience:
                state.should_stop = True

    def see(self, loss):
        if self.is_better(loss):
            self.best, self.waited = loss, 0
        else:
            self.waited += 1


class IgnoresMinDelta(Stopping):
    def is_better(self, loss):
        return loss < self.best


class ComparesWithTheLowest(Stopping):
    def see(self, loss):
        self.waited = 0 if self.is_better(loss) else self.waited + 1
        self.best = min(self.best, loss)


class EqualIsBetter(Stopping):
    def is_better(self, loss):
        return loss <= self.best


class OneTooLate(Stopping):
    def on_step_end(self, state):
        if "val_loss" in state.record:
            self.see(state.record["val_loss"])
            if self.waited > self.patience:
                state.should_stop = True


class NeverReset(Stopping):
    def see(self, loss):
        self.waited += not self.is_better(loss)
        self.best = min(self.best, loss)


class ComparesWithTheLast(Stopping):
    def see(self, loss):
        self.waited = 0 if loss < self.best else self.waited + 1
        self.best = loss


class CountsSteps(Stopping):
    def on_step_end(self, state):
        self.see(state.record.get("val_loss", math.inf))
        if self.waited >= self.patience:
            state.should_stop = True


class TakesBack(Stopping):
    def on_step_end(self, state):
        if "val_loss" in state.record:
            self.see(state.record["val_loss"])
            state.should_stop = self.waited >= self.patience


class NeedsALoss(Stopping):
    def on_step_end(self, state):
        self.see(state.record["val_loss"])
        if self.waited >= self.patience:
            state.should_stop = True


class NeverStops(Stopping):
    def on_step_end(self, state):
        if "val_loss" in state.record:
            self.see(state.record["val_loss"])


class HistoryInTheClass(Stopping):
    losses = []

    def __init__(self, patience, min_delta=0.0):
        self.patience = patience

    def on_step_end(self, state):
        if "val_loss" in state.record:
            self.losses.append(state.record["val_loss"])
            since = len(self.losses) - 1 - self.losses.index(min(self.losses))
            if since >= self.patience:
                state.should_stop = True


class FromTheHistory:
    """Right, without a memory of its own."""

    def __init__(self, patience, min_delta=0.0):
        self.patience, self.min_delta = patience, min_delta

    def on_step_end(self, state):
        best, waited = math.inf, 0
        for record in state.history.records:
            if "val_loss" in record:
                better = best - record["val_loss"] > self.min_delta
                best, waited = (record["val_loss"], 0) if better else (best, waited + 1)
        if waited >= self.patience:
            state.should_stop = True


# The best interval


def interval(write, failure, step, *, two=2, root=0.5, per_step=True, rounding=math.floor,
             least=1):
    value = (two * write * failure) ** root
    return max(least, rounding(value / step if per_step else value))


# Which files to delete


def prune(names, keep, milestone, *, key=None, good=r"step-(\d+)\.pt", first=True, every=True):
    """Right; with a mistake by keyword."""
    found = [(int(m[1]), n) for n in names if (m := re.fullmatch(good, n))]
    found.sort(key=key)
    old = found[:max(0, len(found) - keep)] if first else [f for f in found if f[0] % milestone][
        :-keep or None]
    return [n for step, n in old if not every or step % milestone]


def prune_in_place(names, keep, milestone):
    names.sort(key=lambda n: int(n[5:-3]))
    return [n for n in names[:-keep] if int(n[5:-3]) % milestone]


def prune_minus_zero(names, keep, milestone):
    found = sorted((int(m[1]), n) for n in names if (m := re.fullmatch(r"step-(\d+)\.pt", n)))
    kept = found[-keep:]
    return [n for step, n in found if (step, n) not in kept and step % milestone]


WRONG = [
    ("check_data_position", position_of_steps, "counts steps"),
    ("check_data_position", position_full_epoch, "the epoch is complete"),
    ("check_data_position", position_fraction, "whole numbers"),
    ("check_data_position", position_read_in_all, "which has only"),
    ("check_data_position", position_per_epoch_steps, "in all, so expected"),
    ("check_data_position", position_one_number, "expected two numbers"),
    ("check_data_position", position_no_default, "1 where it is not given"),
    ("check_early_stopping", IgnoresMinDelta, "2.95 after 3.0 is no"),
    ("check_early_stopping", ComparesWithTheLowest, "end with an improvement"),
    ("check_early_stopping", EqualIsBetter, "equal loss"),
    ("check_early_stopping", OneTooLate, "after evaluation 4"),
    ("check_early_stopping", NeverReset, "begins anew"),
    ("check_early_stopping", ComparesWithTheLast, "compare with the best"),
    ("check_early_stopping", CountsSteps, "do not count"),
    ("check_early_stopping", TakesBack, "set by somebody else"),
    ("check_early_stopping", NeedsALoss, "KeyError"),
    ("check_early_stopping", NeverStops, "did not stop"),
    ("check_early_stopping", HistoryInTheClass, "with patience 2"),
    ("check_interval", lambda w, f, s: interval(w, f, s, per_step=False), "seconds of a step"),
    ("check_interval", lambda w, f, s: interval(w, f, s, two=1), "without the 2"),
    ("check_interval", lambda w, f, s: interval(w, f, s, root=1), "without the root"),
    ("check_interval", lambda w, f, s: interval(w, f, s, rounding=math.ceil), "rounded down"),
    ("check_interval", lambda w, f, s: interval(w, f, s, rounding=float), "whole number"),
    ("check_interval", lambda w, f, s: interval(w, f, s, least=0), "so 1"),
    ("check_prune", lambda n, k, m: prune(n, k, m, key=lambda f: f[1]), "compare numbers"),
    ("check_prune", lambda n, k, m: prune(n, k, m, every=False), "stays for good"),
    ("check_prune", lambda n, k, m: prune(n, k, m, key=lambda f: -f[0]), "two newest"),
    ("check_prune", lambda n, k, m: prune(n, k, m, first=False), "expected step-200.pt"),
    ("check_prune", lambda n, k, m: prune(n, k, m)[::-1], "oldest first"),
    ("check_prune", lambda n, k, m: prune(n, k, m, good=r"step-(\d+)\..*"), "only step-1.pt"),
    ("check_prune", prune_in_place, "has changed"),
    ("check_prune", prune_minus_zero, "names[-0:]"),
]

RIGHT = [
    ("check_data_position", lambda step, n, grad_accum_steps=1: list(
        divmod(step * grad_accum_steps, n))),
    ("check_data_position", lambda step, n, grad_accum_steps=1: np.divmod(
        step * grad_accum_steps, n)),
    ("check_early_stopping", Stopping),
    ("check_early_stopping", FromTheHistory),
    ("check_interval", interval),
    ("check_interval", lambda w, f, s: float(interval(w, f, s))),
    ("check_prune", prune),
    ("check_prune", lambda n, k, m: tuple(prune(n, k, m))),
]
