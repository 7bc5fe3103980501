"""5 · Pretraining.

Made from notebooks/05_pretraining.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import math
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

__all__ = [
    "IGNORE_INDEX",
    "lm_loss",
    "eval_mode",
    "to_device",
    "evaluate_loss",
    "configure_optimizer",
    "check_optimizer",
    "cosine_lr_with_warmup",
    "has_fast_bfloat16",
    "autocast_context",
    "train_step",
    "History",
    "ResumableLoader",
    "InterruptFlag",
    "unwrap_model",
    "atomic_write",
    "save_checkpoint",
    "load_checkpoint",
    "Monitor",
    "plan_steps",
    "is_main_process",
    "fit",
]


# cell ignore of notebooks/05_pretraining.ipynb
IGNORE_INDEX = -100    # a target that does not count; PyTorch's own default


# cell lm-loss of notebooks/05_pretraining.ipynb
def lm_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Next-token cross-entropy: the sum over all counted targets in nats, and their number.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        batch: inputs and targets, int64 (B, T) each; targets of -100 do not count.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> inputs = torch.tensor([[1, 2, 3]])
        >>> loss, n = lm_loss(GPT(config), (inputs, torch.tensor([[2, 3, -100]])))
        >>> n, 3 < loss.item() < 6
        (2, True)
    """
    inputs, targets = batch
    logits = model(inputs)                                        # (B, T, V)
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX,
                            reduction="sum")
    return total, int((targets != IGNORE_INDEX).sum())


# cell evaluating of notebooks/05_pretraining.ipynb
@contextmanager
def eval_mode(model: nn.Module, *loaders: Iterable) -> Iterator[None]:
    """Within it the model is in eval mode, without gradients, and random numbers are borrowed.

    Afterwards the mode of each of its parts and the state of the random generators, those of the
    loaders too, are what they were, so that looking at a model never changes how it trains.
    """
    modes = [(part, part.training) for part in model.modules()]
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    generators = [getattr(loader, "generator", None) for loader in loaders]
    states = [(g, g.get_state()) for g in generators if g is not None]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        for generator, state in states:
            generator.set_state(state)


