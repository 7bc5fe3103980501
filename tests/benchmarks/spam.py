"""Spam classification over seeds: the comparisons that chapter 6 tabulates.

    python tests/benchmarks/spam.py --out data/results/spam.csv

Runs on the messages that ship with the series and, where LLM_DATA_DIR has it or it can be fetched,
on the UCI collection; on CUDA where there is one (some minutes on an H200 with `--workers 10`),
else on the CPU (hours; `--seeds 1 --epochs 1 --only baselines,seeds` is a quick look).

The validation set chooses learning rate (the lowest mean loss over `--grid-seeds` seeds) and epoch
(for each run); the test set is predicted once for each run, with the parameters of the chosen
epoch. `--resume` takes over the runs that the file already has. A row has all settings, the
scores, and in `wrong` the rows of the test set that were classified wrongly, for paired tests.

Experiments: baselines; grid and seeds (which parameters to train); curve (labels needed, pretrained
and random start); pooling; duplicates (a split in which repeated messages were kept).
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from helpers.baselines import (  # noqa: E402
    Tfidf,
    best_threshold,
    fit_logistic_regression,
    spam_words,
    words_of,
)
from helpers.classification import (  # noqa: E402
    LABELS,
    GPTForSequenceClassification,
    SpamDataset,
    auxiliary_loss,
    classification_loss,
    classification_metrics,
    collate_messages,
    confusion_matrix,
    dedup_key,
    drop_duplicates,
    predict_logits,
    read_messages,
    stratified_split,
    undersample,
)
from helpers.common import data_path, get_device  # noqa: E402
from helpers.data import make_dataloader  # noqa: E402
from helpers.download import DownloadError, fetch  # noqa: E402
from helpers.gpt import GPT  # noqa: E402
from helpers.pretrained import load_pretrained  # noqa: E402
from helpers.training import Callback, TrainConfig, TrainState, eval_mode, fit  # noqa: E402

try:
    from helpers.lora import apply_lora
except ImportError:                                  # appendix B is not there
    apply_lora = None

FIELDS = ("experiment", "collection", "method", "pooling", "n_train", "seed", "lr", "C",
          "batch_size", "max_epochs", "epoch", "trained_params", "val_loss", "val_accuracy",
          "n_test", "accuracy", "precision", "recall", "f1", "test_loss", "cross_accuracy",
          "n_repeats", "accuracy_on_repeats", "accuracy_on_others", "seconds", "device", "wrong")
GRID = {"all": (1e-4, 3e-4, 1e-3, 3e-3), "last": (3e-4, 1e-3, 3e-3, 1e-2),
        "lora": (1e-3, 3e-3, 1e-2, 3e-2), "random": (1e-4, 3e-4, 1e-3, 3e-3),
        "dropout": (1e-4, 3e-4, 1e-3, 3e-3), "auxiliary": (1e-4, 3e-4, 1e-3, 3e-3),
        "auxiliary dropout": (3e-4, 1e-3, 3e-3)}
WHOLE = {"random", "dropout", "auxiliary", "auxiliary dropout"}    # train all parameters: `build`
SCORES = {"accuracy", "precision", "recall", "f1", "test_loss", "cross_accuracy", "wrong"}
SHOWN = ("experiment", "collection", "method", "pooling", "n_train", "seed", "lr", "epoch",
         "val_accuracy", "accuracy")
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Task:
    """One training run."""

    experiment: str
    collection: str
    method: str                      # a key of GRID, or "baselines"
    lr: float = 0.0
    seed: int = 0
    n_train: int | None = None       # None: the whole training set
    pooling: str = "last token"
    batch_size: int = 32
    max_epochs: int = 6


# ---------------------------------------------------------------------------------------------
# Data


def load_messages(collection: str) -> pd.DataFrame:
    """All messages of a collection, repeats included."""
    return read_messages(fetch("sms-spam") if collection == "uci" else data_path("sms.tsv"))


@functools.cache
def load_split(collection: str) -> tuple[pd.DataFrame, ...]:
    """Training, validation and test set of a collection, without duplicates, undersampled."""
    return tuple(stratified_split(undersample(drop_duplicates(load_messages(collection)))))


def split_with_repeats(collection: str, seed: int) -> tuple[pd.DataFrame, ...]:
    """The split of the undersampled collection at random, with nothing removed before."""
    frame = load_messages(collection)
    spam = frame[frame["label"] == "spam"]
    ham = frame[frame["label"] == "ham"].sample(len(spam), random_state=seed)
    frame = pd.concat([ham, spam]).sample(frac=1, random_state=seed).reset_index(drop=True)
    n, m = int(len(frame) * 0.7), int(len(frame) * 0.8)
    return tuple(part.reset_index(drop=True) for part in (frame[:n], frame[n:m], frame[m:]))


def first(frame: pd.DataFrame, n: int | None, seed: int) -> pd.DataFrame:
    """A subset of about n messages with the labels in proportion, another for each seed."""
    if n is None or n >= len(frame):
        return frame
    return stratified_split(frame, (n / len(frame), 1 - n / len(frame)), seed)[0]


def label_tensor(frame: pd.DataFrame) -> Tensor:
    return torch.tensor([LABELS.index(label) for label in frame["label"]])


# ---------------------------------------------------------------------------------------------
# Scores


def scores(logits: Tensor, labels: Tensor) -> dict:
    """The test columns, from logits (N, 2) and labels (N,) on the CPU."""
    predictions = logits.argmax(dim=-1)
    wrong = (predictions != labels).nonzero()[:, 0].tolist()
    return {**classification_metrics(confusion_matrix(labels, predictions)), "n_test": len(labels),
            "test_loss": F.cross_entropy(logits, labels).item(), "wrong": " ".join(map(str, wrong))}


def two_logits(score: Tensor) -> Tensor:
    """Logits (N, 2) of which class 1 wins where the score (N,) is positive."""
    return torch.stack([torch.zeros_like(score), score], dim=-1).float()


# ---------------------------------------------------------------------------------------------
# Baselines: each gives a function from texts to scores, positive for spam


def length_rule(train: pd.DataFrame, val: pd.DataFrame) -> tuple[Callable, dict]:
    lengths = torch.tensor([float(len(text)) for text in train["text"]])
    cut = best_threshold(lengths, label_tensor(train))
    return lambda texts: torch.tensor([1.0 if len(t) >= cut else -1.0 for t in texts]), {}


def keyword_rule(train: pd.DataFrame, val: pd.DataFrame) -> tuple[Callable, dict]:
    """Spam if one of n words occurs; n is chosen on the validation set."""
    labels = label_tensor(train).tolist()

    def rule(n: int) -> Callable:
        words = set(spam_words(train["text"].tolist(), labels, n))
        return lambda texts: torch.tensor([1.0 if words & set(words_of(t)) else -1.0
                                           for t in texts])

    def right(n: int) -> int:
        return int(((rule(n)(val["text"]) > 0) == label_tensor(val).bool()).sum())

    return rule(max((10, 20, 50, 100, 200), key=right)), {}


def linear_rule(features: Callable[[Iterable[str]], Tensor], train: pd.DataFrame,
                val: pd.DataFrame, device: str) -> tuple[Callable, dict]:
    """Logistic regression on features of the texts; C is chosen on the validation set."""
    x, y, y_val = features(train["text"]).to(device), label_tensor(train), label_tensor(val)
    layers = {C: fit_logistic_regression(x, y.to(device), C).cpu() for C in PENALTIES}
    x_val = features(val["text"])

    @torch.no_grad()
    def loss(C: float) -> float:
        return F.cross_entropy(two_logits(layers[C](x_val)[:, 0]), y_val).item()

    best = min(PENALTIES, key=loss)
    return (lambda texts: layers[best](features(texts))[:, 0].detach()), {
        "C": best, "val_loss": loss(best), "trained_params": x.shape[1] + 1}


def hidden_features(base: GPT, tokenizer) -> Callable[[Iterable[str]], Tensor]:
    """Texts to the frozen model's hidden state of the last real token, float64, standardized."""
    model, statistics = GPTForSequenceClassification(base), []
    model.head = nn.Identity()

    def features(texts: Iterable[str]) -> Tensor:
        frame = pd.DataFrame({"label": LABELS[0], "text": list(texts)})
        loader = make_loader(frame, tokenizer, model.config.context_length, 256)
        x = predict_logits(model, loader)[0]
        if not statistics:                         # those of the training set, which comes first
            statistics.extend((x.mean(dim=0), x.std(dim=0)))
        return ((x - statistics[0]) / statistics[1]).double()

    return features


