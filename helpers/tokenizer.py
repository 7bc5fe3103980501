"""2 · From text to tensors: tokenization and embeddings.

Made from notebooks/02_text.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.data.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken
from torch import Tensor

from helpers.common import atomic_write
from helpers.download import DownloadError, fetch, find_files

__all__ = [
    "END_OF_TEXT",
    "merge",
    "bytes_to_unicode",
    "SPLIT_PATTERN",
    "make_encoding",
    "mergeable_ranks",
    "bpe",
    "eos_token_id",
    "encode",
    "decode",
    "learn_merges",
    "train_bpe",
    "save_tokenizer",
    "load_merges",
    "load_tokenizer",
]


# cell end-of-text of notebooks/02_text.ipynb
END_OF_TEXT = "<|endoftext|>"


# cell merge-pair of notebooks/02_text.ipynb
def merge(ids: Sequence, pair: tuple, new_id: object) -> list:
    """Replace each occurrence of `pair` in `ids`, from the left, by `new_id`.

    The ids may be numbers, or symbols of any other kind, such as strings or bytes.

    Example:
        >>> merge([1, 2, 3, 1, 2], (1, 2), 9)
        [9, 3, 9]
    """
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


# cell byte-symbols of notebooks/02_text.ipynb
def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's files, in the order of the ids.

    Example:
        >>> symbols = bytes_to_unicode()
        >>> symbols[ord("A")], symbols[ord(" ")], list(symbols)[0]
        ('A', 'Ġ', 33)
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(printable)]
    symbols = {b: chr(b) for b in printable}
    return symbols | {b: chr(0x100 + i) for i, b in enumerate(rest)}


# cell split-pattern of notebooks/02_text.ipynb
SPLIT_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


# cell make-encoding of notebooks/02_text.ipynb
def make_encoding(name: str, merges: Sequence[bytes],
                  special_tokens: Sequence[str] = (END_OF_TEXT,)) -> tiktoken.Encoding:
    """A `tiktoken.Encoding` with ids as in GPT-2: 256 bytes, the merges, the special tokens.

    Example:
        >>> make_encoding("toy", [b"lo", b"low"]).encode_ordinary("lower")
        [257, 68, 81]
    """
    tokens = [bytes([b]) for b in bytes_to_unicode()] + list(merges)
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {token: len(tokens) + i for i, token in enumerate(special_tokens)}
    return tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens=special, explicit_n_vocab=len(tokens) + len(special))


# cell token-ranks of notebooks/02_text.ipynb
def mergeable_ranks(tokenizer: tiktoken.Encoding) -> dict[bytes, int]:
    """The bytes of each ordinary token and its id, in the order of the ids.

    Example:
        >>> mergeable_ranks(make_encoding("toy", [b"lo", b"low"]))[b"low"]
        257
    """
    special = {tokenizer.encode_single_token(token) for token in tokenizer.special_tokens_set}
    ordinary = (i for i in range(tokenizer.n_vocab) if i not in special)
    return {tokenizer.decode_single_token_bytes(i): i for i in ordinary}


# cell bpe-encode of notebooks/02_text.ipynb
def bpe(data: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[int]:
    """Encode bytes by merging neighbours, lowest rank first: what tiktoken does for one piece.

    Any bytes at all can be encoded, valid UTF-8 or not, if `ranks` holds the 256 single bytes.
    With `below`, only merges of a lower rank than that are made.

    Example:
        >>> bpe(b"aab", {b"a": 0, b"b": 1, b"ab": 2})
        [0, 2]
    """
    limit = len(ranks) if below is None else below
    parts = [bytes([b]) for b in data]
    while len(parts) > 1:
        merged = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
        rank = min(merged)
        if rank >= limit:
            break
        i = merged.index(rank)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


# cell eos-id of notebooks/02_text.ipynb
def eos_token_id(tokenizer: tiktoken.Encoding) -> int:
    """The id of the token that ends a document.

    Raises:
        ValueError: the tokenizer was made without that token.

    Example:
        >>> eos_token_id(make_encoding("bytes", []))
        256
    """
    if END_OF_TEXT not in tokenizer.special_tokens_set:
        raise ValueError(f"The tokenizer {tokenizer.name!r} has no {END_OF_TEXT}; its special "
                         f"tokens are {sorted(tokenizer.special_tokens_set)}.")
    return tokenizer.encode_single_token(END_OF_TEXT)


# cell utf8 of notebooks/02_text.ipynb
def _utf8(text: str) -> bytes:
    """The text as UTF-8, or a ValueError that names the lone surrogate in it."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text holds a lone surrogate, {text[error.start]!r} at position {error.start}, "
            "which is half a character and cannot be encoded. Remove it, for example with "
            "text.encode('utf-8', 'replace').decode('utf-8')."
        ) from None


