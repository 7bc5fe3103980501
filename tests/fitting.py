"""A small model, its data, and one call of `fit` with the callbacks that most tests need."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers.callbacks import Evaluate, PrintSample
from helpers.checkpoint import Checkpoint, GracefulInterrupt
from helpers.data import TokenDataset, make_dataloader
from helpers.gpt import GPT, GPTConfig
from helpers.training import IGNORE_INDEX, Callback, History, TrainConfig, TrainState, fit, lm_loss

SHAPE = {"vocab_size": 11, "context_length": 8, "n_embd": 16, "n_head": 2, "n_layer": 2}
TOKENS = torch.randint(11, (57,), generator=torch.Generator().manual_seed(3))


def make_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SHAPE | changes))


def perturb(model: nn.Module) -> nn.Module:
    """Move every tensor off its start: fresh biases are zero and fresh norms one."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def windows(seed: int = 0) -> DataLoader:
    """Four batches a pass, the last of two windows where the others have three."""
    return make_dataloader(TokenDataset(TOKENS, 5), batch_size=3, seed=seed)


def unequal_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of 10 and 2 counted targets, and of unequal numbers of rows."""
    inputs, targets = TOKENS[:15].view(3, 5), TOKENS[1:16].view(3, 5).clone()
    targets[2, 2:] = IGNORE_INDEX
    return [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module | dict) -> None:
    other = other if isinstance(other, dict) else weights_of(other)
    differing = [n for n, w in weights_of(model).items() if not torch.equal(w, other[n])]
    assert not differing


def timeless(history: History) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "targets_per_s"} for r in history.records]


class Bomb:
    """A pickle of this writes a file where it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


class Log(Callback):
    """Call a function with each record, that of step 0 included."""

    def __init__(self, log: Callable[[dict], object]) -> None:
        self.log = log

    def on_train_start(self, state: TrainState) -> None:
        if state.step == 0:
            self.log(state.history.records[0])

    def on_step_end(self, state: TrainState) -> None:
        self.log(state.record)


def train(model: nn.Module, loader: Iterable, *, loss_fn: Callable = lm_loss, optimizer=None,
          val_loader: Iterable | None = None, eval_every: int | None = None,
          eval_batches: int | None = None, metrics: Callable | None = None,
          sample: Callable | None = None, sample_every: int | None = None,
          log: Callable | None = None, checkpoint: Path | None = None,
          checkpoint_every: int | None = None, resume: Path | None = None, **config) -> History:
    """`fit`, with evaluation, interruption, and if asked for samples, a log and checkpoints."""
    callbacks: list[Callback] = [Log(log)] if log else []
    callbacks.append(Evaluate(val_loader, eval_every, max_batches=eval_batches, metrics=metrics))
    if sample:
        callbacks.append(PrintSample(sample, sample_every))
    callbacks.append(GracefulInterrupt())
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint or resume:
            path = Path(checkpoint or Path(folder, "only-here.pt"))
            if resume and Path(resume) != path:
                shutil.copy(resume, path)            # the file that is read stays as it is
            callbacks.append(Checkpoint(path, checkpoint_every, resume=resume is not None))
        return fit(model, loader, TrainConfig(**config), loss_fn=loss_fn, optimizer=optimizer,
                   callbacks=callbacks)
