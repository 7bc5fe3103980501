"""Compare ways to fine-tune the spam classifier, over seeds, and write one row for each run.

    python tests/benchmarks/lora.py --out data/results/lora.csv         # a GPU: about two minutes
    python tests/benchmarks/lora.py --out runs/lora.csv --quick         # each setting for two steps

Five experiments. `methods`: each method of appendix B with the learning rate that had the lowest
validation loss in `learning_rate` (two seeds for each rate), on all training messages, and in
`few_labels` on a hundred of them. `rank`, `rank_fixed_alpha` and `targets`: LoRA of several ranks,
and on several sets of layers. The split is the same in all runs; a seed decides the initialization
of what is new, the order of the messages, and which hundred are taken. The test set is measured in
every run and chooses nothing. Runs are divided over processes, since such small models leave most
of a GPU idle, so `seconds` compares runs of one file only, roughly.
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from helpers.adapters import PrefixTuning, PromptTuning, apply_adapters, apply_bitfit
from helpers.classification import (
    GPTForSequenceClassification,
    SpamDataset,
    classification_loss,
    collate_messages,
    drop_duplicates,
    evaluate,
    read_messages,
    stratified_split,
)
from helpers.common import data_path, set_seed
from helpers.data import make_dataloader
from helpers.lora import GPT_LINEAR_LAYERS, apply_lora, count_parameters, freeze
from helpers.pretrained import load_pretrained
from helpers.quantization import nf4_codebook, quantize_linear_layers
from helpers.training import TrainConfig, fit

LEARNING_RATES = {
    "full fine-tuning": (1e-4, 3e-4, 1e-3, 3e-3),
    "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
    "adapters": (1e-3, 3e-3, 1e-2, 3e-2),
    "prefix tuning": (1e-3, 3e-3, 1e-2, 3e-2),
    "prompt tuning": (1e-3, 3e-3, 1e-2, 3e-2),
    "BitFit": (1e-3, 3e-3, 1e-2, 3e-2),
    "last block": (3e-4, 1e-3, 3e-3, 1e-2),
    "head": (1e-3, 3e-3, 1e-2, 3e-2),
}
TARGETS = ("qkv", "output_projection", "up_projection", "down_projection", "qkv output_projection",
           "up_projection down_projection")
RANKS = (1, 2, 4, 8, 16, 32)
COLUMNS = ("experiment", "method", "r", "alpha", "target_modules", "lr", "n_train", "steps",
           "batch_size", "seed", "n_trained", "n_params", "val_loss", "val_accuracy", "test_loss",
           "test_accuracy", "seconds", "device", "base")
DEFAULT = {"experiment": "methods", "method": "LoRA", "r": 4, "alpha": 8.0, "seed": 0,
           "target_modules": " ".join(GPT_LINEAR_LAYERS), "n_train": 0}
WORK: dict[str, Any] = {}                # of a process: base model, messages, options


# ---------------------------------------------------------------------------------------------
# One run


def prepare(options: argparse.Namespace) -> None:
    """Load once in each process what all its runs need."""
    torch.set_num_threads(1)
    frame = drop_duplicates(read_messages(options.messages or data_path("sms.tsv")))
    parts = dict(zip(("train", "val", "test"), stratified_split(frame), strict=True))
    if options.quick:
        parts = {name: part.groupby("label").head(10) for name, part in parts.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt, tokenizer = load_pretrained(options.base)
    data = {name: SpamDataset(part, tokenizer, 128) for name, part in parts.items()}
    WORK.update(options=options, data=data, gpt=gpt.to(device), device=device)


def make_loader(part: str, batch_size: int, n: int = 0, seed: int | None = None) -> DataLoader:
    """A part of the messages, or n of it, half of each label; with a seed drawn and shuffled."""
    whole = WORK["data"][part]
    collate_fn = partial(collate_messages, pad_token_id=whole.pad_token_id)
    if n and n < len(whole):
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [[i for i in order if whole[i][1] == label][:n // 2] for label in (0, 1)]
        whole = Subset(whole, rows[0] + rows[1])
    return make_dataloader(whole, batch_size=batch_size, shuffle=seed is not None, seed=seed or 0,
                           collate_fn=collate_fn)


def make_model(run: dict) -> nn.Module:
    """The classifier, prepared for the method of a run."""
    method, gpt = run["method"], copy.deepcopy(WORK["gpt"])
    model = GPTForSequenceClassification(gpt, trainable="all")
    prompt = torch.randint(gpt.config.vocab_size, (run["r"],)).tolist()
    targets = run["target_modules"].split()
    match method:
        case "LoRA" | "QLoRA":
            if method == "QLoRA":
                quantize_linear_layers(model, nf4_codebook())
            apply_lora(model, run["r"], run["alpha"], target_modules=targets,
                       modules_to_save=["head"])
        case "adapters":
            apply_adapters(model, run["r"], modules_to_save=["head"])
        case "prefix tuning":
            model = PrefixTuning(model, prompt)
        case "prompt tuning":
            model = PromptTuning(model, prompt)
        case "BitFit":
            apply_bitfit(model, modules_to_save=["head"])
        case "head":
            freeze(model, ["head"])
        case "last block":
            last = f"gpt.blocks.{gpt.config.n_layer - 1}"
            freeze(model, ["head", last, "gpt.final_norm"])
    return model.to(WORK["device"])


def measure(run: dict) -> dict:
    """Train once; returns the row of the run."""
    options, batch = WORK["options"], WORK["options"].batch_size
    set_seed(run["seed"])
    loader = make_loader("train", batch, run["n_train"], run["seed"])
    model = make_model(run)
    steps = 2 if options.quick else max(40, options.epochs * len(loader))
    start = time.perf_counter()
    fit(model, loader, TrainConfig(max_steps=steps, lr=run["lr"]), loss_fn=classification_loss)
    seconds = time.perf_counter() - start
    trained, total = count_parameters(model)
    row = run | {"n_train": len(loader.dataset), "steps": steps, "batch_size": batch,
                 "n_trained": trained, "n_params": total, "seconds": round(seconds, 2),
                 "base": options.base,
                 "device": torch.cuda.get_device_name() if WORK["device"].type == "cuda" else "cpu"}
    for part in ("val", "test"):
        found = evaluate(model, make_loader(part, 256))
        row |= {f"{part}_loss": round(found["loss"], 4), f"{part}_accuracy": found["accuracy"]}
    return row


# ---------------------------------------------------------------------------------------------
# The experiments


def learning_rate_runs() -> list[dict]:
    """Each method with each of its learning rates, two seeds."""
    return [DEFAULT | sizes(method) | {"experiment": "learning_rate", "lr": lr, "seed": seed}
            for seed in range(2) for method, rates in LEARNING_RATES.items() for lr in rates]


def sizes(method: str) -> dict:
    """What a method needs; for prompts and prefixes `r` is their length, for adapters the width."""
    changes: dict = {"method": method}
    if method in ("prefix tuning", "prompt tuning", "adapters"):
        changes |= {"r": 16 if method != "adapters" else 8}
    if method not in ("LoRA", "QLoRA"):
        changes |= {"alpha": "", "target_modules": ""}
    return changes


def best_rates(rows: Iterable[dict]) -> dict[str, float]:
    """For each method the learning rate with the lowest mean validation loss."""
    losses: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["experiment"] == "learning_rate":
            losses.setdefault((row["method"], row["lr"]), []).append(row["val_loss"])
    means = {key: sum(values) / len(values) for key, values in losses.items()}
    rates = {method: min((m, lr) for (name, lr), m in means.items() if name == method)[1]
             for method, _ in means}
    return rates | {"QLoRA": rates["LoRA"]}


def later_runs(rates: dict[str, float], seeds: int) -> Iterator[dict]:
    """The runs of the other experiments, seed after seed.

    `rank` keeps alpha / r as it is in `methods`; `rank_fixed_alpha` keeps alpha.
    """
    for seed in range(seeds):
        for method, lr in rates.items():
            run = DEFAULT | sizes(method) | {"seed": seed, "lr": lr}
            yield run
            yield run | {"experiment": "few_labels", "n_train": 100}
        lora = DEFAULT | {"lr": rates["LoRA"], "seed": seed}
        for r in RANKS:
            yield lora | {"experiment": "rank", "r": r, "alpha": 2.0 * r}
            yield lora | {"experiment": "rank_fixed_alpha", "r": r, "alpha": 8.0}
        for targets in TARGETS:
            yield lora | {"experiment": "targets", "target_modules": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--base", default="tiny", help="the base model")
    parser.add_argument("--messages", type=Path, help="a file of messages, instead of data/sms.tsv")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--max-seconds", type=float, help="begin no further run after that long")
    parser.add_argument("--quick", action="store_true", help="two steps a run, one seed")
    options = parser.parse_args()
    began, rows = time.perf_counter(), []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (open(options.out, "w", newline="", encoding="utf-8") as file,
          context.Pool(options.processes, prepare, [options]) as pool):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()

        def do(runs: list[dict]) -> None:
            if options.quick:
                runs = [run for run in runs if run["seed"] == 0]
            for row in pool.imap_unordered(measure, runs):
                rows.append(row)
                writer.writerow(row)
                file.flush()
                if options.max_seconds and time.perf_counter() - began > options.max_seconds:
                    raise TimeoutError

        try:
            do(learning_rate_runs())
            do(list(later_runs(best_rates(rows), options.seeds)))
        except TimeoutError:
            print(f"stopped after {options.max_seconds:g} s")
    print(f"{len(rows)} runs in {time.perf_counter() - began:.0f} s, written to {options.out}")


if __name__ == "__main__":
    main()
