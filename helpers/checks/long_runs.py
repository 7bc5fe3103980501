"""Checks of the exercises of appendix C, long runs."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from types import SimpleNamespace

from helpers.checks._core import (
    call,
    expect,
    expect_function,
    expect_number,
    done,
    is_started,
)


def check_data_position(my_position: Callable[..., tuple[int, int]]) -> None:
    """Exercise C.1: complete epochs, and batches read of the current one."""
    name = "my_position"
    if not is_started(my_position, name):
        return
    expect_function(my_position, name)
    for step, n_batches, accum in ((0, 5, 1), (3, 5, 1), (5, 5, 1), (13, 5, 1), (3, 5, 2),
                                   (5, 5, 2), (7, 3, 4), (1, 2, 7)):
        where = f"{name}({step}, {n_batches}, {accum})"
        found = call(my_position, step, n_batches, accum)
        expect(isinstance(found, tuple | list) and len(found) == 2,
               f"{where}: expected two numbers, epochs and batches, got {found!r}.")
        epochs, batches = (expect_number(value, name) for value in found)
        expect(all(isinstance(value, numbers.Integral) for value in found),
               f"{where}: expected whole numbers, got {tuple(found)}. // divides without a rest.")
        read = step * accum
        expect((epochs, batches) != (step // n_batches, step % n_batches) or accum == 1
               or step == 0,
               f"{where}: got {epochs:g} and {batches:g}, which counts steps. A step reads "
               "grad_accum_steps batches.")
        expect(not (batches == n_batches and epochs == read // n_batches - 1),
               f"{where}: all {n_batches} batches have been read, so the epoch is complete and no "
               "batch of the next one has been read.")
        expect(batches < n_batches,
               f"{where}: {batches:g} batches of the current epoch, which has only {n_batches}.")
        expect((epochs, batches) == divmod(read, n_batches),
               f"{where}: {read} batches have been read in all, so expected "
               f"{divmod(read, n_batches)}, got {(int(epochs), int(batches))}.")
    expect(tuple(call(my_position, 4, 3)) == (1, 1),
           f"{name}: grad_accum_steps is 1 where it is not given.")
    done(name)


def check_early_stopping(my_early_stopping: type) -> None:
    """Exercise C.2: a callback that stops after `patience` evaluations without improvement."""
    name = "MyEarlyStopping"
    if inspect.isclass(my_early_stopping):
        if not is_started(getattr(my_early_stopping, "on_step_end", None), name):
            return
    elif not is_started(my_early_stopping, name):
        return
    expect(inspect.isclass(my_early_stopping),
           f"{name}: expected the class itself, got {type(my_early_stopping).__name__}.")

    def stops_at(losses: list[float | None], patience: int, *min_delta: float,
                 stopped: bool = False) -> int | None:
        """The number of the evaluation, steps without one counted too, after which it stops."""
        callback = call(my_early_stopping, patience, *min_delta)
        state = SimpleNamespace(step=0, should_stop=stopped, record={}, total_steps=100,
                                history=SimpleNamespace(records=[]))
        if hasattr(callback, "on_train_start"):
            call(callback.on_train_start, state)
        for loss in losses:
            state.step += 1
            state.record = {"step": state.step, "train_loss": 1.0}
            state.record |= {} if loss is None else {"val_loss": loss}
            state.history.records.append(state.record)
            call(callback.on_step_end, state)
            if state.should_stop and not stopped:
                return state.step
        expect(state.should_stop == stopped,
               f"{name}: state.should_stop was True, set by somebody else, and is False now.")
        return None

    falling = [3.0, 2.5, 2.0, 1.5, 1.0]
    expect(stops_at(falling, 1) is None,
           f"{name}: it stopped although the validation loss fell each time.")
    found = stops_at([3.0, 2.0, 2.1, 2.2, 2.3], 2)
    expect(found is not None, f"{name}: with patience 2 it did not stop at losses 3.0, 2.0, 2.1, "
                              "2.2, 2.3. Set state.should_stop to True.")
    expect(found == 4, f"{name}: with patience 2 and losses 3.0, 2.0, 2.1, 2.2, 2.3 it should stop "
                       f"after evaluation 4, and stopped after {found}.")
    found = stops_at([3.0, 2.0, 2.1, 1.9, 2.0, 2.1, 2.2], 3)
    expect(found == 7, f"{name}: the third loss is worse, the fourth the best so far: the count "
                       f"begins anew there. Expected to stop after 7, stopped after {found}.")
    found = stops_at([3.0, 2.0, 2.5, 2.4, 2.3], 3)
    expect(found == 5, f"{name}: losses that fall again but stay above the best one are no "
                       f"improvement. Compare with the best, not with the one before: expected to "
                       f"stop after 5, stopped after {found}.")
    found = stops_at([2.0, 2.0, 2.0], 2)
    expect(found == 3, f"{name}: an equal loss is no improvement. Losses 2.0, 2.0, 2.0 with "
                       f"patience 2 stop after 3, here after {found}.")
    found = stops_at([3.0, None, None, 3.1, None, 3.2], 2)
    expect(found == 6, f"{name}: steps without val_loss do not count. Expected to stop after 6, "
                       f"stopped after {found}.")
    found = stops_at([3.0, 2.95, 2.95], 2, 0.1)
    expect(found == 3, f"{name}: with min_delta 0.1 a loss of 2.95 after 3.0 is no "
                       "improvement. Losses 3.0, 2.95, 2.95 with patience 2 stop after 3, "
                       f"here after {found}.")
    found = stops_at([3.0, 2.96, 2.92, 2.88], 3, 0.1)
    expect(found is None, f"{name}: with min_delta 0.1 losses of 3.0, 2.96, 2.92, 2.88 end with an "
                          "improvement: 2.88 is lower than 3.0, the loss of the last improvement, "
                          f"by more than 0.1. With patience 3 it stopped after {found}.")
    stops_at(falling, 2, stopped=True)
    first, second = call(my_early_stopping, 1), call(my_early_stopping, 1)
    expect(first is not second and stops_at([1.0, 0.5], 1) is None,
           f"{name}: a second callback remembers the losses of the first. Keep them in self.")
    done(name)


def check_interval(my_interval: Callable[[float, float, float], int]) -> None:
    """Exercise C.3: steps between two checkpoints, by Young's formula."""
    name = "my_interval"
    if not is_started(my_interval, name):
        return
    expect_function(my_interval, name)
    for write, failure, step in ((20.0, 86_400.0, 1.5), (5.0, 3_600.0, 0.25), (90.0, 6e5, 7.0)):
        where = f"{name}({write:g}, {failure:g}, {step:g})"
        value = call(my_interval, write, failure, step)
        steps = expect_number(value, name)
        seconds = math.sqrt(2 * write * failure)
        wrong = {"the seconds between two checkpoints; divide by the seconds of a step": seconds,
                 "what comes out without the 2 under the root": math.sqrt(write * failure) / step,
                 "what comes out without the root": 2 * write * failure / step}
        for what, number in wrong.items():
            expect(abs(steps - number) > 1, f"{where}: {steps:g} is {what}.")
        exact = seconds / step
        expect(steps != math.ceil(exact), f"{where}: {exact:.2f} steps are rounded down, to "
                                          f"{math.floor(exact)}, and {steps:g} is rounded up.")
        expect(steps == int(steps), f"{where}: expected a whole number of steps, got {steps}.")
        expect(steps == math.floor(exact), f"{where}: expected {math.floor(exact)} steps, got "
                                           f"{steps:g}.")
    expect(call(my_interval, 0.01, 10.0, 60.0) == 1,
           f"{name}: a step that is longer than the interval: save after each one, so 1.")
    done(name)


