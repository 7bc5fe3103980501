"""5 · Pretraining.

Made from notebooks/05_pretraining.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.sampling, helpers.callbacks, helpers.pretrained.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import pandas as pd
import tiktoken
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.data import TokenDataset, make_dataloader
from helpers.tokenizer import encode, eos_token_id

__all__ = [
    "configure_optimizer",
    "check_optimizer",
    "cosine_lr_with_warmup",
    "IGNORE_INDEX",
    "lm_loss",
    "has_fast_bfloat16",
    "autocast_context",
    "to_device",
    "train_step",
    "eval_mode",
    "evaluate_loss",
    "TrainConfig",
    "History",
    "TrainState",
    "Callback",
    "fit",
    "unwrap_model",
    "bits_per_byte",
]


# cell configure-optimizer of notebooks/05_pretraining.ipynb
def configure_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.1,
                        betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over what trains; decay on matrices only.

    Example:
        >>> optimizer = configure_optimizer(nn.Linear(2, 3), lr=0.1)
        >>> [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
        [(1, 0.1), (1, 0.0)]
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("The model has no parameter to train: all have requires_grad = False.")
    for p in params:                        # the fused form takes one memory order for granted
        p.data = p.data.contiguous()
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas,
                             fused=params[0].device.type in ("cpu", "cuda"))


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


# cell cosine-lr of notebooks/05_pretraining.ipynb
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


# cell ignore-index of notebooks/05_pretraining.ipynb
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
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(),
                            ignore_index=IGNORE_INDEX, reduction="sum")
    return total, int((targets != IGNORE_INDEX).sum())


# cell has-fast-bfloat16 of notebooks/05_pretraining.ipynb
def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


# cell autocast-context of notebooks/05_pretraining.ipynb
def autocast_context(precision: str, device: torch.device):
    """A context in which the model computes in "float32" or "bfloat16" (mixed precision).

    "auto" is "bfloat16" where `has_fast_bfloat16` says so, and "float32" elsewhere.

    Raises:
        ValueError: another name.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f'precision must be "auto", "float32" or "bfloat16", not {precision!r}.')
    if precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


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


# cell average-and-clip of notebooks/05_pretraining.ipynb
def _average_and_clip(optimizer: torch.optim.Optimizer, count: int,
                      max_grad_norm: float | None) -> float:
    """Divide the gradients of a sum over count targets by it, and clip them; returns their norm."""
    if not count:
        raise ValueError("No target in the batch counts: all are padding or masked.")
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in params:
        p.grad.div_(count)                         # of the sum, now of the mean
    return nn.utils.clip_grad_norm_(params, max_grad_norm or math.inf).item()


# cell require-finite of notebooks/05_pretraining.ipynb
def _require_finite(optimizer: torch.optim.Optimizer, **values: float) -> None:
    """FloatingPointError where a value is infinite or NaN; the gradients are dropped."""
    for what, value in values.items():
        if not math.isfinite(value):
            optimizer.zero_grad()
            raise FloatingPointError(f"the {what} is {value}, with a learning rate of "
                                     f"{optimizer.param_groups[0]['lr']:.3g}. Lower the rate, or "
                                     "warm up longer.")


# cell train-step of notebooks/05_pretraining.ipynb
def train_step(model: nn.Module, batches: list, loss_fn: Callable, optimizer: torch.optim.Optimizer,
               *, max_grad_norm: float | None = 1.0, precision: str = "float32") -> dict:
    """One optimizer step on one or more micro-batches.

    Returns:
        train_loss (the mean over all targets), n_targets, and grad_norm (before clipping).

    Raises:
        FloatingPointError: loss or gradient are not finite; no parameter has been changed.
        ValueError: no target in the batches counts.
    """
    device, losses, count = next(model.parameters()).device, [], 0
    optimizer.zero_grad()
    for batch in batches:
        with autocast_context(precision, device):
            loss, n = loss_fn(model, to_device(batch, device))     # a sum over n targets
        loss.backward()                            # gradients of micro-batches add up
        losses.append(loss.detach())
        count += n
    grad_norm = _average_and_clip(optimizer, count, max_grad_norm)
    train_loss = sum(loss.item() for loss in losses) / count
    _require_finite(optimizer, loss=train_loss, gradient=grad_norm)
    optimizer.step()
    optimizer.zero_grad()                          # their memory is free until the next step
    return {"train_loss": train_loss, "n_targets": count, "grad_norm": grad_norm}


