"""C · Long runs: checkpoints and exact resume.

Made from notebooks/C_long_runs.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import signal
import threading
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch
from torch import nn

from helpers.common import atomic_write
from helpers.training import Callback, TrainState, unwrap_model

__all__ = [
    "ResumableLoader",
    "checkpoint_contents",
    "write_checkpoint",
    "read_checkpoint",
    "restore",
    "Checkpoint",
    "GracefulInterrupt",
]


# cell resumable-loader of notebooks/C_long_runs.ipynb
class ResumableLoader:
    """Epoch after epoch over a loader, with a position that can be saved and restored.

    Raises:
        ValueError: the loader gives no batch.

    Example:
        >>> batches = ResumableLoader([10, 20, 30])
        >>> [next(batches) for _ in range(4)], batches.epoch
        ([10, 20, 30, 10], 1)
    """

    def __init__(self, loader: Iterable, state: TrainState | None = None) -> None:
        self.loader, self.epoch, self.batch, self.state = loader, 0, 0, state
        # Without a generator of its own a loader shuffles with PyTorch's global one.
        self.generator = getattr(loader, "generator", None) or torch.default_generator
        self.iterator = None                           # nothing is drawn before the first batch

    def _start(self) -> None:
        """Begin an epoch, and remember the generator's state from before it was shuffled."""
        self.before = self.generator.get_state()
        if self.state is not None:
            self.state.epoch = self.epoch
        if hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(self.epoch)      # each epoch its own order on every rank
        self.iterator, self.batch = iter(self.loader), 0

    def __iter__(self) -> "ResumableLoader":
        return self

    def __next__(self) -> object:
        if self.iterator is None:
            self._start()
        try:
            item = next(self.iterator)
        except StopIteration:
            if self.batch == 0:
                raise ValueError(f"The loader is empty in pass {self.epoch + 1}: it gave no batch. "
                                 "Can it be read only once?") from None
            self.epoch += 1
            self._start()
            return next(self)
        self.batch += 1
        return item

    def state_dict(self) -> dict:
        """The position, as plain data."""
        return {"epoch": self.epoch, "batch": self.batch,
                "generator": self.generator.get_state() if self.iterator is None else self.before}

    def load_state_dict(self, position: dict) -> None:
        """Go to a position saved before, on the same data.

        Raises:
            ValueError: the loader has fewer batches than had been read.
        """
        self.generator.set_state(position["generator"])
        self.epoch, self.batch, self.iterator = position["epoch"], 0, None
        for _ in range(position["batch"]):
            next(self)
        if self.epoch != position["epoch"]:
            raise ValueError(f"The loader has fewer than the {position['batch']} batches that had "
                             "been read: resume with the data and batch size of that run.")


