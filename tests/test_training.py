"""Chapter 5: the loss, the step, the training loop and its callbacks."""

import math
import signal
from functools import partial

import matplotlib
import pytest
import torch
from fitting import (
    TOKENS,
    assert_same,
    make_model,
    perturb,
    timeless,
    train,
    unequal_batches,
    weights_of,
    windows,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from helpers import training
from helpers.callbacks import Evaluate, ProgressBar
from helpers.data import TokenDataset
from helpers.training import (
    IGNORE_INDEX,
    Callback,
    History,
    TrainConfig,
    autocast_context,
    configure_optimizer,
    cosine_lr_with_warmup,
    eval_mode,
    evaluate_loss,
    fit,
    has_fast_bfloat16,
    lm_loss,
    to_device,
    train_step,
)

matplotlib.use("Agg")


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


def joined(batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def test_evaluate_loss_weighs_targets_and_not_batches():
    model, batches = make_model(), unequal_batches()
    whole = lm_loss(model, joined(batches))[0].item() / 12
    assert evaluate_loss(model, batches) == pytest.approx(whole, rel=1e-6)
    of_means = sum(evaluate_loss(model, [b]) for b in batches) / 2
    assert abs(whole - of_means) > 1e-3         # the two differ by more than rounding


def test_evaluate_loss_leaves_all_as_it_was():
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


def test_evaluate_loss_restores_the_mode_after_an_error():
    model = make_model()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        1 / 0  # noqa: B018
    assert model.training


def test_evaluate_loss_leaves_the_loader_where_it_was():
    model, loader = make_model(), windows()
    first = evaluate_loss(model, loader, max_batches=1)
    assert evaluate_loss(model, loader, max_batches=1) == first
    assert evaluate_loss(model, windows(), max_batches=1) == first


def test_evaluate_loss_max_batches_takes_no_more_than_that():
    taken = []

    def batches():
        for batch in unequal_batches():
            taken.append(batch)
            yield batch

    model = make_model()
    expected = evaluate_loss(model, unequal_batches()[:1])
    assert evaluate_loss(model, batches(), max_batches=1) == expected
    assert len(taken) == 1


@pytest.mark.parametrize("loader", [[], [(TOKENS[:5][None], torch.full((1, 5), IGNORE_INDEX))]])
def test_evaluate_loss_of_nothing(loader):
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
    train_step(model, batches, lm_loss, optimizer, max_grad_norm=None)
    return {name: before[name] - weight for name, weight in weights_of(model).items()}


def test_accumulated_unequal_batches_give_the_gradient_of_one_big_batch():
    batches = unequal_batches()
    ours = gradients(make_model().double(), batches)
    model = make_model().double()
    total, n = lm_loss(model, joined(batches))
    (total / n).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-5, atol=1e-7)


def test_fit_with_grad_accum_steps_equals_fit_on_the_big_batch():
    batches = unequal_batches()
    one, other = make_model().double(), make_model().double()
    a = train(one, batches, max_steps=4, grad_accum_steps=2)
    b = train(other, [joined(batches)], max_steps=4)
    assert a.last("train_loss") == pytest.approx(b.last("train_loss"), rel=1e-5)
    assert a.last("n_targets") == b.last("n_targets") == 48
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weight, weights_of(other)[name], rtol=0, atol=1e-4)


def test_gradients_that_were_there_before_do_not_count():
    model, batches = make_model(), unequal_batches()
    expected = gradients(make_model(), batches)
    lm_loss(model, batches[1])[0].backward()            # as a notebook's earlier cell may do
    for name, gradient in gradients(model, batches).items():
        assert torch.equal(gradient, expected[name]), name


def test_max_grad_norm_bounds_the_move_and_reports_the_unclipped_size():
    sizes = []
    for clip in (None, 1e-3):
        model = make_model()
        before = weights_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = train_step(model, unequal_batches(), lm_loss, optimizer, max_grad_norm=clip)
        moves = [before[n] - w for n, w in weights_of(model).items()]
        sizes.append(torch.stack([m.norm() for m in moves]).norm().item())
        assert seen["n_targets"] == 12
        assert seen["grad_norm"] == pytest.approx(sizes[0], rel=1e-4)
    assert sizes[0] > 0.1 and sizes[1] == pytest.approx(1e-3, rel=1e-2)


