"""D · Scaling: data, optimizers, and many processes.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.corpus, helpers.optim, helpers.distributed, helpers.inference.
"""

import argparse
import json
import math
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import pandas as pd
import tiktoken
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from helpers.callbacks import Evaluate
from helpers.common import get_device, set_seed
from helpers.data import make_dataloader
from helpers.gpt import GPT, GPTConfig, flops_per_token
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import eos_token_id, load_tokenizer, save_tokenizer, train_bpe
from helpers.training import (Callback, History, TrainConfig, TrainState, autocast_context,
                              configure_optimizer, cosine_lr_with_warmup, fit, lm_loss,
                              unwrap_model)
from helpers.corpus import load_shards, read_documents, stream_documents, write_shards
from helpers.distributed import (DistributedCheckpoint, DistributedInterrupt, apply_fsdp,
                                 check_fsdp, distributed_loss, gather_model, init_distributed,
                                 is_main_process, main_process_first, seed_rank)
from helpers.optim import Muon, wsd_lr

__all__ = [
    "training_flops",
    "PEAK_FLOPS",
    "measured_flops",
    "peak_flops",
    "PretrainConfig",
    "RunConfig",
    "load_run_config",
    "train_settings",
    "HUB_SOURCE",
    "find_sources",
    "left_out",
    "iter_documents",
    "prepare",
    "make_loaders",
    "start_model",
    "JSONLog",
    "make_schedule",
    "train",
    "main",
]


# cell training-flops of notebooks/D_scaling.ipynb
def training_flops(config: GPTConfig, n_tokens: float = 1) -> float:
    """Floating-point operations that training takes for n_tokens: three forward passes' worth.

    Example:
        >>> training_flops(GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1))
        5232
    """
    return 3 * flops_per_token(config) * n_tokens


# cell peaks of notebooks/D_scaling.ipynb
# Published peaks in bfloat16, operations a second, without sparsity: NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "L4": 121e12, "L40S": 362e12, "H100 PCIe": 756e12, "H100": 989e12,
              "H100 NVL": 835e12, "H200": 989e12}


# cell measured-flops of notebooks/D_scaling.ipynb
def measured_flops(device: torch.device, dtype: torch.dtype = torch.float32,
                   size: int | None = None, repeats: int = 8) -> float:
    """Operations a second of a product of two square matrices on a device, the best of some."""
    size = size or (8192 if device.type == "cuda" else 1024)
    own = torch.Generator(device).manual_seed(0)       # the run's own random numbers stay
    a = torch.randn(size, size, device=device, generator=own).to(dtype)
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        (a @ a)[0, 0].item()                           # reading a number waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


# cell peak-flops of notebooks/D_scaling.ipynb
def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Operations a second to measure a run against, and where the number comes from.

    The published peak of a GPU that `PEAK_FLOPS` knows, in bfloat16; else `measured_flops`.
    """
    autocast = isinstance(autocast_context(precision, device), torch.autocast)
    dtype = torch.bfloat16 if autocast else torch.float32
    if device.type == "cuda" and autocast:
        name = torch.cuda.get_device_name(device)
        for known in sorted(PEAK_FLOPS, key=len, reverse=True):       # "H100 PCIe" before "H100"
            if re.search(rf"\b{known}\b", name):                      # an A1000 is no A100
                return PEAK_FLOPS[known], f"published peak of {known}, bfloat16"
    return measured_flops(device, dtype), f"measured matrix product, {str(dtype)[6:]}"


# cell pretrain-config of notebooks/D_scaling.ipynb
@dataclass(frozen=True)
class PretrainConfig:
    """The `[training]` part of a recipe."""

    tokens: int                      # to train on, repeated epochs counted
    batch_size: int                  # windows in a micro-batch, in each process
    lr: float
    min_lr: float
    warmup_steps: int
    grad_accum_steps: int = 1        # micro-batches a step
    optimizer: str = "adamw"         # or "muon"
    schedule: str = "cosine"         # or "wsd": warm-up, stable, decay
    decay_steps: int = 0             # of "wsd", at the end
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    eval_every: int = 500
    eval_batches: int = 20
    checkpoint_every: int = 250
    checkpoint_minutes: float | None = None


# cell run-config of notebooks/D_scaling.ipynb
@dataclass(frozen=True)
class RunConfig:
    """What `python -m helpers.pretrain` is to do: a model, sources of documents, and a training."""

    model: dict
    train: tuple[str, ...]
    validation: tuple[str, ...]
    training: PretrainConfig
    text_column: str = "text"        # of tables
    tokenizer: str | None = None     # a folder or name; else one is trained on the files
    leave_out: tuple[str, ...] = ()  # titles of books, see `left_out`


# cell load-run-config of notebooks/D_scaling.ipynb
def load_run_config(path: str | Path) -> RunConfig:
    """Read a recipe in TOML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, or a part or setting missing, unknown or impossible.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        model, data = raw["model"], raw["data"]
        training = raw["training"]
        if unknown := training.keys() - {f.name for f in fields(PretrainConfig)}:
            raise ValueError(f"unknown training settings {sorted(unknown)}")
        for name, known in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "wsd"))):
            if training.get(name, known[0]) not in known:
                raise ValueError(f"the {name} must be one of {', '.join(known)}, "
                                 f"not {training[name]!r}")
        if given := model.keys() & {"bos_token_id", "eos_token_id"}:
            raise ValueError(f"{sorted(given)} cannot be set: the tokenizer decides these ids")
        GPTConfig(**model)                              # it would complain, now and not in an hour
        TrainConfig(**train_settings(PretrainConfig(**training), max_steps=1))
        for split in ("train", "validation"):
            if not isinstance(data[split], list):
                raise ValueError(f"{split} must be a list of file patterns, not {data[split]!r}")
        lists = {name: tuple(data.get(name, ())) for name in ("train", "validation", "leave_out")}
        return RunConfig(**data | {"model": model, "training": PretrainConfig(**training)} | lists)
    except KeyError as error:
        raise ValueError(f"{path} is not a recipe: it has no {error}. "
                         "See data/models/tiny/recipe.toml for one.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a recipe: {error}. "
                         "See data/models/tiny/recipe.toml for one.") from None


