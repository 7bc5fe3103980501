"""5 · Pretraining.

Made from notebooks/05_pretraining.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.sampling, helpers.training, helpers.pretrained.
"""

import sys
from collections.abc import Callable, Iterable

from torch import nn
from tqdm import tqdm

from helpers.training import (Callback, TrainState, autocast_context, eval_mode, evaluate_loss,
                              unwrap_model)

__all__ = ["ProgressBar", "Evaluate", "PrintSample"]


# cell progress-bar of notebooks/05_pretraining.ipynb
class ProgressBar(Callback):
    """A bar with the loss, the learning rate and the throughput; `unit` names what is counted."""

    def __init__(self, unit: str = "tokens") -> None:
        self.unit = unit

    def on_train_start(self, state: TrainState) -> None:
        """Open the bar at the step where the run stands."""
        self.bar = tqdm(total=state.total_steps, initial=state.step, unit="step", mininterval=1.0,
                        file=sys.stdout)

    def on_step_end(self, state: TrainState) -> None:
        """Move the bar on."""
        r = state.record
        self.bar.set_postfix_str(f"loss {r['train_loss']:.3f}, lr {r['lr']:.1e}, "
                                 f"{r['targets_per_s']:,.0f} {self.unit}/s", refresh=False)
        self.bar.update()

    def on_train_end(self, state: TrainState) -> None:
        """Close the bar."""
        self.bar.close()


# cell evaluate of notebooks/05_pretraining.ipynb
class Evaluate(Callback):
    """Measure the model at step 0, every so many steps, and at the last step.

    Evaluation changes nothing of how the run goes on: neither modes nor random numbers nor the
    order of the data.

    Args:
        val_loader: its loss goes into the records as `val_loss`.
        every: steps from one evaluation to the next; only first and last unless given.
        max_batches: of val_loader, at most.
        metrics: maps the model to a dict of numbers, which go into the records too.
    """

    def __init__(self, val_loader: Iterable | None = None, every: int | None = None, *,
                 max_batches: int | None = None,
                 metrics: Callable[[nn.Module], dict] | None = None) -> None:
        self.val_loader, self.every, self.max_batches = val_loader, every, max_batches
        self.metrics = metrics

    def on_train_start(self, state: TrainState) -> None:
        """Measure the model as it is before the first step."""
        if not state.history.records:
            state.history.records.append({"step": 0, "epoch": 0, "n_targets": 0})
        if state.step == 0:
            state.history.records[0].update(self.measure(state))

    def on_step_end(self, state: TrainState) -> None:
        """Measure where it is due."""
        if state.step == state.total_steps or (self.every and state.step % self.every == 0):
            state.record.update(self.measure(state))

    def measure(self, state: TrainState) -> dict[str, float]:
        """The validation loss and the metrics now."""
        found, device = {}, next(state.model.parameters()).device
        loaders = state.train_loader, self.val_loader
        with autocast_context(state.config.precision, device), eval_mode(state.model, *loaders):
            if self.val_loader is not None:
                found["val_loss"] = evaluate_loss(state.model, self.val_loader, state.loss_fn,
                                                  max_batches=self.max_batches)
            if self.metrics is not None:
                seen = self.metrics(unwrap_model(state.model))
                found |= {name: float(value) for name, value in seen.items()}
        return found


# cell print-sample of notebooks/05_pretraining.ipynb
class PrintSample(Callback):
    """Print what `make_text(model)` gives, at step 0, every so many steps, and at the last step.

    The texts are kept in the history; drawing them changes nothing of how the run goes on.
    """

    def __init__(self, make_text: Callable[[nn.Module], str], every: int | None = None) -> None:
        self.make_text, self.every = make_text, every

    def on_train_start(self, state: TrainState) -> None:
        """Print what the model generates before the first step."""
        if state.step == 0:
            self.show(state)

    def on_step_end(self, state: TrainState) -> None:
        """Print where it is due."""
        if state.step == state.total_steps or (self.every and state.step % self.every == 0):
            self.show(state)

    def show(self, state: TrainState) -> None:
        """Generate, print and keep one text."""
        with eval_mode(state.model, state.train_loader):
            text = self.make_text(unwrap_model(state.model))
        state.history.samples.append((state.step, text))
        tqdm.write(f"step {state.step}: {text}", file=sys.stdout)
