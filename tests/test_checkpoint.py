"""Appendix C: a stopped run goes on bit for bit, and every damaged file gets one clear error."""

import errno
import os
import pickle
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import (
    TOKENS,
    Bomb,
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
from torch.utils.data import DataLoader

from helpers.checkpoint import (
    ResumableLoader,
    checkpoint_contents,
    read_checkpoint,
    restore,
    write_checkpoint,
)
from helpers.data import TokenDataset
from helpers.generation import generate
from helpers.pretrained import save_pretrained
from helpers.sampling import make_sampler
from helpers.tokenizer import train_bpe
from helpers.training import History, TrainConfig, TrainState, configure_optimizer, lm_loss


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
    train(quiet, loader, max_steps=9)
    watched = make_model(dropout=0.2)
    history = train(watched, other, max_steps=9, **looking(other))
    assert_same(quiet, watched)
    assert [step for step, _ in history.samples] == [0, 3, 6, 9]


@pytest.mark.parametrize("make", [windows, shuffled_globally, unequal_batches])
@pytest.mark.parametrize(("grad_accum_steps", "stop"), [(1, 1), (1, 4), (1, 6), (3, 1), (3, 4)])
def test_stop_and_resume_is_the_uninterrupted_run(make, grad_accum_steps, stop, tmp_path):
    def run(model, **how):
        loader = make()
        return train(model, loader, max_steps=8, grad_accum_steps=grad_accum_steps, warmup_steps=3,
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
    history = train(model, windows(), loss_fn=loss_fn, max_steps=9, grad_accum_steps=2,
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
    history = train(model, windows(), max_steps=2, val_loader=windows(),
                        checkpoint=tmp_path / "c.pt",
                        log=lambda r: signal.raise_signal(signal.SIGINT))
    assert history.interrupted and [r["step"] for r in history.records] == [0]
    assert history.last("val_loss") > 0
    assert_same(model, before)
    whole = make_model(dropout=0.2)
    expected = train(whole, windows(), max_steps=4, val_loader=windows())
    train(make_model(dropout=0.2), windows(), max_steps=4, val_loader=windows(),
              checkpoint=tmp_path / "d.pt", log=lambda r: signal.raise_signal(signal.SIGINT))
    resumed = make_model(seed=5, dropout=0.2)
    history = train(resumed, windows(), max_steps=4, val_loader=windows(),
                        resume=tmp_path / "d.pt")
    assert_same(whole, resumed)
    assert timeless(history) == timeless(expected)


def test_the_checkpoint_is_there_whenever_fit_returns(tmp_path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    model = make_model()
    train(model, windows(), max_steps=3, checkpoint=first)
    train(make_model(1), windows(), max_steps=3, resume=first, checkpoint=second)  # no step
    again = make_model(2)
    assert load(second, again) == 3
    assert_same(model, again)


def test_an_interrupt_that_comes_with_the_last_step_interrupts_nothing(tmp_path):
    history = train(make_model(), windows(), max_steps=2, checkpoint=tmp_path / "c.pt",
                        log=lambda r: r["step"] == 2 and signal.raise_signal(signal.SIGINT))
    assert not history.interrupted and (tmp_path / "c.pt").is_file()


def test_the_second_interrupt_is_one(tmp_path):
    def loss_fn(model, batch):
        for _ in range(2 if model.training else 0):
            signal.raise_signal(signal.SIGINT)
        return lm_loss(model, batch)

    before = signal.getsignal(signal.SIGINT)
    history = train(make_model(), windows(), loss_fn=loss_fn, max_steps=3,
                    checkpoint=tmp_path / "c.pt")
    assert history.interrupted and not (tmp_path / "c.pt").exists()   # it stopped inside a step
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_in_a_thread():
    done = []
    thread = threading.Thread(
        target=lambda: done.append(train(make_model(), windows(), max_steps=2)))
    thread.start()
    thread.join()
    assert done[0].last("step") == 2


def test_a_run_can_be_made_longer(tmp_path):
    model = make_model()
    train(model, windows(), max_steps=3, checkpoint=tmp_path / "c.pt")
    before = weights_of(model)
    same = train(make_model(1), windows(), max_steps=3, resume=tmp_path / "c.pt")
    assert same.last("step") == 3 and len(same.records) == 4
    longer = make_model(1)
    assert train(longer, windows(), max_steps=5, resume=tmp_path / "c.pt").last("step") == 5
    assert any(not torch.equal(w, before[n]) for n, w in weights_of(longer).items())


def test_numpy_numbers_in_settings_and_metrics_survive_the_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    how = {"lr": np.float64(1e-3), "metrics": lambda m: {"x": np.float64(0.25)}}
    train(make_model(), windows(), max_steps=2, checkpoint=path, **how)
    history = train(make_model(), windows(), max_steps=3, resume=path, **how)
    assert history.last("x") == 0.25 and history.last("step") == 3


# ---- checkpoints


def at(model: nn.Module, step: int = 7) -> TrainState:
    """A run of the model that has come to a step."""
    state = TrainState(model, configure_optimizer(model, 1e-3), TrainConfig(max_steps=9), lm_loss,
                       windows(), History(), 9, step=step)
    state.batches = ResumableLoader(state.train_loader, state)
    return state


def save(path: Path, state: TrainState) -> Path:
    write_checkpoint(path, checkpoint_contents(state))
    return path


def load(path: Path, model: nn.Module) -> int:
    """Put a fresh run of the model where the checkpoint was, and return the step."""
    state = at(model, 0)
    restore(state, read_checkpoint(path, model))
    return state.step


def saved(path: Path, **changes) -> Path:
    return save(path, at(make_model(**changes)))


def test_checkpoint_of_another_config_names_the_difference(tmp_path):
    path = saved(tmp_path / "c.pt")
    model = make_model(n_layer=1, dropout=0.5)
    before = weights_of(model)
    message = r"of another model: dropout: 0\.0 there, 0\.5 here; n_layer: 2 th"
    with pytest.raises(ValueError, match=message):
        train(model, windows(), max_steps=9, resume=path)
    assert_same(model, before)


def test_checkpoint_of_another_kind_of_model(tmp_path):
    path = tmp_path / "c.pt"
    save(path, at(nn.Linear(2, 2), 1))
    with pytest.raises(ValueError, match="other shapes"):
        load(path, nn.Linear(2, 3))
    with pytest.raises(ValueError, match="0.bias"):
        load(path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="another model"):
        load(path, make_model())
    assert load(path, nn.Linear(2, 2)) == 1


def test_checkpoint_of_other_trained_parameters_leaves_the_model(tmp_path):
    path = saved(tmp_path / "c.pt")
    model = make_model(seed=1)
    model.blocks[0].requires_grad_(False)
    before = weights_of(model)
    with pytest.raises(ValueError, match="requires_grad"):
        train(model, windows(), max_steps=9, resume=path)
    assert_same(model, before)


def test_checkpoint_with_less_data_leaves_the_model(tmp_path):
    path = tmp_path / "c.pt"
    train(make_model(), windows(), max_steps=3, checkpoint=path)
    model = make_model(seed=1)
    before = weights_of(model)
    with pytest.raises(ValueError, match="fewer than the 3 batches"):
        train(model, unequal_batches(), max_steps=9, resume=path)
    assert_same(model, before)


def test_checkpoint_that_is_missing_damaged_or_foreign(tmp_path):
    path, model = saved(tmp_path / "c.pt"), make_model(seed=1)
    before = weights_of(model)
    with pytest.raises(FileNotFoundError, match=r"no\.pt"):
        load(tmp_path / "no.pt", model)
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
            load(tmp_path / name, model)
    assert_same(model, before)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    target = tmp_path / "it ran"
    torch.save({"step": 1, "config": None, "model": Bomb(target)}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pickle").write_bytes(pickle.dumps(Bomb(target)))
    for name in ("bomb.pt", "bomb.pickle"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            load(tmp_path / name, make_model())
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


def test_a_disk_that_is_really_full(tmp_path):
    tokenizer = train_bpe("low lower lowest new newer newest", 262)
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