def all_rules(train: pd.DataFrame, val: pd.DataFrame, base: GPT, tokenizer,
              device: str) -> dict[str, Callable[[], tuple[Callable, dict]]]:
    """What fits each baseline to a training set, by name."""
    return {
        "majority": lambda: (lambda texts: -torch.ones(len(texts)), {}),
        "length": lambda: length_rule(train, val),
        "keywords": lambda: keyword_rule(train, val),
        "tfidf": lambda: linear_rule(Tfidf(train["text"].tolist()), train, val, device),
        "features": lambda: linear_rule(hidden_features(base, tokenizer), train, val, device),
    }


def run_baselines(task: Task, base: GPT, tokenizer, device: str,
                  others: tuple[str, ...]) -> list[dict]:
    """A row for each baseline."""
    if task.experiment == "duplicates":
        train, val, test = split_with_repeats(task.collection, task.seed)
    else:
        train, val, test = load_split(task.collection)
        train = first(train, task.n_train, task.seed)
    seen = set(train["text"].map(dedup_key))
    repeats = torch.tensor([dedup_key(text) in seen for text in test["text"]])
    if task.experiment == "duplicates":
        tfidf = Tfidf(train["text"].tolist())
        rules = {"tfidf": lambda: linear_rule(tfidf, train, val, device)}
    else:
        rules = all_rules(train, val, base, tokenizer, device)
    rows = []
    for method, make in rules.items():
        began = time.perf_counter()
        rule, more = make()
        row = {"experiment": task.experiment, "collection": task.collection, "method": method,
               "n_train": len(train), "seed": task.seed, "device": device,
               "seconds": time.perf_counter() - began, **more}
        logits = two_logits(rule(test["text"]))
        row |= scores(logits, label_tensor(test))
        if repeats.any():
            right = logits.argmax(dim=-1) == label_tensor(test)
            row |= {"n_repeats": int(repeats.sum()),
                    "accuracy_on_repeats": right[repeats].double().mean().item(),
                    "accuracy_on_others": right[~repeats].double().mean().item()}
        row["val_accuracy"] = scores(two_logits(rule(val["text"])), label_tensor(val))["accuracy"]
        for other in others:
            frame = load_split(other)[2]
            cross = scores(two_logits(rule(frame["text"])), label_tensor(frame))
            row["cross_accuracy"] = cross["accuracy"]
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Trained classifiers


