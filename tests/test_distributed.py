"""Tests of helpers.distributed: two processes equal one, copied or sharded, killed or stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_corpus import RECIPE, TEXTS, assert_same_run, command, environment, make_corpus, tiny

from helpers.checkpoint import GracefulInterrupt, ResumableLoader, read_checkpoint, restore
from helpers.distributed import DistributedInterrupt
from helpers.gpt import GPT, GPTConfig
from helpers.optim import Muon
from helpers.pretrain import load_run_config, make_loaders
from helpers.pretrained import load_pretrained
from helpers.tokenizer import train_bpe
from helpers.training import (
    IGNORE_INDEX,
    Callback,
    History,
    TrainConfig,
    TrainState,
    configure_optimizer,
    fit,
    lm_loss,
    train_step,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


# ---- one process


class StopAfterTwo(Callback):
    def on_step_end(self, state):
        if state.step == 2:
            state.should_stop = True


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("interrupt", [GracefulInterrupt, DistributedInterrupt])
def test_a_stop_that_another_callback_asked_for_is_kept(interrupt, before):
    batch = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    model = GPT(GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1))
    callbacks = [StopAfterTwo(), interrupt()] if before else [interrupt(), StopAfterTwo()]
    history = fit(model, [batch], TrainConfig(max_steps=4), callbacks=callbacks)
    assert history.interrupted and history.last("step") == 2


# ---- two processes


WORKER = """
    import os, signal, sys, torch, torch.distributed as dist
    from datetime import timedelta
    from torch.nn.functional import dropout
    from torch.nn.parallel import DistributedDataParallel
    from helpers import pretrain
    from helpers.common import set_seed
    from helpers.distributed import (DistributedCheckpoint, DistributedInterrupt, apply_fsdp,
                                     distributed_loss, full_state_dict, gather_model, seed_rank)
    from helpers.gpt import GPT, GPTConfig
    from helpers.optim import Muon
    from helpers.training import TrainConfig, fit, lm_loss, train_step

    folder, rank, start = sys.argv[1], int(os.environ["RANK"]), dist.init_process_group
    close = dist.destroy_process_group                  # one group for all that follows
    dist.destroy_process_group = lambda: None
    dist.init_process_group = lambda: None if dist.is_initialized() else start()
    new_group, waits = dist.new_group, []

    def noted_group(*arguments, **named):
        waits.append(named.get("timeout", timedelta()).total_seconds())
        return new_group(*arguments, **named)

    def command(recipe, run, *more):
        pretrain.main([f"{folder}/{recipe}", "--corpus", folder + "/corpus",
                       "--run", f"{folder}/{run}", *more])

    dist.new_group = noted_group
    command("recipe.toml", "run")
    dist.new_group = new_group
    work = torch.load(folder + "/work.pt", weights_only=True)

    def fresh(tied=True):
        model = GPT(GPTConfig(**work["shape"] | {"tie_word_embeddings": tied}))
        model.load_state_dict(work["model"])            # untied, both tables begin the same
        return model

    def steps(wrapped, optimizer):
        seen = [train_step(wrapped, step[rank], distributed_loss(lm_loss), optimizer,
                           max_grad_norm=0.5) for step in work["steps"]]
        return {name: [s[name] for s in seen] for name in ("train_loss", "grad_norm", "n_targets")}

    result = {"waits": waits}
    set_seed(0)
    equal = torch.rand(3)
    seed_rank(0)
    result["draws"] = {"before": equal, "mask": dropout(torch.ones(64)) > 0}
    for name, make in (("sgd", torch.optim.SGD), ("muon", Muon)):
        model = fresh()
        optimizer = make(model.parameters() if name == "sgd" else model, lr=0.1)
        result[name] = steps(DistributedDataParallel(model), optimizer)
        result[name]["model"] = model.state_dict()

    for tied in (True, False):
        model = apply_fsdp(fresh(tied), torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        full_state_dict(model, optimizer)
        held = sum(p.to_local().numel() for p in model.parameters())
        result[f"shard-{tied}"] = steps(model, optimizer) | {
            "held": held, "all": model.n_params, "model": gather_model(model).state_dict(),
            "tied": model.lm_head.weight is model.token_embedding.weight}

    command("short.toml", "copied")
    command("short.toml", "sharded", "--fsdp")

    class LogAndStop(pretrain.JSONLog):
        def on_step_end(self, state):
            super().on_step_end(state)
            if state.step == 23 and rank == 1:          # an interrupt that only one of them gets
                signal.raise_signal(signal.SIGINT)

    log, pretrain.JSONLog = pretrain.JSONLog, LogAndStop
    command("short.toml", "stopped", "--fsdp")
    result["stopped at"] = torch.load(folder + "/stopped/checkpoint.pt", weights_only=True)["step"]
    dist.barrier()
    pretrain.JSONLog = log
    command("short.toml", "stopped", "--fsdp")

    calls = []
    def interrupted(model, batch):
        calls.append(0)
        if rank == 1 and len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return lm_loss(model, batch)

    wrapped, batches = DistributedDataParallel(fresh()), work["steps"][0][rank][:1]
    history = fit(wrapped, batches, TrainConfig(max_steps=40),
                  loss_fn=distributed_loss(interrupted),
                  callbacks=[DistributedInterrupt(), DistributedCheckpoint(folder + "/c.pt")])
    result["stopped"] = [r["step"] for r in history.records][-1], history.interrupted

    wrapped = DistributedDataParallel(fresh())
    def broken(model, batch):
        loss, n = lm_loss(model, batch)
        return (loss * float("nan") if rank == 1 else loss), n
    try:
        fit(wrapped, batches, TrainConfig(max_steps=2), loss_fn=distributed_loss(broken))
    except FloatingPointError as error:
        result["broken"] = str(error)
    torch.save(result, f"{folder}/result{rank}.pt")
    close()
"""


def torchrun(folder: Path, *what: str) -> subprocess.Popen:
    """Two processes at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--master-addr=127.0.0.1", f"--master-port={port}", *what], env=environment() | more,
        cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    try:
        _, errors = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()                             # torchrun then ends its workers
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]