# cell checkpoint-contents of notebooks/C_long_runs.ipynb
def checkpoint_contents(state: TrainState) -> dict:
    """All that the next step depends on, as plain data and tensors.

    `state.batches` must be a `ResumableLoader`.
    """
    inner = unwrap_model(state.model)
    config = getattr(inner, "config", None)
    return {
        "step": state.step, "n_targets": state.n_targets,
        "config": asdict(config) if is_dataclass(config) else None,
        "model": inner.state_dict(), "optimizer": state.optimizer.state_dict(),
        "batches": state.batches.state_dict(),
        "records": state.history.records, "samples": state.history.samples,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


# cell write-checkpoint of notebooks/C_long_runs.ipynb
def write_checkpoint(path: str | Path, contents: dict) -> None:
    """Write the contents of a checkpoint to one file, all or nothing.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(contents, temporary)
        except (OSError, RuntimeError) as error:    # which of the two a full disk gives, varies
            raise OSError(f"The checkpoint {path} could not be written ({error}). Is the disk "
                          "full? An older checkpoint of that name is unchanged.") from error


# cell read-checkpoint of notebooks/C_long_runs.ipynb
def read_checkpoint(path: str | Path, model: nn.Module) -> dict:
    """Read a checkpoint and compare it with the model; nothing is changed yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, or is of another model.
    """
    path, inner = Path(path), unwrap_model(model)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    parts = ("step", "n_targets", "config", "model", "optimizer", "batches", "records", "samples",
             "rng", "cuda_rng")
    try:
        with zipfile.ZipFile(path) as archive:             # torch.load does not look at checksums
            if archive.testzip() is not None:
                raise ValueError("wrong checksum")
        contents = torch.load(path, map_location="cpu", weights_only=True)
        _, _, found, names, *_ = (contents[part] for part in parts)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this series, or is damaged "
                         f"({type(error).__name__}).") from error
    config = getattr(inner, "config", None)
    expected = asdict(config) if is_dataclass(config) else None
    if found != expected:
        keys = sorted((found or {}).keys() | (expected or {}).keys())
        differing = [f"{k}: {(found or {}).get(k)} there, {(expected or {}).get(k)} here"
                     for k in keys if (found or {}).get(k) != (expected or {}).get(k)]
        raise ValueError(f"{path} is of another model: " + "; ".join(differing))
    shapes = {k: v.shape for k, v in inner.state_dict().items()}
    if shapes != {k: v.shape for k, v in names.items()}:
        odd = sorted(shapes.keys() ^ names.keys()) or "the same names with other shapes"
        raise ValueError(f"{path} does not fit this model: {odd}")
    return contents


# cell restore of notebooks/C_long_runs.ipynb
def restore(state: TrainState, contents: dict) -> None:
    """Put a run back to where `checkpoint_contents` was called.

    Raises:
        ValueError: other parameters were trained, or the data are shorter; the model has not been
            changed then.
    """
    try:
        state.optimizer.load_state_dict(contents["optimizer"])
    except ValueError as error:
        raise ValueError("The checkpoint trained other parameters than are to be trained now: "
                         f"which of them has requires_grad? ({error})") from None
    state.batches.load_state_dict(contents["batches"])
    unwrap_model(state.model).load_state_dict(contents["model"])
    state.step, state.n_targets = contents["step"], contents["n_targets"]
    state.history.records[:] = contents["records"]
    state.history.samples[:] = [tuple(sample) for sample in contents["samples"]]
    torch.set_rng_state(contents["rng"])
    if torch.cuda.is_available() and len(contents["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(contents["cuda_rng"])


# cell checkpoint of notebooks/C_long_runs.ipynb
class Checkpoint(Callback):
    """Save the run every so many steps and at its end, and go on from the file if it is there.

    List it last: what is listed last restores before the other callbacks look, and saves after
    they have written. On the CPU a resumed run equals the uninterrupted one bit for bit.

    Args:
        path: of the one file, which is replaced as a whole each time.
        every: steps from one checkpoint to the next; only at the end unless given.
        resume: whether a file that is there is gone on from, or overwritten.
    """

    def __init__(self, path: str | Path, every: int | None = None, *, resume: bool = True) -> None:
        self.path, self.every, self.resume = Path(path), every, resume

    def on_train_start(self, state: TrainState) -> None:
        """Restore the run, if there is a checkpoint of it."""
        state.batches = ResumableLoader(state.train_loader, state)
        if self.resume and self.path.is_file():
            self.load(state)

    def on_step_end(self, state: TrainState) -> None:
        """Save where it is due."""
        if self.every and state.step % self.every == 0 and state.step < state.total_steps:
            self.save(state)

    def on_train_end(self, state: TrainState) -> None:
        """Save the end, or where the run was stopped; after an error the last file stays."""
        if state.error is None:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Write the checkpoint now."""
        self.write(self.collect(state))

    def load(self, state: TrainState) -> None:
        """Go on from the checkpoint."""
        self.restore(state, read_checkpoint(self.path, state.model))

    def collect(self, state: TrainState) -> dict:
        """What is saved; see `checkpoint_contents`."""
        return checkpoint_contents(state)

    def write(self, contents: dict) -> None:
        """Put it into the file; see `write_checkpoint`."""
        write_checkpoint(self.path, contents)

    def restore(self, state: TrainState, contents: dict) -> None:
        """Put it back; see `restore`."""
        restore(state, contents)


# cell graceful-interrupt of notebooks/C_long_runs.ipynb
class GracefulInterrupt(Callback):
    """Let the first interrupt end the run after the step that is being made.

    A checkpoint is then written as at any end. The second interrupt is a KeyboardInterrupt as
    usual. Signals arrive in the main thread only; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.raised, self._before, self._state = False, None, None

    def on_train_start(self, state: TrainState) -> None:
        """Take over the interrupt signal."""
        self.raised, self._state = False, state
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)

    def on_train_end(self, state: TrainState) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _note(self, number: int, frame: object) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = self._state.should_stop = True