# cell eval-mode of notebooks/05_pretraining.ipynb
@contextmanager
def eval_mode(model: nn.Module, *loaders: Iterable) -> Iterator[None]:
    """Within it the model is in eval mode and computes no gradients.

    Afterwards the mode of each of its parts and the RNG states, those of the loaders too, are what
    they were before, so that an evaluation never changes how a model trains.
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


# cell evaluate-loss of notebooks/05_pretraining.ipynb
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


# cell train-config of notebooks/05_pretraining.ipynb
@dataclass(frozen=True)
class TrainConfig:
    """The hyperparameters of a training run.

    Raises:
        ValueError: not exactly one of epochs and max_steps, a count below 1 or not whole, or a
            learning rate that is not positive.

    Example:
        >>> config = TrainConfig(max_steps=1000, lr=3e-4)
        >>> config.max_grad_norm, config.weight_decay
        (1.0, 0.1)
    """

    epochs: int | None = None            # passes over the loader, or
    max_steps: int | None = None         # steps: one of the two
    lr: float = 1e-3                     # the peak of the schedule
    min_lr: float | None = None          # its end; None: a tenth of lr
    warmup_steps: int | None = None      # None: a tenth of the steps, 100 at most
    weight_decay: float = 0.1            # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float | None = 1.0    # None: no gradient clipping
    grad_accum_steps: int = 1            # micro-batches to a step
    precision: str = "float32"           # "bfloat16", or "auto": see `autocast_context`
    compile: bool = False                # run the model through torch.compile

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("Give either epochs or max_steps, "
                             f"not {'both' if self.epochs is not None else 'neither'}.")
        for name in ("epochs", "max_steps", "grad_accum_steps"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value % 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value}.")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}.")


# cell history of notebooks/05_pretraining.ipynb
class History:
    """What a training run did: a record for each step, and the samples it generated.

    Attributes:
        records: dicts with step, epoch, n_targets (so far), train_loss, lr, grad_norm,
            targets_per_s, and at the steps that were evaluated val_loss and the metrics.
        samples: (step, text) pairs.
        total_steps: of the run as planned.
        interrupted: whether it ended before.

    Example:
        >>> history = History([{"step": 1, "train_loss": 2.0}, {"step": 2, "val_loss": 1.5}])
        >>> history.last("train_loss"), len(history.frame)
        (2.0, 2)
    """

    def __init__(self, records: list[dict] | None = None, total_steps: int = 0) -> None:
        self.records: list[dict] = records if records is not None else []
        self.samples: list[tuple[int, str]] = []
        self.total_steps, self.interrupted = total_steps, False

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

    def require_complete(self) -> "History":
        """This history; RuntimeError if the run was cut short, so that no result rests on it."""
        if self.interrupted:
            raise RuntimeError(f"The run was cut short after step {self.records[-1]['step']} of "
                               f"{self.total_steps}: run its cell again before you go on.")
        return self

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


# cell train-state of notebooks/05_pretraining.ipynb
@dataclass
class TrainState:
    """What a training run knows while it goes on; callbacks read it, and may change it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    loss_fn: Callable
    train_loader: Iterable
    history: History
    total_steps: int
    batches: Iterator | None = None      # micro-batches, epoch after epoch
    step: int = 0                        # steps done
    epoch: int = 0                       # passes over the loader that are complete
    n_targets: int = 0                   # targets that have counted so far
    record: dict = field(default_factory=dict)      # of the step just done
    should_stop: bool = False            # set by a callback: stop after this step
    error: BaseException | None = None   # what ended the run, if something did


# cell callback of notebooks/05_pretraining.ipynb
class Callback:
    """Something to do while `fit` trains: override the moments that matter, all do nothing here.

    `on_train_start` is called from the last callback of the list to the first, the other two from
    the first to the last: what is listed last restores before the others look, and saves after
    they have written.
    """

    def on_train_start(self, state: TrainState) -> None:
        """Before the first step."""

    def on_step_end(self, state: TrainState) -> None:
        """After each step; `state.record` is its record, already in the history."""

    def on_train_end(self, state: TrainState) -> None:
        """At the end, also after an error, which is then in `state.error`."""


# cell count-steps of notebooks/05_pretraining.ipynb
def _count_steps(loader: Iterable, config: TrainConfig) -> tuple[int, int]:
    """How many steps a run has, and how many micro-batches the last of them takes."""
    if config.max_steps is not None:
        return config.max_steps, config.grad_accum_steps
    try:
        n_batches = int(config.epochs) * len(loader)
    except TypeError:
        raise ValueError("The loader does not know its length, so epochs cannot be counted "
                         "beforehand: give max_steps.") from None
    if not n_batches:
        raise ValueError("The loader is empty: there is no batch to train on. Is the text too "
                         "short for one batch, with drop_last?")
    total = math.ceil(n_batches / config.grad_accum_steps)
    return total, n_batches - (total - 1) * config.grad_accum_steps


# cell cycle of notebooks/05_pretraining.ipynb
def _cycle(state: TrainState) -> Iterator:
    """The batches of the train loader, epoch after epoch."""
    while True:
        empty = True
        for batch in state.train_loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("The loader is empty: it gave no batch to train on in pass "
                             f"{state.epoch + 1}. Can it be read only once?")
        state.epoch += 1