def batch(rows: int, counted: int, generator: torch.Generator) -> list[torch.Tensor]:
    inputs, targets = torch.randint(300, (2, rows, 8), generator=generator)
    targets[:, counted:] = IGNORE_INDEX
    return [inputs, targets]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer) -> Path:
    """What two processes did: see WORKER."""
    folder = tmp_path_factory.mktemp("pair")
    make_corpus(folder)
    generator = torch.Generator().manual_seed(1)
    sizes = [[(3, 8), (1, 5)], [(1, 2), (2, 1)]]        # of each rank: two batches, unequal counts
    steps = [[[batch(*size, generator) for size in rank] for rank in sizes] for _ in range(4)]
    model = tiny(tokenizer, n_layer=2)
    work = {"shape": {k: v for k, v in vars(model.config).items() if v is not None},
            "model": model.state_dict(), "steps": steps}
    torch.save(work, folder / "work.pt")
    (folder / "worker.py").write_text(textwrap.dedent(WORKER), encoding="utf-8")
    for name, tokens in (("recipe.toml", "25_600"), ("short.toml", "5_120")):
        text = RECIPE.replace("19_200", tokens).replace("checkpoint_every = 70",
                                                        "checkpoint_every = 10")
        (folder / name).write_text(text, encoding="utf-8")
    finish(torchrun(folder, str(folder / "worker.py"), str(folder)))
    return folder


def results(folder: Path) -> list[dict]:
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in (0, 1)]


def alone(folder: Path, optimizer=torch.optim.SGD, **changes) -> tuple[GPT, list[dict]]:
    """The same steps on the same global batches in one process."""
    work = torch.load(folder / "work.pt", weights_only=True)
    model = GPT(GPTConfig(**work["shape"] | changes))
    model.load_state_dict(work["model"])
    moved = optimizer(model if optimizer is Muon else model.parameters(), lr=0.1)
    return model, [train_step(model, [b for rank in step for b in rank], lm_loss, moved,
                              max_grad_norm=0.5) for step in work["steps"]]


@pytest.mark.parametrize(("name", "optimizer", "rel"), [("sgd", torch.optim.SGD, 1e-5),
                                                        ("muon", Muon, 2e-3)])
def test_two_processes_train_to_the_loss_of_one(name, optimizer, rel, pair):
    """Unequal counts of targets on the two ranks, two batches a step; Muon is in bfloat16."""
    model, seen = alone(pair, optimizer)
    first, second = (result[name] for result in results(pair))
    assert [s["n_targets"] for s in seen] == first["n_targets"] == second["n_targets"] == [33] * 4
    for key in ("train_loss", "grad_norm"):
        assert first[key] == pytest.approx([s[key] for s in seen], rel=rel)
        assert first[key] == second[key]
    for part, weight in model.state_dict().items():
        if name == "sgd":
            torch.testing.assert_close(first["model"][part], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["model"][part], second["model"][part])


