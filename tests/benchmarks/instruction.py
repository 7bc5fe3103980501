"""Instruction tuning measured: recipes, more examples, the loss mask, seeds, LoRA.

    python tests/benchmarks/instruction.py --out data/results/instruction.csv

Writes one row for each evaluation, with every setting and seed, and beside it two more files.
NAME_kinds.csv holds the scores of each kind of task at the end of each training, NAME_responses.csv
what the base model and some of the fine-tuned ones respond to the whole test set. Picks CUDA where
there is one, and then runs several trainings at a time. `--quick` runs a few steps of everything,
for a trial. Chapter 7 reads the results.

Settings are chosen by the rows of the split "val". Trainings that such a choice may fall on also
have a row of the split "test", which is to be read for the chosen one only.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from instruction_generator import copy_words, generate_examples

from helpers.callbacks import Evaluate
from helpers.common import data_path, get_device, set_seed
from helpers.data import make_dataloader, read_text
from helpers.gpt import GPT
from helpers.instruction import (
    InstructionDataset,
    chrf,
    collate,
    exact_match,
    generate_responses,
    length_grouped_batches,
    load_examples,
    masked_lm_loss,
    train_val_test_split,
)
from helpers.lora import apply_lora
from helpers.pretrained import load_pretrained
from helpers.tokenizer import eos_token_id
from helpers.training import IGNORE_INDEX, TrainConfig, bits_per_byte, evaluate_loss, fit

MIN_STEPS = 150                          # also for few examples
MAX_NEW_TOKENS = 64
LR = 1e-3
EXTRA_BATCH_SIZE = 64                    # of the additional examples
RECORDED = ("base", "full", "unmasked", "lora", "more")


@dataclass(frozen=True)
class Run:
    """The settings of one training; `epochs` 0 only evaluates the base model."""

    experiment: str
    seed: int = 0
    method: str = "full"                 # or "lora"
    rank: int = 0                        # of LoRA
    lr: float = LR
    epochs: int = 3
    batch_size: int = 16
    dropout: float = 0.0
    n_train: int = 0                     # 0: all
    n_extra: int = 0                     # additional examples, made by instruction_generator.py
    mixed: bool = False                  # these among the others, else in one pass before them
    mask_prompt: bool = True
    mask_end: bool = False               # the mistake: no end token counts
    include_held_out: bool = False       # train on the held-out kind too
    every_epoch: bool = False            # evaluate after each epoch, not only the last
    splits: tuple[str, ...] = ("test",)  # the second is evaluated at the end only
    record: str = ""                     # name under which the responses are recorded


def plan(quick: bool) -> list[Run]:
    """All runs, the most important first."""
    base, chosen_by = Run("base", epochs=0, splits=("val", "test"), record="base"), ("val", "test")
    if quick:
        one = {"epochs": 1, "n_train": 32}
        return [base, Run("recipe", dropout=0.1, batch_size=32, every_epoch=True, epochs=2,
                          n_train=32, splits=chosen_by, record="full"),
                Run("more examples", n_extra=64, splits=chosen_by, record="more", **one),
                Run("more examples", n_extra=64, mixed=True, splits=chosen_by, **one),
                Run("masking", mask_prompt=False, every_epoch=True, record="unmasked", **one),
                Run("epochs", splits=("val",), **one),
                Run("learning rate", lr=3e-4, splits=("val",), **one),
                Run("examples", **one), Run("lora", method="lora", rank=8, record="lora", **one),
                Run("end masked", mask_end=True, **one),
                Run("kind included", include_held_out=True, **one)]
    runs, more = [base], {"splits": chosen_by}
    for seed in range(3):
        runs += [Run("recipe", seed, lr=lr, epochs=epochs, every_epoch=True, **more)
                 for lr in (3e-4, 5e-4) for epochs in (6, 3)]
        runs += [Run("more examples", seed, n_extra=60_000, mixed=True,
                     record="" if seed else "more", **more)]
        runs += [Run("more examples", seed, lr=lr, n_extra=n, **more)
                 for n in (20_000, 5_000) for lr in (LR, 3e-4)]
    for seed in range(5):
        for mask in (True, False):
            record = ("full" if mask else "unmasked") if seed == 0 else ""
            runs.append(Run("masking", seed, mask_prompt=mask, every_epoch=True, record=record))
    for seed in range(3):
        runs += [Run("examples", seed, n_train=n) for n in (50, 100, 200, 400, 800, 1600)]
        runs += [Run("kind included", seed, include_held_out=True),
                 Run("lora", seed, "lora", 8, 3 * LR, record="" if seed else "lora"),
                 Run("end masked", seed, mask_end=True)]
        runs += [Run("learning rate", seed, lr=lr, splits=("val",))
                 for lr in (1e-4, 3e-4, 1e-3, 3e-3)]
        runs += [Run("epochs", seed, epochs=10, every_epoch=True, splits=("val",))]
    for seed in range(3):
        runs += [Run("more examples", seed, lr=lr, n_extra=60_000, **more) for lr in (LR, 3e-4)]
        runs += [Run("recipe", seed, lr=lr, epochs=10, dropout=dropout, every_epoch=True, **more)
                 for lr in (3e-4, 5e-4) for dropout in (0.0, 0.1)]
        runs += [Run("recipe", seed, lr=lr, epochs=6, batch_size=32, every_epoch=True, **more)
                 for lr in (3e-4, 5e-4)]
    for seed in range(3):
        runs += [Run("lora", seed, "lora", 32, 3 * LR), Run("lora", seed, "lora", 8, 10 * LR)]
    return runs


class Bench:
    """Model, data and what is measured; one for each process."""

    def __init__(self, held_out_kind: str, quick: bool) -> None:
        self.device = get_device()
        torch.set_float32_matmul_precision("high")
        self.base, self.tokenizer = load_pretrained("tiny")
        self.base = self.base.to(self.device)
        kinds = json.loads(read_text(data_path("instruction_kinds.json")))
        self.closed = {kind for kind, about in kinds.items() if about["closed"]}
        examples = load_examples(data_path("instructions.json"))
        held_out = [e for e in examples if e["kind"] == held_out_kind]
        self.train, self.val, self.test = train_val_test_split(
            [e for e in examples if e["kind"] != held_out_kind])
        self.extra, _, self.held_out = train_val_test_split(held_out, (0.5, 0.05, 0.45))
        if quick:
            self.val, self.test, self.held_out = self.val[:8], self.test[:16], self.held_out[:4]
        self.length = self.base.config.context_length
        self.val_loader = make_dataloader(self.dataset(self.val), batch_size=64, shuffle=False,
                                          collate_fn=collate)
        self.prose = read_text(data_path("story.txt"))[:1000 if quick else None]
        self.quick = quick
        self.made: list[tuple] = []

    def dataset(self, examples: list[dict], mask_prompt: bool = True) -> InstructionDataset:
        return InstructionDataset(examples, self.tokenizer, self.length, mask_prompt=mask_prompt)

    def additional(self, n: int) -> list[tuple]:
        """The items of n examples made by rules; the same for every seed, the first n of all."""
        if len(self.made) < n:
            made = generate_examples(n, words=copy_words(self.tokenizer))
            self.made = self.dataset(made).items
        return self.made[:n]

    def stages(self, run: Run) -> list[list]:
        """The batches: those of the additional examples, if any, then those of each epoch."""
        generator = torch.Generator().manual_seed(run.seed)
        pool = self.train + self.extra if run.include_held_out else self.train
        order = torch.randperm(len(pool), generator=generator).tolist()
        chosen = [pool[i] for i in order[:run.n_train or None]]
        items = self.dataset(chosen, run.mask_prompt).items
        if run.mask_end:
            end = eos_token_id(self.tokenizer)
            items = [(ids, labels.masked_fill(labels == end, IGNORE_INDEX))
                     for ids, labels in items]
        epochs = run.epochs
        if run.n_train and not self.quick:
            epochs = max(epochs, -(-MIN_STEPS * run.batch_size // len(items)))
        additional = self.additional(run.n_extra)
        if run.mixed:
            return [[], length_grouped_batches(additional + epochs * items, EXTRA_BATCH_SIZE,
                                               seed=1000 * run.seed)]
        before = length_grouped_batches(additional, EXTRA_BATCH_SIZE, seed=1000 * run.seed + 999)
        return [before, *(length_grouped_batches(items, run.batch_size,
                                                 seed=1000 * run.seed + epoch)
                          for epoch in range(epochs))]

    def start(self, run: Run) -> GPT:
        """The base model, prepared for the run."""
        model = copy.deepcopy(self.base)
        if run.dropout:
            model = GPT(replace(self.base.config, dropout=run.dropout))
            model.load_state_dict(self.base.state_dict())
        if run.method == "lora":
            apply_lora(model, run.rank, 2 * run.rank)
        return model.to(self.device)

    def measure(self, model, split: str) -> tuple[dict, list[dict], list]:
        """The metrics of a model on a split, those of each kind, and its responses."""
        examples = self.dataset({"val": self.val, "test": self.test}[split]).examples
        asked = [*examples, *self.held_out]
        responses, ended = generate_responses(model, self.tokenizer, asked, MAX_NEW_TOKENS,
                                              batch_size=512, return_ended=True)
        found, of_kind = {True: [], False: []}, defaultdict(list)
        for example, response in zip(asked, responses, strict=True):
            closed = example["kind"] in self.closed
            score = (100 * exact_match(response, example["output"]) if closed
                     else chrf(response, example["output"]))
            of_kind[example["kind"]].append(score)
            if len(of_kind[self.held_out[0]["kind"]]) == 0:
                found[closed].append(score)
        held_out = of_kind[self.held_out[0]["kind"]]
        mean = {closed: sum(values) / max(1, len(values)) for closed, values in found.items()}
        kinds = [{"split": split, "kind": kind, "n": len(values),
                  "score": round(sum(values) / len(values), 2)} for kind, values in of_kind.items()]
        return {"split": split, "n_closed": len(found[True]), "n_open": len(found[False]),
                "n_held_out": len(held_out), "exact_match": round(mean[True], 3),
                "chrf": round(mean[False], 3), "held_out": round(sum(held_out) / len(held_out), 3),
                "ended": round(sum(ended[:len(examples)]) / len(examples), 4),
                "val_loss": round(evaluate_loss(model, self.val_loader, masked_lm_loss), 4),
                "bits_per_byte": round(bits_per_byte(model, self.tokenizer, self.prose,
                                                     batch_size=16), 4)
                }, kinds, list(zip(examples, responses, strict=False))

    def __call__(self, run: Run) -> tuple[list[dict], list[dict], dict[str, list]]:
        """Train and evaluate; the rows, the rows of each kind, and the responses to record."""
        set_seed(run.seed)
        model, rows, kinds, recorded = self.start(run), [], [], {}
        before, *epochs = self.stages(run) if run.epochs else ([],)
        flat = [tuple(x.to(self.device) for x in batch)
                for stage in (before, *epochs) for batch in stage]
        settings = {k: v for k, v in asdict(run).items()
                    if k not in ("every_epoch", "record", "splits")}
        n_items = sum(len(inputs) for inputs, _ in epochs[0]) if epochs else 0
        settings["n_train"] = run.n_train or len(self.train) if run.mixed else n_items
        per_epoch, losses = len(epochs[0]) if epochs else 1, []

        def note(epoch: int, steps: int, last: bool) -> None:
            model.eval()
            train_loss = (round(sum(losses[-per_epoch:]) / len(losses[-per_epoch:]), 4)
                          if losses else "")
            for split in run.splits if last else run.splits[:1]:
                scores, by_kind, responses = self.measure(model, split)
                rows.append(settings | {"epoch": epoch, "steps": steps, "train_loss": train_loss}
                            | scores)
                if last:
                    kinds.extend({"experiment": run.experiment, "seed": run.seed} | row
                                 for row in by_kind)
                    if run.record and split == "test":
                        recorded[run.record] = responses
            model.train()

        class AtEpochs(Evaluate):
            def on_step_end(self, state) -> None:
                losses.append(state.record["train_loss"])
                epoch, inside = divmod(state.step - len(before), per_epoch)
                last = state.step == len(flat)
                if last and run.mixed:
                    epoch = run.epochs
                if inside == 0 and (run.every_epoch or last or state.step == len(before)):
                    note(epoch, state.step, last)

        if not epochs:
            note(0, 0, True)
            return rows, kinds, recorded
        fit(model, flat, TrainConfig(epochs=1, lr=run.lr, weight_decay=0.01),
            loss_fn=masked_lm_loss, callbacks=[AtEpochs()])
        return rows, kinds, recorded


_bench: Bench | None = None


def _start(held_out_kind: str, quick: bool) -> None:
    global _bench
    torch.set_num_threads(1 if get_device().type == "cuda" else torch.get_num_threads())
    _bench = Bench(held_out_kind, quick)


def _work(run: Run) -> tuple[Run, list[dict], list[dict], dict[str, list], float]:
    began = time.perf_counter()
    return (run, *_bench(run), time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--held-out-kind", default="negative")
    parser.add_argument("--jobs", type=int, help="trainings at a time; 8 on CUDA, 1 elsewhere")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after this time")
    parser.add_argument("--quick", action="store_true", help="a trial of a minute")
    options = parser.parse_args()
    began, rows, kinds, recorded = time.perf_counter(), [], [], {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = options.jobs or (8 if get_device().type == "cuda" else 1)
    responses = options.out.with_name(options.out.stem + "_responses.csv")

    def write(path: Path, table: list[dict]) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)

    def save() -> None:
        rows.sort(key=lambda row: (row["run"], row["epoch"], row["steps"]))
        kinds.sort(key=lambda row: row["run"])
        write(options.out, rows)
        write(options.out.with_name(options.out.stem + "_kinds.csv"), kinds)
        names = [name for name in RECORDED if name in recorded]
        made = [{"kind": e["kind"], "instruction": e["instruction"], "input": e["input"],
                 "reference": e["output"]} for e, _ in (recorded[names[0]] if names else ())]
        for name in names:
            for row, (_, text) in zip(made, recorded[name], strict=True):
                row[name] = text
        if made:
            write(responses, made)

    runs = plan(options.quick)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start,
                             (options.held_out_kind, options.quick)) as pool:
        waiting = {pool.submit(_work, run): i for i, run in enumerate(runs)}
        for future in as_completed(waiting):
            if future.cancelled():
                continue
            run, made, of_kind, texts, took = future.result()
            rows += [{"run": waiting[future]} | row for row in made]
            kinds += [{"run": waiting[future]} | row for row in of_kind]
            recorded |= texts
            save()
            print(f"{time.perf_counter() - began:6.1f} s  {run.experiment:<14} seed {run.seed}  "
                  f"{took:5.1f} s  exact match {made[-1]['exact_match']:5.1f}  "
                  f"ended {made[-1]['ended']:.2f}", flush=True)
            if time.perf_counter() - began > options.seconds:
                for other in waiting:
                    other.cancel()
    print(f"{len({row['run'] for row in rows})} of {len(runs)} runs, {len(rows)} rows")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
