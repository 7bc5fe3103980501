"""Tests of helpers.scaling: corpora, shards, Muon, recipes, the command line, two processes."""

import contextlib
import copy
import gzip
import io
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
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from helpers import scaling
from helpers.gpt import GPT, GPTConfig, flops_per_token
from helpers.pretrained import load_pretrained
from helpers.training import (IGNORE_INDEX, History, ResumableLoader, configure_optimizer,
                              evaluate_loss, fit, lm_loss, load_checkpoint, train_step)
from helpers.corpus import (bits_per_byte, load_shards, read_documents, stream_documents,
                            write_shards)
from helpers.distributed import apply_fsdp
from helpers.optim import Muon, newton_schulz
from helpers.pretrain import (find_sources, iter_documents, load_run_config, main, make_loaders,
                              make_log, measured_flops, peak_flops, prepare, start_model,
                              training_flops)
from helpers.tokenizer import (END_OF_TEXT, encode, eos_token_id, load_tokenizer, save_tokenizer,
                               train_bpe)

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


# ---- tables


def test_tables_are_read_as_documents(tmp_path):
    texts = ["One.", " ", "Two,\nżółw.", "Three."]
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        path = tmp_path / name
        assert list(read_documents(path)) == ["One.", "Two,\nżółw.", "Three."]
        assert list(stream_documents([path, path], start=2, stop=5)) == ["Two,\nżółw.", "Three.",
                                                                        "One."]
        with pytest.raises(ValueError, match=r"no column 'body'; it has \['id', 'text'\]"):
            list(read_documents(path, text_column="body"))


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


def test_without_the_package_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        next(stream_documents("someone/tales"))


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
    expected = [i for text in texts for i in [eos_token_id(tokenizer), *encode(tokenizer, text)]]
    assert read_back(tmp_path) == expected
    assert expected.count(eos_token_id(tokenizer)) == len(texts) == manifest["documents"]
    assert manifest["bytes"] == sum(len(t.encode()) for t in texts)
    assert sum(s["tokens"] for s in manifest["shards"]) == len(expected)
    assert (len(manifest["shards"]) == 1) == (shard_tokens == 2**24)
    for shard in manifest["shards"]:                    # no document is torn apart
        first = np.fromfile(tmp_path / shard["file"], dtype=np.uint16)[0]
        assert first == eos_token_id(tokenizer)


