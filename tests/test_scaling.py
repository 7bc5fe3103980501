"""Tests of helpers.scaling: corpora, shards, recipes, the command line, two processes."""

import json
import lzma
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from helpers import scaling
from helpers.gpt import GPT, GPTConfig
from helpers.pretraining import IGNORE, lm_loss, load_pretrained, train_step
from helpers.scaling import (
    bits_per_byte,
    main,
    make_loaders,
    open_shards,
    prepare,
    read_documents,
    read_recipe,
    write_shards,
)
from helpers.text import END_OF_TEXT, encode, eos_id, train_bpe

ROOT = Path(__file__).resolve().parent.parent


def some_text(n_words: int, seed: int) -> str:
    words = ["the", "a", "small", "old", "river", "mountain", "walked", "slept", "found", "lost",
             "and", "then", "under", "over"]
    draw = random.Random(seed)
    return " ".join(draw.choice(words) for _ in range(n_words))


TEXTS = [some_text(300, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


def tiny(tokenizer, **changes) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.n_vocab, "context_length": 8, "n_embd": 16, "n_head": 2,
             "n_layer": 1}
    model = GPT(GPTConfig(**shape | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


# ---- documents


TWO = f"One.\nStill one.\n\n{END_OF_TEXT}\n\n  \n{END_OF_TEXT}\nTwo, a {END_OF_TEXT} inside.\n"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", [TWO, f"{END_OF_TEXT}\n{TWO}{END_OF_TEXT}", "\ufeff" + TWO,
                                  f"\ufeff{END_OF_TEXT}\n{TWO}", TWO.replace("\n", "\r\n")])
def test_documents_are_split_at_lines_of_the_end_token(text, packed, tmp_path):
    path = tmp_path / ("a.txt.xz" if packed else "a.txt")
    data = text.encode("utf-8")
    path.write_bytes(lzma.compress(data) if packed else data)
    assert list(read_documents(path)) == ["One.\nStill one.", f"Two, a {END_OF_TEXT} inside."]


def test_files_without_documents(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("", " \n\n", f"{END_OF_TEXT}\n{END_OF_TEXT}"):
        path.write_text(text, encoding="utf-8")
        assert list(read_documents(path)) == []
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        list(read_documents(tmp_path / "no.txt"))


def test_damaged_files_are_refused(tmp_path):
    whole = lzma.compress(TWO.encode() * 50)
    broken = whole[:40] + bytes([whole[40] ^ 255]) + whole[41:]
    for name, data in [("bad.txt", b"caf\xe9 au lait"), ("cut.txt.xz", whole[:-20]),
                       ("not.txt.xz", b"plain"), ("broken.txt.xz", broken),
                       ("latin.txt.xz", lzma.compress(b"caf\xe9"))]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} cannot be read as UTF-8"):
            list(read_documents(tmp_path / name))


# ---- shards


def read_back(folder: Path) -> list[int]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return np.concatenate([np.fromfile(folder / s["file"], dtype=np.uint16)
                           for s in manifest["shards"]]).tolist()


@pytest.mark.parametrize("shard_tokens", [1, 700, 2**24])
def test_shards_hold_every_token_and_each_document_opens_with_the_end_token(
        shard_tokens, tmp_path, tokenizer):
    texts = [*TEXTS, f"żółw {END_OF_TEXT} 🐢"]
    manifest = write_shards(iter(texts), tokenizer, tmp_path, shard_tokens=shard_tokens)
    expected = [i for text in texts for i in [eos_id(tokenizer), *encode(tokenizer, text)]]
    assert read_back(tmp_path) == expected
    assert expected.count(eos_id(tokenizer)) == len(texts) == manifest["documents"]
    assert manifest["bytes"] == sum(len(t.encode()) for t in texts)
    assert sum(s["tokens"] for s in manifest["shards"]) == len(expected)
    assert (len(manifest["shards"]) == 1) == (shard_tokens == 2**24)
    for shard in manifest["shards"]:                    # no document is torn apart
        first = np.fromfile(tmp_path / shard["file"], dtype=np.uint16)[0]
        assert first == eos_id(tokenizer)


def test_windows_of_shards_are_those_of_the_tokens(tmp_path, tokenizer):
    manifest = write_shards(TEXTS, tokenizer, tmp_path, shard_tokens=700)
    windows, n = open_shards(tmp_path, 32), 0
    for shard in manifest["shards"]:
        tokens = np.fromfile(tmp_path / shard["file"], dtype=np.uint16).astype(np.int64)
        tokens = torch.from_numpy(tokens)
        for start in range(0, len(tokens) - 32, 32):
            inputs, targets = windows[n]
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.equal(inputs, tokens[start:start + 32])
            assert torch.equal(targets, tokens[start + 1:start + 33])
            n += 1
    assert len(windows) == n > 10


def test_one_string_is_one_document(tmp_path, tokenizer):
    assert write_shards("A river.", tokenizer, tmp_path)["documents"] == 1
    model = tiny(tokenizer)
    assert bits_per_byte(model, tokenizer, TEXTS[0]) == bits_per_byte(model, tokenizer, TEXTS[:1])


def test_damaged_shards_are_refused(tmp_path, tokenizer):
    write_shards(TEXTS, tokenizer, tmp_path, shard_tokens=700)
    path = tmp_path / "tokens-00001.bin"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[100] ^= 1                                   # another token, the same length
    for data in (whole[:-2], whole[:-1], whole + b"\0\0", b"", bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"tokens-00001\.bin is missing, cut short or damaged"):
            open_shards(tmp_path, 32)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokens-00001\.bin is missing"):
        open_shards(tmp_path, 32)
    path.write_bytes(whole)
    open_shards(tmp_path, 32)
    for text in ("", "[]", '{"shards"'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            open_shards(tmp_path, 32)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        open_shards(tmp_path, 32)


def test_tokenizing_again_does_not_leave_an_old_manifest(tmp_path, tokenizer):
    def breaks():
        yield TEXTS[0]
        raise KeyboardInterrupt

    write_shards(TEXTS, tokenizer, tmp_path, shard_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        write_shards(breaks(), tokenizer, tmp_path, shard_tokens=100)
    with pytest.raises(FileNotFoundError, match="not a folder of finished shards"):
        open_shards(tmp_path, 32)


def test_what_write_and_open_refuse(tmp_path, tokenizer):
    class Large:
        n_vocab = 65_537

    with pytest.raises(ValueError, match="65537 does not fit 16 bits"):
        write_shards(TEXTS, Large(), tmp_path / "large")
    assert not (tmp_path / "large").exists()
    with pytest.raises(ValueError, match="no document"):
        write_shards([], tokenizer, tmp_path / "none")
    write_shards(["short"], tokenizer, tmp_path / "short")
    with pytest.raises(ValueError, match="longer than one window of 32"):
        open_shards(tmp_path / "short", 32)


def test_the_largest_id_of_16_bits_survives(tmp_path):
    class Widest:
        n_vocab = 65_536
        special_tokens_set = frozenset({END_OF_TEXT})

        def encode_ordinary(self, text):
            return [65_535, 0, 65_534]

        def encode_single_token(self, text):
            return 65_535

    write_shards(["x"], Widest(), tmp_path)
    assert open_shards(tmp_path, 3)[0][0].tolist() == [65_535, 65_535, 0]


# ---- bits per byte


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bits_per_byte_by_hand(batch_size, tokenizer):
    model = tiny(tokenizer).eval()
    T, texts, bits = 8, ["", "a", "the old river", TEXTS[0][:90], "żółw 🐢", TEXTS[1]], 0.0
    lengths = set()
    for text in texts:
        ids = [eos_id(tokenizer), *encode(tokenizer, text)]
        lengths.add((len(ids) - 1) % T)
        for i in range(1, len(ids)):
            start = (i - 1) // T * T
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:i]]))[0, -1]
            bits -= F.log_softmax(logits, dim=-1)[ids[i]].item() / math.log(2)
    expected = bits / sum(len(text.encode()) for text in texts)
    found = bits_per_byte(model, tokenizer, iter(texts), batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-5) and len(lengths) > 3
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="no text"):
            bits_per_byte(model, tokenizer, nothing)


