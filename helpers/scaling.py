"""C · Scaling up.

Made from notebooks/C_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import argparse
import hashlib
import json
import lzma
import math
import os
import tomllib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler

from helpers.gpt import GPT, GPTConfig
from helpers.pretraining import (
    History,
    fit,
    mean_loss,
    replacing,
    save_pretrained,
    unwrap,
)
from helpers.setup import get_device, set_seed, sha256
from helpers.text import (
    END_OF_TEXT,
    TokenWindows,
    encode,
    eos_id,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)

__all__ = [
    "read_documents",
    "write_shards",
    "open_shards",
    "bits_per_byte",
    "TrainingConfig",
    "Recipe",
    "read_recipe",
    "prepare",
    "make_loaders",
    "train",
    "main",
]


# cell read-documents of notebooks/C_scaling.ipynb
def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a text file (`.txt`, `.txt.xz`), split at lines of `<|endoftext|>`.

    Raises:
        ValueError: the file is not UTF-8, or a packed file is damaged.

    Example:
        >>> len(list(read_documents(data_path("story.txt"))))              # doctest: +SKIP
        1
    """
    path = Path(path)
    opener = lzma.open if path.suffix == ".xz" else open
    lines: list[str] = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                if line.rstrip("\n") != END_OF_TEXT:
                    lines.append(line)
                elif text := "".join(lines).strip():
                    yield text
                    lines = []
        if text := "".join(lines).strip():
            yield text
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}.") from error