# cell train-settings of notebooks/D_scaling.ipynb
def train_settings(t: PretrainConfig, max_steps: int) -> dict:
    """The settings of a recipe that `TrainConfig` has too."""
    same = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(PretrainConfig)}
    return {name: getattr(t, name) for name in same} | {"max_steps": max_steps}


# cell hub-source of notebooks/D_scaling.ipynb
HUB_SOURCE = re.compile(r"hf:([^:\[\]]+)(?::([^:\[\]]+))?(?:\[(\d*):(\d*)\])?")   # hf:a/b:c[0:9]


# cell find-sources of notebooks/D_scaling.ipynb
def find_sources(patterns: Iterable[str], corpus: Path) -> list[Path | str]:
    """The files of a corpus that match, each as often as it does; `hf:` sources as they are.

    Raises:
        FileNotFoundError: a pattern matches no file.
        ValueError: an `hf:` source that cannot be read.
    """
    found: list[Path | str] = []
    for pattern in patterns:
        if pattern.startswith("hf:"):
            if not HUB_SOURCE.fullmatch(pattern):
                raise ValueError(f"{pattern!r} is no source; expected for example "
                                 "hf:HuggingFaceFW/fineweb-edu:sample-10BT[0:1000].")
            found.append(pattern)
        elif paths := sorted(corpus.glob(pattern)):
            found += paths
        else:
            raise FileNotFoundError(f"No file in {corpus} matches {pattern!r} of the recipe.")
    return found


# cell left-out of notebooks/D_scaling.ipynb
def left_out(path: Path, titles: Sequence[str]) -> set[int]:
    """Which documents of a corpus file, counted from 0, belong to books with these titles.

    The corpus's `manifest.csv` has a row for each book, in the order of the books in their file,
    with the number of documents of each.

    Raises:
        ValueError: the manifest does not count as many documents as the file holds.
    """
    manifest = path.parent / "manifest.csv"
    if not titles or not manifest.is_file():
        return set()
    table = pd.read_csv(manifest)
    rows = table[table["shard"] == path.name]
    if not rows["title"].isin(titles).any():
        return set()
    found = sum(1 for _ in read_documents(path))
    if rows["docs"].sum() != found:
        raise ValueError(f"{manifest} counts {rows['docs'].sum()} documents in {path.name}, which "
                         f"holds {found}.")
    ends = rows["docs"].cumsum()
    return {i for title, end, docs in zip(rows["title"], ends, rows["docs"], strict=True)
            if title in titles for i in range(end - docs, end)}


# cell iter-documents of notebooks/D_scaling.ipynb
def iter_documents(source: Path | str, text_column: str = "text",
                   leave_out: Sequence[str] = ()) -> Iterator[str]:
    """The documents of a source that `find_sources` gave, without those of books left out."""
    if isinstance(source, Path):
        out = left_out(source, leave_out)
        return (text for i, text in enumerate(read_documents(source, text_column))
                if i not in out)
    name, config, start, stop = HUB_SOURCE.fullmatch(source).groups()
    return stream_documents(name, config=config, text_column=text_column,
                            start=int(start or 0), stop=int(stop) if stop else None)