# cell encode of notebooks/02_text.ipynb
def encode(tokenizer: tiktoken.Encoding, text: str, *, end: bool = False) -> list[int]:
    """Encode user text, in which nothing is special; with `end`, close it with the end token.

    Raises:
        TypeError: text is not a string.
        ValueError: text holds a lone surrogate, or half a million white-space characters in a row.

    Example:
        >>> encode(make_encoding("bytes", []), "A", end=True)
        [32, 256]
    """
    if not isinstance(text, str):
        raise TypeError(f"encode wants a str, got {type(text).__name__}.")
    _utf8(text)
    if len(text) >= 500_000 and (run := regex.search(r"(?<!\s)\s{500000}", text)):
        raise ValueError(f"The text holds 500,000 or more white-space characters in a row, from "
                         f"position {run.start()}, more than tiktoken can split. Shorten them.")
    ids = tokenizer.encode_ordinary(text)
    return [*ids, eos_token_id(tokenizer)] if end else ids


# cell decode of notebooks/02_text.ipynb
def decode(tokenizer: tiktoken.Encoding, ids: Iterable[int] | Tensor) -> str:
    """The text of token ids; bytes that are not valid UTF-8 come out as the character U+FFFD.

    Raises:
        ValueError: an id has no token, as where a model's vocabulary is padded to a round size.

    Example:
        >>> decode(make_encoding("bytes", []), [32, 256])
        'A<|endoftext|>'
    """
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    try:
        return tokenizer.decode(ids)
    except (KeyError, OverflowError):
        unknown = [i for i in ids if not 0 <= i < tokenizer.n_vocab] or ids
        raise ValueError(
            f"The id {unknown[0]} has no token: {tokenizer.name!r} has the ids 0 to "
            f"{tokenizer.n_vocab - 1}. If the model's vocabulary is larger, sample from "
            "logits[..., :tokenizer.n_vocab]."
        ) from None


# cell learn-merges of notebooks/02_text.ipynb
def learn_merges(word_counts: dict[bytes, int], n_merges: int) -> list[bytes]:
    """The byte-pair merges of a text, as the byte strings they make, in the order of training.

    Sennrich et al. 2016 (arXiv:1508.07909), section 3.2, on bytes. Of pairs that are equally
    frequent the one with the smaller ids goes first, so the result does not depend on the order of
    the words. Pairs that occur once are not merged.

    Args:
        word_counts: how often each piece of the split text occurs.
        n_merges: how many merges to learn; fewer come back if the text runs out of pairs.

    Example:
        >>> learn_merges({b"low": 5, b"lower": 2}, 2)
        [b'lo', b'low']
    """
    byte_id = {b: i for i, b in enumerate(bytes_to_unicode())}
    words = [[byte_id[b] for b in word] for word in word_counts]
    counts = list(word_counts.values())
    token_bytes = [bytes([b]) for b in byte_id]
    pair_count: dict[tuple[int, int], int] = Counter()
    holders = defaultdict(set)                      # pair -> the words that hold it
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_count[pair] += counts[w]
            holders[pair].add(w)
    heap = [(-n, pair) for pair, n in pair_count.items()]
    heapq.heapify(heap)

    while len(token_bytes) < 256 + n_merges and heap:
        negative, pair = heapq.heappop(heap)
        if pair_count[pair] != -negative:           # out of date: put it back as it is now
            if pair_count[pair] > 1:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        if -negative < 2:
            break
        new_id = len(token_bytes)
        token_bytes.append(token_bytes[pair[0]] + token_bytes[pair[1]])
        changed = Counter()
        for w in holders.pop(pair):
            before, after = words[w], merge(words[w], pair, new_id)
            for old in pairwise(before):
                changed[old] -= counts[w]
            for new in pairwise(after):
                changed[new] += counts[w]
                holders[new].add(w)
            words[w] = after
        for other, difference in changed.items():
            pair_count[other] += difference
            if difference > 0:
                heapq.heappush(heap, (-pair_count[other], other))
        del pair_count[pair]
    return token_bytes[256:]


