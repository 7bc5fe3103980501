"""Tests of helpers.pretrain: what a run costs, its log, recipes, the command line."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_corpus import (
    RECIPE,
    ROOT,
    TEXTS,
    assert_same_run,
    command,
    environment,
    make_corpus,
    read_back,
    tiny,
)

from helpers import pretrain
from helpers.distributed import apply_fsdp
from helpers.gpt import GPTConfig, flops_per_token
from helpers.pretrain import (
    JSONLog,
    find_sources,
    iter_documents,
    load_run_config,
    main,
    make_loaders,
    make_schedule,
    measured_flops,
    peak_flops,
    prepare,
    start_model,
    training_flops,
)
from helpers.pretrained import load_pretrained
from helpers.tokenizer import encode, eos_token_id, load_tokenizer, train_bpe
from helpers.training import History, TrainConfig, TrainState, evaluate_loss, lm_loss


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


# ---- what a run costs


def test_training_takes_three_forward_passes():
    config = GPTConfig(vocab_size=300, context_length=16, n_embd=16, n_head=2, n_layer=1)
    assert training_flops(config, 7) == 21 * flops_per_token(config)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_rate_a_run_is_measured_against(monkeypatch):
    cpu = torch.device("cpu")
    assert 1e8 < measured_flops(cpu, size=128) < 1e14
    state = torch.get_rng_state()
    assert peak_flops(cpu, "float32")[1] == "measured matrix product, float32"
    assert torch.equal(torch.get_rng_state(), state)    # or a resumed run has other dropout masks
    cuda = torch.device("cuda")
    for name, peak in (("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA H200", 989e12),
                       ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
                       ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, "bfloat16")[0] == peak
        monkeypatch.setattr(pretrain, "measured_flops", lambda device, dtype: 5.0)
        assert peak_flops(cuda, "float32")[0] == 5.0
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA A10", "NVIDIA L400", "Tesla T4"])
def test_a_gpu_that_is_not_in_the_list_is_measured(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(pretrain, "measured_flops", lambda device, dtype: 5.0)
    monkeypatch.setattr(pretrain, "autocast_context", lambda *a: torch.autocast("cpu"))
    rate, origin = peak_flops(torch.device("cuda"), "bfloat16")
    assert rate == 5.0 and origin == "measured matrix product, bfloat16"


def test_lines_of_the_log(capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(pretrain, "peak_flops", lambda device, precision: (1e9, "made up"))
    model = tiny(tokenizer)
    records = [{"step": 0, "val_loss": 5.123456789}, {"step": 4, "targets_per_s": 1.0},
               {"step": 5, "targets_per_s": 1000.0, "lr": 3e-6}, {"step": 7, "val_loss": 4.0}]
    kept = [dict(record) for record in records]
    state = TrainState(model, torch.optim.SGD(model.parameters()), TrainConfig(max_steps=9),
                       lm_loss, [], History(records), 9)
    log = JSONLog("float32", every=5)
    log.on_train_start(state)
    for record in records[1:]:
        state.step, state.record = record["step"], record
        log.on_step_end(state)
    assert records == kept                               # the history is not written to
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"step": 0, "val_loss": 5.12346, "machine_flops": 1e9, "machine": "made up"}
    assert lines[1]["mfu"] == pytest.approx(1000 * training_flops(model.config) / 1e9, rel=1e-5)
    assert lines[1]["lr"] == 3e-6                        # a small rate is no zero
    assert [line["step"] for line in lines] == [0, 5, 7] and "machine" not in lines[1]


def test_a_data_set_of_the_hub_is_a_source(tmp_path, monkeypatch):
    """A local folder stands for the hub: `datasets` takes both by the same name."""
    (tmp_path / "someone" / "tales").mkdir(parents=True)
    rows = pd.DataFrame({"story": [f"Tale {i}." for i in range(9)]})
    rows.to_parquet(tmp_path / "someone" / "tales" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    sources = find_sources(["hf:someone/tales[2:4]", "hf:someone/tales[7:]"], tmp_path)
    found = [text for source in sources for text in iter_documents(source, "story")]
    assert found == ["Tale 2.", "Tale 3.", "Tale 7.", "Tale 8."]
    for wrong in ("hf:", "hf:a/b[1]", "hf:a/b:c:d", "hf:a/b[x:y]"):
        with pytest.raises(ValueError, match="is no source; expected for example hf:"):
            find_sources([wrong], tmp_path)


# ---- recipes


@pytest.fixture
def corpus(tmp_path) -> Path:
    return make_corpus(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "models" / "tiny").glob("recipe*.toml")),
                         ids=lambda path: path.stem)
def test_the_shipped_recipe_made_the_shipped_model(path: Path):
    recipe = load_run_config(path)
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    for ours, theirs in [("vocab_size", "vocab_size"), ("context_length", "n_positions"),
                         ("n_embd", "n_embd"), ("n_head", "n_head"), ("n_layer", "n_layer")]:
        assert recipe.model[ours] == config[theirs]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[model]", "[model", "not a recipe"),
    ("[training]", "[trainings]", "no 'training'"),
    ("validation =", "validations =", "no 'validation'"),
    ('["held.txt"]', '"held.txt"', "validation must be a list of file patterns"),
    ("tokens = 19_200", "", "tokens"),
    ("lr = 3e-3", "lr = 3e-3\nlearning_rate = 1", r"unknown training settings \['learning_rate'\]"),
    ("n_layer = 1", "n_layers = 1", "n_layer"),
    ("vocab_size = 300", "", "vocab_size"),
    ("n_head = 2", "n_head = 3", "multiple of n_head"),
    ("n_head = 2", "n_head = 0", "n_head must be"),
    ("n_head = 2", "n_head = 2\neos_token_id = 0", "the tokenizer decides these ids"),
    ("n_head = 2", "n_head = 2\neos_id = 0", "eos_id"),
    ("lr = 3e-3", 'lr = 3e-3\nschedule = "linear"', "the schedule must be .* not 'linear'"),
    ("lr = 3e-3", "lr = -1.0", "lr must be above 0"),
    ("lr = 3e-3", "lr = 3e-3\ngrad_accum_steps = 0", "grad_accum_steps must be a whole number"),
    ("lr = 3e-3", 'lr = 3e-3\noptimizer = "sgd"', "the optimizer must be .* not 'sgd'"),
    ("[data]", "[data]\ntokeniser = 'x'", "tokeniser"),
])
def test_recipes_that_are_none(old, new, message, tmp_path):
    path = tmp_path / "recipe.toml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_run_config(path)
    assert str(path) in str(caught.value)


def test_schedules_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    cosine = make_schedule(load_run_config(path).training, 100)
    path.write_text(RECIPE + 'schedule = "wsd"\ndecay_steps = 20\n', encoding="utf-8")
    constant = make_schedule(load_run_config(path).training, 100)
    assert cosine(5) == constant(5) == constant(80) == 3e-3 and cosine(80) < 2e-3
    assert cosine(100) == pytest.approx(3e-4) and constant(100) == pytest.approx(3e-4)


def test_books_are_left_out_by_title(corpus, tmp_path):
    rows = [("books-1.txt.xz", "First", 2), ("books-1.txt.xz", "Second", 1),
            ("tale.txt", "Tale", 1)]
    table = pd.DataFrame(rows, columns=["shard", "title", "docs"])
    table.to_csv(corpus / "manifest.csv", index=False)
    path = corpus / "books-1.txt.xz"
    assert list(iter_documents(path, leave_out=["First"])) == TEXTS[2:3]
    assert list(iter_documents(path, leave_out=["Second", "Tale"])) == TEXTS[:2]
    assert list(iter_documents(path, leave_out=["Third"])) == TEXTS[:3]
    text = RECIPE.replace("[data]", '[data]\nleave_out = ["Second"]')
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    tokenizer = prepare(load_run_config(tmp_path / "recipe.toml"), corpus, tmp_path / "run")
    assert read_back(tmp_path / "run" / "train").count(eos_token_id(tokenizer)) == 2 + 1 + 1
    table.loc[1, "docs"] = 5
    table.to_csv(corpus / "manifest.csv", index=False)
    with pytest.raises(ValueError, match="counts 7 documents in books-1.txt.xz, which holds 3"):
        list(iter_documents(path, leave_out=["First"]))


def test_recipe_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.toml"):
        load_run_config(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes\.toml is not a recipe"):
        load_run_config(tmp_path / "bytes.toml")


def test_prepare_reads_patterns_and_repeats(corpus, tmp_path):
    recipe = load_run_config(tmp_path / "recipe.toml")
    tokenizer = prepare(recipe, corpus, tmp_path / "run")
    ids = read_back(tmp_path / "run" / "train")
    assert ids.count(eos_token_id(tokenizer)) == 3 + 1 + 1    # the tale is read twice
    assert tokenizer.decode(ids[-len(encode(tokenizer, TEXTS[3])):]) == TEXTS[3]
    assert read_back(tmp_path / "run" / "validation").count(eos_token_id(tokenizer)) == 2
    (tmp_path / "run" / "train" / "manifest.json").write_text("{}")
    for file in corpus.iterdir():
        file.write_bytes(b"")
    assert prepare(recipe, corpus, tmp_path / "run").n_vocab == 300      # done before: nothing read
    assert (tmp_path / "run" / "train" / "manifest.json").read_text() == "{}"


def test_prepare_takes_up_after_a_kill_while_the_tokenizer_was_written(corpus, tmp_path):
    recipe = load_run_config(tmp_path / "recipe.toml")
    whole = prepare(recipe, corpus, tmp_path / "run")
    broken = tmp_path / "run2" / "tokenizer"
    broken.mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "tokenizer" / "vocab.json", broken)
    text = (tmp_path / "run" / "tokenizer" / "merges.txt").read_text(encoding="utf-8")
    (broken / "merges.txt").write_text(text[:100], encoding="utf-8")
    assert prepare(recipe, corpus, tmp_path / "run2").n_vocab == whole.n_vocab == 300


def test_prepare_refuses(corpus, tmp_path):
    recipe = load_run_config(tmp_path / "recipe.toml")
    (corpus / "tale.txt").rename(corpus / "story.txt")
    with pytest.raises(FileNotFoundError, match=r"No file in .* matches 'tale\.txt'"):
        prepare(recipe, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (corpus / "story.txt").rename(corpus / "tale.txt")
    prepare(recipe, corpus, tmp_path / "run")
    (tmp_path / "other.toml").write_text(RECIPE.replace("= 300", "= 290"), encoding="utf-8")
    with pytest.raises(ValueError, match="begun with a vocabulary of 300, and the recipe says 290"):
        prepare(load_run_config(tmp_path / "other.toml"), corpus, tmp_path / "run")


def test_prepare_takes_the_tokenizer_that_is_named(corpus, tmp_path):
    text = RECIPE.replace("= 300", "= 8192").replace("[data]", '[data]\ntokenizer = "tiny"')
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    found = prepare(load_run_config(tmp_path / "recipe.toml"), corpus, tmp_path / "run")
    assert found.encode_ordinary(TEXTS[0]) == load_tokenizer("tiny").encode_ordinary(TEXTS[0])
    text = RECIPE.replace('["books*", "tale.txt", "tale.txt"]', '["hf:someone/tales"]')
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match='must name a tokenizer: tokenizer = "gpt2"'):
        prepare(load_run_config(tmp_path / "recipe.toml"), corpus, tmp_path / "other")


def test_a_recipe_of_tables(corpus, tmp_path):
    pd.DataFrame({"body": TEXTS[:3]}).to_parquet(corpus / "books-1.parquet")
    (corpus / "books-1.txt.xz").unlink()
    pd.DataFrame({"body": TEXTS[3:4]}).to_json(corpus / "tale.jsonl", orient="records", lines=True)
    (corpus / "held.jsonl").write_text(json.dumps({"body": TEXTS[4]}), encoding="utf-8")
    text = RECIPE.replace(".txt", ".jsonl").replace("[data]", '[data]\ntext_column = "body"')
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    tokenizer = prepare(load_run_config(tmp_path / "recipe.toml"), corpus, tmp_path / "run")
    expected = [i for text in [*TEXTS[:4], TEXTS[3]]
                for i in [eos_token_id(tokenizer), *encode(tokenizer, text)]]
    assert read_back(tmp_path / "run" / "train") == expected


def test_loaders_are_the_same_each_time(corpus, tmp_path):
    recipe = load_run_config(tmp_path / "recipe.toml")
    prepare(recipe, corpus, tmp_path / "run")
    orders = []
    for _ in range(2):
        train, validation = make_loaders(recipe, tmp_path / "run")
        torch.rand(3)                                   # the global generator has no part in it
        orders.append([batch[0].tolist() for loader in (train, validation) for batch in loader])
    assert orders[0] == orders[1] and len(orders[0]) > 10
    assert all(len(batch[0]) == 4 for batch in train)


# ---- the command line


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a corpus, a recipe, a run `whole` that was never stopped, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    make_corpus(folder)
    lines = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(lines):
        patch.setenv("LLM_DEVICE", "cpu")
        assert main(command(folder, "whole")) == 0
    (folder / "log").write_text(lines.getvalue(), encoding="utf-8")
    return folder


def test_a_run_and_its_log(whole):
    lines = [json.loads(line) for line in (whole / "log").read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(0, 301, 20)) and "val_loss" in lines[-1]
    assert lines[0]["machine_flops"] > 1e8 and "measured" in lines[0]["machine"]
    rates = [line["mfu"] / line["targets_per_s"] * lines[0]["machine_flops"] for line in lines[1:]
             if line["mfu"] > 1e-3]
    config = load_pretrained(whole / "whole" / "model")[0].config
    assert rates == pytest.approx([training_flops(config)] * len(rates), rel=0.1)
    history = pd.read_csv(whole / "whole" / "history.csv")
    assert history["n_targets"].iloc[-1] == 19_200 and len(history) == 301
    assert history["val_loss"].dropna().iloc[-1] < history["val_loss"].iloc[0] - 1


def test_torchrun_leaves_our_options_to_us():
    """It takes `--run` for the beginning of an option of its own, `--run-path`."""
    from torch.distributed.run import get_args_parser

    ours = ["recipe.toml", "--corpus", "c", "--folder", "r", "--from", "tiny", "--num-proc", "2",
            "--fsdp", "--prepare"]
    found = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", "helpers.pretrain", *ours])
    assert found.training_script == "helpers.pretrain" and found.training_script_args == ours


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_and_started_again_ends_in_the_same_weights(
        how, whole, monkeypatch):
    monkeypatch.setenv("LLM_DEVICE", "cpu")
    run = whole / f"stopped-{how}"
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.pretrain", *command(whole, run.name)], env=environment(),
        cwd=whole, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if json.loads(line)["step"] >= 80:              # a checkpoint is written at 70
            process.send_signal(how)
            break
    process.stdout.read()
    interrupted = how == signal.SIGINT
    assert process.wait(timeout=60) == (0 if interrupted else -how)
    stopped = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert stopped >= 80 if interrupted else stopped % 70 == 0
    assert stopped < 300 and not (run / "model").exists()      # unfinished, hence no model yet
    if interrupted:
        assert len(pd.read_csv(run / "history.csv")) == stopped + 1
    assert main(command(whole, run.name)) == 0
    assert_same_run(whole / "whole", run)
    model, tokenizer = load_pretrained(run / "model")
    assert model.config.eos_token_id == eos_token_id(tokenizer) and model.config.dropout == 0.1
    assert main(command(whole, run.name)) == 0          # finished before: the same again
    assert_same_run(whole / "whole", run)
    text = RECIPE.replace("n_layer = 1", "n_layer = 2")
    (whole / "other.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="n_layer: 1 there, 2 here"):
        main(command(whole, run.name, "other.toml"))


def test_a_run_can_start_from_a_model(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_DEVICE", "cpu")
    folder = whole / "whole" / "model"
    text = RECIPE.replace("19_200", "640").replace("dropout = 0.1", "dropout = 0.0")
    (whole / "short.toml").write_text(text, encoding="utf-8")
    assert main([*command(whole, "next", "short.toml"), "--start", str(folder)]) == 0
    given, tokenizer = load_pretrained(folder)
    recipe = load_run_config(whole / "short.toml")
    _, validation = make_loaders(recipe, whole / "next")
    expected = evaluate_loss(given, validation, max_batches=2)
    history = pd.read_csv(whole / "next" / "history.csv")
    assert history["val_loss"].iloc[0] == pytest.approx(expected, rel=1e-6)
    assert expected < math.log(300) - 1                 # not the loss of random weights
    started = start_model(replace(given.config, dropout=0.0), folder)
    assert started.config.dropout == 0.0
    for name, weight in given.state_dict().items():
        assert torch.equal(weight, started.state_dict()[name])
    names = ("vocab.json", "merges.txt")
    for name in names:
        assert (whole / "next" / "tokenizer" / name).read_bytes() == (folder / name).read_bytes()

    (whole / "deep.toml").write_text(text.replace("n_layer = 1", "n_layer = 2"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"n_layer=1.* but the recipe asks for .*n_layer=2"):
        main([*command(whole, "deep", "deep.toml"), "--start", str(folder)])
    with pytest.raises(FileNotFoundError, match="no such model"):
        main([*command(whole, "none", "short.toml"), "--start", "no such model"])
    assert not (whole / "none" / "tokenizer").exists()


def test_the_corpus_can_be_prepared_alone(whole, monkeypatch):
    assert main([*command(whole, "alone"), "--prepare"]) == 0
    assert sorted(p.name for p in (whole / "alone").iterdir()) == ["tokenizer", "train",
                                                                  "validation"]


def test_a_run_with_muon(whole, monkeypatch, capsys):
    monkeypatch.setenv("LLM_DEVICE", "cpu")
    text = RECIPE.replace("lr = 3e-3", 'lr = 3e-3\noptimizer = "muon"').replace("19_200", "6_400")
    (whole / "muon.toml").write_text(text, encoding="utf-8")
    assert main(command(whole, "muon", "muon.toml")) == 0
    state = torch.load(whole / "muon" / "checkpoint.pt", weights_only=True)["optimizer"]
    assert state["param_groups"][0]["muon"] and "momentum" in state["state"][0]
    history = pd.read_csv(whole / "muon" / "history.csv")
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[1] - 1


def test_what_cannot_be_sharded(whole, monkeypatch, tokenizer):
    with pytest.raises(ValueError, match="torchrun --nproc-per-node N -m helpers"):
        main([*command(whole, "shard"), "--fsdp"])
    assert not (whole / "shard").exists()
    with pytest.raises(ValueError, match="torchrun --nproc-per-node N -m helpers"):
        apply_fsdp(tiny(tokenizer), torch.device("cpu"))
    text = RECIPE.replace("lr = 3e-3", 'lr = 3e-3\noptimizer = "muon"')
    (whole / "muon-shard.toml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        main([*command(whole, "shard", "muon-shard.toml"), "--fsdp"])


def test_the_command_line_explains_itself(capsys):
    with pytest.raises(SystemExit):
        main(["recipe.toml"])
    assert "--corpus" in capsys.readouterr().err
    assert "main" in pretrain.__all__