# cell prepare of notebooks/D_scaling.ipynb
def prepare(recipe: RunConfig, corpus: str | Path, run: str | Path, start: str | Path | None = None,
            num_proc: int = 1) -> tiktoken.Encoding:
    """Train the tokenizer and write the shards of a run, unless that was done before.

    The tokenizer is that of `start`, a model's folder, or the one that the recipe names, or else
    it is trained on the recipe's files.

    Raises:
        FileNotFoundError: a pattern of the recipe matches no file of the corpus.
        ValueError: the folder of the run was begun with another recipe, or there are no files to
            train a tokenizer on.
    """
    corpus, run = Path(corpus), Path(run)
    sources = {split: find_sources(patterns, corpus) for split, patterns in
               (("train", recipe.train), ("validation", recipe.validation))}

    def documents(found: Iterable[Path | str]) -> Iterator[str]:
        return (text for source in found
                for text in iter_documents(source, recipe.text_column, recipe.leave_out))

    begun = (run / "tokenizer" / "tokenizer_config.json").is_file()     # the last to be written
    given = recipe.tokenizer if start is None else start
    if not begun and given is not None:
        save_tokenizer(load_tokenizer(given), run / "tokenizer")
    elif not begun:
        files = sorted({source for source in sources["train"] if isinstance(source, Path)})
        if not files:
            raise ValueError("The recipe trains on no file, so it must name a tokenizer: "
                             'tokenizer = "gpt2" under [data].')
        save_tokenizer(train_bpe(documents(files), recipe.model["vocab_size"]), run / "tokenizer")
    tokenizer = load_tokenizer(run / "tokenizer")
    if tokenizer.n_vocab != recipe.model["vocab_size"]:
        raise ValueError(f"{run} was begun with a vocabulary of {tokenizer.n_vocab}, and the "
                         f"recipe says {recipe.model['vocab_size']}: give another folder.")
    for split, found in sources.items():
        if not (run / split / "manifest.json").is_file():
            write_shards(documents(found), tokenizer, run / split, num_proc=num_proc)
    return tokenizer


# cell make-loaders of notebooks/D_scaling.ipynb
def make_loaders(recipe: RunConfig, run: str | Path) -> tuple[DataLoader, DataLoader]:
    """Training and validation loaders over the shards of a run, other windows for each process.

    All processes measure on the same validation windows, drawn once from all over the shards.
    """
    length, t = recipe.model["context_length"], recipe.training
    train, validation = (load_shards(Path(run) / s, length) for s in ("train", "validation"))
    val_loader = make_dataloader(validation, batch_size=t.batch_size, seed=t.seed)
    if not dist.is_initialized():
        train_loader = make_dataloader(train, batch_size=t.batch_size, drop_last=True, seed=t.seed)
        return train_loader, val_loader
    sampler = DistributedSampler(train, seed=t.seed, drop_last=True)
    return DataLoader(train, t.batch_size, sampler=sampler, drop_last=True,
                      generator=torch.Generator().manual_seed(t.seed)), val_loader


# cell start-model of notebooks/D_scaling.ipynb
def start_model(config: GPTConfig, start: str | Path | None = None) -> GPT:
    """A new model, or one with the weights of the folder `start`; dropout is the config's.

    Raises:
        ValueError: the folder holds a model of another shape.
    """
    model = GPT(config)
    if start is not None:
        given, _ = load_pretrained(start)
        found = replace(given.config, dropout=config.dropout)
        if found != config:
            raise ValueError(f"{start} holds {found}, but the recipe asks for {config}.")
        model.load_state_dict(given.state_dict())
    return model


# cell json-log of notebooks/D_scaling.ipynb
class JSONLog(Callback):
    """Print records as lines of JSON, in the first process, with the MFU of the step.

    The first line also says what the MFU is measured against: `machine_flops`, the sum over all
    processes, and its origin. List it after `Evaluate`.

    Args:
        every: steps from one line to the next; evaluations are printed too.
    """

    def __init__(self, precision: str, every: int = 20) -> None:
        self.precision, self.every, self.first = precision, every, {}

    def on_train_start(self, state: TrainState) -> None:
        """Measure the machine; all processes take part."""
        device = next(state.model.parameters()).device
        peak, origin = peak_flops(device, self.precision)
        total = torch.tensor(peak, device=device)
        if dist.is_initialized():
            dist.all_reduce(total)
        self.peak, self.first = total.item(), {"machine_flops": total.item(), "machine": origin}
        self.pending = state.step == 0                 # the record of step 0 is to come

    def on_step_end(self, state: TrainState) -> None:
        """Print the record where it is due."""
        if self.pending:
            self.show(state, state.history.records[0])
        self.pending = False
        if "val_loss" in state.record or state.step % self.every == 0:
            self.show(state, state.record)

    def show(self, state: TrainState, record: dict) -> None:
        """Print one record, numbers to six significant digits."""
        line = record | self.first
        if "targets_per_s" in record:
            rate = record["targets_per_s"] * training_flops(unwrap_model(state.model).config)
            line |= {"mfu": rate / self.peak}
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        self.first = {}
        if is_main_process():
            print(json.dumps(line), flush=True)


