"""C · Scaling up.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import argparse
import json
import math
import os
import re
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from helpers.common import get_device, set_seed
from helpers.corpus import load_shards, read_documents, stream_documents, write_shards
from helpers.distributed import apply_fsdp, check_sharding, full_state_dict
from helpers.gpt import GPT, GPTConfig, flops_per_token
from helpers.optim import Muon
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import eos_token_id, load_tokenizer, save_tokenizer, train_bpe
from helpers.training import History, autocast_context, configure_optimizer, fit, is_main_process

__all__ = [
    "training_flops",
    "PEAKS",
    "measured_flops",
    "peak_flops",
    "make_log",
    "TrainingConfig",
    "RunConfig",
    "load_run_config",
    "HUB_SOURCE",
    "find_sources",
    "iter_documents",
    "prepare",
    "make_loaders",
    "start_model",
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
PEAKS = {"A100": 312e12, "L4": 121e12, "L40S": 362e12, "H100 PCIe": 756e12, "H100": 989e12,
         "H200": 989e12}


# cell matmul-rate of notebooks/D_scaling.ipynb
def measured_flops(device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None,
                repeats: int = 8) -> float:
    """Operations a second of the best of some products of two square matrices on a device."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        (a @ a)[0, 0].item()                           # reading a number waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


# cell machine-rate of notebooks/D_scaling.ipynb
def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Operations a second to measure a run against, and where the number comes from.

    The published peak of a GPU that `PEAKS` knows, in bfloat16; else the measured `measured_flops`.
    """
    autocast = isinstance(autocast_context(precision, device), torch.autocast)
    dtype = torch.bfloat16 if autocast else torch.float32
    if device.type == "cuda" and autocast:
        name = torch.cuda.get_device_name(device)
        for known in sorted(PEAKS, key=len, reverse=True):            # L40S before L4
            if known in name:
                return PEAKS[known], f"published peak of {known}, bfloat16"
    return measured_flops(device, dtype), f"measured matrix product, {str(dtype)[6:]}"


# cell make-log of notebooks/D_scaling.ipynb
def make_log(config: GPTConfig, device: torch.device, precision: str, every: int = 20):
    """A `log` for `fit` that prints records as lines of JSON, with the MFU of the step.

    The first line also says what the MFU is measured against: `machine_flops`, the sum over all
    processes, and its origin. All processes must call this.

    Args:
        every: steps from one line to the next; evaluations are printed too.
    """
    rate, origin = peak_flops(device, precision)
    if dist.is_initialized():
        total = torch.tensor(rate, device=device)
        dist.all_reduce(total)
        rate = total.item()
    per_token, first = training_flops(config), {"machine_flops": round(rate), "machine": origin}

    def log(record: dict) -> None:
        if "val_loss" in record or record["step"] % every == 0:
            line = {name: round(value, 5) for name, value in record.items()}
            if "tokens_per_s" in record:
                line["mfu"] = round(record["tokens_per_s"] * per_token / rate, 4)
            print(json.dumps(line | first), flush=True)
            first.clear()

    return log


# cell training-config of notebooks/D_scaling.ipynb
@dataclass(frozen=True)
class TrainingConfig:
    """The `[training]` part of a recipe; the names are those of `fit`."""

    tokens: int                      # to train on, repeated passes counted
    batch_size: int                  # windows a batch, in each process
    lr: float
    min_lr: float
    warmup_steps: int
    accumulate: int = 1              # batches a step
    optimizer: str = "adamw"         # or "muon"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    eval_every: int = 500
    eval_batches: int = 20
    checkpoint_every: int = 250


# cell recipe of notebooks/D_scaling.ipynb
@dataclass(frozen=True)
class RunConfig:
    """What `python -m helpers.pretrain` is to do: a model, sources of documents, and a training."""

    model: dict
    train: tuple[str, ...]
    validation: tuple[str, ...]
    training: TrainingConfig
    text_column: str = "text"        # of tables
    tokenizer: str | None = None     # a folder or name; else one is trained on the files


# cell read-recipe of notebooks/D_scaling.ipynb
def load_run_config(path: str | Path) -> RunConfig:
    """Read a recipe in TOML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, or a part or setting missing or unknown.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        model, data, training = raw["model"], raw["data"], raw["training"]
        known = {f.name for f in fields(TrainingConfig)}
        if unknown := training.keys() - known:
            raise ValueError(f"unknown training settings {sorted(unknown)}")
        if training.get("optimizer", "adamw") not in ("adamw", "muon"):
            raise ValueError(f'the optimizer must be "adamw" or "muon", '
                             f"not {training['optimizer']!r}")
        GPTConfig(**model)                              # it would complain, now and not in an hour
        for split in ("train", "validation"):
            if not isinstance(data[split], list):
                raise ValueError(f"{split} must be a list of file patterns, not {data[split]!r}")
        return RunConfig(**data | {"model": model, "training": TrainingConfig(**training),
                                "train": tuple(data["train"]),
                                "validation": tuple(data["validation"])})
    except KeyError as error:
        raise ValueError(f"{path} is not a recipe: it has no {error}. "
                         "See data/models/tiny/recipe.toml for one.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a recipe: {error}. "
                         "See data/models/tiny/recipe.toml for one.") from None


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


# cell open-source of notebooks/D_scaling.ipynb
def iter_documents(source: Path | str, text_column: str = "text") -> Iterator[str]:
    """The documents of a source that `find_sources` gave."""
    if isinstance(source, Path):
        return read_documents(source, text_column)
    name, config, start, stop = HUB_SOURCE.fullmatch(source).groups()
    return stream_documents(name, config=config, text_column=text_column,
                            start=int(start or 0), stop=int(stop) if stop else None)