# cell train-bpe of notebooks/02_text.ipynb
def train_bpe(texts: Iterable[str], vocab_size: int,
              special_tokens: Sequence[str] = (END_OF_TEXT,)) -> tiktoken.Encoding:
    """Train a byte-level byte-pair tokenizer with GPT-2's split pattern (GPT-2 paper, section 2.2).

    Args:
        texts: documents; a single string counts as one. Special tokens in them are not special.
        vocab_size: size of the finished vocabulary: 256 bytes + merges + special_tokens.

    Raises:
        ValueError: vocab_size is below 256 + special_tokens, a special token is named twice, the
            text is empty or holds a lone surrogate, or it has too few repeated pairs.

    Example:
        >>> train_bpe("low lower lowest", 260).encode_ordinary("lower")
        [257, 68, 81]
    """
    smallest = 256 + len(special_tokens)
    if isinstance(special_tokens, str) or len(set(special_tokens)) < len(special_tokens):
        raise ValueError("special_tokens must be a list of different tokens, "
                         f"not {special_tokens!r}.")
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but the 256 bytes and {len(special_tokens)} "
                         f"special tokens alone need {smallest}.")
    counts: Counter[str] = Counter()
    for text in [texts] if isinstance(texts, str) else texts:
        _utf8(text)
        counts.update(regex.findall(SPLIT_PATTERN, text))
    if not counts:
        raise ValueError("There is no text to train a tokenizer on: the texts are empty.")
    words = {word.encode("utf-8"): n for word, n in counts.items()}
    merges = learn_merges(words, vocab_size - smallest)
    if len(merges) < vocab_size - smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but this text has repeated pairs for only "
                         f"{smallest + len(merges)}. Give more text, or a smaller vocab_size.")
    return make_encoding("trained", merges, special_tokens)


# cell save-tokenizer of notebooks/02_text.ipynb
def save_tokenizer(tokenizer: tiktoken.Encoding, folder: str | Path) -> None:
    """Write `vocab.json`, `merges.txt` and `tokenizer_config.json`, as GPT-2's folder holds them.

    Raises:
        ValueError: the tokenizer is not byte-level BPE with GPT-2's split pattern and order of ids,
            or has no token for the end of a text.

    Example:
        >>> save_tokenizer(train_bpe("low lower lowest", 260), "my-tokenizer")  # doctest: +SKIP
    """
    eos_token_id(tokenizer)                               # its error if there is none
    symbols = bytes_to_unicode()
    try:
        ranks = mergeable_ranks(tokenizer)
    except KeyError:                                # an id that stands for nothing
        ranks = {}
    in_order = list(ranks.values()) == list(range(len(ranks)))
    if [bytes([b]) for b in symbols] != list(ranks)[:256] or not in_order:
        raise ValueError(f"The tokenizer {tokenizer.name!r} does not number its tokens as GPT-2 "
                         "does; it cannot be saved as vocab.json and merges.txt.")
    if tokenizer._pat_str != SPLIT_PATTERN:
        raise ValueError(f"The tokenizer {tokenizer.name!r} splits text by another pattern than "
                         "SPLIT_PATTERN, which vocab.json and merges.txt cannot say.")
    written = {token: "".join(symbols[b] for b in token) for token in ranks}
    special = {s: tokenizer.encode_single_token(s) for s in tokenizer.special_tokens_set}
    if words := sorted(filter(_is_one_piece, special)):
        raise ValueError(f"The special token {words[0]!r} reads like an ordinary one, and in "
                         "vocab.json nothing would tell them apart. Name it like <|this|>.")
    vocab = {written[token]: i for token, i in ranks.items()}
    vocab |= dict(sorted(special.items(), key=lambda item: item[1]))
    lines = ["#version: 0.2"]
    for token in list(ranks)[256:]:
        halves = bpe(token, ranks, below=ranks[token])
        lines.append(" ".join(written[tokenizer.decode_single_token_bytes(i)] for i in halves))
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False,
              "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "\n".join(lines),
             "tokenizer_config.json": json.dumps(config, indent=1)}
    with ExitStack() as stack:                      # no old file is replaced before all are written
        for name, content in files.items():
            path = stack.enter_context(atomic_write(Path(folder) / name))
            path.write_text(content + "\n", encoding="utf-8", newline="\n")


# cell read-merges of notebooks/02_text.ipynb
def load_merges(vocab_path: Path, merges_path: Path) -> tuple[dict[str, int], list[list[str]]]:
    """Read `vocab.json` and `merges.txt`: token to id, and the two halves of each merge.

    Raises:
        ValueError: a file is damaged, or is no such file.
    """
    known = set(bytes_to_unicode().values())
    try:
        vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise ValueError(f"{vocab_path} and {merges_path.name} are not GPT-2 tokenizer files: "
                         f"{type(error).__name__}: {error}.") from None
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{vocab_path} is not a GPT-2 tokenizer file: "
                         "expected tokens with their ids.")
    numbered = list(enumerate(lines, start=1))[lines[0].startswith("#version"):]
    pairs = [(number, line.rstrip("\r").split(" ")) for number, line in numbered if line.strip()]
    for number, pair in pairs:
        if len(pair) != 2 or not all(pair) or not set("".join(pair)) <= known:
            raise ValueError(f"{merges_path}, line {number}: expected two tokens with a space "
                             f"between them, found {' '.join(pair)[:80]!r}.")
    return vocab, [pair for _, pair in pairs]


