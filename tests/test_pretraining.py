"""Tests of helpers.pretraining: loss, training loop, checkpoints, samplers and weight files."""

import copy
import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from helpers import pretraining
from helpers.generation import generate, greedy
from helpers.gpt import GPT, GPTConfig
from helpers.pretrained import hf_key_map, load_config, load_pretrained, save_pretrained
from helpers.sampling import make_sampler, next_token_probs
from helpers.training import (IGNORE_INDEX, History, InterruptFlag, ResumableLoader, atomic_write,
                              autocast_context, configure_optimizer, cosine_lr_with_warmup,
                              eval_mode, evaluate_loss, fit, has_fast_bfloat16, lm_loss,
                              load_checkpoint, plan_steps, save_checkpoint, to_device, train_step)
from helpers.data import TokenDataset, make_dataloader
from helpers.tokenizer import encode, eos_token_id, save_tokenizer, train_bpe

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"vocab_size": 11, "context_length": 8, "n_embd": 16, "n_head": 2, "n_layer": 2}
TOKENS = torch.randint(11, (57,), generator=torch.Generator().manual_seed(3))


def make_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SHAPE | changes))


def perturb(model: nn.Module) -> nn.Module:
    """Move every tensor off its start: fresh biases are zero and fresh norms one."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def windows(seed: int = 0) -> DataLoader:
    """Four batches a pass, the last of two windows where the others have three."""
    return make_dataloader(TOKENS, context_length=5, batch_size=3, seed=seed)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module | dict) -> None:
    other = other if isinstance(other, dict) else weights_of(other)
    differing = [n for n, w in weights_of(model).items() if not torch.equal(w, other[n])]
    assert not differing


def timeless(history: History) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in history.records]


quiet_fit = partial(fit, progress=False)


# ---- losses


def test_lm_loss_is_the_cross_entropy_of_the_counted_targets():
    model, inputs = make_model(), TOKENS[:15].view(3, 5)
    targets = TOKENS[1:16].view(3, 5).clone()
    targets[0, 2:] = targets[2] = IGNORE_INDEX
    total, n = lm_loss(model, (inputs, targets))
    assert n == 7 and isinstance(n, int)
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(total / n, expected)


def test_lm_loss_without_any_target_is_zero_of_zero():
    total, n = lm_loss(make_model(), (TOKENS[:5][None], torch.full((1, 5), IGNORE_INDEX)))
    assert (total.item(), n) == (0.0, 0)


def test_lm_loss_is_float32_for_a_bfloat16_model():
    model = make_model().bfloat16()
    total, _ = lm_loss(model, (TOKENS[:5][None], TOKENS[1:6][None]))
    assert total.dtype == torch.float32


def unequal_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of 10 and 2 counted targets, and of unequal numbers of rows."""
    inputs, targets = TOKENS[:15].view(3, 5), TOKENS[1:16].view(3, 5).clone()
    targets[2, 2:] = IGNORE_INDEX
    return [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]


def joined(batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def test_mean_loss_weighs_targets_and_not_batches():
    model, batches = make_model(), unequal_batches()
    whole = lm_loss(model, joined(batches))[0].item() / 12
    assert evaluate_loss(model, batches) == pytest.approx(whole, rel=1e-6)
    of_means = sum(evaluate_loss(model, [b]) for b in batches) / 2
    assert abs(whole - of_means) > 1e-3         # the two would be told apart


def test_mean_loss_leaves_all_as_it_was():
    model = make_model(dropout=0.5)
    model.blocks[0].eval()                      # a part that its owner wants in eval mode
    modes = [part.training for part in model.modules()]
    loader = DataLoader(TokenDataset(TOKENS, 5), batch_size=3, shuffle=True)     # draws globally
    before = torch.get_rng_state()

    def noisy(model, batch):
        torch.rand(1)
        assert not model.training and not torch.is_grad_enabled()
        return lm_loss(model, batch)

    evaluate_loss(model, loader, noisy)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()


def test_mean_loss_restores_the_mode_after_an_error():
    model = make_model()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        1 / 0  # noqa: B018
    assert model.training


def test_mean_loss_leaves_the_loader_where_it_was():
    model, loader = make_model(), windows()
    first = evaluate_loss(model, loader, max_batches=1)
    assert evaluate_loss(model, loader, max_batches=1) == first
    assert evaluate_loss(model, windows(), max_batches=1) == first


def test_mean_loss_max_batches_takes_no_more_than_that():
    taken = []

    def batches():
        for batch in unequal_batches():
            taken.append(batch)
            yield batch

    model = make_model()
    assert evaluate_loss(model, batches(), max_batches=1) == evaluate_loss(model, unequal_batches()[:1])
    assert len(taken) == 1


@pytest.mark.parametrize("loader", [[], [(TOKENS[:5][None], torch.full((1, 5), IGNORE_INDEX))]])
def test_mean_loss_of_nothing(loader):
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate_loss(make_model(), loader)


def test_to_device_reaches_nested_tensors():
    moved = to_device({"a": [torch.ones(1), ("x", torch.ones(2))], "b": 3}, "meta")
    assert moved["a"][0].is_meta and moved["a"][1][1].is_meta
    assert moved["a"][1][0] == "x" and moved["b"] == 3


# ---- one step


def gradients(model: nn.Module, batches: list) -> dict[str, torch.Tensor]:
    """What a step moved the weights by: plain descent at a rate of 1 moves by the gradient."""
    before = weights_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    train_step(model, batches, lm_loss, optimizer, lr=1.0, grad_clip=None)
    return {name: before[name] - weight for name, weight in weights_of(model).items()}


def test_accumulated_unequal_batches_give_the_gradient_of_one_big_batch():
    batches = unequal_batches()
    ours = gradients(make_model().double(), batches)
    model = make_model().double()
    total, n = lm_loss(model, joined(batches))
    (total / n).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-5, atol=1e-7)


def test_fit_with_accumulate_equals_fit_on_the_big_batch():
    batches = unequal_batches()
    one, other = make_model().double(), make_model().double()
    a = quiet_fit(one, batches, max_steps=4, accumulate=2)
    b = quiet_fit(other, [joined(batches)], max_steps=4)
    assert a.last("train_loss") == pytest.approx(b.last("train_loss"), rel=1e-5)
    assert a.last("tokens") == b.last("tokens") == 48
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weight, weights_of(other)[name], rtol=0, atol=1e-4)