# cell make-schedule of notebooks/D_scaling.ipynb
def make_schedule(t: PretrainConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each step, as the recipe says."""
    plan = {"lr": t.lr, "min_lr": t.min_lr, "warmup_steps": t.warmup_steps,
            "total_steps": total_steps}
    if t.schedule == "wsd":
        return partial(wsd_lr, decay_steps=t.decay_steps, **plan)
    return partial(cosine_lr_with_warmup, **plan)


# cell train of notebooks/D_scaling.ipynb
def train(recipe: RunConfig, run: str | Path, tokenizer: tiktoken.Encoding,
          start: str | Path | None = None, fsdp: bool = False) -> tuple[GPT, History]:
    """Train the model of a recipe on the shards of a run, from its checkpoint if it has one.

    Args:
        start: the folder of a model to begin with; see `start_model`.
        fsdp: shard the model over the processes (FSDP2) instead of copying it to each (DDP).

    Raises:
        ValueError: `start` holds a model of another shape, or it cannot be sharded.
    """
    run, t, device = Path(run), recipe.training, get_device()
    if fsdp:
        check_fsdp(t.optimizer)
    set_seed(t.seed)                                   # the same weights in all processes
    end = eos_token_id(tokenizer)
    model = start_model(GPTConfig(**recipe.model, bos_token_id=end, eos_token_id=end), start)
    model = apply_fsdp(model, device) if fsdp else model.to(device)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() and not fsdp else model
    make = Muon if t.optimizer == "muon" else configure_optimizer
    optimizer = make(model, t.lr, t.weight_decay, betas=tuple(t.betas))
    train_loader, val_loader = make_loaders(recipe, run)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    step_tokens = t.batch_size * t.grad_accum_steps * recipe.model["context_length"] * world_size
    total = max(1, t.tokens // step_tokens)
    keep_at = total - t.decay_steps if t.schedule == "wsd" and t.decay_steps else None
    callbacks = [Evaluate(val_loader, t.eval_every, max_batches=t.eval_batches),
                 JSONLog(t.precision), DistributedInterrupt(),
                 DistributedCheckpoint(run / "checkpoint.pt", t.checkpoint_every,
                                       minutes=t.checkpoint_minutes, keep_at=keep_at)]
    seed_rank(t.seed)                                  # another dropout mask in each process
    history = fit(wrapped, train_loader, TrainConfig(**train_settings(t, total)),
                  loss_fn=distributed_loss(lm_loss), optimizer=optimizer,
                  lr_schedule=make_schedule(t, total), callbacks=callbacks)
    return gather_model(model) if fsdp else model, history


# cell main of notebooks/D_scaling.ipynb
def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prepare, train, and write model and history into the run's folder."""
    parser = argparse.ArgumentParser(prog="python -m helpers.pretrain",
                                     description="Pretrain a GPT from a recipe.")
    parser.add_argument("recipe", help="a TOML file such as data/models/tiny/recipe.toml")
    parser.add_argument("--corpus", required=True, help="the folder with the recipe's files")
    parser.add_argument("--run", "--folder", required=True, dest="run",
                        help="the folder of this run; resumed if begun")
    parser.add_argument("--start", "--from", dest="start",
                        help="a model's folder to begin with, not random weights")
    parser.add_argument("--num-proc", type=int, default=1, help="how many processes tokenize")
    parser.add_argument("--prepare", action="store_true", help="tokenize, and do not train yet")
    parser.add_argument("--fsdp", action="store_true",
                        help="shard the model over the processes that torchrun started")
    arguments = parser.parse_args(argv)
    recipe, run = load_run_config(arguments.recipe), Path(arguments.run)
    if arguments.fsdp:
        check_fsdp(recipe.training.optimizer)
    several = init_distributed()
    with main_process_first():
        tokenizer = prepare(recipe, arguments.corpus, run, arguments.start, arguments.num_proc)
    if not arguments.prepare:
        model, history = train(recipe, run, tokenizer, arguments.start, arguments.fsdp)
        if is_main_process():
            history.frame.to_csv(run / "history.csv", index=False)
            if not history.interrupted:
                save_pretrained(model, tokenizer, run / "model", dtype=torch.float16)
    if several:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