def test_a_step_on_batches_without_targets():
    empty = (TOKENS[:5][None], torch.full((1, 5), IGNORE_INDEX))
    model = make_model()
    before = weights_of(model)
    with pytest.raises(ValueError, match="No target"):
        train(model, [empty], max_steps=1)
    assert_same(model, before)
    train(model, [empty, *unequal_batches()], max_steps=1, grad_accum_steps=3)   # one may


def test_weight_decay_shrinks_matrices_and_nothing_else():
    def flat(model, batch):
        return sum(p.sum() for p in model.parameters()) * 0.0, 1

    model = perturb(make_model())
    before = weights_of(model)
    train(model, [0], loss_fn=flat, max_steps=1, lr=0.1, weight_decay=0.5)
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
    expected = train(default, windows(), **how)
    given = make_model(dropout=0.2)
    history = train(given, windows(), **how,
                        optimizer=configure_optimizer(given, 0.5))       # the rate is fit's to set
    assert_same(default, given)
    assert timeless(history) == timeless(expected)


def test_an_optimizer_of_the_callers_resumes(tmp_path):
    def run(model, **more):
        optimizer = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)
        history = train(model, windows(), max_steps=7, lr=1e-2, optimizer=optimizer, **more)
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
    train(model, windows(), max_steps=2, optimizer=part, weight_decay=99.0)
    moved = {n for n, w in weights_of(model).items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if n.startswith("blocks.0.")}
    assert part.param_groups[0]["weight_decay"] == 0.0


def test_an_optimizer_of_another_model_is_refused():
    model, other = make_model(), make_model()
    before = weights_of(model)
    for foreign in (configure_optimizer(other, 1e-3),
                    torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))])):
        with pytest.raises(ValueError, match="not this model's"):
            train(model, windows(), max_steps=1, optimizer=foreign)
    assert_same(model, before)


def test_frozen_parameters_stay_and_have_no_gradient():
    model = make_model()
    model.blocks[0].requires_grad_(False)
    model.token_embedding.requires_grad_(False)
    before = weights_of(model)
    train(model, windows(), max_steps=3)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name
        assert weight.grad is None


