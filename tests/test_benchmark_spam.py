"""The comparison of chapter 6 on a model that takes no time: its rows, and who chooses what."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers.classification import SpamDataset, dedup_key, predict_logits
from helpers.gpt import GPT, GPTConfig
from helpers.pretrained import load_pretrained, save_pretrained
from helpers.tokenizer import train_bpe

PATH = Path(__file__).parent / "benchmarks" / "spam.py"


@pytest.fixture(scope="module")
def spam() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_spam", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(spam: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small GPT with random weights."""
    folder = tmp_path_factory.mktemp("base")
    texts = spam.load_split("sample")[0]["text"].tolist()
    tokenizer = train_bpe(texts[:50], vocab_size=300)
    torch.manual_seed(0)
    save_pretrained(GPT(GPTConfig(vocab_size=300, context_length=32, n_embd=16, n_head=2,
                                  n_layer=2, eos_token_id=299)), tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize("method", ["all", "last", "lora", "random", "dropout", "auxiliary",
                                    "auxiliary dropout"])
def test_a_row_says_what_was_done(spam: ModuleType, base: str, method: str) -> None:
    task = spam.Task("seeds", "sample", method, 1e-3, seed=1, n_train=40, max_epochs=2)
    [row] = spam.run_task(task, base, "cpu", ("sample",))
    assert set(row) <= set(spam.FIELDS)
    n_wrong = len(row["wrong"].split())
    assert row["accuracy"] == pytest.approx(1 - n_wrong / row["n_test"])
    assert row["cross_accuracy"] == pytest.approx(row["accuracy"])     # the same messages here
    assert abs(row["n_train"] - 40) <= 1 and row["epoch"] in (1, 2)
    everything = load_pretrained(base)[0].n_params + 2 * 16
    assert (row["trained_params"] == everything) == (method not in ("last", "lora"))


def test_baselines_have_a_row_each(spam: ModuleType, base: str) -> None:
    rows = spam.run_task(spam.Task("baselines", "sample", "baselines", n_train=40), base, "cpu", ())
    assert [row["method"] for row in rows] == ["majority", "length", "keywords", "tfidf",
                                               "features"]
    assert rows[0]["accuracy"] == pytest.approx(0.5) and all(set(r) <= set(spam.FIELDS)
                                                             for r in rows)


def test_keep_best_ends_with_the_parameters_of_the_lowest_loss(spam: ModuleType,
                                                               base: str) -> None:
    """With a learning rate that ruins the model, the first epoch is the best one."""
    gpt, tokenizer = load_pretrained(base)
    train, val, _ = spam.load_split("sample")
    task = spam.Task("seeds", "sample", "all")
    model = spam.build(task, gpt, torch.device("cpu"))
    val_loader = spam.make_loader(val[:40], tokenizer, 32, 64)
    loader = spam.make_loader(train[:32], tokenizer, 32, 16, shuffle=True)
    keep, losses = spam.KeepBest(val_loader, every=2), []

    class Note(spam.Callback):
        def on_step_end(self, state: object) -> None:
            if state.step % 2 == 0:
                logits, labels = predict_logits(state.model, val_loader)
                losses.append(torch.nn.functional.cross_entropy(logits, labels).item())

    config = spam.TrainConfig(epochs=4, lr=0.3, warmup_steps=0, max_grad_norm=None)
    spam.fit(model, loader, config, loss_fn=spam.classification_loss, callbacks=[keep, Note()])
    logits, labels = predict_logits(model, val_loader)
    found = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found == pytest.approx(min(losses), rel=1e-4) and keep.best[1] == 1 + losses.index(
        min(losses))
    assert max(losses) > min(losses)


def test_pooling_ignores_padding_or_does_not(spam: ModuleType, base: str) -> None:
    gpt, tokenizer = load_pretrained(base)
    tokens, lengths = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([3])
    for name, depends in (("last token", False), ("mean", False), ("last column", True)):
        model = spam.POOLING[name](gpt).eval()
        with torch.no_grad():
            model.head.weight.normal_()
            change = (model(tokens, lengths) - model(tokens[:, :3], lengths)).abs().max()
        assert (change > 1e-4) == depends, name


def test_subsets_keep_the_labels_in_proportion(spam: ModuleType) -> None:
    train = spam.load_split("sample")[0]
    for n in (50, 200):
        a, b = spam.first(train, n, 0), spam.first(train, n, 1)
        assert abs(len(a) - n) <= 1 and abs((a["label"] == "spam").sum() - n / 2) <= 1
        assert set(a["text"]) <= set(train["text"]) and set(a["text"]) != set(b["text"])
        assert not a["text"].map(dedup_key).duplicated().any()


def test_two_logits_predict_spam_where_the_score_is_positive(spam: ModuleType) -> None:
    assert spam.two_logits(torch.tensor([-1.0, 2.0])).argmax(dim=-1).tolist() == [0, 1]


def test_the_loader_pads_and_cuts(spam: ModuleType, base: str) -> None:
    _, tokenizer = load_pretrained(base)
    frame = spam.load_split("sample")[2][:8]
    tokens, lengths, labels = next(iter(spam.make_loader(frame, tokenizer, 12, 8)))
    assert tokens.shape == (8, 12) and lengths.max() == 12
    assert labels.tolist() == [label for _, label in SpamDataset(frame, tokenizer)]


def test_the_auxiliary_loss_adds_half_the_language_models(spam: ModuleType, base: str) -> None:
    """Each row as if it were alone: padding is no target."""
    gpt, tokenizer = load_pretrained(base)
    model = spam.build(spam.Task("seeds", "sample", "auxiliary"), gpt, torch.device("cpu")).eval()
    tokens, lengths = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([4, 2])
    batch = tokens, lengths, torch.tensor([0, 1])
    with torch.no_grad():
        total, n = spam.auxiliary_loss(model, batch)
        plain, _ = spam.classification_loss(model, batch)
        nats = [torch.nn.functional.cross_entropy(gpt(row[None, :-1])[0], row[1:],
                                                  reduction="sum")
                for row in (tokens[0], tokens[1, :2])]
    assert n == 2
    torch.testing.assert_close(total, plain + 0.5 * 2 * sum(nats) / 4, atol=1e-4, rtol=1e-4)