# cell advance of notebooks/05_pretraining.ipynb
def _advance(state: TrainState, lr: float, n_batches: int) -> None:
    """One step of `fit`: take the micro-batches, move the weights, write the record."""
    began, config = time.perf_counter(), state.config
    batches = [next(state.batches) for _ in range(n_batches)]
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    try:
        made = train_step(state.model, batches, state.loss_fn, state.optimizer,
                          max_grad_norm=config.max_grad_norm, precision=config.precision)
    except FloatingPointError as error:
        raise FloatingPointError(f"Step {state.step + 1}: {error}") from None
    n_targets = made.pop("n_targets")
    state.step, state.n_targets = state.step + 1, state.n_targets + n_targets
    state.record = {"step": state.step, "epoch": state.epoch, "n_targets": state.n_targets,
                    "lr": lr, **made, "targets_per_s": n_targets / (time.perf_counter() - began)}
    state.history.records.append(state.record)


# cell fit of notebooks/05_pretraining.ipynb
def fit(model: nn.Module, train_loader: Iterable, config: TrainConfig, *,
        loss_fn: Callable = lm_loss, optimizer: torch.optim.Optimizer | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        callbacks: Sequence[Callback] = ()) -> History:
    """Train a model, in place and where it is: the one training loop of the series.

    Args:
        train_loader: gives batches; what a batch is, loss_fn knows.
        loss_fn: `(model, batch) -> (sum of the losses, number of targets)`, as `lm_loss`.
        optimizer: `configure_optimizer` makes one from the config unless it is given.
        lr_schedule: step (from 1) to learning rate, which every group of the optimizer gets;
            `cosine_lr_with_warmup` unless given.
        callbacks: what else to do; see `Callback`.

    Returns:
        The `History`; after an interrupt, up to the last whole step.

    Raises:
        ValueError: an empty loader, or an optimizer of other parameters.
        FloatingPointError: the loss was not finite; names the step and the learning rate.

    Example:
        >>> config = GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1)
        >>> batch = (torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
        >>> history = fit(GPT(config), [batch], TrainConfig(max_steps=30, lr=1e-2))
        >>> history.last("train_loss") < history.records[0]["train_loss"]
        True
    """
    total, last_group = _count_steps(train_loader, config)
    optimizer = check_optimizer(optimizer or configure_optimizer(
        model, config.lr, config.weight_decay, config.betas), model)
    warmup = min(100, total // 10) if config.warmup_steps is None else config.warmup_steps
    lr_schedule = lr_schedule or partial(
        cosine_lr_with_warmup, lr=config.lr, warmup_steps=warmup, total_steps=total,
        min_lr=config.lr / 10 if config.min_lr is None else config.min_lr)
    history = History(total_steps=total)
    state = TrainState(torch.compile(model) if config.compile else model, optimizer, config,
                       loss_fn, train_loader, history, total)
    state.batches, started = _cycle(state), []
    try:
        for callback in reversed(callbacks):
            callback.on_train_start(state)
            started.append(callback)
        state.model.train()
        while state.step < total and not state.should_stop:
            _advance(state, float(lr_schedule(state.step + 1)),
                     last_group if state.step + 1 == total else config.grad_accum_steps)
            for callback in callbacks:
                callback.on_step_end(state)
    except BaseException as error:
        state.error = error
        if not isinstance(error, KeyboardInterrupt):
            raise
    finally:
        for callback in reversed(started):
            callback.on_train_end(state)
    history.interrupted = state.step < total
    if history.interrupted:
        print(f"Training stopped after step {state.step} of {total}. The model keeps what it has "
              "learned so far; call fit again to train it further.")
    return history


# cell unwrap-model of notebooks/05_pretraining.ipynb
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


# cell bits-per-byte of notebooks/05_pretraining.ipynb
def bits_per_byte(model: nn.Module, tokenizer: tiktoken.Encoding, documents: str | Iterable[str],
                  *, context_length: int | None = None, batch_size: int = 8) -> float:
    """The cross-entropy of a model on some documents, in bits for each byte of their UTF-8.

    Each document is opened by the end token and read in windows that do not overlap, the last one
    shorter, so that every token is a target once.

    Args:
        context_length: of the windows; the model's own unless given.

    Raises:
        ValueError: there is no text.

    Example:
        >>> model, tokenizer = load_pretrained("tiny")                    # doctest: +SKIP
        >>> bits_per_byte(model, tokenizer, "Once upon a time there was a king.") < 3
        True
    """
    nats, n_bytes = 0.0, 0
    limit = context_length or unwrap_model(model).config.context_length
    for text in [documents] if isinstance(documents, str) else documents:
        ids = [eos_token_id(tokenizer), *encode(tokenizer, text)]
        for start in range(0, len(ids) - 1, limit * batch_size):
            piece = ids[start:start + limit * batch_size + 1]
            whole = (len(piece) - 1) // limit * limit            # in full windows, then the rest
            for part in (piece[:whole + 1], piece[whole:]):
                if len(part) > 1:
                    windows = TokenDataset(part, min(limit, len(part) - 1))
                    loader = make_dataloader(windows, batch_size=batch_size, shuffle=False)
                    nats += evaluate_loss(model, loader) * (len(part) - 1)
        n_bytes += len(text.encode("utf-8"))
    if not n_bytes:
        raise ValueError("There is no text to measure on.")
    return nats / math.log(2) / n_bytes