# cell to-device of notebooks/05_pretraining.ipynb
def to_device(batch: object, device: torch.device | str) -> object:
    """The batch with every tensor in it, however nested, on the device.

    Example:
        >>> to_device((torch.ones(1), [torch.ones(1), "label"]), "cpu")
        (tensor([1.]), [tensor([1.]), 'label'])
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(part, device) for part in batch)
    return batch


# cell mean-loss of notebooks/05_pretraining.ipynb
def evaluate_loss(model: nn.Module, loader: Iterable, loss_fn: Callable = lm_loss, *,
              max_batches: int | None = None) -> float:
    """The loss for each counted target over a loader, in eval mode; the mode is restored.

    A loader that shuffles with a generator of its own gives the same batches each time.

    Raises:
        ValueError: the loader gave no batch, or no target in it counts.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> batch = (torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
        >>> 1.5 < evaluate_loss(GPT(config), [batch]) < 3
        True
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with eval_mode(model, loader):
        for batch in islice(loader, max_batches):
            loss, n = loss_fn(model, to_device(batch, device))
            total, count = total + loss.item(), count + n
    if not count:
        raise ValueError("There is nothing to measure: the loader is empty, or no target counts.")
    return total / count


# cell make-optimizer of notebooks/05_pretraining.ipynb
def configure_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.1,
                   betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over what trains; decay on matrices only.

    Example:
        >>> optimizer = configure_optimizer(nn.Linear(2, 3), lr=0.1)
        >>> [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
        [(1, 0.1), (1, 0.0)]
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("The model has no parameter to train: all have requires_grad = False.")
    groups = [{"params": [p for p in weights if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}]
    fused = (weights[0].device.type in ("cpu", "cuda")   # it takes one memory order for granted
             and all(p.is_contiguous() for p in weights))
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=fused)


# cell check-optimizer of notebooks/05_pretraining.ipynb
def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, if all that it moves belongs to the model.

    Raises:
        ValueError: it moves other parameters: those of another model, or those that this one had
            before its weights were replaced.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> type(check_optimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer)).__name__
        'SGD'
    """
    own = {id(p) for p in model.parameters()}
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(id(p) not in own for p in moved)
    if foreign:
        raise ValueError(f"The optimizer moves {foreign} parameters (of {len(moved)}) that are not "
                         "this model's. Build it from model.parameters() of the model that is to "
                         "be trained, after its last change.")
    return optimizer


# cell warmup-cosine of notebooks/05_pretraining.ipynb
def cosine_lr_with_warmup(step: int, *, lr: float, min_lr: float, warmup_steps: int,
                  total_steps: int) -> float:
    """The learning rate of a step, counted from 1: a straight rise, then half a cosine down.

    Example:
        >>> [round(cosine_lr_with_warmup(s, lr=1.0, min_lr=0.0, warmup_steps=2, total_steps=6), 2)
        ...  for s in range(1, 7)]
        [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# cell pick-precision of notebooks/05_pretraining.ipynb
def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


# cell precision-context of notebooks/05_pretraining.ipynb
def autocast_context(precision: str, device: torch.device):
    """A context in which the model computes in "float32", "bfloat16", or what is faster ("auto").

    Raises:
        ValueError: another name.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f'precision must be "auto", "float32" or "bfloat16", not {precision!r}.')
    if precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


# cell train-step of notebooks/05_pretraining.ipynb
def train_step(model: nn.Module, batches: list, loss_fn: Callable, optimizer: torch.optim.Optimizer,
               *, lr: float, grad_clip: float | None = 1.0, precision: str = "float32",
               step: int = 1) -> dict:
    """One move of the weights on one or more batches; `step` is its number, for the errors.

    Returns:
        train_loss (the mean over all targets, of all processes), targets (their number), lr,
        grad_norm (the gradient's size before clipping) and tokens_per_s.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; no weight has been touched.
        ValueError: no target in the batches counts.
    """
    began, device = time.perf_counter(), next(model.parameters()).device
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    sums = torch.zeros(2, dtype=torch.float64, device=device if dist.is_initialized() else "cpu")
    optimizer.zero_grad(set_to_none=True)           # of what an earlier cell may have left there
    with autocast_context(precision, device):
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            wait = nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
            with wait:                              # gradients travel once, with the last batch
                loss, n = loss_fn(model, to_device(batch, device))
                loss.backward()
            sums += torch.tensor([loss.item(), n], dtype=torch.float64, device=sums.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    total, count = sums.tolist()
    if not count:
        optimizer.zero_grad(set_to_none=True)
        raise ValueError("No target in the batch counts: all are padding or masked.")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for weight in weights:
        if weight.grad is not None:
            weight.grad.mul_(ranks / count)         # averaged over ranks before, hence times ranks
    norm = nn.utils.clip_grad_norm_(weights, math.inf if grad_clip is None else grad_clip).item()
    for what, value in (("loss", total), ("gradient", norm)):
        if not math.isfinite(value):
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"The {what} is {value} at step {step}, with a learning rate "
                                     f"of {lr:.3g}. Lower the rate, or warm up longer.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"train_loss": total / count, "targets": int(count), "lr": lr, "grad_norm": norm,
            "tokens_per_s": count / (time.perf_counter() - began)}


# cell history of notebooks/05_pretraining.ipynb
class History:
    """What a training run did: a record a step, and the samples it wrote.

    Attributes:
        records: dicts with step, epoch, tokens, train_loss, lr, grad_norm, tokens_per_s, and
            val_loss and the metrics at the steps that were evaluated.
        samples: (step, text) pairs.
        interrupted: whether the run was stopped by hand.

    Example:
        >>> history = History([{"step": 1, "train_loss": 2.0}, {"step": 2, "val_loss": 1.5}])
        >>> history.last("train_loss"), len(history.frame)
        (2.0, 2)
    """

    def __init__(self, records: list[dict] | None = None) -> None:
        self.records: list[dict] = records if records is not None else []
        self.samples: list[tuple[int, str]] = []
        self.interrupted = False

    @property
    def frame(self) -> pd.DataFrame:
        """The records as a table, one row a step."""
        return pd.DataFrame(self.records)

    def last(self, name: str) -> float:
        """The newest value of a column; KeyError if there is none."""
        for record in reversed(self.records):
            if name in record:
                return record[name]
        raise KeyError(f"no {name!r} was recorded; there are {sorted(self.frame.columns)}")

    def plot(self, ax=None, title: str | None = None):
        """Draw training and validation loss against steps; returns the axes."""
        import matplotlib.pyplot as plt

        ax = ax or plt.subplots()[1]
        for name, style in [("train_loss", {"alpha": 0.6}), ("val_loss", {"marker": "o"})]:
            points = [(r["step"], r[name]) for r in self.records if name in r]
            if points:
                ax.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
        ax.set(xlabel="step", ylabel="loss (nats per target)")
        if title:
            ax.set_title(title)
        if ax.lines:
            ax.legend()
        return ax


# cell batch-stream of notebooks/05_pretraining.ipynb
class ResumableLoader:
    """Pass after pass over a loader, with a place that can be noted and returned to.

    Raises:
        ValueError: the loader gives no batch.

    Example:
        >>> batches = ResumableLoader([10, 20, 30])
        >>> [next(batches) for _ in range(4)], batches.epoch
        ([10, 20, 30, 10], 1)
    """

    def __init__(self, loader: Iterable) -> None:
        self.loader, self.epoch, self.batch = loader, 0, 0
        own = getattr(loader, "generator", None)       # else it shuffles with PyTorch's global one
        self.generator = torch.default_generator if own is None else own
        self._start()

    def _start(self) -> None:
        """Begin a pass, and remember the generator's state from before it was shuffled."""
        self.state = self.generator.get_state()
        if hasattr(getattr(self.loader, "sampler", None), "set_epoch"):
            self.loader.sampler.set_epoch(self.epoch)      # each pass its own order on every rank
        self.iterator, self.batch = iter(self.loader), 0

    def __next__(self) -> object:
        try:
            item = next(self.iterator)
        except StopIteration:
            if self.batch == 0:
                raise ValueError("The loader is empty: it gave no batch to train on in pass "
                                 f"{self.epoch + 1}. Can it be read only once?") from None
            self.epoch += 1
            self._start()
            return next(self)
        self.batch += 1
        return item

    def state_dict(self) -> dict:
        """The place, as plain data."""
        return {"epoch": self.epoch, "batch": self.batch, "generator": self.state}

    def load_state_dict(self, place: dict) -> None:
        """Go to a place noted before, on the same data.

        Raises:
            ValueError: the loader has fewer batches than were read then.
        """
        if place["generator"] is not None:
            self.generator.set_state(place["generator"])
        self.epoch = place["epoch"]
        self._start()
        for _ in range(place["batch"]):
            next(self)
        if self.epoch != place["epoch"]:
            raise ValueError(f"The loader has fewer than the {place['batch']} batches of a pass "
                             "that had been read: resume with the data and batch size of that run.")


# cell interrupt-flag of notebooks/05_pretraining.ipynb
class InterruptFlag:
    """Within it the first interrupt sets `raised`; the second is a KeyboardInterrupt as usual.

    Example:
        >>> with InterruptFlag() as flag:
        ...     print(flag.raised)
        False
    """

    def __init__(self) -> None:
        self.raised, self._before = False, None

    def __enter__(self) -> "InterruptFlag":
        if threading.current_thread() is threading.main_thread():   # signals arrive only there
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was interrupted, so that all of them stop at the same step."""
        if not dist.is_initialized():
            return self.raised
        flag = torch.tensor(float(self.raised), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


# cell unwrap of notebooks/05_pretraining.ipynb
def unwrap_model(model: nn.Module) -> nn.Module:
    """The model itself, out of the wrappers of `torch.compile` and data-parallel training.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> unwrap_model(layer) is layer
        True
    """
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# cell save-atomically of notebooks/05_pretraining.ipynb
@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` at the end; on an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# cell save-checkpoint of notebooks/05_pretraining.ipynb
def save_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer,
                    batches: ResumableLoader, history: History, step: int) -> None:
    """Write all that the next step depends on to one file, in one move.

    Of several processes the first writes; all must call, since a sharded model's state dict is
    put together from theirs.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    inner = unwrap_model(model)
    config = getattr(inner, "config", None)
    state = {
        "step": step, "config": asdict(config) if is_dataclass(config) else None,
        "model": inner.state_dict(), "optimizer": optimizer.state_dict(),
        "batches": batches.state_dict(), "records": history.records, "samples": history.samples,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if not is_main_process():
        return
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except (OSError, RuntimeError) as error:    # a full disk is now this, now that
            raise OSError(f"The checkpoint {path} could not be written ({error}). Is the disk "
                          "full? An older checkpoint of that name is untouched.") from error


# cell load-checkpoint of notebooks/05_pretraining.ipynb
def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer,
                    batches: ResumableLoader, history: History) -> int:
    """Put a run back to where `save_checkpoint` was called, and return its step.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, or is of another model, other trained
            parameters or shorter data; the model given has not been changed.
    """
    path, inner = Path(path), unwrap_model(model)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    parts = ("step", "config", "model", "optimizer", "batches", "records", "samples", "rng",
             "cuda_rng")
    try:
        with zipfile.ZipFile(path) as archive:             # torch.load does not look at checksums
            if archive.testzip() is not None:
                raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, found, names, *_ = (state[part] for part in parts)
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
    if shapes != {k: v.shape for k, v in state["model"].items()}:
        odd = sorted(shapes.keys() ^ names.keys()) or "the same names with other shapes"
        raise ValueError(f"{path} does not fit this model: {odd}")
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise ValueError(f"{path} trained other parameters than are to be trained now: which of "
                         f"them has requires_grad? ({error})") from None
    batches.load_state_dict(state["batches"])
    inner.load_state_dict(state["model"])
    history.records[:] = state["records"]
    history.samples[:] = [tuple(sample) for sample in state["samples"]]
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return step


# cell monitor of notebooks/05_pretraining.ipynb
class Monitor:
    """Looks at a model while it trains and writes what it sees into the history.

    Evaluations and samples come at step 0, every so many steps, and at the end; none of them
    changes how the training goes on. The arguments are those of `fit`.
    """

    def __init__(self, history: History, total_steps: int, loss_fn: Callable, precision: str,
                 val_loader: Iterable | None, eval_every: int | None, eval_batches: int | None,
                 metrics: Callable | None, sample: Callable | None, sample_every: int | None,
                 log: Callable | None, train_loader: Iterable | None = None) -> None:
        self.history, self.total_steps, self.loss_fn = history, total_steps, loss_fn
        self.precision, self.val_loader, self.eval_batches = precision, val_loader, eval_batches
        self.eval_every = eval_every or (total_steps if val_loader is not None or metrics else None)
        self.metrics, self.sample, self.log = metrics, sample, log
        self.sample_every = sample_every or (total_steps if sample else None)
        self.loaders = train_loader, val_loader     # whose order looking must not change

    def __call__(self, step: int, model: nn.Module, record: dict, bar: tqdm) -> None:
        """Complete the record of a step, keep it, and show it."""
        record = {"step": step, **record}
        device = next(model.parameters()).device
        if self._due(step, self.eval_every):
            with autocast_context(self.precision, device), eval_mode(model, *self.loaders):
                if self.val_loader is not None:
                    record["val_loss"] = evaluate_loss(model, self.val_loader, self.loss_fn,
                                                   max_batches=self.eval_batches)
                if self.metrics is not None:
                    seen = self.metrics(unwrap_model(model))
                    record |= {name: float(value) for name, value in seen.items()}
        if self._due(step, self.sample_every):
            with eval_mode(model, *self.loaders):
                self.history.samples.append((step, self.sample(unwrap_model(model))))
        self.history.records.append(record)
        if step:
            bar.set_postfix(loss=f"{record['train_loss']:.3f}", lr=f"{record['lr']:.1e}",
                            tok_s=f"{record['tokens_per_s']:,.0f}", refresh=False)
            bar.update()
        if self.log is not None:
            self.log(record)

    def _due(self, step: int, every: int | None) -> bool:
        return bool(every) and (step % every == 0 or step == self.total_steps)


# cell plan-steps of notebooks/05_pretraining.ipynb
def plan_steps(loader: Iterable, epochs: int | None, max_steps: int | None,
               accumulate: int) -> tuple[int, int]:
    """How many steps a run has, and how many batches the last of them takes.

    Raises:
        ValueError: no or both of epochs and max_steps, a count that is not whole or below 1, or
            epochs for a loader that does not know its length.

    Example:
        >>> plan_steps([1, 2, 3], epochs=1, max_steps=None, accumulate=2)
        (2, 1)
    """
    if (epochs is None) == (max_steps is None):
        raise ValueError("Give either epochs or max_steps, "
                         f"not {'both' if epochs is not None else 'neither'}.")
    for name, value in (("epochs", epochs), ("max_steps", max_steps), ("accumulate", accumulate)):
        if value is not None and (value < 1 or value % 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value}.")
    if max_steps is not None:
        return max_steps, accumulate
    try:
        n_batches = int(epochs) * len(loader)
    except TypeError:
        raise ValueError("The loader does not know its length, so epochs cannot be counted "
                         "beforehand: give max_steps.") from None
    if not n_batches:
        raise ValueError("The loader is empty: there is no batch to train on. Is the text too "
                         "short for one batch, with drop_last?")
    total = math.ceil(n_batches / accumulate)
    return total, n_batches - (total - 1) * accumulate


# cell is-main of notebooks/05_pretraining.ipynb
def is_main_process() -> bool:
    """Whether this process is the one that prints and writes files: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


# cell fit of notebooks/05_pretraining.ipynb
def fit(model: nn.Module, train_loader: Iterable, *, loss_fn: Callable = lm_loss,
        epochs: int | None = None, max_steps: int | None = None, lr: float = 1e-3,
        min_lr: float | None = None, warmup_steps: int = 0, weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95), optimizer: torch.optim.Optimizer | None = None,
        grad_clip: float | None = 1.0, accumulate: int = 1, precision: str = "float32",
        val_loader: Iterable | None = None, eval_every: int | None = None,
        eval_batches: int | None = None, metrics: Callable[[nn.Module], dict] | None = None,
        sample: Callable[[nn.Module], str] | None = None, sample_every: int | None = None,
        checkpoint: str | Path | None = None, checkpoint_every: int | None = None,
        resume: str | Path | None = None, device: torch.device | str | None = None,
        compile: bool = False, progress: bool = True, log: Callable | None = None) -> History:
    """Train a model: the one training loop of the series.

    Args:
        model: trained in place; only parameters with requires_grad move.
        train_loader: gives batches; one with a `generator` is resumed exactly.
        loss_fn: `(model, batch) -> (sum of the losses, number of targets)`, as `lm_loss`.
        epochs, max_steps: passes over the loader, or steps; one of the two.
        lr, min_lr, warmup_steps: see `cosine_lr_with_warmup`; min_lr is lr / 10 unless given.
        weight_decay, betas: see `configure_optimizer`.
        optimizer: one built by the caller; lr is still set from the schedule in every group, and
            weight_decay and betas are then its own.
        grad_clip: the largest size of the gradient; None leaves it as it is.
        accumulate: batches to a step.
        precision: "float32", "bfloat16" (autocast), or "auto" for the faster one.
        val_loader, eval_every, eval_batches, metrics: the loss on up to eval_batches of
            val_loader, and `metrics(model)`, at step 0, every eval_every steps, and at the end.
        sample, sample_every: `sample(model)` gives a text for the history, likewise.
        checkpoint, checkpoint_every, resume: a file to write at the end, on an interrupt and every
            so many steps; and one to go on from: on the CPU bit for bit the uninterrupted run.
            Whenever fit returns, the file is there, even if no step was made.
        device: where to train; where the model is unless given.
        compile: run the model through `torch.compile`.
        log: called with each record, in the main process.

    Returns:
        The `History`; after an interrupt, up to the last whole step.

    Raises:
        ValueError: an empty loader, no or both of epochs and max_steps, a count below 1, or a
            checkpoint or an optimizer that does not fit.
        FloatingPointError: the loss was not finite; names the step and the learning rate.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> batch = (torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
        >>> history = fit(GPT(config), [batch], max_steps=30, lr=1e-2, progress=False)
        >>> history.last("train_loss") < history.records[1]["train_loss"]
        True
    """
    total, last_group = plan_steps(train_loader, epochs, max_steps, accumulate)
    lr, min_lr = float(lr), float(lr / 10 if min_lr is None else min_lr)
    model.to(device)
    optimizer = check_optimizer(optimizer or configure_optimizer(model, lr, weight_decay, betas), model)
    batches, history, main = ResumableLoader(train_loader), History(), is_main_process()
    watch = Monitor(history, total, loss_fn, precision, val_loader, eval_every, eval_batches,
                    metrics, sample, sample_every, log if main else None, train_loader)
    done = load_checkpoint(resume, model, optimizer, batches, history) if resume else 0
    tokens, every = history.records[-1]["tokens"] if done else 0, checkpoint_every or total
    running, where = torch.compile(model) if compile else model, next(model.parameters()).device
    bar = tqdm(total=total, initial=done, disable=not (progress and main), mininterval=1.0)
    with InterruptFlag() as interrupt, bar:
        if not history.records:
            watch(0, running, {"epoch": 0, "tokens": 0}, bar)
        running.train()
        while done < total and not interrupt.agreed(where):
            group = [next(batches) for _ in range(last_group if done + 1 == total else accumulate)]
            rate = cosine_lr_with_warmup(done + 1, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps,
                                 total_steps=total)
            seen = train_step(running, group, loss_fn, optimizer, lr=rate, grad_clip=grad_clip,
                              precision=precision, step=done + 1)
            done, tokens = done + 1, tokens + seen.pop("targets")
            watch(done, running, {"epoch": batches.epoch, "tokens": tokens, **seen}, bar)
            if checkpoint and done % every == 0 and done < total:
                save_checkpoint(checkpoint, model, optimizer, batches, history, done)
        if checkpoint:                      # at the end, or where it was stopped, be it at step 0
            save_checkpoint(checkpoint, model, optimizer, batches, history, done)
    history.interrupted = done < total
    return history
