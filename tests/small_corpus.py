"""A small corpus, a recipe for it, and a small model, for the tests of appendix D."""

from __future__ import annotations

import json
import lzma
import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from helpers.gpt import GPT, GPTConfig
from helpers.tokenizer import END_OF_TEXT

ROOT = Path(__file__).resolve().parent.parent


def some_text(n_words: int, seed: int) -> str:
    words = ["the", "a", "small", "old", "river", "mountain", "walked", "slept", "found", "lost",
             "and", "then", "under", "over"]
    draw = random.Random(seed)
    return " ".join(draw.choice(words) for _ in range(n_words))


TEXTS = [some_text(300, seed) for seed in range(6)]


def tiny(tokenizer, **changes) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.n_vocab, "context_length": 8, "n_embd": 16, "n_head": 2,
             "n_layer": 1}
    model = GPT(GPTConfig(**shape | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


class Stopped(Exception):
    """As a power cut would."""


def read_back(folder: Path) -> list[int]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return np.concatenate([np.fromfile(folder / s["file"], dtype=np.uint16)
                           for s in manifest["shards"]]).tolist()


RECIPE = """
[model]
vocab_size = 300
context_length = 16
n_embd = 16
n_head = 2
n_layer = 1
dropout = 0.1
[data]
train = ["books*", "tale.txt", "tale.txt"]
validation = ["held.txt"]
[training]
tokens = 19_200
batch_size = 4
lr = 3e-3
min_lr = 3e-4
warmup_steps = 5
precision = "float32"
eval_every = 60
eval_batches = 2
checkpoint_every = 70
"""


def make_corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    separator = f"\n{END_OF_TEXT}\n"
    (folder / "books-1.txt.xz").write_bytes(lzma.compress(separator.join(TEXTS[:3]).encode()))
    (folder / "tale.txt").write_text(TEXTS[3], encoding="utf-8")
    (folder / "held.txt").write_text(separator.join(TEXTS[4:]), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder


def command(folder: Path, run: str, recipe: str = "recipe.toml") -> list[str]:
    return [str(folder / recipe), "--corpus", str(folder / "corpus"), "--run", str(folder / run)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "LLM_DEVICE": "cpu"}


def assert_same_run(one: Path, other: Path) -> None:
    """To the last bit, but for the speed."""
    histories = [pd.read_csv(run / "history.csv").drop(columns="targets_per_s")
                 for run in (one, other)]
    pd.testing.assert_frame_equal(*histories)
    files = [run / "model" / "model.safetensors" for run in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    weights = [torch.load(run / "checkpoint.pt", weights_only=True)["model"]
               for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
