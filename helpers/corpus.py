"""D · Scaling: data, optimizers, and many processes.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.pretrain, helpers.optim, helpers.distributed, helpers.inference.
"""

import hashlib
import json
import lzma
import multiprocessing
import os
import threading
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from helpers.common import atomic_write
from helpers.data import TokenDataset
from helpers.download import sha256
from helpers.tokenizer import END_OF_TEXT, encode, eos_token_id

__all__ = [
    "read_documents",
    "stream_documents",
    "tokenize_documents",
    "start_worker",
    "GROUP_CHARS",
    "tokenize_stream",
    "resume_shards",
    "write_shards",
    "ShardDataset",
    "load_shards",
]


# cell read-documents of notebooks/D_scaling.ipynb
def read_documents(path: str | Path, text_column: str = "text") -> Iterator[str]:
    """The documents of a file, one by one: text split at lines of `<|endoftext|>`, or a table.

    Args:
        path: text (`.txt`, `.txt.xz`), or a table for `stream_documents` (`.jsonl`, `.jsonl.gz`,
            `.parquet`).
        text_column: of a table.

    Raises:
        ValueError: the file is not UTF-8, or a packed file is damaged.

    Example:
        >>> len(list(read_documents(data_path("story.txt"))))              # doctest: +SKIP
        1
    """
    path = Path(path)
    if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        yield from stream_documents([path], text_column=text_column)
        return
    opener = lzma.open if path.suffix == ".xz" else open
    lines: list[str] = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                if line.rstrip("\n") != END_OF_TEXT:
                    lines.append(line)
                elif text := "".join(lines).strip():
                    yield text
                    lines = []
        if text := "".join(lines).strip():
            yield text
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}.") from error