def test_windows_of_shards_are_those_of_the_tokens(tmp_path, tokenizer):
    manifest = write_shards(TEXTS, tokenizer, tmp_path, shard_tokens=700)
    windows, n = load_shards(tmp_path, 32), 0
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
            load_shards(tmp_path, 32)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokens-00001\.bin is missing"):
        load_shards(tmp_path, 32)
    path.write_bytes(whole)
    load_shards(tmp_path, 32)
    for text in ("", "[]", '{"shards"'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            load_shards(tmp_path, 32)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        load_shards(tmp_path, 32)


def test_tokenizing_again_does_not_leave_an_old_manifest(tmp_path, tokenizer):
    def breaks():
        yield TEXTS[0]
        raise KeyboardInterrupt

    write_shards(TEXTS, tokenizer, tmp_path, shard_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        write_shards(breaks(), tokenizer, tmp_path, shard_tokens=100)
    with pytest.raises(FileNotFoundError, match="not a folder of finished shards"):
        load_shards(tmp_path, 32)


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
        load_shards(tmp_path / "short", 32)


def test_the_largest_id_of_16_bits_survives(tmp_path):
    class Widest:
        n_vocab = 65_536
        special_tokens_set = frozenset({END_OF_TEXT})

        def encode_ordinary(self, text):
            return [65_535, 0, 65_534]

        def encode_single_token(self, text):
            return 65_535

        def token_byte_values(self):
            return [b"x"]

    write_shards(["x"], Widest(), tmp_path)
    assert load_shards(tmp_path, 3)[0][0].tolist() == [65_535, 65_535, 0]


class Stopped(Exception):
    """As a power cut would."""


def stopped_after(texts: list[str], n: int):
    yield from texts[:n]
    raise Stopped


def test_a_stopped_call_goes_on_after_its_last_whole_shard(tmp_path, tokenizer, monkeypatch):
    whole = write_shards(TEXTS, tokenizer, tmp_path / "whole", shard_tokens=700)
    assert sum(s["tokens"] for s in whole["shards"]) == whole["tokens"]
    original, encoded = scaling.tokenize_documents, []

    def counting(texts, *arguments):
        encoded.extend(texts)
        return original(texts, *arguments)

    for n in range(len(TEXTS) + 1):
        folder = tmp_path / str(n)
        with pytest.raises(Stopped), monkeypatch.context() as patch:
            patch.setattr(scaling, "GROUP_CHARS", 1)    # each document by itself
            write_shards(stopped_after(TEXTS, n), tokenizer, folder, shard_tokens=700)
        assert not (folder / "manifest.json").exists()
        done = len(list(folder.glob("tokens-*.bin")))
        encoded.clear()
        monkeypatch.setattr(scaling, "GROUP_CHARS", 1)  # each document by itself
        monkeypatch.setattr(scaling, "tokenize_documents", counting)
        assert write_shards(iter(TEXTS), tokenizer, folder, shard_tokens=700) == whole
        monkeypatch.undo()
        assert read_back(folder) == read_back(tmp_path / "whole")
        assert not (folder / "unfinished.json").exists()
        assert (len(encoded) < len(TEXTS)) == (done > 0) == (n > 1)    # what was done stayed


def test_what_a_stopped_call_left_is_not_mixed_with_something_else(
        tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(scaling, "GROUP_CHARS", 1)
    def stop(folder):
        with pytest.raises(Stopped):
            write_shards(stopped_after(TEXTS, 5), tokenizer, folder, shard_tokens=100)

    stop(tmp_path / "a")
    for other in (["Another text.", *TEXTS[1:]], TEXTS[:2], TEXTS[1:]):
        with pytest.raises(ValueError, match="was begun with other documents"):
            write_shards(other, tokenizer, tmp_path / "a", shard_tokens=100)
    assert write_shards(TEXTS, tokenizer, tmp_path / "a", shard_tokens=100)["documents"] == 6
    other = train_bpe(TEXTS[:3], 290)
    for changes in ({"tokenizer": other, "shard_tokens": 100},
                    {"tokenizer": tokenizer, "shard_tokens": 50}):
        stop(tmp_path / "b")
        found = write_shards(TEXTS, folder=tmp_path / "b", **changes)
        expected = write_shards(TEXTS, folder=tmp_path / "c", **changes)
        assert found == expected                         # begun anew


TOKENIZE = """
    import sys, time
    from pathlib import Path
    from helpers.corpus import write_shards
    from helpers.tokenizer import load_tokenizer

    folder = Path(sys.argv[1])

    def documents():
        for i in range(12):
            if i == 8:
                print("waiting", flush=True)
                time.sleep(60)
            yield (folder / "text.txt").read_text(encoding="utf-8") + str(i)

    if __name__ == "__main__":
        write_shards(documents(), load_tokenizer(folder / "tokenizer"), folder / "two",
                     shard_tokens=1000, processes=2)
"""


def test_several_processes_write_the_same_and_a_killed_call_goes_on(tmp_path, tokenizer):
    text = " ".join(TEXTS) * 8                          # a group of its own
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "work.py").write_text(textwrap.dedent(TOKENIZE), encoding="utf-8")
    documents = [text + str(i) for i in range(12)]
    assert len(text) > scaling.GROUP_CHARS
    whole = write_shards(documents, tokenizer, tmp_path / "one", shard_tokens=1000)

    process = subprocess.Popen([sys.executable, str(tmp_path / "work.py"), str(tmp_path)],
                               env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    journal = json.loads((tmp_path / "two" / "unfinished.json").read_text(encoding="utf-8"))
    assert 0 < journal["documents"] < 8 and not (tmp_path / "two" / "manifest.json").exists()
    process.stdout.read()                               # ends when its workers have ended, too
    assert journal["shards"] == whole["shards"][:len(journal["shards"])]    # two did as one does
    assert write_shards(iter(documents), tokenizer, tmp_path / "two", shard_tokens=1000) == whole
    assert read_back(tmp_path / "two") == read_back(tmp_path / "one")


LARGE = """
    import re, sys
    import numpy as np
    from helpers.corpus import load_shards

    def own_memory():                                   # in kilobytes, pages of files apart
        return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

    before = own_memory()
    windows = load_shards(sys.argv[1], 1024)
    for i in np.random.default_rng(0).integers(len(windows), size=200):
        windows[int(i)]
    print(len(windows), own_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_shard_is_not_loaded(tmp_path):
    size = 400_000_000                                  # on disk it is a hole and takes no room
    with open(tmp_path / "tokens-00000.bin", "wb") as file:
        file.truncate(size)
    shard = {"file": "tokens-00000.bin", "tokens": size // 2,
             "sha256": scaling.sha256(tmp_path / "tokens-00000.bin")}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [shard]}), encoding="utf-8")
    (tmp_path / "large.py").write_text(textwrap.dedent(LARGE), encoding="utf-8")
    result = subprocess.run([sys.executable, str(tmp_path / "large.py"), str(tmp_path)],
                            env=environment(), capture_output=True, text=True, check=True)
    n_windows, grown = map(int, result.stdout.split())
    assert n_windows == (size // 2 - 1) // 1024
    assert grown < 20_000                               # a twentieth of the file


# ---- bits per byte


@pytest.mark.parametrize("batch_size", [1, 3])
def test_bits_per_byte_by_hand(batch_size, tokenizer):
    model = tiny(tokenizer).eval()
    T, texts, bits = 8, ["", "a", "the old river", TEXTS[0][:90], "żółw 🐢", TEXTS[1]], 0.0
    lengths = set()
    for text in texts:
        ids = [eos_token_id(tokenizer), *encode(tokenizer, text)]
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


# ---- Muon


@settings(deadline=None, max_examples=20)
@given(m=st.integers(1, 24), n=st.integers(1, 24), seed=st.integers(0, 999),
       size=st.sampled_from([1e-4, 1.0, 1e4]), copies=st.integers(1, 3))
def test_orthogonalized_matrices_have_singular_values_near_one(m, n, seed, size, copies):
    generator = torch.Generator().manual_seed(seed)
    low = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(copies, k, low, generator=generator)).Q
                   for k in (m, n))
    values = 0.05 + 0.95 * torch.rand(copies, low, generator=generator)
    matrices = size * (left * values[:, None]) @ right.mT                      # (copies, m, n)
    found = newton_schulz(matrices)
    assert found.shape == matrices.shape and found.dtype == torch.float32
    rotated = left.mT @ found @ right                    # diagonal: the directions were kept
    diagonal = rotated.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.35
    assert (rotated - diagonal.diag_embed()).abs().max() < 0.1
    torch.testing.assert_close(newton_schulz(matrices[0]), found[0], rtol=0.05, atol=0.05)


def test_orthogonalize_of_nothing_is_nothing():
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))


def parts(model: GPT) -> tuple[list[str], list[str], list[str]]:
    """Names of the matrices of the blocks, of the tables, and of norms and biases."""
    names = [name for name, _ in model.named_parameters()]
    tables = [n for n in names if "embedding" in n or n.startswith("head")]
    rest = [n for n in names if model.get_parameter(n).dim() == 1]
    return [n for n in names if n not in tables + rest], tables, rest


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it from 2.9 on")
@pytest.mark.parametrize("tied", [True, False])
def test_muon_agrees_with_pytorchs(tied, tokenizer):
    model = tiny(tokenizer, tie_word_embeddings=tied, n_layer=2)
    other = copy.deepcopy(model)
    ours = Muon(model, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98))
    matrices, tables, rest = parts(model)
    assert len(tables) == (2 if tied else 3) and len(matrices) == 8
    sample = other.get_parameter
    theirs = [torch.optim.Muon([sample(n) for n in matrices], lr=0.01, weight_decay=0.1,
                               adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW([{"params": [sample(n) for n in tables], "weight_decay": 0.1},
                                 {"params": [sample(n) for n in rest], "weight_decay": 0.0}],
                                lr=0.01, betas=(0.9, 0.98))]
    for step in range(5):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            sample(name).grad = p.grad.clone()
            sample(name).data.copy_(p.data)
        for optimizer in (ours, *theirs):
            optimizer.step()
        for name in matrices:                            # in bfloat16, hence not to the last digit
            moves = [(m.get_parameter(name).detach() - before[name]).flatten()
                     for m in (model, other)]
            assert F.cosine_similarity(*moves, dim=0) > 0.99
            assert moves[0].norm() == pytest.approx(moves[1].norm().item(), rel=0.02)
        for name in tables + rest:
            torch.testing.assert_close(model.get_parameter(name), sample(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_decays_matrices_and_tables_only(tied, tokenizer):
    model = tiny(tokenizer, tie_word_embeddings=tied)
    before = copy.deepcopy(model)
    wrapped = nn.Module()
    wrapped.module = model                               # as data-parallel training wraps it
    optimizer = Muon(wrapped, lr=0.5, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    _, _, rest = parts(model)
    for name, p in model.named_parameters():
        expected = before.get_parameter(name) * (1 if name in rest else 0.95)
        torch.testing.assert_close(p, expected)
    assert [g["muon"] for g in optimizer.param_groups] == [True, False, False]
    moved = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(moved) == sorted(id(p) for p in model.parameters())


def test_muon_leaves_what_does_not_train(tokenizer):
    model = tiny(tokenizer)
    model.token_embedding.requires_grad_(False)
    model.blocks[0].attention.qkv.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    inputs = torch.arange(16).view(2, 8)
    train_step(model, [(inputs, inputs)], lm_loss, Muon(model), lr=0.1)
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == before.keys() - {"token_embedding.weight", "lm_head.weight",
                                     "blocks.0.attention.qkv.weight"}


def test_muon_resumes_exactly(tokenizer, tmp_path):
    batches = [(t[:, :-1], t[:, 1:]) for t in
               torch.randint(300, (6, 4, 9), generator=torch.Generator().manual_seed(0))]

    def run(checkpoint, **more):
        model = tiny(tokenizer, dropout=0.1)
        fit(model, batches, max_steps=8, optimizer=Muon(model), progress=False,
            checkpoint=checkpoint, checkpoint_every=3, **more)
        return model.state_dict()

    def stop(record):
        if record["step"] == 5:
            raise Stopped

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        run(tmp_path / "half.pt", log=stop)
    resumed = run(tmp_path / "half.pt", resume=tmp_path / "half.pt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- what a run costs


def test_training_takes_three_forward_passes():
    config = GPTConfig(vocab_size=300, context_length=16, n_embd=16, n_head=2, n_layer=1)
    assert training_flops(config, 7) == 21 * flops_per_token(config)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_rate_a_run_is_measured_against(monkeypatch):
    cpu = torch.device("cpu")
    assert 1e8 < measured_flops(cpu, size=128) < 1e14
    assert peak_flops(cpu, "float32")[1] == "measured matrix product, float32"
    cuda = torch.device("cuda")
    for name, peak in (("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA H200", 989e12),
                       ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, "bfloat16")[0] == peak
        monkeypatch.setattr(scaling, "measured_flops", lambda device, dtype: 5.0)
        assert peak_flops(cuda, "float32")[0] == 5.0
        monkeypatch.undo()


def test_lines_of_the_log(capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(scaling, "peak_flops", lambda device, precision: (1e9, "made up"))
    config = tiny(tokenizer).config
    log = make_log(config, torch.device("cpu"), "float32", every=5)
    for record in ({"step": 0, "val_loss": 5.123456789}, {"step": 4, "tokens_per_s": 1.0},
                   {"step": 5, "tokens_per_s": 1000.0}, {"step": 7, "val_loss": 4.0}):
        kept = dict(record)
        log(record)
        assert record == kept                            # the history is not written to
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"step": 0, "val_loss": 5.12346, "machine_flops": 1e9, "machine": "made up"}
    assert lines[1]["mfu"] == round(1000 * training_flops(config) / 1e9, 4) > 0
    assert [line["step"] for line in lines] == [0, 5, 7] and "machine" not in lines[1]


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


def make_corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    separator = f"\n{END_OF_TEXT}\n"
    (folder / "books-1.txt.xz").write_bytes(lzma.compress(separator.join(TEXTS[:3]).encode()))
    (folder / "tale.txt").write_text(TEXTS[3], encoding="utf-8")
    (folder / "held.txt").write_text(separator.join(TEXTS[4:]), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    return make_corpus(tmp_path)


@pytest.mark.parametrize(("name", "optimizer"), [("recipe", "adamw"), ("recipe-2", "muon")])
def test_the_shipped_recipes_read(name: str, optimizer: str):
    recipe = load_run_config(ROOT / "data" / "models" / "tiny" / f"{name}.toml")
    assert recipe.training.optimizer == optimizer
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


def command(folder: Path, run: str, recipe: str = "recipe.toml") -> list[str]:
    return [str(folder / recipe), "--corpus", str(folder / "corpus"), "--run", str(folder / run)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "LLM_DEVICE": "cpu"}


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


def assert_same_run(one: Path, other: Path) -> None:
    """To the last bit, but for the speed."""
    histories = [pd.read_csv(run / "history.csv").drop(columns="tokens_per_s")
                 for run in (one, other)]
    pd.testing.assert_frame_equal(*histories)
    files = [run / "model" / "model.safetensors" for run in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    weights = [torch.load(run / "checkpoint.pt", weights_only=True)["model"]
               for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_and_its_log(whole):
    lines = [json.loads(line) for line in (whole / "log").read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(0, 301, 20)) and "val_loss" in lines[-1]
    assert lines[0]["machine_flops"] > 1e8 and "measured" in lines[0]["machine"]
    rates = [line["mfu"] / line["tokens_per_s"] * lines[0]["machine_flops"] for line in lines[1:]
             if line["mfu"] > 1e-3]
    config = load_pretrained(whole / "whole" / "model")[0].config
    assert rates == pytest.approx([training_flops(config)] * len(rates), rel=0.1)
    history = pd.read_csv(whole / "whole" / "history.csv")
    assert history["tokens"].iloc[-1] == 19_200 and len(history) == 301
    assert history["val_loss"].dropna().iloc[-1] < history["val_loss"].iloc[0] - 1


def test_torchrun_leaves_our_options_to_us():
    """It takes `--run` for the beginning of an option of its own, `--run-path`."""
    from torch.distributed.run import get_args_parser

    ours = ["recipe.toml", "--corpus", "c", "--folder", "r", "--from", "tiny", "--processes", "2",
            "--shard", "--prepare"]
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
        main([*command(whole, "shard"), "--shard"])
    assert not (whole / "shard").exists()
    with pytest.raises(ValueError, match="torchrun --nproc-per-node N -m helpers"):
        apply_fsdp(tiny(tokenizer), torch.device("cpu"))
    text = RECIPE.replace("lr = 3e-3", 'lr = 3e-3\noptimizer = "muon"')
    (whole / "muon-shard.toml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        main([*command(whole, "shard", "muon-shard.toml"), "--shard"])


def test_the_command_line_explains_itself(capsys):
    with pytest.raises(SystemExit):
        main(["recipe.toml"])
    assert "--corpus" in capsys.readouterr().err
    assert "main" in scaling.__all__


# ---- two processes


WORKER = """
    import os, signal, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from helpers import scaling
    from helpers.gpt import GPT, GPTConfig
    from helpers.training import configure_optimizer, fit, lm_loss, train_step
    from helpers.distributed import apply_fsdp, full_state_dict
    from helpers.optim import Muon
    from helpers.pretrain import main

    folder, rank, start = sys.argv[1], int(os.environ["RANK"]), dist.init_process_group
    close = dist.destroy_process_group                  # one group for all that follows
    dist.destroy_process_group = lambda: None
    dist.init_process_group = lambda: None if dist.is_initialized() else start()

    def command(recipe, run, *more):
        main([f"{folder}/{recipe}", "--corpus", folder + "/corpus", "--run", f"{folder}/{run}",
              *more])

    command("recipe.toml", "run")
    work = torch.load(folder + "/work.pt", weights_only=True)

    def fresh(tied=True):
        model = GPT(GPTConfig(**work["shape"] | {"tie_word_embeddings": tied}))
        model.load_state_dict(work["model"])            # untied, both tables begin the same
        return model

    def steps(wrapped, optimizer):
        seen = [train_step(wrapped, step[rank], lm_loss, optimizer, lr=0.1, grad_clip=0.5)
                for step in work["steps"]]
        return {"losses": [s["train_loss"] for s in seen], "norms": [s["grad_norm"] for s in seen],
                "targets": [s["targets"] for s in seen]}

    result = {}
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
            "held": held, "all": model.n_params, "model": model.state_dict(),
            "tied": model.lm_head.weight is model.token_embedding.weight}

    command("short.toml", "copied")
    command("short.toml", "sharded", "--shard")
    make_log = scaling.make_log

    def log_and_stop(*arguments):
        log = make_log(*arguments)
        return lambda r: log(r) if r["step"] != 23 else signal.raise_signal(signal.SIGINT)

    scaling.make_log = log_and_stop
    command("short.toml", "stopped", "--shard")
    result["stopped at"] = torch.load(folder + "/stopped/checkpoint.pt", weights_only=True)["step"]
    dist.barrier()
    scaling.make_log = make_log
    command("short.toml", "stopped", "--shard")

    calls = []
    def interrupted(model, batch):
        calls.append(0)
        if rank == 1 and len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return lm_loss(model, batch)

    wrapped = DistributedDataParallel(fresh())
    history = fit(wrapped, work["steps"][0][rank][:1], loss_fn=interrupted, max_steps=40,
                  progress=False, checkpoint=folder + "/c.pt")
    result["stopped"] = [r["step"] for r in history.records][-1], history.interrupted

    wrapped = DistributedDataParallel(fresh())
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
    return model, [train_step(model, [b for rank in step for b in rank], lm_loss, moved, lr=0.1,
                              grad_clip=0.5) for step in work["steps"]]


@pytest.mark.parametrize(("name", "optimizer", "rel"), [("sgd", torch.optim.SGD, 1e-5),
                                                        ("muon", Muon, 2e-3)])
def test_two_processes_train_to_the_loss_of_one(name, optimizer, rel, pair):
    """Unequal counts of targets on the two ranks, two batches a step; Muon is in bfloat16."""
    model, seen = alone(pair, optimizer)
    first, second = (result[name] for result in results(pair))
    assert [s["targets"] for s in seen] == first["targets"] == second["targets"] == [33] * 4
    for ours, key in (("train_loss", "losses"), ("grad_norm", "norms")):
        assert first[key] == pytest.approx([s[ours] for s in seen], rel=rel)
        assert first[key] == second[key]
    for part, weight in model.state_dict().items():
        if name == "sgd":
            torch.testing.assert_close(first["model"][part], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(first["model"][part], second["model"][part])


@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_model_trains_to_the_loss_of_one_process(tied, pair):
    model, seen = alone(pair, tie_word_embeddings=tied)
    first, second = (result[f"shard-{tied}"] for result in results(pair))
    for ours, key in (("train_loss", "losses"), ("grad_norm", "norms"), ("targets", "targets")):
        assert first[key] == pytest.approx([s[ours] for s in seen], rel=1e-5)
        assert first[key] == second[key]
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
    batches = ResumableLoader([[0]] * 100)
    assert load_checkpoint(pair / "sharded" / "checkpoint.pt", plain, optimizer, batches,
                           History()) == 40
    assert plain.lm_head.weight is plain.token_embedding.weight
    for name, weight in model.state_dict().items():      # in the folder they are float16
        torch.testing.assert_close(plain.state_dict()[name], weight, rtol=1e-3, atol=1e-6)
    state = torch.load(pair / "copied" / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    for i, kept in optimizer.state_dict()["state"].items():
        for name, value in kept.items():
            torch.testing.assert_close(value, state[i][name], rtol=1e-2, atol=1e-4)


def test_two_processes_stop_together_and_fail_together(pair):
    first, second = results(pair)
    assert first["stopped"] == second["stopped"] == (3, True)      # an interrupt of one stops both
    assert "loss is nan" in first["broken"] and "loss is nan" in second["broken"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_two_killed_processes_resume_to_the_same_weights(pair):
    history = pd.read_csv(pair / "run" / "history.csv")
    assert history["step"].iloc[-1] == 200 and history["tokens"].iloc[-1] == 25_600
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