# cell write-shards of notebooks/C_scaling.ipynb
def write_shards(documents: Iterable[str], tokenizer: tiktoken.Encoding, folder: str | Path, *,
                 shard_tokens: int = 2**24) -> dict:
    """Tokenize documents into uint16 files of about shard_tokens each; returns the manifest.

    The manifest (`manifest.json`, written last) counts documents, tokens and bytes of text and has
    a sha256 for each shard. A single string counts as one document.

    Raises:
        ValueError: the vocabulary does not fit uint16, or there is no document.
    """
    if tokenizer.n_vocab > 2**16:
        raise ValueError(f"The vocabulary of {tokenizer.n_vocab} does not fit 16 bits.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"vocab_size": tokenizer.n_vocab, "documents": 0, "bytes": 0, "shards": []}
    buffer = array("H")                                # two bytes a token, in memory too
    (folder / "manifest.json").unlink(missing_ok=True)

    def flush() -> None:
        name = f"tokens-{len(manifest['shards']):05}.bin"
        data = buffer.tobytes()
        with replacing(folder / name) as temporary:
            temporary.write_bytes(data)
        manifest["shards"].append({"file": name, "tokens": len(buffer),
                                   "sha256": hashlib.sha256(data).hexdigest()})
        del buffer[:]

    for text in [documents] if isinstance(documents, str) else documents:
        buffer.extend([eos_id(tokenizer), *encode(tokenizer, text)])
        manifest["documents"] += 1
        manifest["bytes"] += len(text.encode("utf-8"))
        if len(buffer) >= shard_tokens:
            flush()
    if buffer:
        flush()
    if not manifest["shards"]:
        raise ValueError("There is no document to tokenize.")
    with replacing(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


# cell open-shards of notebooks/C_scaling.ipynb
def open_shards(folder: str | Path, context_length: int) -> ConcatDataset:
    """All whole windows of a folder of shards, read from disk as they are asked for.

    Raises:
        FileNotFoundError: the folder has no manifest: it is none, or was not finished.
        ValueError: a shard is not the file that its manifest describes, or all are too short.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} has no manifest.json: not a folder of finished shards.")
    try:
        shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'manifest.json'} is damaged ({error!r}): delete it, and "
                         "tokenize again.") from None
    windows = []
    for path, shard in ((folder / shard["file"], shard) for shard in shards):
        found = sha256(path) if path.is_file() else "missing"
        if found != shard["sha256"]:
            raise ValueError(f"{path} is missing, cut short or damaged (sha256 {found}, the "
                             f"manifest says {shard['sha256']}): delete the manifest, and tokenize "
                             "again.")
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        if len(tokens) > context_length:
            windows.append(TokenWindows(tokens, context_length))
    if not windows:
        raise ValueError(f"No shard in {folder} is longer than one window of {context_length}.")
    return ConcatDataset(windows)


# cell bits-per-byte of notebooks/C_scaling.ipynb
def bits_per_byte(model: nn.Module, tokenizer: tiktoken.Encoding, documents: Iterable[str], *,
                  batch_size: int = 8) -> float:
    """The mean surprise of a model at some documents, in bits for each byte of their UTF-8.

    Each document is read in windows that do not overlap, the first opened by the end token.

    Raises:
        ValueError: there is no text.
    """
    nats, n_bytes, config = 0.0, 0, unwrap(model).config
    for text in [documents] if isinstance(documents, str) else documents:
        ids = [eos_id(tokenizer), *encode(tokenizer, text)]
        T = min(config.context_length, len(ids) - 1)
        if T < 1:
            continue
        whole = TokenWindows(ids, T)
        rest = ids[len(whole) * T:]
        loaders = [DataLoader(whole, batch_size=batch_size)]
        if len(rest) > 1:
            loaders.append(DataLoader(TokenWindows(rest, len(rest) - 1)))
        counts = [len(whole) * T, len(rest) - 1]
        nats += sum(mean_loss(model, loader) * n
                    for loader, n in zip(loaders, counts, strict=False))
        n_bytes += len(text.encode("utf-8"))
    if not n_bytes:
        raise ValueError("There is no text to measure on.")
    return nats / math.log(2) / n_bytes


# cell training-config of notebooks/C_scaling.ipynb
@dataclass(frozen=True)
class TrainingConfig:
    """The `[training]` part of a recipe; the names are those of `fit`."""

    tokens: int                      # to train on, repeated passes counted
    batch_size: int                  # windows a batch, in each process
    lr: float
    min_lr: float
    warmup_steps: int
    accumulate: int = 1              # batches a step
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    eval_every: int = 500
    eval_batches: int = 20
    checkpoint_every: int = 250


# cell recipe of notebooks/C_scaling.ipynb
@dataclass(frozen=True)
class Recipe:
    """What `python -m helpers.scaling` is to do: a model, files, and a training."""

    model: dict
    train: tuple[str, ...]
    validation: tuple[str, ...]
    training: TrainingConfig


# cell read-recipe of notebooks/C_scaling.ipynb
def read_recipe(path: str | Path) -> Recipe:
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
        GPTConfig(**model)                              # it would complain, now and not in an hour
        for split in ("train", "validation"):
            if not isinstance(data[split], list):
                raise ValueError(f"{split} must be a list of file patterns, not {data[split]!r}")
        return Recipe(model, tuple(data["train"]), tuple(data["validation"]),
                      TrainingConfig(**training))
    except KeyError as error:
        raise ValueError(f"{path} is not a recipe: it has no {error}. "
                         "See data/models/tiny/recipe.toml for one.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a recipe: {error}. "
                         "See data/models/tiny/recipe.toml for one.") from None


# cell prepare of notebooks/C_scaling.ipynb
def prepare(recipe: Recipe, corpus: str | Path, run: str | Path) -> tiktoken.Encoding:
    """Train the tokenizer and write the shards of a run, unless that was done before.

    Raises:
        FileNotFoundError: a pattern of the recipe matches no file of the corpus.
        ValueError: the folder of the run was begun with another recipe.
    """
    corpus, run = Path(corpus), Path(run)
    files: dict[str, list[Path]] = {}
    for split, patterns in (("train", recipe.train), ("validation", recipe.validation)):
        files[split] = []
        for pattern in patterns:
            found = sorted(corpus.glob(pattern))
            if not found:
                raise FileNotFoundError(f"No file in {corpus} matches {pattern!r} of the recipe.")
            files[split] += found
    if not (run / "tokenizer" / "tokenizer_config.json").is_file():     # the last to be written
        texts = (text for path in sorted(set(files["train"])) for text in read_documents(path))
        save_tokenizer(train_bpe(texts, recipe.model["vocab_size"]), run / "tokenizer")
    tokenizer = load_tokenizer(run / "tokenizer")
    if tokenizer.n_vocab != recipe.model["vocab_size"]:
        raise ValueError(f"{run} was begun with a vocabulary of {tokenizer.n_vocab}, and the "
                         f"recipe says {recipe.model['vocab_size']}: give another folder.")
    for split, paths in files.items():
        if not (run / split / "manifest.json").is_file():
            documents = (text for path in paths for text in read_documents(path))
            write_shards(documents, tokenizer, run / split)
    return tokenizer


# cell make-loaders of notebooks/C_scaling.ipynb
def make_loaders(recipe: Recipe, run: str | Path) -> tuple[DataLoader, DataLoader]:
    """Training and validation loaders over the shards of a run, each process its own share."""
    length, t = recipe.model["context_length"], recipe.training
    train, validation = (open_shards(Path(run) / s, length) for s in ("train", "validation"))
    generator = torch.Generator().manual_seed(t.seed)
    sampler = None
    if dist.is_initialized():
        sampler, generator = DistributedSampler(train, seed=t.seed, drop_last=True), None
    return (DataLoader(train, t.batch_size, shuffle=sampler is None, sampler=sampler,
                       drop_last=True, generator=generator),
            DataLoader(validation, t.batch_size, shuffle=True,
                       generator=torch.Generator().manual_seed(t.seed)))


# cell train of notebooks/C_scaling.ipynb
def train(recipe: Recipe, run: str | Path, tokenizer: tiktoken.Encoding) -> tuple[GPT, History]:
    """Train the model of a recipe on the shards of a run, from its checkpoint if it has one."""
    run, t = Path(run), recipe.training
    set_seed(t.seed)
    end = eos_id(tokenizer)
    model = GPT(GPTConfig(**recipe.model, bos_id=end, eos_id=end))
    device, ranks = get_device(), 1
    model.to(device)
    wrapped: nn.Module = model
    if dist.is_initialized():
        ranks = dist.get_world_size()
        wrapped = DistributedDataParallel(model)
    train_loader, val_loader = make_loaders(recipe, run)
    step_tokens = t.batch_size * t.accumulate * recipe.model["context_length"] * ranks
    checkpoint = run / "checkpoint.pt"

    def log(record: dict) -> None:
        if "val_loss" in record or record["step"] % 20 == 0:
            print(json.dumps({k: round(v, 5) for k, v in record.items()}), flush=True)

    history = fit(wrapped, train_loader, max_steps=max(1, t.tokens // step_tokens), lr=t.lr,
                  min_lr=t.min_lr, warmup_steps=t.warmup_steps, weight_decay=t.weight_decay,
                  betas=tuple(t.betas), grad_clip=t.grad_clip, accumulate=t.accumulate,
                  precision=t.precision, compile=t.compile, val_loader=val_loader,
                  eval_every=t.eval_every, eval_batches=t.eval_batches, checkpoint=checkpoint,
                  checkpoint_every=t.checkpoint_every,
                  resume=checkpoint if checkpoint.is_file() else None, progress=False, log=log)
    return model, history


# cell main of notebooks/C_scaling.ipynb
def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prepare, train, and write model and history into the run's folder."""
    parser = argparse.ArgumentParser(prog="python -m helpers.scaling",
                                     description="Pretrain a GPT from a recipe.")
    parser.add_argument("recipe", help="a TOML file such as data/models/tiny/recipe.toml")
    parser.add_argument("--corpus", required=True, help="the folder with the recipe's text files")
    parser.add_argument("--run", required=True, help="the folder of this run; resumed if begun")
    arguments = parser.parse_args(argv)
    recipe, run = read_recipe(arguments.recipe), Path(arguments.run)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        if torch.cuda.is_available():                  # each process its own device
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    main_process = not several or dist.get_rank() == 0
    if main_process:
        prepare(recipe, arguments.corpus, run)
    if several:
        dist.barrier()
    tokenizer = load_tokenizer(run / "tokenizer")
    model, history = train(recipe, run, tokenizer)
    if main_process:
        history.frame.to_csv(run / "history.csv", index=False)
        if not history.interrupted:
            save_pretrained(model, tokenizer, run / "model", dtype=torch.float16)
    if several:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