def test_bits_per_byte_leaves_the_model_in_training(tokenizer):
    model = tiny(tokenizer, dropout=0.5).train()
    assert bits_per_byte(model, tokenizer, TEXTS[:1]) == bits_per_byte(model, tokenizer, TEXTS[:1])
    assert model.training


# ---- recipes


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


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    separator = f"\n{END_OF_TEXT}\n"
    (folder / "books-1.txt.xz").write_bytes(lzma.compress(separator.join(TEXTS[:3]).encode()))
    (folder / "tale.txt").write_text(TEXTS[3], encoding="utf-8")
    (folder / "held.txt").write_text(separator.join(TEXTS[4:]), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder


def test_the_shipped_recipe_reads():
    recipe = read_recipe(ROOT / "data" / "models" / "tiny" / "recipe.toml")
    config = json.loads((ROOT / "data" / "models" / "tiny" / "config.json").read_text())
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
])
def test_recipes_that_are_none(old, new, message, tmp_path):
    path = tmp_path / "recipe.toml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_recipe_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.toml"):
        read_recipe(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes\.toml is not a recipe"):
        read_recipe(tmp_path / "bytes.toml")


def test_prepare_reads_patterns_and_repeats(corpus, tmp_path):
    recipe = read_recipe(tmp_path / "recipe.toml")
    tokenizer = prepare(recipe, corpus, tmp_path / "run")
    ids = read_back(tmp_path / "run" / "train")
    assert ids.count(eos_id(tokenizer)) == 3 + 1 + 1    # the tale is read twice
    assert tokenizer.decode(ids[-len(encode(tokenizer, TEXTS[3])):]) == TEXTS[3]
    assert read_back(tmp_path / "run" / "validation").count(eos_id(tokenizer)) == 2
    (tmp_path / "run" / "train" / "manifest.json").write_text("{}")
    for file in corpus.iterdir():
        file.write_bytes(b"")
    assert prepare(recipe, corpus, tmp_path / "run").n_vocab == 300      # done before: nothing read
    assert (tmp_path / "run" / "train" / "manifest.json").read_text() == "{}"


def test_prepare_takes_up_after_a_kill_while_the_tokenizer_was_written(corpus, tmp_path):
    recipe = read_recipe(tmp_path / "recipe.toml")
    whole = prepare(recipe, corpus, tmp_path / "run")
    broken = tmp_path / "run2" / "tokenizer"
    broken.mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "tokenizer" / "vocab.json", broken)
    text = (tmp_path / "run" / "tokenizer" / "merges.txt").read_text(encoding="utf-8")
    (broken / "merges.txt").write_text(text[:100], encoding="utf-8")
    assert prepare(recipe, corpus, tmp_path / "run2").n_vocab == whole.n_vocab == 300