# cell is-one-piece of notebooks/02_text.ipynb
def _is_one_piece(token: str) -> bool:
    """Whether a token of `vocab.json` is one piece of split text, as all that is merged is.

    Example:
        >>> _is_one_piece("Ġthe"), _is_one_piece("<|endoftext|>")
        (True, False)
    """
    byte_of = {symbol: b for b, symbol in bytes_to_unicode().items()}
    if not set(token) <= byte_of.keys():
        return False
    text = bytes(byte_of[symbol] for symbol in token).decode("utf-8", "ignore")
    return len(regex.findall(SPLIT_PATTERN, text)) <= 1


# cell tokenizer-files of notebooks/02_text.ipynb
def _tokenizer_files(folder_or_name: str | Path) -> list[Path]:
    """The paths of `vocab.json` and `merges.txt`, or a FileNotFoundError that says what to do."""
    try:
        if str(folder_or_name) == "gpt2" and not Path("gpt2").is_dir():
            return [fetch("gpt2-vocab"), fetch("gpt2-merges")]
        return find_files(folder_or_name, ["vocab.json", "merges.txt"])
    except DownloadError as error:
        raise FileNotFoundError(str(error)) from error
    except FileNotFoundError:
        try:
            path = find_files(folder_or_name, ["tokenizer.json"])[0]
        except FileNotFoundError:
            path = None
        if path is None:
            raise
        raise FileNotFoundError(
            f"{folder_or_name} has its tokenizer in tokenizer.json, and here vocab.json and "
            "merges.txt are read. If it is byte-level BPE with GPT-2's split pattern, the package "
            "tokenizers writes the two files: "
            f"Tokenizer.from_file({str(path)!r}).model.save(folder)"
        ) from None


# cell load-tokenizer of notebooks/02_text.ipynb
def load_tokenizer(folder_or_name: str | Path) -> tiktoken.Encoding:
    """Open a byte-level BPE tokenizer in GPT-2's format as a `tiktoken.Encoding`.

    Args:
        folder_or_name: a folder with `vocab.json` and `merges.txt`, `"tiny"`, a hub name, or
            `"gpt2"`, whose two files are fetched and checked like every other source.

    Raises:
        FileNotFoundError: no such folder or name, or a file that could not be had.
        ValueError: the two files are damaged or do not belong together.

    Example:
        >>> load_tokenizer("tiny").n_vocab
        8192
    """
    vocab_path, merges_path = _tokenizer_files(folder_or_name)
    vocab, pairs = load_merges(vocab_path, merges_path)
    byte_of = {symbol: bytes([b]) for b, symbol in bytes_to_unicode().items()}
    ranks, broken = {}, f"{vocab_path.parent}: the ids break the order of the merges"
    for i, token in enumerate([*byte_of, *map("".join, pairs)]):
        if vocab.get(token) != i:
            raise ValueError(f"{broken}: {token!r} has id {vocab.get(token)} in {vocab_path.name}, "
                             f"and its place in {merges_path.name} makes it {i}.")
        ranks[b"".join(byte_of[c] for c in token)] = i
    for token, pair in zip(list(ranks)[256:], pairs, strict=True):
        if bpe(token, ranks, below=ranks[token]) != [vocab.get(half) for half in pair]:
            raise ValueError(f"{broken}: {' '.join(pair)!r} is not what the merges before it in "
                             f"{merges_path.name} leave of {''.join(pair)!r}.")
    special_tokens = [token for token, i in sorted(vocab.items(), key=lambda item: item[1])
                if token not in byte_of and i >= len(ranks)]
    if sorted(vocab.values()) != list(range(len(ranks) + len(special_tokens))):
        raise ValueError(f"{vocab_path}: the ids are not 0 to {len(vocab) - 1}, each once.")
    if words := list(filter(_is_one_piece, special_tokens)):
        raise ValueError(f"{vocab_path} has {len(words)} tokens without a merge in "
                         f"{merges_path.name}, {words[0]!r} first: is that file whole?")
    if END_OF_TEXT not in special_tokens:
        raise ValueError(f"{vocab_path} has no {END_OF_TEXT}, which ends a document here.")
    return make_encoding(vocab_path.parent.name, list(ranks)[256:], special_tokens)