class LastColumn(GPTForSequenceClassification):
    """Reads the last column of the batch, padding or not: the mistake of the chapter."""

    def pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        return hidden[:, -1]


class MeanPooling(GPTForSequenceClassification):
    """Reads the mean of the hidden states of the real tokens."""

    def pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]    # (B, T)
        return (hidden * real[..., None]).sum(dim=1) / lengths[:, None]


POOLING = {"last token": GPTForSequenceClassification, "last column": LastColumn,
           "mean": MeanPooling}


def make_loader(frame: pd.DataFrame, tokenizer, context_length: int, batch_size: int, *,
                shuffle: bool = False, seed: int = 0) -> Iterable:
    data = SpamDataset(frame, tokenizer, context_length)
    return make_dataloader(data, batch_size=batch_size, shuffle=shuffle, seed=seed,
                           collate_fn=functools.partial(collate_messages,
                                                        pad_token_id=data.pad_token_id))


def build(task: Task, base: GPT, device: torch.device) -> GPTForSequenceClassification:
    """The classifier before training."""
    torch.manual_seed(task.seed)
    gpt = copy.deepcopy(base)
    if task.method == "random":
        gpt = GPT(base.config)
    elif "dropout" in task.method:
        gpt = GPT(replace(base.config, dropout=0.1))
        gpt.load_state_dict(base.state_dict())
    trainable = "all" if task.method in WHOLE else task.method.replace("lora", "head")
    model = POOLING[task.pooling](gpt.to(device), trainable=trainable)
    if task.method == "lora":
        apply_lora(model, r=8, alpha=16.0, modules_to_save=("head",))
    return model.to(device)