def test_prepare_refuses(corpus, tmp_path):
    recipe = read_recipe(tmp_path / "recipe.toml")
    (corpus / "tale.txt").rename(corpus / "story.txt")
    with pytest.raises(FileNotFoundError, match=r"No file in .* matches 'tale\.txt'"):
        prepare(recipe, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (corpus / "story.txt").rename(corpus / "tale.txt")
    prepare(recipe, corpus, tmp_path / "run")
    (tmp_path / "other.toml").write_text(RECIPE.replace("= 300", "= 290"), encoding="utf-8")
    with pytest.raises(ValueError, match="begun with a vocabulary of 300, and the recipe says 290"):
        prepare(read_recipe(tmp_path / "other.toml"), corpus, tmp_path / "run")


def test_loaders_are_the_same_each_time(corpus, tmp_path):
    recipe = read_recipe(tmp_path / "recipe.toml")
    prepare(recipe, corpus, tmp_path / "run")
    orders = []
    for _ in range(2):
        train, validation = make_loaders(recipe, tmp_path / "run")
        torch.rand(3)                                   # the global generator has no part in it
        orders.append([batch[0].tolist() for loader in (train, validation) for batch in loader])
    assert orders[0] == orders[1] and len(orders[0]) > 10
    assert all(len(batch[0]) == 4 for batch in train)


# ---- the command line


def command(tmp_path: Path, run: str) -> list[str]:
    return [str(tmp_path / "recipe.toml"), "--corpus", str(tmp_path / "corpus"), "--run",
            str(tmp_path / run)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "LLM_DEVICE": "cpu"}


def test_a_run_that_is_stopped_and_started_again_ends_in_the_same_weights(
        corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_DEVICE", "cpu")
    assert main(command(tmp_path, "whole")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["step"] for r in lines] == list(range(0, 301, 20)) and "val_loss" in lines[-1]
    whole = pd.read_csv(tmp_path / "whole" / "history.csv")
    assert whole["tokens"].iloc[-1] == 19_200 and len(whole) == 301
    assert whole["val_loss"].dropna().iloc[-1] < whole["val_loss"].iloc[0] - 1

    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.scaling", *command(tmp_path, "half")], env=environment(),
        cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if json.loads(line)["step"] >= 40:
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    assert process.wait(timeout=60) == 0
    stopped = torch.load(tmp_path / "half" / "checkpoint.pt", weights_only=True)["step"]
    assert 40 <= stopped < 300
    assert not (tmp_path / "half" / "model").exists()   # unfinished, hence no model yet
    assert len(pd.read_csv(tmp_path / "half" / "history.csv")) == stopped + 1

    assert main(command(tmp_path, "half")) == 0
    half = pd.read_csv(tmp_path / "half" / "history.csv")
    pd.testing.assert_frame_equal(half.drop(columns="tokens_per_s"),
                                  whole.drop(columns="tokens_per_s"))
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "half")]
    assert files[0].read_bytes() == files[1].read_bytes()
    model, tokenizer = load_pretrained(tmp_path / "half" / "model")
    assert model.config.eos_id == eos_id(tokenizer) and model.config.dropout == 0.1
    before = files[1].stat().st_mtime_ns
    assert main(command(tmp_path, "half")) == 0         # finished before: the same again
    assert files[0].read_bytes() == files[1].read_bytes() and files[1].stat().st_mtime_ns >= before
    recipe = RECIPE.replace("n_layer = 1", "n_layer = 2")
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    with pytest.raises(ValueError, match="n_layer: 1 there, 2 here"):
        main(command(tmp_path, "half"))