# cell prepare of notebooks/D_scaling.ipynb
def prepare(recipe: RunConfig, corpus: str | Path, run: str | Path, start: str | Path | None = None,
            processes: int = 1) -> tiktoken.Encoding:
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
    begun = (run / "tokenizer" / "tokenizer_config.json").is_file()     # the last to be written
    given = recipe.tokenizer if start is None else start
    if not begun and given is not None:
        save_tokenizer(load_tokenizer(given), run / "tokenizer")
    elif not begun:
        files = sorted({source for source in sources["train"] if isinstance(source, Path)})
        if not files:
            raise ValueError("The recipe trains on no file, so it must name a tokenizer: "
                             'tokenizer = "gpt2" under [data].')
        texts = (text for path in files for text in iter_documents(path, recipe.text_column))
        save_tokenizer(train_bpe(texts, recipe.model["vocab_size"]), run / "tokenizer")
    tokenizer = load_tokenizer(run / "tokenizer")
    if tokenizer.n_vocab != recipe.model["vocab_size"]:
        raise ValueError(f"{run} was begun with a vocabulary of {tokenizer.n_vocab}, and the "
                         f"recipe says {recipe.model['vocab_size']}: give another folder.")
    for split, found in sources.items():
        if not (run / split / "manifest.json").is_file():
            documents = (text for s in found for text in iter_documents(s, recipe.text_column))
            write_shards(documents, tokenizer, run / split, processes=processes)
    return tokenizer


# cell make-loaders of notebooks/D_scaling.ipynb
def make_loaders(recipe: RunConfig, run: str | Path) -> tuple[DataLoader, DataLoader]:
    """Training and validation loaders over the shards of a run, each process its own share.

    All processes measure on the same validation windows, drawn once from all over the shards.
    """
    length, t = recipe.model["context_length"], recipe.training
    train, validation = (load_shards(Path(run) / s, length) for s in ("train", "validation"))
    generator = torch.Generator().manual_seed(t.seed)
    sampler = None
    if dist.is_initialized():
        sampler, generator = DistributedSampler(train, seed=t.seed, drop_last=True), None
    return (DataLoader(train, t.batch_size, shuffle=sampler is None, sampler=sampler,
                       drop_last=True, generator=generator),
            DataLoader(validation, t.batch_size, shuffle=True,
                       generator=torch.Generator().manual_seed(t.seed)))


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


# cell train of notebooks/D_scaling.ipynb
def train(recipe: RunConfig, run: str | Path, tokenizer: tiktoken.Encoding,
          start: str | Path | None = None, shard: bool = False) -> tuple[GPT, History]:
    """Train the model of a recipe on the shards of a run, from its checkpoint if it has one.

    Args:
        start: the folder of a model to begin with; see `start_model`.
        shard: split the model among the processes (FSDP2) instead of copying it to each (DDP).

    Raises:
        ValueError: `start` holds a model of another shape, or it cannot be sharded.
    """
    run, t, device = Path(run), recipe.training, get_device()
    if shard:
        check_sharding(recipe)
    set_seed(t.seed)
    config = GPTConfig(**recipe.model, bos_token_id=eos_token_id(tokenizer), eos_token_id=eos_token_id(tokenizer))
    model = start_model(config, start)
    model = apply_fsdp(model, device) if shard else model.to(device)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    copied = dist.is_initialized() and not shard
    wrapped: nn.Module = DistributedDataParallel(model) if copied else model
    muon = t.optimizer == "muon"
    optimizer = (Muon if muon else configure_optimizer)(model, t.lr, t.weight_decay,
                                                   betas=tuple(t.betas))
    if shard:
        full_state_dict(model, optimizer)
    train_loader, val_loader = make_loaders(recipe, run)
    step_tokens = t.batch_size * t.accumulate * recipe.model["context_length"] * ranks
    checkpoint = run / "checkpoint.pt"
    history = fit(wrapped, train_loader, max_steps=max(1, t.tokens // step_tokens), lr=t.lr,
                  min_lr=t.min_lr, warmup_steps=t.warmup_steps, optimizer=optimizer,
                  grad_clip=t.grad_clip, accumulate=t.accumulate, precision=t.precision,
                  compile=t.compile, val_loader=val_loader, eval_every=t.eval_every,
                  eval_batches=t.eval_batches, checkpoint=checkpoint,
                  checkpoint_every=t.checkpoint_every,
                  resume=checkpoint if checkpoint.is_file() else None, progress=False,
                  log=make_log(config, device, t.precision))
    if shard:
        weights = model.state_dict()                   # gathered: whole in the first process
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    return model, history


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
    parser.add_argument("--processes", type=int, default=1, help="how many tokenize at once")
    parser.add_argument("--prepare", action="store_true", help="tokenize, and do not train yet")
    parser.add_argument("--shard", action="store_true",
                        help="split the model among the processes that torchrun started")
    arguments = parser.parse_args(argv)
    recipe, run = load_run_config(arguments.recipe), Path(arguments.run)
    if arguments.shard:
        check_sharding(recipe)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        if torch.cuda.is_available():                  # each process its own device
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    if is_main_process():
        prepare(recipe, arguments.corpus, run, arguments.start, arguments.processes)
    if several:
        dist.barrier()
    if not arguments.prepare:
        tokenizer = load_tokenizer(run / "tokenizer")
        model, history = train(recipe, run, tokenizer, arguments.start, arguments.shard)
        if is_main_process():
            history.frame.to_csv(run / "history.csv", index=False)
            if not history.interrupted:
                save_pretrained(model, tokenizer, run / "model", dtype=torch.float16)
    if several:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