def check_prune(my_prune: Callable[[list[str], int, int], list[str]]) -> None:
    """Exercise C.4: which checkpoints to delete."""
    name = "my_prune"
    if not is_started(my_prune, name):
        return
    expect_function(my_prune, name)
    names = ["step-900.pt", "step-1000.pt", "step-200.pt", "step-1100.pt", "step-500.pt"]
    given = list(names)
    found = call(my_prune, given, 2, 500)
    expect(isinstance(found, list | tuple), f"{name}: expected a list of names, got "
                                            f"{type(found).__name__}.")
    found = list(found)
    expect(given == names, f"{name}: the list that it was given has changed. Sort a copy: "
                           "sorted(names) makes one.")
    expect("step-1100.pt" not in found and "step-1000.pt" not in found,
           f"{name}: of steps 200, 500, 900, 1000, 1100 the two newest are 1000 and 1100, and "
           f"{found} are to be deleted. As text, step-1000 comes before step-200: compare numbers.")
    expect("step-500.pt" not in found,
           f"{name}: with milestone 500 the checkpoint of step 500 stays for good.")
    expect(found == ["step-200.pt", "step-900.pt"],
           f"{name}: expected step-200.pt and step-900.pt, oldest first, got {found}.")
    found = list(call(my_prune, ["step-500.pt", "step-700.pt", "step-1000.pt", "step-1100.pt"], 2,
                      500))
    expect(found == ["step-700.pt"],
           f"{name}: a milestone may be among the newest, and then counts as one of them. Of steps "
           f"500, 700, 1000, 1100 with keep 2 only 700 goes, got {found}.")
    others = ["notes.txt", "step-5.pt.part", "step-.pt", "history.csv", "step-7.txt"]
    found = call(my_prune, [*others, "step-1.pt", "step-2.pt"], 1, 500)
    expect(list(found) == ["step-1.pt"],
           f"{name}: among {', '.join(others)}, step-1.pt and step-2.pt only step-1.pt is an old "
           f"checkpoint, got {list(found)}.")
    expect(list(call(my_prune, [], 3, 500)) == [], f"{name}: of no files none is deleted.")
    expect(list(call(my_prune, ["step-1.pt"], 3, 500)) == [],
           f"{name}: there are fewer checkpoints than are kept, so none is deleted.")
    found = list(call(my_prune, ["step-3.pt", "step-4.pt"], 0, 500))
    expect(found == ["step-3.pt", "step-4.pt"],
           f"{name}: with keep 0 only milestones stay. names[-0:] is the whole list.")
    done(name)