def test_the_command_line_explains_itself(capsys):
    with pytest.raises(SystemExit):
        main(["recipe.toml"])
    assert "--corpus" in capsys.readouterr().err
    assert "main" in scaling.__all__


# ---- two processes


WORKER = """
    import os, signal, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from helpers.gpt import GPT, GPTConfig
    from helpers.pretraining import fit, lm_loss, train_step
    from helpers.scaling import main

    folder, rank, close = sys.argv[1], int(os.environ["RANK"]), dist.destroy_process_group
    dist.destroy_process_group = lambda: None           # the group is used further below
    main([folder + "/recipe.toml", "--corpus", folder + "/corpus", "--run", folder + "/run"])
    work = torch.load(folder + "/work.pt", weights_only=True)

    def fresh():
        model = GPT(GPTConfig(**work["shape"]))
        model.load_state_dict(work["model"])
        return model, DistributedDataParallel(model)

    model, wrapped = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = [train_step(wrapped, step[rank], lm_loss, optimizer, lr=0.1, grad_clip=0.5)
            for step in work["steps"]]
    result = {"losses": [s["train_loss"] for s in seen], "targets": [s["targets"] for s in seen],
              "norms": [s["grad_norm"] for s in seen], "model": model.state_dict()}

    calls = []
    def interrupted(model, batch):
        calls.append(0)
        if rank == 1 and len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return lm_loss(model, batch)

    model, wrapped = fresh()
    history = fit(wrapped, work["steps"][0][rank][:1], loss_fn=interrupted, max_steps=40,
                  progress=False, checkpoint=folder + "/c.pt")
    result["stopped"] = [r["step"] for r in history.records][-1], history.interrupted

    model, wrapped = fresh()
    def broken(model, batch):
        loss, n = lm_loss(model, batch)
        return (loss * float("nan") if rank == 1 else loss), n
    try:
        fit(wrapped, work["steps"][0][rank][:1], loss_fn=broken, max_steps=2, progress=False)
    except FloatingPointError as error:
        result["broken"] = str(error)
    torch.save(result, f"{folder}/result{rank}.pt")
    close()
"""


def test_two_processes_train_to_the_loss_of_one(corpus, tmp_path, tokenizer):
    """Unequal counts of targets on the two ranks, two batches a step; and the whole command."""
    generator = torch.Generator().manual_seed(1)

    def batch(rows: int, counted: int) -> list[torch.Tensor]:
        inputs, targets = torch.randint(300, (2, rows, 8), generator=generator)
        targets[:, counted:] = IGNORE
        return [inputs, targets]

    steps = [[[batch(3, 8), batch(1, 5)], [batch(1, 2), batch(2, 1)]] for _ in range(4)]
    model = tiny(tokenizer)
    work = {"shape": {k: v for k, v in vars(model.config).items() if v is not None},
            "model": model.state_dict(), "steps": steps}
    torch.save(work, tmp_path / "work.pt")
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("19_200", "5_120"), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--master-addr=127.0.0.1", f"--master-port={port}", str(tmp_path / "worker.py"),
         str(tmp_path)], env=environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()                             # torchrun then ends its workers
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (torch.load(tmp_path / f"result{rank}.pt") for rank in (0, 1))
    for i, step in enumerate(steps):
        seen = train_step(model, [b for rank in step for b in rank], lm_loss, optimizer, lr=0.1,
                          grad_clip=0.5)
        assert seen["targets"] == first["targets"][i] == second["targets"][i] == 33
        for name, key in (("train_loss", "losses"), ("grad_norm", "norms")):
            assert first[key][i] == pytest.approx(seen[name], rel=1e-5)
            assert second[key][i] == first[key][i]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["model"][name], second["model"][name])

    assert first["stopped"] == second["stopped"] == (3, True)      # an interrupt of one stops both
    assert "loss is nan" in first["broken"] and "loss is nan" in second["broken"]

    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert history["step"].iloc[-1] == 40 and history["tokens"].iloc[-1] == 5_120
    trained, _ = load_pretrained(tmp_path / "run" / "model")
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[1] - 0.5
    assert trained.config.context_length == 16
