"""Tests of helpers.corpus: documents, tables, shards; and of bits per byte on documents."""

import gzip
import json
import lzma
import math
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from small_corpus import TEXTS, Stopped, environment, read_back, tiny
from torch.nn import functional as F

from helpers import corpus
from helpers.corpus import load_shards, read_documents, stream_documents, write_shards
from helpers.download import sha256
from helpers.tokenizer import END_OF_TEXT, encode, eos_token_id, save_tokenizer, train_bpe
from helpers.training import bits_per_byte


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


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


def test_without_the_package_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        next(stream_documents("someone/tales"))


# ---- shards


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
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    for (inputs, targets), i in zip(windows.__getitems__(order), order, strict=True):
        assert torch.equal(inputs, windows[i][0]) and torch.equal(targets, windows[i][1])


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


def stopped_after(texts: list[str], n: int):
    yield from texts[:n]
    raise Stopped


def test_a_stopped_call_goes_on_after_its_last_whole_shard(tmp_path, tokenizer, monkeypatch):
    whole = write_shards(TEXTS, tokenizer, tmp_path / "whole", shard_tokens=700)
    assert sum(s["tokens"] for s in whole["shards"]) == whole["tokens"]
    original, encoded = corpus.tokenize_documents, []

    def counting(texts, *arguments):
        encoded.extend(texts)
        return original(texts, *arguments)

    for n in range(len(TEXTS) + 1):
        folder = tmp_path / str(n)
        with pytest.raises(Stopped), monkeypatch.context() as patch:
            patch.setattr(corpus, "GROUP_CHARS", 1)    # each document by itself
            write_shards(stopped_after(TEXTS, n), tokenizer, folder, shard_tokens=700)
        assert not (folder / "manifest.json").exists()
        done = len(list(folder.glob("tokens-*.bin")))
        encoded.clear()
        monkeypatch.setattr(corpus, "GROUP_CHARS", 1)  # each document by itself
        monkeypatch.setattr(corpus, "tokenize_documents", counting)
        assert write_shards(iter(TEXTS), tokenizer, folder, shard_tokens=700) == whole
        monkeypatch.undo()
        assert read_back(folder) == read_back(tmp_path / "whole")
        assert not (folder / "unfinished.json").exists()
        assert (len(encoded) < len(TEXTS)) == (done > 0) == (n > 1)    # what was done stayed


def test_what_a_stopped_call_left_is_not_mixed_with_something_else(
        tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "GROUP_CHARS", 1)
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
                     shard_tokens=1000, num_proc=2)
"""


def test_several_processes_write_the_same_and_a_killed_call_goes_on(tmp_path, tokenizer):
    text = " ".join(TEXTS) * 8                          # a group of its own
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "work.py").write_text(textwrap.dedent(TOKENIZE), encoding="utf-8")
    documents = [text + str(i) for i in range(12)]
    assert len(text) > corpus.GROUP_CHARS
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
             "sha256": sha256(tmp_path / "tokens-00000.bin")}
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