def test_gradients_that_were_there_before_do_not_count():
    model, batches = make_model(), unequal_batches()
    expected = gradients(make_model(), batches)
    lm_loss(model, batches[1])[0].backward()            # as a notebook's earlier cell may do
    for name, gradient in gradients(model, batches).items():
        assert torch.equal(gradient, expected[name]), name


def test_grad_clip_bounds_the_move_and_reports_the_unclipped_size():
    sizes = []
    for clip in (None, 1e-3):
        model = make_model()
        before = weights_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = train_step(model, unequal_batches(), lm_loss, optimizer, lr=1.0, grad_clip=clip)
        moves = [before[n] - w for n, w in weights_of(model).items()]
        sizes.append(torch.stack([m.norm() for m in moves]).norm().item())
        assert seen["targets"] == 12 and seen["lr"] == 1.0
        assert seen["grad_norm"] == pytest.approx(sizes[0], rel=1e-4)
    assert sizes[0] > 0.1 and sizes[1] == pytest.approx(1e-3, rel=1e-2)


def test_a_step_on_batches_without_targets():
    empty = (TOKENS[:5][None], torch.full((1, 5), IGNORE_INDEX))
    model = make_model()
    before = weights_of(model)
    with pytest.raises(ValueError, match="No target"):
        quiet_fit(model, [empty], max_steps=1)
    assert_same(model, before)
    quiet_fit(model, [empty, *unequal_batches()], max_steps=1, accumulate=3)     # one of three may


def test_weight_decay_shrinks_matrices_and_nothing_else():
    def flat(model, batch):
        return sum(p.sum() for p in model.parameters()) * 0.0, 1

    model = perturb(make_model())
    before = weights_of(model)
    quiet_fit(model, [0], loss_fn=flat, max_steps=1, lr=0.1, weight_decay=0.5)
    shrunk = {n for n, w in weights_of(model).items() if not torch.equal(w, before[n])}
    assert shrunk == {n for n, w in before.items() if w.dim() >= 2}
    for name in shrunk:         # the rate of the only step is the smallest: lr / 10
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] * 0.995)


def test_the_optimizer_has_each_parameter_once():
    model = make_model()
    grouped = [p for g in configure_optimizer(model, 1e-3).param_groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="no parameter"):
        configure_optimizer(model.requires_grad_(False), 1e-3)


def test_an_optimizer_of_the_callers_is_the_default_if_built_the_same():
    how = {"max_steps": 7, "lr": 1e-2, "warmup_steps": 2}
    default = make_model(dropout=0.2)
    expected = quiet_fit(default, windows(), **how)
    given = make_model(dropout=0.2)
    history = quiet_fit(given, windows(), **how,
                        optimizer=configure_optimizer(given, 0.5))       # the rate is fit's to set
    assert_same(default, given)
    assert timeless(history) == timeless(expected)


def test_an_optimizer_of_the_callers_resumes(tmp_path):
    def run(model, **more):
        optimizer = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)
        history = quiet_fit(model, windows(), max_steps=7, lr=1e-2, optimizer=optimizer, **more)
        assert {group["lr"] for group in optimizer.param_groups} == {history.last("lr")}
        return history

    whole = make_model(dropout=0.2)
    run(whole)
    run(make_model(dropout=0.2), checkpoint=tmp_path / "c.pt",
        log=lambda r: r["step"] == 3 and signal.raise_signal(signal.SIGINT))
    resumed = make_model(seed=5, dropout=0.2)
    run(resumed, resume=tmp_path / "c.pt")
    assert_same(whole, resumed)


def test_an_optimizer_has_its_own_decay_and_may_move_a_part():
    model = make_model()
    before = weights_of(model)
    part = torch.optim.AdamW(model.blocks[0].parameters(), weight_decay=0.0)
    quiet_fit(model, windows(), max_steps=2, optimizer=part, weight_decay=99.0)
    moved = {n for n, w in weights_of(model).items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if n.startswith("blocks.0.")}
    assert part.param_groups[0]["weight_decay"] == 0.0


def test_an_optimizer_of_another_model_is_refused():
    model, other = make_model(), make_model()
    before = weights_of(model)
    for foreign in (configure_optimizer(other, 1e-3),
                    torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))])):
        with pytest.raises(ValueError, match="not this model's"):
            quiet_fit(model, windows(), max_steps=1, optimizer=foreign)
    assert_same(model, before)


def test_frozen_parameters_stay_and_have_no_gradient():
    model = make_model()
    model.blocks[0].requires_grad_(False)
    model.token_embedding.requires_grad_(False)
    before = weights_of(model)
    quiet_fit(model, windows(), max_steps=3)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name
        assert weight.grad is None