def test_cosine_lr_with_warmup_by_hand():
    rate = partial(cosine_lr_with_warmup, lr=2.0, min_lr=0.4, warmup_steps=4, total_steps=12)
    assert [rate(s) for s in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert rate(8) == pytest.approx(1.2) and rate(12) == pytest.approx(0.4)
    assert rate(99) == pytest.approx(0.4)
    assert cosine_lr_with_warmup(1, lr=1.0, min_lr=0.1, warmup_steps=0, total_steps=1) == 0.1
    history = train(make_model(), windows(), max_steps=6, lr=2e-3, warmup_steps=2)
    expected = [cosine_lr_with_warmup(s, lr=2e-3, min_lr=2e-4, warmup_steps=2, total_steps=6)
                for s in range(1, 7)]
    assert history.frame["lr"].dropna().tolist() == expected


# ---- fit


def test_fit_learns_and_its_history_adds_up():
    model, seen = make_model(), []
    history = train(model, windows(), epochs=10, lr=1e-2, val_loader=windows(5), eval_every=10,
                        metrics=lambda m: {"half": 0.5}, log=seen.append)
    frame = history.frame
    assert frame["step"].tolist() == list(range(41)) and seen == history.records
    assert history.last("train_loss") < 0.85 * history.records[1]["train_loss"]
    assert frame["n_targets"].iloc[-1] == 10 * 55 and not history.interrupted
    assert frame["epoch"].tolist()[1:9] == [0] * 4 + [1] * 4
    assert frame.loc[frame["val_loss"].notna(), "step"].tolist() == [0, 10, 20, 30, 40]
    assert history.last("half") == 0.5
    for column in ("train_loss", "val_loss", "lr", "grad_norm", "targets_per_s"):
        assert column in frame
    assert history.last("val_loss") == pytest.approx(evaluate_loss(model, windows(5)), rel=1e-6)


def test_epochs_with_grad_accum_steps_see_every_batch_once():
    history = train(make_model(), windows(), epochs=1, grad_accum_steps=3)
    assert history.last("step") == 2 and history.last("n_targets") == 55
    for epochs, grad_accum_steps, expected in ((1, 3, (2, 1)), (3, 2, (6, 2))):
        config = TrainConfig(epochs=epochs, grad_accum_steps=grad_accum_steps)
        assert training._count_steps(range(4), config) == expected


def test_fewer_steps_than_a_pass():
    assert train(make_model(), windows(), max_steps=2).last("n_targets") == 30


def test_a_loader_of_one_batch():
    history = train(make_model(), unequal_batches()[:1], max_steps=3)
    assert history.frame["epoch"].tolist() == [0, 0, 1, 2]


class Endless(IterableDataset):
    def __iter__(self):
        for start in range(0, 50, 5):
            yield TOKENS[start:start + 5], TOKENS[start + 1:start + 6]


def test_loaders_that_do_not_know_their_length():
    loader = DataLoader(Endless(), batch_size=4)
    assert train(make_model(), loader, max_steps=5).last("epoch") == 1
    with pytest.raises(ValueError, match="max_steps"):
        train(make_model(), (batch for batch in unequal_batches()), epochs=1)


def test_a_loader_that_can_be_read_only_once():
    once = (batch for batch in unequal_batches())
    with pytest.raises(ValueError, match="only once"):
        train(make_model(), once, max_steps=3)
    assert train(make_model(), iter(unequal_batches()), max_steps=2).last("step") == 2


@pytest.mark.parametrize("how", [{"epochs": 1}, {"max_steps": 3}])
def test_an_empty_loader(how):
    short = DataLoader(TokenDataset(TOKENS[:8], 5), batch_size=3, drop_last=True)
    for loader in ([], short):
        with pytest.raises(ValueError, match="empty"):
            train(make_model(), loader, **how)


@pytest.mark.parametrize("how", [
    {}, {"epochs": 1, "max_steps": 1}, {"epochs": 0}, {"max_steps": 0}, {"max_steps": -3},
    {"epochs": 1.5}, {"max_steps": 1, "grad_accum_steps": 0}, {"max_steps": math.inf}])
def test_epochs_and_max_steps_misused(how):
    model = make_model()
    before = weights_of(model)
    with pytest.raises(ValueError, match="epochs|max_steps|grad_accum_steps"):
        train(model, windows(), **how)
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
            return loss + (model.final_norm.bias * 0).sum().sqrt(), n   # its gradient is not
        return loss, n

    with pytest.raises(FloatingPointError, match=rf"Step 3: the {bad} is (nan|inf).* 0\.\d+"):
        train(model, windows(), loss_fn=breaks, max_steps=6, lr=0.01,
                  checkpoint=tmp_path / "c.pt", checkpoint_every=2)
    assert kept
    assert_same(model, kept)
    assert all(p.grad is None for p in model.parameters())
    history = train(model, windows(), max_steps=6, resume=tmp_path / "c.pt")
    assert history.records[2]["step"] == 2 and history.last("step") == 6


def test_only_the_progress_bar_prints(capfd):
    config = TrainConfig(max_steps=3, lr=3e-6)
    fit(make_model(), windows(), config, callbacks=[Evaluate(windows())])
    assert capfd.readouterr() == ("", "")
    fit(make_model(), windows(), config, callbacks=[ProgressBar("messages")])
    shown = capfd.readouterr()
    assert "3/3" in shown.out and "messages/s" in shown.out and shown.err == ""
    assert "e-07" in shown.out                                # a small rate is not shown as 0


def test_bfloat16_trains_in_float32_weights():
    runs = {}
    for precision in ("float32", "bfloat16"):
        model = make_model()
        runs[precision] = train(model, windows(), max_steps=8, grad_accum_steps=2, lr=1e-2,
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
        train(make_model(), windows(), max_steps=1, precision="float16")


def test_a_compiled_model_trains_and_its_files_fit_the_plain_one(tmp_path):
    plain = make_model(dropout=0.1)
    train(plain, windows(), max_steps=5)
    model = make_model(dropout=0.1)
    history = train(torch.compile(model, backend="eager"), windows(), max_steps=3,
                        val_loader=windows(2), sample=lambda m: type(m).__name__,
                        checkpoint=tmp_path / "c.pt")
    assert history.samples[0] == (0, "GPT") and model.training
    resumed = make_model(dropout=0.1)
    assert train(resumed, windows(), max_steps=5, resume=tmp_path / "c.pt").last("step") == 5
    for name, weight in weights_of(resumed).items():    # the schedules differ in length
        torch.testing.assert_close(weight, weights_of(plain)[name], rtol=0, atol=0.01)


def test_compile_is_an_option(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    model = make_model()
    train(model, windows(), max_steps=1)
    train(model, windows(), max_steps=1, compile=True)
    assert compiled == [model]


def test_a_sample_is_printed_and_kept(capfd):
    history = train(make_model(), windows(), max_steps=4, sample=lambda m: "once", sample_every=2)
    assert history.samples == [(0, "once"), (2, "once"), (4, "once")]
    assert capfd.readouterr().out.splitlines() == [f"step {i}: once" for i in (0, 2, 4)]


class Order(Callback):
    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def on_train_start(self, state):
        self.calls.append((self.name, "start", state.step))

    def on_step_end(self, state):
        self.calls.append((self.name, "step", state.step))
        if state.step == 2:
            state.should_stop = True

    def on_train_end(self, state):
        self.calls.append((self.name, "end", state.step))


def test_callbacks_start_from_the_last_and_may_stop_the_run(capfd):
    calls: list = []
    history = fit(make_model(), windows(), TrainConfig(max_steps=5),
                  callbacks=[Order("a", calls), Order("b", calls)])
    assert calls == [("b", "start", 0), ("a", "start", 0), ("a", "step", 1), ("b", "step", 1),
                     ("a", "step", 2), ("b", "step", 2), ("a", "end", 2), ("b", "end", 2)]
    assert history.interrupted and "after step 2 of 5" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match="cut short after step 2 of 5"):
        history.require_complete()


def test_an_error_in_a_callback_ends_those_that_had_begun():
    class Breaks(Callback):
        def on_train_start(self, state):
            raise RuntimeError("not today")

    calls: list = []
    with pytest.raises(RuntimeError, match="not today"):
        fit(make_model(), windows(), TrainConfig(max_steps=5),
            callbacks=[Order("a", calls), Breaks(), Order("c", calls)])
    assert calls == [("c", "start", 0), ("c", "end", 0)]


def test_a_plain_interrupt_says_where_the_run_stopped(capfd):
    def loss_fn(model, batch):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return lm_loss(model, batch)

    calls: list = []
    history = fit(make_model(), windows(), TrainConfig(max_steps=5), loss_fn=loss_fn,
                  callbacks=[ProgressBar()])
    assert history.interrupted and history.last("step") == 2
    assert "Training stopped after step 2 of 5." in capfd.readouterr().out


def test_a_schedule_of_the_callers_sets_every_rate():
    history = fit(make_model(), windows(), TrainConfig(max_steps=3), lr_schedule=lambda s: s * 1e-4)
    assert [r["lr"] for r in history.records] == pytest.approx([1e-4, 2e-4, 3e-4])


def test_transposed_weights_train_as_contiguous_ones_do():
    one, other = make_model(), make_model()
    for layer in (m for m in other.modules() if isinstance(m, nn.Linear)):
        layer.weight.data = layer.weight.data.t().contiguous().t()     # as a mapped file has them
    other.tie_weights()
    for model in (one, other):
        train(model, windows(), max_steps=3, lr=1e-2)
    assert all(p.is_contiguous() for p in other.parameters())
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weight, weights_of(other)[name])


def test_history_with_nothing_and_with_something():
    empty = History()
    assert empty.frame.empty and empty.plot(title="nothing").get_title() == "nothing"
    with pytest.raises(KeyError, match="train_loss"):
        empty.last("train_loss")
    history = train(make_model(), windows(), max_steps=3, val_loader=windows())
    with pytest.raises(KeyError, match="'acuracy'.*val_loss"):
        history.last("acuracy")
    ax = history.plot()
    assert [line.get_label() for line in ax.lines] == ["train loss", "val loss"]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3] and list(ax.lines[1].get_xdata()) == [0, 3]
    assert "step" in ax.get_xlabel() and "nats" in ax.get_ylabel()
    matplotlib.pyplot.close("all")