# cell stream-documents of notebooks/D_scaling.ipynb
def stream_documents(source: str | Sequence[str | Path], *, config: str | None = None,
                     split: str = "train", text_column: str = "text", start: int = 0,
                     stop: int | None = None) -> Iterator[str]:
    """The documents of a data set on the Hugging Face hub, or of local tables, one by one.

    Args:
        source: a name on the hub, or paths of `.jsonl` or of `.parquet` files.
        config, split: which part of a data set on the hub.
        start, stop: the first row to take, and the first not to; empty texts are passed over.

    Raises:
        ModuleNotFoundError: the package `datasets` is not installed.
        ValueError: there is no such column.

    Example:
        >>> pages = stream_documents("HuggingFaceFW/fineweb-edu", config="sample-10BT", stop=10)
    """
    try:
        import datasets                                # here, since only this needs it
    except ImportError:
        raise ModuleNotFoundError("Streaming tables needs the package datasets: "
                                  "pip install datasets") from None
    if isinstance(source, str):
        rows = datasets.load_dataset(source, config, split=split, streaming=True)
    else:
        files = [str(path) for path in source]
        kind = "parquet" if files[0].endswith(".parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    for row in islice(rows, start, stop):
        if text_column not in row:
            raise ValueError(f"{source} has no column {text_column!r}; it has {sorted(row)}.")
        if (text := row[text_column]) and text.strip():
            yield text


# cell tokenize-documents of notebooks/D_scaling.ipynb
def tokenize_documents(texts: list[str], tokenizer: tiktoken.Encoding | None = None) -> list[array]:
    """The ids of each document, two bytes each, the end token first.

    Without a tokenizer it is the one that `start_worker` was given in this process.

    Example:
        >>> tokenizer = load_tokenizer("tiny")
        >>> tokenizer.decode(tokenize_documents(["A fox."], tokenizer)[0])
        '<|endoftext|>A fox.'
    """
    tokenizer = tokenizer or start_worker.tokenizer
    return [array("H", [eos_token_id(tokenizer), *encode(tokenizer, text)]) for text in texts]


# cell start-worker of notebooks/D_scaling.ipynb
def start_worker(tokenizer: tiktoken.Encoding) -> None:
    """Give a process the tokenizer of all its calls of `tokenize_documents`.

    The process ends when the one that started it is gone, however it went.
    """
    start_worker.tokenizer = tokenizer
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# cell group-chars of notebooks/D_scaling.ipynb
GROUP_CHARS = 2**16    # characters of text that are worth a message to another process


# cell tokenize-stream of notebooks/D_scaling.ipynb
def tokenize_stream(documents: Iterable[str], tokenizer: tiktoken.Encoding,
                    num_proc: int = 1) -> Iterator[tuple[str, array]]:
    """Each document with its ids, in the order they came, computed by several processes.

    Documents travel in groups of at least GROUP_CHARS, few of which are under way at a time.
    With several processes, call it from a script or the command line, not from a notebook: they
    import the file that was started.

    Example:
        >>> next(tokenize_stream(["A fox."], load_tokenizer("tiny")))[0]
        'A fox.'
    """
    def groups() -> Iterator[list[str]]:
        group, size = [], 0
        for text in documents:
            group.append(text)
            size += len(text)
            if size >= GROUP_CHARS:
                yield group
                group, size = [], 0
        if group:
            yield group

    if num_proc == 1:
        for group in groups():
            yield from zip(group, tokenize_documents(group, tokenizer), strict=True)
        return
    context = multiprocessing.get_context("spawn")     # the same on every system
    with ProcessPoolExecutor(num_proc, context, start_worker, (tokenizer,)) as pool:
        waiting: deque = deque()
        for group in groups():
            waiting.append((group, pool.submit(tokenize_documents, group)))
            if len(waiting) > 2 * num_proc:
                group, job = waiting.popleft()
                yield from zip(group, job.result(), strict=True)
        for group, job in waiting:
            yield from zip(group, job.result(), strict=True)


# cell resume-shards of notebooks/D_scaling.ipynb
def resume_shards(journal: Path, fresh: dict, documents: Iterator[str]) -> tuple[dict, object]:
    """The manifest to go on from, with a hash of the texts in it; those are read past.

    That is `fresh`, unless a run with the same settings was stopped and left its journal.

    Raises:
        ValueError: the documents are not those that the run that was stopped had read.
    """
    manifest = fresh
    if journal.is_file():
        found = json.loads(journal.read_text(encoding="utf-8"))
        same = all(found.get(k) == fresh[k] for k in ("vocab_size", "tokenizer", "shard_tokens"))
        manifest = found if same else fresh
    text_hash = hashlib.sha256()
    for text in islice(documents, manifest["documents"]):
        text_hash.update(text.encode("utf-8"))
    if text_hash.hexdigest() != manifest["text_sha256"]:
        raise ValueError(f"{journal.parent} was begun with other documents than these: delete "
                         f"{journal} to begin again.")
    return manifest, text_hash


# cell write-shards of notebooks/D_scaling.ipynb
def write_shards(documents: Iterable[str], tokenizer: tiktoken.Encoding, folder: str | Path, *,
                 shard_tokens: int = 2**24, num_proc: int = 1) -> dict:
    """Tokenize documents into uint16 files of about shard_tokens each; returns the manifest.

    The manifest (`manifest.json`, written last) counts documents, tokens and bytes of text and has
    a sha256 for each shard. A call that was killed is taken up after its last whole shard. A
    single string counts as one document.

    Args:
        num_proc: how many processes tokenize; the files are the same for any number (see
            `tokenize_stream`).

    Raises:
        ValueError: the vocabulary does not fit uint16, there is no document, or a call that was
            killed had read other documents.
    """
    if tokenizer.n_vocab > 2**16:
        raise ValueError(f"The vocabulary of {tokenizer.n_vocab} does not fit 16 bits.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    journal, final = folder / "unfinished.json", folder / "manifest.json"
    final.unlink(missing_ok=True)
    documents = iter([documents] if isinstance(documents, str) else documents)
    tokens = b"".join(b"%d " % len(t) + t for t in tokenizer.token_byte_values())
    manifest, text_hash = resume_shards(journal, {
        "vocab_size": tokenizer.n_vocab, "tokenizer": hashlib.sha256(tokens).hexdigest(),
        "shard_tokens": shard_tokens, "documents": 0, "bytes": 0, "tokens": 0,
        "text_sha256": hashlib.sha256().hexdigest(), "shards": []}, documents)
    buffer = array("H")                                # two bytes a token, in memory too

    def flush() -> None:
        name, data = f"tokens-{len(manifest['shards']):05}.bin", buffer.tobytes()
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(data)
        manifest["shards"].append({"file": name, "tokens": len(buffer),
                                   "sha256": hashlib.sha256(data).hexdigest()})
        manifest.update(tokens=manifest["tokens"] + len(buffer), text_sha256=text_hash.hexdigest())
        with atomic_write(journal) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        del buffer[:]

    for text, ids in tokenize_stream(documents, tokenizer, num_proc):
        data = text.encode("utf-8")
        text_hash.update(data)
        buffer.extend(ids)
        manifest.update(documents=manifest["documents"] + 1, bytes=manifest["bytes"] + len(data))
        if len(buffer) >= shard_tokens:
            flush()
    if buffer:
        flush()
    if not manifest["shards"]:
        raise ValueError("There is no document to tokenize.")
    os.replace(journal, final)
    return manifest


# cell shard-dataset of notebooks/D_scaling.ipynb
class ShardDataset(ConcatDataset):
    """Windows of several shards, each a `TokenDataset` without overlap; a batch is read at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        rows = []
        for i in indices:
            shard = bisect_right(self.cumulative_sizes, i)
            tokens, T = self.datasets[shard].tokens, self.datasets[shard].context_length
            start = (i - (self.cumulative_sizes[shard - 1] if shard else 0)) * T
            rows.append(tokens[start:start + T + 1])
        windows = torch.from_numpy(np.stack(rows).astype(np.int64))          # (B, T + 1)
        return list(zip(windows[:, :-1], windows[:, 1:], strict=True))


# cell load-shards of notebooks/D_scaling.ipynb
def load_shards(folder: str | Path, context_length: int) -> ShardDataset:
    """All whole windows of a folder of shards, read from disk as they are asked for.

    Item `i` is `(inputs, targets)`, int64 of shape (T,) each, in the order of the corpus.

    Raises:
        FileNotFoundError: the folder has no manifest: it is none, or was not finished.
        ValueError: a shard is not the file that its manifest describes, or all are too short.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} has no manifest.json: not a folder of finished shards.")
    try:
        shards = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'manifest.json'} is damaged ({error!r}): delete it, and "
                         "tokenize again.") from None
    windows = []
    for path, shard in ((folder / shard["file"], shard) for shard in shards):
        found = sha256(path) if path.is_file() else "missing"
        if found != shard["sha256"]:
            raise ValueError(f"{path} is missing, cut short or damaged (sha256 {found}, the "
                             f"manifest says {shard['sha256']}): delete the manifest, and tokenize "
                             "again.")
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        if len(tokens) > context_length:
            windows.append(TokenDataset(tokens, context_length))
    if not windows:
        raise ValueError(f"No shard in {folder} is longer than one window of {context_length}.")
    return ShardDataset(windows)