@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_model_trains_to_the_loss_of_one_process(tied, pair):
    model, seen = alone(pair, tie_word_embeddings=tied)
    first, second = (result[f"shard-{tied}"] for result in results(pair))
    for name in ("train_loss", "grad_norm", "n_targets"):
        assert first[name] == pytest.approx([s[name] for s in seen], rel=1e-5)
        assert first[name] == second[name]
    assert first["tied"] == second["tied"] == tied
    assert first["all"] == model.n_params and first["held"] + second["held"] == model.n_params
    assert abs(first["held"] - second["held"]) < 0.1 * model.n_params
    for part, weight in model.state_dict().items():
        torch.testing.assert_close(first["model"][part], weight, rtol=1e-5, atol=1e-6)
        assert second["model"][part].device.type == "meta"     # whole in the first process only


def test_a_sharded_run_saves_and_resumes_as_any_other(pair):
    copied, sharded = (pd.read_csv(pair / run / "history.csv") for run in ("copied", "sharded"))
    for column in ("train_loss", "grad_norm"):
        assert sharded[column][1:].tolist() == pytest.approx(copied[column][1:].tolist(), rel=1e-4)
    assert sharded["val_loss"].iloc[-1] == pytest.approx(copied["val_loss"].iloc[-1], rel=1e-4)
    assert results(pair)[0]["stopped at"] == 23
    assert_same_run(pair / "sharded", pair / "stopped")
    model, tokenizer = load_pretrained(pair / "sharded" / "model")
    plain = GPT(model.config)                            # one process opens the checkpoint of two
    optimizer = configure_optimizer(plain, 0.1)
    state = TrainState(plain, optimizer, TrainConfig(max_steps=40), lm_loss, [], History(), 40,
                       batches=ResumableLoader([[0]] * 100))
    restore(state, read_checkpoint(pair / "sharded" / "checkpoint.pt", plain))
    assert state.step == 40
    assert plain.lm_head.weight is plain.token_embedding.weight
    for name, weight in model.state_dict().items():      # in the folder they are float16
        torch.testing.assert_close(plain.state_dict()[name], weight, rtol=1e-3, atol=1e-6)
    moments = torch.load(pair / "copied" / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    for i, kept in optimizer.state_dict()["state"].items():
        for name, value in kept.items():
            torch.testing.assert_close(value, moments[i][name], rtol=1e-2, atol=1e-4)


def test_each_rank_draws_its_own_dropout_and_the_checkpoint_keeps_all(pair):
    first, second = (result["draws"] for result in results(pair))
    assert torch.equal(first["before"], second["before"])          # equal weights at the start
    assert not torch.equal(first["mask"], second["mask"])
    contents = torch.load(pair / "run" / "checkpoint.pt", weights_only=True)
    states = [rank["cpu"] for rank in contents["rank_rng"]]
    assert len(states) == 2 and not torch.equal(*states)


def test_the_wait_for_the_first_process_outlasts_a_process_group(pair):
    for result in results(pair):
        assert result["waits"] and min(result["waits"]) > 24 * 3600


def test_two_processes_stop_together_and_fail_together(pair):
    first, second = results(pair)
    assert first["stopped"] == second["stopped"] == (3, True)      # an interrupt of one stops both
    assert "loss is nan" in first["broken"] and "loss is nan" in second["broken"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_two_killed_processes_resume_to_the_same_weights(pair):
    history = pd.read_csv(pair / "run" / "history.csv")
    assert history["step"].iloc[-1] == 200 and history["n_targets"].iloc[-1] == 25_600
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[1] - 0.5
    what = ["-m", "helpers.pretrain", *command(pair, "killed")]
    what[what.index("--run")] = "--folder"              # see the test of torchrun's options
    process = torchrun(pair, *what)
    for line in process.stdout:
        if json.loads(line)["step"] >= 60:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in map(int, children.split()):
                os.kill(child, signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == 1 and not (pair / "killed" / "model").exists()
    step = torch.load(pair / "killed" / "checkpoint.pt", weights_only=True)["step"]
    assert 50 <= step < 200 and step % 10 == 0
    finish(torchrun(pair, *what))
    assert_same_run(pair / "run", pair / "killed")


def test_each_process_reads_windows_of_its_own(pair, monkeypatch):
    recipe = load_run_config(pair / "recipe.toml")
    read = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *a: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *a, rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        train, validation = make_loaders(recipe, pair / "run")
        read.append((list(train.sampler), [b[0].tolist() for b in validation]))
    (first, held), (second, same) = read
    assert not set(first) & set(second) and len(first) == len(second)
    assert len(first) + len(second) in (len(train.dataset), len(train.dataset) - 1)
    assert held == same                                  # both measure on the same