class KeepBest(Callback):
    """Validate after each epoch; end with the parameters of the lowest validation loss."""

    def __init__(self, val_loader: Iterable, every: int) -> None:
        self.val_loader, self.every, self.best = val_loader, every, (float("inf"), 0, 0.0, {})

    def on_step_end(self, state: TrainState) -> None:
        if state.step % self.every and state.step != state.total_steps:
            return
        with eval_mode(state.model):
            logits, labels = predict_logits(state.model, self.val_loader)
        loss = F.cross_entropy(logits, labels).item()
        if loss < self.best[0]:
            accuracy = (logits.argmax(dim=-1) == labels).float().mean().item()
            kept = {name: p.detach().clone() for name, p in state.model.named_parameters()
                    if p.requires_grad}
            self.best = (loss, -(-state.step // self.every), accuracy, kept)

    def on_train_end(self, state: TrainState) -> None:
        state.model.load_state_dict(self.best[3], strict=False)


def task_key(task: Task) -> tuple[str, ...]:
    """What makes a run the one it is, in the words of the file."""
    n_train = task.n_train or 0
    return (task.experiment, task.collection, task.method, task.pooling, str(n_train),
            str(task.seed), f"{task.lr:g}", str(task.max_epochs))


def finished_runs(path: Path) -> dict[tuple[str, ...], list[dict]]:
    """The rows of an earlier file by `task_key`."""
    rows: dict[tuple[str, ...], list[dict]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            n = row["n_train"] if row["experiment"] == "curve" else 0
            task = Task(row["experiment"], row["collection"], row["method"],
                        float(row["lr"] or 0), int(row["seed"]), int(n),
                        row["pooling"] or "last token", max_epochs=int(row["max_epochs"] or 0))
            if not row["pooling"]:
                task = replace(task, method="baselines", max_epochs=Task.max_epochs)
            row["val_loss"] = float(row["val_loss"] or "nan")
            row["lr"] = float(row["lr"] or 0)
            rows.setdefault(task_key(task), []).append(row)
    return rows


@functools.lru_cache(maxsize=1)
def load_base(name: str, device: str) -> tuple[GPT, object]:
    torch.set_num_threads(1 if device != "cpu" else torch.get_num_threads())
    base, tokenizer = load_pretrained(name)
    return base.to(device), tokenizer


def run_task(task: Task, base_name: str, device_name: str, others: tuple[str, ...]) -> list[dict]:
    """Train and test one classifier, or all baselines; returns the rows."""
    device = torch.device(device_name)
    base, tokenizer = load_base(base_name, device_name)
    if task.method == "baselines":
        return run_baselines(task, base, tokenizer, device_name, others)
    T = base.config.context_length
    train, val, test = load_split(task.collection)
    train = first(train, task.n_train, task.seed)
    loader = make_loader(train, tokenizer, T, task.batch_size, shuffle=True, seed=task.seed)
    model = build(task, base, device)
    loss_fn = auxiliary_loss if "auxiliary" in task.method else classification_loss
    began = time.perf_counter()
    keep = KeepBest(make_loader(val, tokenizer, T, 256), every=len(loader))
    fit(model, loader, TrainConfig(epochs=task.max_epochs, lr=task.lr), loss_fn=loss_fn,
        callbacks=[keep])
    seconds = time.perf_counter() - began
    logits, labels = predict_logits(model, make_loader(test, tokenizer, T, 256))
    row = {"experiment": task.experiment, "collection": task.collection,
           "method": task.method, "pooling": task.pooling,
           "n_train": len(train), "seed": task.seed, "lr": task.lr, "batch_size": task.batch_size,
           "max_epochs": task.max_epochs, "epoch": keep.best[1],
           "trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
           "val_loss": keep.best[0], "val_accuracy": keep.best[2], "seconds": seconds,
           "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
           **scores(logits, labels)}
    for other in others if task.experiment == "seeds" else ():
        other_logits, other_labels = predict_logits(
            model, make_loader(load_split(other)[2], tokenizer, T, 256))
        row["cross_accuracy"] = scores(other_logits, other_labels)["accuracy"]
    return [row]


# ---------------------------------------------------------------------------------------------
# What to run


def later_tasks(rates: dict[tuple[str, str], float], seeds: range, epochs: int,
                only: set[str]) -> list[Task]:
    """The runs after the grid, seed by seed, with the learning rates it found."""
    tasks = []
    collections = sorted({collection for collection, _ in rates})
    methods = [m for m in GRID if any(key[1] == m for key in rates)]
    for c in collections:
        tasks += [Task("seeds", c, m, rates[c, m], seed, max_epochs=epochs)
                  for m in methods for seed in seeds]
    for c in collections:
        tasks.append(Task("baselines", c, "baselines"))
        for n, most in ((50, 20), (200, 10), (1000, epochs)):
            if n < len(load_split(c)[0]):
                tasks += [Task("curve", c, m, rates[c, m], seed, n,
                               max_epochs=min(most, 4 * epochs))
                          for m in ("all", "random") for seed in seeds]
                tasks += [Task("curve", c, "baselines", seed=seed, n_train=n) for seed in seeds]
    for c in collections:
        tasks += [Task("pooling", c, "last", rates[c, "last"], seed, pooling=pooling,
                       max_epochs=epochs)
                  for pooling in ("last column", "mean") for seed in seeds]
    if "uci" in collections:
        tasks += [Task("duplicates", "uci", "baselines", seed=seed) for seed in seeds]
    tasks = [task for task in tasks if task.experiment in only]
    return sorted(tasks, key=lambda task: task.seed)    # out of time: fewer seeds, all experiments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "spam.csv")
    parser.add_argument("--base", default="tiny", help="a model for load_pretrained")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grid-seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1, help="processes beside each other")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="begin no further run after so long")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out holds")
    parser.add_argument("--only", default="baselines,grid,seeds,curve,pooling,duplicates")
    parser.add_argument("--collections", default="sample,uci")
    given = parser.parse_args()
    began, only, seeds = time.perf_counter(), set(given.only.split(",")), range(given.seeds)
    device = str(get_device())
    collections = given.collections.split(",")
    try:
        load_messages("uci")
    except DownloadError as error:
        print(f"without the UCI collection: {error}", file=sys.stderr)
        collections = [c for c in collections if c != "uci"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    finished = finished_runs(given.out) if given.resume and given.out.exists() else {}
    with open(given.out, "w", encoding="utf-8", newline="") as file, ProcessPoolExecutor(
            given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()

        def write(row: dict) -> dict:
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
            return row

        def run(tasks: list[Task]) -> Iterator[dict]:
            """Run tasks in the pool, no more begun than it has workers; stops at the deadline."""
            for task in tasks:
                yield from finished.get(task_key(task), ())
            waiting = [task for task in tasks if task_key(task) not in finished]
            running = set()
            while waiting or running:
                while waiting and len(running) < given.workers:
                    if time.perf_counter() - began > given.seconds:
                        print(f"out of time: {len(waiting)} runs left out", file=sys.stderr)
                        waiting.clear()
                        break
                    task = waiting.pop(0)
                    rest = tuple(c for c in collections if c != task.collection)
                    running.add(pool.submit(run_task, task, given.base, device, rest))
                if running:
                    done = next(as_completed(running))
                    running.remove(done)
                    for row in done.result():
                        shown = " ".join(f"{row.get(name, '')!s:11.11}" for name in SHOWN)
                        print(f"{time.perf_counter() - began:6.1f} s  {shown}", flush=True)
                        yield row

        methods = [m for m in GRID if m != "lora" or apply_lora is not None]
        grid = [Task("grid", c, m, lr, seed, max_epochs=given.epochs)
                for seed in range(given.grid_seeds)
                for c in collections for m in methods for lr in GRID[m]]
        rates = {(c, m): GRID[m][1] for c in collections for m in methods}
        if "grid" in only:
            losses: dict[tuple[str, str, float], list[float]] = {}
            for row in run(grid):
                losses.setdefault((row["collection"], row["method"], row["lr"]), []).append(
                    row["val_loss"])
                write({k: v for k, v in row.items() if k not in SCORES})  # the test is not for this
            for c, m in rates:
                found = {lr: sum(losses[c, m, lr]) / len(losses[c, m, lr])
                         for lr in GRID[m] if (c, m, lr) in losses}
                rates[c, m] = min(found, key=found.get, default=rates[c, m])
        for row in run(later_tasks(rates, seeds, given.epochs, only)):
            write(row)
    print(f"{time.perf_counter() - began:.0f} s, {given.out}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