def test_warmup_cosine_by_hand():
    rate = partial(cosine_lr_with_warmup, lr=2.0, min_lr=0.4, warmup_steps=4, total_steps=12)
    assert [rate(s) for s in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert rate(8) == pytest.approx(1.2) and rate(12) == pytest.approx(0.4)
    assert rate(99) == pytest.approx(0.4)
    assert cosine_lr_with_warmup(1, lr=1.0, min_lr=0.1, warmup_steps=0, total_steps=1) == 0.1
    history = quiet_fit(make_model(), windows(), max_steps=6, lr=2e-3, warmup_steps=2)
    expected = [cosine_lr_with_warmup(s, lr=2e-3, min_lr=2e-4, warmup_steps=2, total_steps=6)
                for s in range(1, 7)]
    assert history.frame["lr"].dropna().tolist() == expected


# ---- fit


def test_fit_learns_and_its_history_adds_up():
    model, seen = make_model(), []
    history = quiet_fit(model, windows(), epochs=10, lr=1e-2, val_loader=windows(5), eval_every=10,
                        metrics=lambda m: {"half": 0.5}, log=seen.append)
    frame = history.frame
    assert frame["step"].tolist() == list(range(41)) and seen == history.records
    assert history.last("train_loss") < 0.85 * history.records[1]["train_loss"]
    assert frame["tokens"].iloc[-1] == 10 * 55 and not history.interrupted
    assert frame["epoch"].tolist()[1:9] == [0] * 4 + [1] * 4
    assert frame.loc[frame["val_loss"].notna(), "step"].tolist() == [0, 10, 20, 30, 40]
    assert history.last("half") == 0.5
    for column in ("train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s"):
        assert column in frame
    assert history.last("val_loss") == pytest.approx(evaluate_loss(model, windows(5)), rel=1e-6)


def test_epochs_with_accumulate_see_every_batch_once():
    history = quiet_fit(make_model(), windows(), epochs=1, accumulate=3)
    assert history.last("step") == 2 and history.last("tokens") == 55
    assert plan_steps(range(4), 1, None, 3) == (2, 1) and plan_steps(range(4), 3, None, 2) == (6, 2)


def test_fewer_steps_than_a_pass():
    assert quiet_fit(make_model(), windows(), max_steps=2).last("tokens") == 30


def test_a_loader_of_one_batch():
    history = quiet_fit(make_model(), unequal_batches()[:1], max_steps=3)
    assert history.frame["epoch"].tolist() == [0, 0, 1, 2]


class Endless(IterableDataset):
    def __iter__(self):
        for start in range(0, 50, 5):
            yield TOKENS[start:start + 5], TOKENS[start + 1:start + 6]


def test_loaders_that_do_not_know_their_length():
    loader = DataLoader(Endless(), batch_size=4)
    assert quiet_fit(make_model(), loader, max_steps=5).last("epoch") == 1
    with pytest.raises(ValueError, match="max_steps"):
        quiet_fit(make_model(), (batch for batch in unequal_batches()), epochs=1)


def test_a_loader_that_can_be_read_only_once():
    once = (batch for batch in unequal_batches())
    with pytest.raises(ValueError, match="only once"):
        quiet_fit(make_model(), once, max_steps=3)
    assert quiet_fit(make_model(), iter(unequal_batches()), max_steps=2).last("step") == 2


@pytest.mark.parametrize("how", [{"epochs": 1}, {"max_steps": 3}])
def test_an_empty_loader(how):
    short = DataLoader(TokenDataset(TOKENS[:8], 5), batch_size=3, drop_last=True)
    for loader in ([], short):
        with pytest.raises(ValueError, match="empty"):
            quiet_fit(make_model(), loader, **how)


@pytest.mark.parametrize("how", [
    {}, {"epochs": 1, "max_steps": 1}, {"epochs": 0}, {"max_steps": 0}, {"max_steps": -3},
    {"epochs": 1.5}, {"max_steps": 1, "accumulate": 0}, {"max_steps": math.inf}])
def test_epochs_and_max_steps_misused(how):
    model = make_model()
    before = weights_of(model)
    with pytest.raises(ValueError, match="epochs|max_steps|accumulate"):
        quiet_fit(model, windows(), **how)
    assert_same(model, before)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_before_the_weights_move(bad, tmp_path):
    model, steps, kept = make_model(), [], {}

    def breaks(model, batch):
        loss, n = lm_loss(model, batch)
        steps.append(0)
        if len(steps) == 3:
            kept.update(weights_of(model))
            if bad == "loss":
                return loss * math.nan, n
            return loss + (model.final_norm.bias * 0).sum().sqrt(), n    # finite, its slope is not
        return loss, n

    with pytest.raises(FloatingPointError, match=rf"(?i)the {bad} is (nan|inf) at step 3.* 0\.\d+"):
        quiet_fit(model, windows(), loss_fn=breaks, max_steps=6, lr=0.01,
                  checkpoint=tmp_path / "c.pt", checkpoint_every=2)
    assert kept
    assert_same(model, kept)
    assert all(p.grad is None for p in model.parameters())
    history = quiet_fit(model, windows(), max_steps=6, resume=tmp_path / "c.pt")
    assert history.records[2]["step"] == 2 and history.last("step") == 6


def test_progress_off_prints_nothing(capfd):
    quiet_fit(make_model(), windows(), max_steps=3, val_loader=windows())
    assert capfd.readouterr() == ("", "")
    fit(make_model(), windows(), max_steps=3)
    assert "3/3" in capfd.readouterr().err


def test_bfloat16_trains_in_float32_weights():
    runs = {}
    for precision in ("float32", "bfloat16"):
        model = make_model()
        runs[precision] = quiet_fit(model, windows(), max_steps=8, accumulate=2, lr=1e-2,
                                    precision=precision, val_loader=windows(1), eval_every=3)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    a, b = (run.last("train_loss") for run in runs.values())
    assert a != b and abs(a - b) < 0.1
    x = TOKENS[:5][None]
    with autocast_context("bfloat16", torch.device("cpu")):
        assert model(x).dtype == torch.bfloat16
    with autocast_context("auto", torch.device("cpu")):
        fast = has_fast_bfloat16(torch.device("cpu"))
        assert model(x).dtype == (torch.bfloat16 if fast else torch.float32)
    with pytest.raises(ValueError, match="float16"):
        quiet_fit(make_model(), windows(), max_steps=1, precision="float16")


def test_a_compiled_model_trains_and_its_files_fit_the_plain_one(tmp_path):
    plain = make_model(dropout=0.1)
    quiet_fit(plain, windows(), max_steps=5)
    model = make_model(dropout=0.1)
    history = quiet_fit(torch.compile(model, backend="eager"), windows(), max_steps=3,
                        val_loader=windows(2), sample=lambda m: type(m).__name__,
                        checkpoint=tmp_path / "c.pt")
    assert history.samples[0] == (0, "GPT") and model.training
    resumed = make_model(dropout=0.1)
    assert quiet_fit(resumed, windows(), max_steps=5, resume=tmp_path / "c.pt").last("step") == 5
    for name, weight in weights_of(resumed).items():    # the schedules differ in length
        torch.testing.assert_close(weight, weights_of(plain)[name], rtol=0, atol=0.01)


def test_compile_is_an_option(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    model = make_model()
    quiet_fit(model, windows(), max_steps=1)
    quiet_fit(model, windows(), max_steps=1, compile=True)
    assert compiled == [model]


def test_fit_trains_where_it_is_told():
    model = make_model()
    quiet_fit(model, windows(), max_steps=1, device="cpu")
    assert model.final_norm.weight.device.type == "cpu"


# ---- looking, stopping, going on


def looking(train_loader) -> dict:
    """Arguments of fit that evaluate, measure and sample, and draw random numbers all the while."""
    val_loader = DataLoader(TokenDataset(TOKENS, 5), batch_size=2, shuffle=True,
                            generator=torch.Generator().manual_seed(9))

    def metrics(model):
        for batch in train_loader:                      # as chapter 6 measures training accuracy
            loss, n = lm_loss(model, batch)
            break
        return {"on_train": loss.item() / n, "noise": torch.rand(1)}

    def sample(model):
        return str(generate(model, [1, 2], 3, make_sampler(1.0)))

    return {"val_loader": val_loader, "eval_every": 2, "eval_batches": 1, "metrics": metrics,
            "sample": sample, "sample_every": 3}


def shuffled_globally() -> DataLoader:
    return DataLoader(TokenDataset(TOKENS, 5), batch_size=3, shuffle=True)


@pytest.mark.parametrize("make", [windows, shuffled_globally, unequal_batches])
def test_looking_changes_nothing(make):
    loader, other = make(), make()
    quiet = make_model(dropout=0.2)
    quiet_fit(quiet, loader, max_steps=9)
    watched = make_model(dropout=0.2)
    history = quiet_fit(watched, other, max_steps=9, **looking(other))
    assert_same(quiet, watched)
    assert [step for step, _ in history.samples] == [0, 3, 6, 9]


@pytest.mark.parametrize("make", [windows, shuffled_globally, unequal_batches])
@pytest.mark.parametrize(("accumulate", "stop"), [(1, 1), (1, 4), (1, 6), (3, 1), (3, 4)])
def test_stop_and_resume_is_the_uninterrupted_run(make, accumulate, stop, tmp_path):
    def run(model, **how):
        loader = make()
        return quiet_fit(model, loader, max_steps=8, accumulate=accumulate, warmup_steps=3,
                         **looking(loader), **how)

    def interrupt(record):
        if record["step"] == stop:
            signal.raise_signal(signal.SIGINT)

    whole = make_model(dropout=0.2)
    expected = run(whole)
    halted = make_model(dropout=0.2)
    first = run(halted, checkpoint=tmp_path / "c.pt", log=interrupt)
    assert first.interrupted and first.last("step") == stop
    resumed = make_model(seed=5, dropout=0.2)           # other weights, other random numbers
    history = run(resumed, resume=tmp_path / "c.pt")
    assert not history.interrupted
    assert_same(whole, resumed)
    assert timeless(history) == timeless(expected)
    assert history.samples == expected.samples


def test_an_interrupt_in_the_middle_of_a_step_waits_for_its_end(tmp_path):
    def loss_fn(model, batch):
        calls.append(0)
        if len(calls) == 5:                             # the second batch of the third step
            signal.raise_signal(signal.SIGINT)
        return lm_loss(model, batch)

    calls, before = [], signal.getsignal(signal.SIGINT)
    model = make_model()
    history = quiet_fit(model, windows(), loss_fn=loss_fn, max_steps=9, accumulate=2,
                        checkpoint=tmp_path / "c.pt")
    assert len(calls) == 6 and history.interrupted and history.last("step") == 3
    assert signal.getsignal(signal.SIGINT) is before
    kept = torch.load(tmp_path / "c.pt", weights_only=True)
    assert kept["step"] == 3
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, kept["model"][name])


def test_an_interrupt_before_the_first_step(tmp_path):
    model = make_model()
    before = weights_of(model)
    history = quiet_fit(model, windows(), max_steps=2, val_loader=windows(),
                        checkpoint=tmp_path / "c.pt",
                        log=lambda r: signal.raise_signal(signal.SIGINT))
    assert history.interrupted and [r["step"] for r in history.records] == [0]
    assert history.last("val_loss") > 0
    assert_same(model, before)
    whole = make_model(dropout=0.2)
    expected = quiet_fit(whole, windows(), max_steps=4, val_loader=windows())
    quiet_fit(make_model(dropout=0.2), windows(), max_steps=4, val_loader=windows(),
              checkpoint=tmp_path / "d.pt", log=lambda r: signal.raise_signal(signal.SIGINT))
    resumed = make_model(seed=5, dropout=0.2)
    history = quiet_fit(resumed, windows(), max_steps=4, val_loader=windows(),
                        resume=tmp_path / "d.pt")
    assert_same(whole, resumed)
    assert timeless(history) == timeless(expected)


def test_the_checkpoint_is_there_whenever_fit_returns(tmp_path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    model = make_model()
    quiet_fit(model, windows(), max_steps=3, checkpoint=first)
    quiet_fit(make_model(1), windows(), max_steps=3, resume=first, checkpoint=second)  # no step
    again = make_model(2)
    assert load_checkpoint(second, *parts(again)) == 3
    assert_same(model, again)


def test_an_interrupt_that_comes_with_the_last_step_interrupts_nothing(tmp_path):
    history = quiet_fit(make_model(), windows(), max_steps=2, checkpoint=tmp_path / "c.pt",
                        log=lambda r: r["step"] == 2 and signal.raise_signal(signal.SIGINT))
    assert not history.interrupted and (tmp_path / "c.pt").is_file()


def test_the_second_interrupt_is_one():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), InterruptFlag() as flag:
        signal.raise_signal(signal.SIGINT)
        assert flag.raised
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_in_a_thread():
    done = []
    thread = threading.Thread(
        target=lambda: done.append(quiet_fit(make_model(), windows(), max_steps=2)))
    thread.start()
    thread.join()
    assert done[0].last("step") == 2


def test_a_run_can_be_made_longer(tmp_path):
    model = make_model()
    quiet_fit(model, windows(), max_steps=3, checkpoint=tmp_path / "c.pt")
    before = weights_of(model)
    same = quiet_fit(make_model(1), windows(), max_steps=3, resume=tmp_path / "c.pt")
    assert same.last("step") == 3 and len(same.records) == 4
    longer = make_model(1)
    assert quiet_fit(longer, windows(), max_steps=5, resume=tmp_path / "c.pt").last("step") == 5
    assert any(not torch.equal(w, before[n]) for n, w in weights_of(longer).items())


def test_numpy_numbers_in_settings_and_metrics_survive_the_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    how = {"lr": np.float64(1e-3), "metrics": lambda m: {"x": np.float64(0.25)}}
    quiet_fit(make_model(), windows(), max_steps=2, checkpoint=path, **how)
    history = quiet_fit(make_model(), windows(), max_steps=3, resume=path, **how)
    assert history.last("x") == 0.25 and history.last("step") == 3


def test_history_with_nothing_and_with_something():
    empty = History()
    assert empty.frame.empty and empty.plot(title="nothing").get_title() == "nothing"
    with pytest.raises(KeyError, match="train_loss"):
        empty.last("train_loss")
    history = quiet_fit(make_model(), windows(), max_steps=3, val_loader=windows())
    with pytest.raises(KeyError, match="'acuracy'.*val_loss"):
        history.last("acuracy")
    ax = history.plot()
    assert [line.get_label() for line in ax.lines] == ["train loss", "val loss"]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3] and list(ax.lines[1].get_xdata()) == [0, 3]
    assert "step" in ax.get_xlabel() and "nats" in ax.get_ylabel()
    matplotlib.pyplot.close("all")


# ---- checkpoints


def parts(model: nn.Module, loader=None) -> tuple:
    return model, configure_optimizer(model, 1e-3), ResumableLoader(loader or windows()), History()


def saved(path: Path, **changes) -> Path:
    save_checkpoint(path, *parts(make_model(**changes)), 7)
    return path


def test_checkpoint_of_another_config_names_the_difference(tmp_path):
    path = saved(tmp_path / "c.pt")
    model = make_model(n_layer=1, dropout=0.5)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"c\.pt.*dropout: 0\.0 there, 0\.5 here; n_layer: 2 th"):
        quiet_fit(model, windows(), max_steps=9, resume=path)
    assert_same(model, before)


def test_checkpoint_of_another_kind_of_model(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, *parts(nn.Linear(2, 2)), 1)
    with pytest.raises(ValueError, match="other shapes"):
        load_checkpoint(path, *parts(nn.Linear(2, 3)))
    with pytest.raises(ValueError, match="0.bias"):
        load_checkpoint(path, *parts(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(path, *parts(make_model()))
    assert load_checkpoint(path, *parts(nn.Linear(2, 2))) == 1


def test_checkpoint_of_other_trained_parameters_leaves_the_model(tmp_path):
    path = saved(tmp_path / "c.pt")
    model = make_model(seed=1)
    model.blocks[0].requires_grad_(False)
    before = weights_of(model)
    with pytest.raises(ValueError, match="requires_grad"):
        quiet_fit(model, windows(), max_steps=9, resume=path)
    assert_same(model, before)


def test_checkpoint_with_less_data_leaves_the_model(tmp_path):
    path = tmp_path / "c.pt"
    quiet_fit(make_model(), windows(), max_steps=3, checkpoint=path)
    model = make_model(seed=1)
    before = weights_of(model)
    with pytest.raises(ValueError, match="fewer than the 3 batches"):
        quiet_fit(model, unequal_batches(), max_steps=9, resume=path)
    assert_same(model, before)


def test_checkpoint_that_is_missing_damaged_or_foreign(tmp_path):
    path, model = saved(tmp_path / "c.pt"), make_model(seed=1)
    before = weights_of(model)
    with pytest.raises(FileNotFoundError, match=r"no\.pt"):
        load_checkpoint(tmp_path / "no.pt", *parts(model))
    whole = path.read_bytes()
    files = {"cut": whole[:len(whole) // 2], "empty": b"", "text": b"hello"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    flipped = bytearray(whole)
    flipped[whole.index(make_model().token_embedding.weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)         # one bit of one number
    torch.save({"model": {}, "step": 3, "config": None}, tmp_path / "foreign")
    torch.save([1, 2], tmp_path / "list")
    for name in (*files, "flipped", "foreign", "list"):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint"):
            load_checkpoint(tmp_path / name, *parts(model))
    assert_same(model, before)


class Bomb:
    """A pickle of this writes a file where it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    target = tmp_path / "it ran"
    torch.save({"step": 1, "config": None, "model": Bomb(target)}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pickle").write_bytes(pickle.dumps(Bomb(target)))
    for name in ("bomb.pt", "bomb.pickle"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            load_checkpoint(tmp_path / name, *parts(make_model()))
    assert not target.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert target.exists()                              # the bomb was a real one


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("[enforce fail at inline_container.cc:664]")])
def test_full_disk_leaves_the_older_checkpoint(error, tmp_path, monkeypatch):
    path = saved(tmp_path / "c.pt")
    before = path.read_bytes()

    def full(state, temporary):
        Path(temporary).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"c\.pt could not be written .*disk full"):
        saved(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


@contextmanager
def small_files(limit: int):
    """No file may grow beyond the limit: the nearest thing to a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_really_full(tmp_path, tokenizer):
    path = saved(tmp_path / "a" / "c.pt")
    model = make_model(vocab_size=300)
    save_pretrained(model, tokenizer, tmp_path / "b")
    files = [path, *sorted((tmp_path / "b").iterdir())]
    before = [file.read_bytes() for file in files]
    with small_files(20_000):
        with pytest.raises(OSError, match="disk full"):
            saved(path)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(perturb(model), tokenizer, tmp_path / "b")
    with small_files(1_000), pytest.raises(OSError):
        save_pretrained(perturb(model), tokenizer, tmp_path / "b")
    assert [file.read_bytes() for file in files] == before
    assert len(list(tmp_path.rglob("*"))) == len(files) + 2


def test_replacing_puts_the_new_file_in_one_move(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("newer")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file"]
    inode = path.stat().st_ino
    with atomic_write(path) as temporary:
        temporary.write_text("newest")
        made = temporary.stat().st_ino
    assert path.stat().st_ino == made != inode          # moved, not copied: never half-written


# ---- choosing words


def test_bend_by_hand():
    scores = torch.tensor([[math.log(4), math.log(3), math.log(2), math.log(1)]])

    def is_close(probabilities, *expected):
        torch.testing.assert_close(probabilities, torch.tensor([expected]))

    is_close(next_token_probs(scores), 0.4, 0.3, 0.2, 0.1)
    is_close(next_token_probs(scores, temperature=0.5), 16 / 30, 9 / 30, 4 / 30, 1 / 30)
    is_close(next_token_probs(scores, top_k=2), 4 / 7, 3 / 7, 0.0, 0.0)
    is_close(next_token_probs(scores, top_p=0.65), 4 / 7, 3 / 7, 0.0, 0.0)
    is_close(next_token_probs(scores, top_p=0.75), 4 / 9, 3 / 9, 2 / 9, 0.0)
    is_close(next_token_probs(scores, top_k=3, top_p=0.5), 4 / 7, 3 / 7, 0.0, 0.0)    # 4/9 of three are below
    is_close(next_token_probs(scores, top_p=1e-9), 1.0, 0.0, 0.0, 0.0)
    is_close(next_token_probs(scores.flip(1), top_k=1), 0.0, 0.0, 0.0, 1.0)


def reference(row: list[float], temperature: float, top_k: int | None, top_p: float | None):
    """What bend should give, in plain Python, and how near top_p comes to a boundary."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    shares = {i: math.exp((row[i] - row[order[0]]) / temperature) for i in order}
    total, kept, reached, distance = sum(shares.values()), [], 0.0, 1.0
    for i in order:
        if top_p is not None:
            distance = min(distance, abs(reached - top_p))
        if top_p is None or top_p == 1 or reached < top_p:
            kept.append(i)
        reached += shares[i] / total
    whole = sum(shares[i] for i in kept)
    return [shares[i] / whole if i in kept else 0.0 for i in range(len(row))], kept, distance


one_logit = st.floats(-20, 20, width=16) | st.sampled_from([0.0, 1.0, -math.inf])
logit_rows = st.lists(one_logit, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
bends = {"temperature": st.floats(0.05, 20), "top_k": st.none() | st.integers(1, 15),
         "top_p": st.none() | st.floats(1e-6, 1.0)}


@settings(deadline=None, max_examples=150)
@given(row=logit_rows, **bends)
def test_bend_keeps_the_smallest_set_and_sums_to_one(row, temperature, top_k, top_p):
    expected, kept, distance = reference(row, temperature, top_k, top_p)
    assume(distance > 1e-5 or top_p == 1)
    found = next_token_probs(torch.tensor([row]), temperature, top_k, top_p)[0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert {i for i, p in enumerate(found.tolist()) if p > 0} <= set(kept)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(logit_rows, min_size=1, max_size=4), temperature=st.floats(0.05, 20),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_top_k_of_one_is_greedy_even_among_equals(rows, temperature, dtype):
    width = max(map(len, rows))
    logits = torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows], dtype=dtype)
    torch.manual_seed(0)
    assert torch.equal(make_sampler(temperature, top_k=1)(logits), greedy(logits))
    assert torch.equal(make_sampler(0, top_k=3)(logits), greedy(logits))


def test_equals_at_the_border_are_kept_by_their_ids():
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert (next_token_probs(scores, top_k=3) > 0).tolist() == [[True, True, False, True, False],
                                                    [True, True, True, False, False]]
    assert (next_token_probs(scores[1:], top_p=0.39) > 0).tolist() == [[True, True, False, False, False]]


def test_top_p_of_one_and_top_k_above_the_vocabulary_keep_all():
    torch.manual_seed(0)
    scores = torch.randn(4, 50_000) * 2                 # sums of so many shares pass 1 by rounding
    for kept in (next_token_probs(scores, top_p=1.0), next_token_probs(scores, top_k=60_000), next_token_probs(scores, top_k=50_000)):
        assert torch.equal(kept, next_token_probs(scores)) and (kept > 0).all()


def test_low_temperatures_do_not_overflow():
    scores = torch.tensor([[5.0, -3.0, 80.0]])
    for temperature in (1e-3, 1e-30, 1e-37):
        assert next_token_probs(scores, temperature).tolist() == [[0.0, 0.0, 1.0]]
        assert make_sampler(temperature, seed=0)(scores).tolist() == [2]


def test_half_precision_logits_are_bent_in_float32():
    scores = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert next_token_probs(scores, 0.7, 20, 0.9).dtype == torch.float32
    assert torch.equal(next_token_probs(scores, 0.7, 20, 0.9), next_token_probs(scores.float(), 0.7, 20, 0.9))


def test_sampler_draws_by_the_probabilities():
    scores = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    drawn = torch.bincount(make_sampler(seed=1)(scores), minlength=3) / 20_000
    torch.testing.assert_close(drawn, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.02)


def test_seeds():
    scores = torch.zeros(64, 50)
    sample, again, other = make_sampler(seed=1), make_sampler(seed=1), make_sampler(seed=2)
    state = torch.get_rng_state()
    first = sample(scores)
    assert torch.equal(first, again(scores)) and not torch.equal(first, other(scores))
    assert not torch.equal(first, sample(scores))         # it goes on, and does not start anew
    assert torch.equal(state, torch.get_rng_state())    # the global one is untouched
    torch.manual_seed(3)
    drawn = make_sampler()(scores)
    torch.manual_seed(3)
    assert torch.equal(drawn, make_sampler()(scores))


@pytest.mark.parametrize("how", [
    {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": 0},
    {"top_k": -5}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": math.nan},
    {"temperature": 0, "top_k": 0}])
def test_sampler_refuses(how):
    name = "top_k" if "top_k" in how else next(iter(how))
    with pytest.raises(ValueError, match=f"{name}.*not {how[name]}"):
        make_sampler(**how)


def test_generate_with_a_sampler_beyond_the_vocabulary_in_a_batch():
    rows = generate(make_model(), [[1, 2], [3]], 12, make_sampler(0.9, top_k=99, top_p=0.9, seed=0),
                    eos_token_id=4)
    assert all(row[-1] == 4 or len(row) == n + 12 for row, n in zip(rows, (2, 1), strict=True))


# ---- weight files


TEXT = "low lower lowest slow slowly is the tower, don't lower it, 12 flowers flow over\n" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXT, 280)


def base_model(tokenizer, **changes) -> GPT:
    shape = {"vocab_size": tokenizer.n_vocab + 3, "context_length": 12, "n_embd": 24, "n_head": 3,
             "bos_token_id": eos_token_id(tokenizer), "eos_token_id": eos_token_id(tokenizer)}
    return perturb(make_model(**shape | changes)).eval()


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    save_pretrained(base_model(tokenizer), tokenizer, tmp_path / "gpt")
    return tmp_path / "gpt"


IDS = torch.arange(24).view(2, 12) * 7 % 280


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"qkv_bias": False},
                                     {"norm_eps": 1e-3, "dropout": 0.3}])
def test_transformers_opens_what_we_save(changes, tmp_path, tokenizer):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model = base_model(tokenizer, **changes)
    save_pretrained(model, tokenizer, tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
        again, _ = load_pretrained(tmp_path)
        torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=1e-6)
    tied = again.lm_head.weight is again.token_embedding.weight
    assert tied == model.config.tie_word_embeddings and not again.training
    wanted = {**vars(model.config), "qkv_bias": True}   # the format has no word for its absence
    assert vars(again.config) == wanted
    assert theirs.config.eos_token_id == eos_token_id(tokenizer)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("lower towers don't slow 123", " low\n\nlow  ", "żółw 🐢"):
        assert opened(text)["input_ids"] == encode(tokenizer, text)
    assert opened.eos_token_id == eos_token_id(tokenizer)


@pytest.fixture(scope="module")
def theirs(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(**changes):
        torch.manual_seed(0)
        shape = {"vocab_size": tokenizer.n_vocab, "n_positions": 12, "n_embd": 24, "n_head": 3,
                 "n_layer": 2, "bos_token_id": eos_token_id(tokenizer), "eos_token_id": eos_token_id(tokenizer)}
        return perturb(GPT2LMHeadModel(GPT2Config(**shape | changes))).eval()

    return build


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False},
                                     {"n_inner": 96, "layer_norm_epsilon": 1e-3}])
def test_we_open_what_transformers_saves(changes, theirs, tmp_path, tokenizer):
    model = theirs(**changes)
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    ours, opened = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert ours.config.tie_word_embeddings == changes.get("tie_word_embeddings", True)
    assert opened.encode_ordinary("lower") == encode(tokenizer, "lower")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_hubs_old_file(prefix, theirs, tmp_path, tokenizer):
    """Bare names, causal masks among the weights, an old config, as openai-community/gpt2 has."""
    model = theirs()
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    state = {name.replace("transformer.", prefix): tensor.clone()
             for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for i in range(2):
        state[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        state[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    config = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
              "attn_pdrop": 0.1, "embd_pdrop": 0.1, "initializer_range": 0.02, "n_ctx": 12,
              "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 24, "n_head": 3,
              "n_layer": 2, "resid_pdrop": 0.1, "vocab_size": tokenizer.n_vocab,
              "bos_token_id": eos_token_id(tokenizer), "eos_token_id": eos_token_id(tokenizer)}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ours, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert ours.config.context_length == 12 and ours.config.eos_token_id == eos_token_id(tokenizer)


def test_files_of_half_precision_open_as_float32(tmp_path, tokenizer):
    model = base_model(tokenizer)
    for dtype in (torch.float16, torch.bfloat16):
        save_pretrained(model, tokenizer, tmp_path, dtype=dtype)
        assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
        again, _ = load_pretrained(tmp_path)
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        torch.testing.assert_close(again.final_norm.weight,
                                   model.final_norm.weight.detach().to(dtype).float())
    half, _ = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(IDS).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}      # saving changed nothing


def test_a_loaded_model_trains_and_is_saved_where_it_came_from(folder, tokenizer):
    before = (folder / "model.safetensors").read_bytes()
    model, opened = load_pretrained(folder)
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    quiet_fit(model, windows(), max_steps=2, lr=0.1)
    assert (folder / "model.safetensors").read_bytes() == before     # the file is not the memory
    other = weights_of(load_pretrained(folder)[0])
    assert any(not torch.equal(w, other[n]) for n, w in weights_of(model).items())
    save_pretrained(model, opened, folder)
    assert_same(load_pretrained(folder)[0], model)
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_wrapped_models_are_saved_as_they_are_inside(folder, tokenizer):
    model, _ = load_pretrained(folder)
    save_pretrained(torch.compile(model, backend="eager"), tokenizer, folder)
    assert_same(load_pretrained(folder)[0], model)


def test_the_order_of_keys_and_the_map_are_whole(tokenizer):
    for changes in ({}, {"tie_word_embeddings": False}, {"qkv_bias": False}):
        model = base_model(tokenizer, **changes)
        assert set(hf_key_map(model.config)) == set(weights_of(model))
        assert len({theirs for theirs, _ in hf_key_map(model.config).values()}) == len(
            hf_key_map(model.config))


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def test_every_wrong_name_and_shape_is_told(folder):
    def change(state):
        for i in range(2):
            for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.bias"):
                del state[f"transformer.h.{i}.{name}"]
        state["transformer.h.7.extra"] = torch.ones(1)
        state["score.weight"] = torch.ones(2)
        state["transformer.wpe.weight"] = torch.ones(13, 24)
        weight = state["transformer.h.0.mlp.c_fc.weight"]
        state["transformer.h.0.mlp.c_fc.weight"] = weight.t().contiguous()

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    message = str(caught.value)
    for i in range(2):
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.bias"):
            assert f"h.{i}.{name} is missing" in message
    assert "h.7.extra is unexpected" in message and "score.weight is unexpected" in message
    assert "wpe.weight has shape (13, 24), expected (12, 24)" in message
    assert "h.0.mlp.c_fc.weight has shape" in message and str(folder) in message


def test_an_untied_model_needs_its_head(tmp_path, tokenizer):
    save_pretrained(base_model(tokenizer, tie_word_embeddings=False), tokenizer, tmp_path)
    rewrite(tmp_path, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        load_pretrained(tmp_path)


def test_names_with_and_without_the_prefix_in_one_file(folder):
    expected = weights_of(load_pretrained(folder)[0])

    def change(state):
        state["wte.weight"] = state.pop("transformer.wte.weight")

    rewrite(folder, change)
    assert_same(load_pretrained(folder)[0], expected)


def test_weights_that_are_no_safetensors(folder, tmp_path):
    path = folder / "model.safetensors"
    whole, target = path.read_bytes(), tmp_path / "it ran"
    torch.save({"wte.weight": Bomb(target)}, tmp_path / "pickle")
    for content in (b"", b"hello", whole[:100], whole[:-10], (tmp_path / "pickle").read_bytes(),
                    pickle.dumps(Bomb(target)), b"\xff" * 64, whole + b"tail"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_pretrained(folder)
    assert not target.exists()


def test_pickled_weights_are_never_opened(folder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    torch.save({"wte.weight": Bomb(tmp_path / "it ran")}, folder / "pytorch_model.bin")
    load_pretrained(folder)                             # not even beside a good file
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load_pretrained(folder)
    assert not (tmp_path / "it ran").exists()


def set_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}), encoding="utf-8")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "llama"}, "'llama'; expected 'gpt2'"),
    ({"model_type": "drop"}, "type None"),
    ({"activation_function": "gelu"}, "'gelu'; this series builds 'gelu_new'"),
    ({"activation_function": "relu"}, "relu"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"n_inner": 95}, "n_inner = 95"),
    ({"n_head": "drop", "n_embd": "drop"}, "lacks n_embd, n_head"),
    ({"n_positions": "drop"}, "lacks n_positions"),
    ({"n_head": 5}, "multiple of n_head"),
    ({"n_layer": "2"}, "n_layer must be"),
    ({"eos_token_id": 50256}, "eos_token_id 50256 is outside"),
    ({"eos_token_id": [279]}, "does not describe"),
    ({"vocab_size": 283, "n_embd": 48}, "wte.weight has shape"),
])
def test_configs_of_other_models(changes, message, folder):
    set_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_config_that_is_none(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not a config"):
        load_config(folder / "config.json")


def test_gpt2s_own_config_is_our_gpt2(tmp_path):
    from transformers import GPT2Config

    from helpers.gpt import GPT2_CONFIGS

    for name, shape in GPT2_CONFIGS.items():
        GPT2Config(n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head).save_pretrained(
            tmp_path)
        assert load_config(tmp_path / "config.json") == shape, name


def test_a_tokenizer_larger_than_the_model(folder, tmp_path, tokenizer):
    larger = train_bpe(TEXT, 290)
    save_tokenizer(larger, folder)
    with pytest.raises(ValueError, match="290 tokens, the model 283"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="290 tokens, the model 283"):
        save_pretrained(base_model(tokenizer), larger, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_pretrained(folder)


def test_a_model_that_is_nowhere(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        load_pretrained("no such model")


def test_the_shipped_model_opens_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_pretrained("tiny")
    assert model.config.eos_token_id == eos_token_id(tokenizer) and model.config.vocab_size == 8192
    same, _ = load_pretrained("data/models/tiny")
    assert_same(same, model)
    assert model.n_params == sum(p.numel() for p in model.parameters())


HUB = """
    import os, sys, torch
    from pathlib import Path
    from helpers.pretrained import load_pretrained

    def rss():
        lines = Path("/proc/self/status").read_text().splitlines()
        kinds = dict(line.split(":", 1) for line in lines)
        return {k: int(kinds[k].split()[0]) / 1024 for k in ("RssAnon", "VmHWM")}

    for name in ("gpt2", "openai-community/gpt2"):
        model, tokenizer = load_pretrained(name)
        torch.save(model(torch.arange(8)[None]).detach(), sys.argv[1])
        print(tokenizer.n_vocab, model.config.eos_token_id)
    try:
        load_pretrained("gpt2-medium")
    except FileNotFoundError as error:
        print("OFFLINE", str(error).replace(chr(10), " "))
    if Path("/proc/self/status").exists():
        before = rss()
        big, _ = load_pretrained(sys.argv[2])
        size = big.n_params * 4 / 2**20
        after = rss()
        print("COPIES", (after["RssAnon"] - before["RssAnon"]) / size,
              (after["VmHWM"] - before["VmHWM"]) / size, size)
    import time
    import huggingface_hub.constants as constants
    constants.HF_HUB_OFFLINE = False
    time.sleep = lambda seconds: None           # the hub's client tries again, later and later
    try:
        load_pretrained("gpt2-large")
    except FileNotFoundError as error:
        print("NO NETWORK", str(error).replace(chr(10), " "))
"""


def test_the_hubs_cache_offline_and_the_memory_of_loading(folder, tmp_path, tokenizer):
    """The real hub client on a cache laid out as it lays it out; no name leaves this machine."""
    sha = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    cache = tmp_path / "home" / "hub" / "models--openai-community--gpt2"
    for name in ("blobs", "refs", f"snapshots/{sha}"):
        (cache / name).mkdir(parents=True)
    (cache / "refs" / "main").write_text(sha)
    for file in folder.iterdir():
        shutil.copy(file, cache / "blobs" / file.name)
        (cache / "snapshots" / sha / file.name).symlink_to(Path("../../blobs") / file.name)
    large = make_model(vocab_size=300, n_embd=768, n_head=12, n_layer=4)
    save_pretrained(large, tokenizer, tmp_path / "large", dtype=torch.float16)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1",
                                "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", textwrap.dedent(HUB), str(tmp_path / "out.pt"),
               str(tmp_path / "large")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stdout.splitlines()
    assert first == second == f"{tokenizer.n_vocab} {eos_token_id(tokenizer)}"
    expected = load_pretrained(folder)[0](torch.arange(8)[None])
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)
    lines = dict((line.split()[0], line) for line in lines)
    for word in ("OFFLINE", "NO"):
        assert "openai-community/gpt2-" in lines[word] and "network" in lines[word]
    if "COPIES" in lines:
        kept, peak, size = map(float, lines["COPIES"].split()[1:])
        assert size > 100 and kept < 1.15 and peak < 1.8    # the file itself is half a copy


def test_module_exports_what_later_chapters_use():
    for name in ("fit", "lm_loss", "IGNORE_INDEX", "sampler", "load_pretrained", "save_pretrained"):
        assert name in pretraining.__all__


def test_weights_in_another_memory_order_train_to_the_same() -> None:
    """The fused AdamW of the CPU ruins them without a word (torch 2.13): not used there."""
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    turned = copy.deepcopy(plain)
    turned.weight.data = turned.weight.data.t().contiguous().t()
    x = torch.randn(8, 6)
    for layer in (plain, turned):
        optimizer = configure_optimizer(layer, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(turned.weight, plain.weight)
