"""Chapter 2, module tokenizer: ids as tiktoken and transformers give them, files they can read."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, GPT2TokenizerFast

from helpers import tokenizer as module
from helpers.common import data_path, find_root
from helpers.data import read_text
from helpers.download import DownloadError, fetch, find_files
from helpers.tokenizer import (
    END_OF_TEXT,
    SPLIT_PATTERN,
    bpe,
    bytes_to_unicode,
    decode,
    encode,
    eos_token_id,
    learn_merges,
    load_tokenizer,
    make_encoding,
    merge,
    mergeable_ranks,
    save_tokenizer,
    train_bpe,
)

STORY = read_text(data_path("story.txt"))
TINY = load_tokenizer("tiny")
RANKS = mergeable_ranks(TINY)
# Where tokenizers go wrong: white space of all kinds, joined emoji, marks, controls, end-of-text.
HARD = [
    "",
    " ",
    "  \n\n  x",
    "\r\n\t\x0b\x0c\x1c\x1f\x85\u00a0\u2028\u3000a\u200b b",
    "It's we'll I'd they'RE 'tis ''s",
    "3 1/2 ²³ Ⅷ १२३ 1,000,000.00",
    "\0\0 a\0",
    "Zoë Zoe\u0308 ﬁ ß İ",
    "猫坐在温暖的楼梯上。こんにちは 안녕",
    "👩‍👩‍👧🏽🐈\ufe0f🇫🇷",
    "مرحبا שלום नमस्ते สวัสดี",
    "\ufeff\ufffd\uffff\U0010ffff",
    "a" * 300 + " " * 300,
]
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
mixed = st.lists(st.sampled_from(HARD) | texts, max_size=4).map("".join)


def encode_by_hand(text: str) -> list[int]:
    pieces = regex.findall(SPLIT_PATTERN, text)
    return [i for piece in pieces for i in bpe(piece.encode(), RANKS)]


# ---------------------------------------------------------------------------------------------
# Training


def test_bytes_to_unicode_is_that_of_transformers() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    symbols = bytes_to_unicode()
    assert sorted(symbols) == list(range(256))
    assert set(symbols.values()) == set(alphabet) and len(alphabet) == 256


@given(st.lists(st.integers(0, 2)), st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_merge_is_replace(ids: list[int], pair: tuple[int, int]) -> None:
    letters, two = "".join("abc"[i] for i in ids), "".join("abc"[i] for i in pair)
    assert "".join("abcd"[i] for i in merge(ids, pair, 3)) == letters.replace(two, "d")


def plain_merges(word_counts: dict[bytes, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding as the paper has it: count all pairs, merge the first, begin again."""
    order = {bytes([b]): i for i, b in enumerate(bytes_to_unicode())}
    words = [([bytes([b]) for b in word], n) for word, n in word_counts.items()]
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges:
        pairs = Counter(pair for word, n in words for pair in pairwise(word) for _ in range(n))
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda p: (-pairs[p], order[p[0]], order[p[1]]))
        order[best[0] + best[1]] = len(order)
        merges.append(best)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return merges


small_words = st.dictionaries(
    st.text("abc", min_size=1, max_size=12).map(str.encode), st.integers(1, 4), max_size=12
)


@settings(deadline=None, max_examples=200)
@given(small_words, st.integers(0, 30))
@example({b"aaaaaaa": 3, b"aaaa": 2}, 30)
@example({b"ab" * 6: 2, b"ba" * 6: 2}, 30)
def test_learn_merges_is_the_plain_algorithm(words: dict[bytes, int], n_merges: int) -> None:
    expected = [a + b for a, b in plain_merges(words, n_merges)]
    assert learn_merges(words, n_merges) == expected
    assert len(set(expected)) == len(expected)             # no two pairs spell the same token
    assert learn_merges(dict(reversed(words.items())), n_merges) == expected


@settings(deadline=None, max_examples=30)
@given(small_words)
def test_the_halves_are_found_again(words: dict[bytes, int]) -> None:
    """What save_tokenizer relies on: a token encoded with the ranks below its own is its pair."""
    merges = plain_merges(words, 30)
    ranks = mergeable_ranks(make_encoding("x", [a + b for a, b in merges]))
    for a, b in merges:
        assert bpe(a + b, ranks, below=ranks[a + b]) == [ranks[a], ranks[b]]


def test_train_bpe_is_hugging_faces_trainer(tmp_path: Path) -> None:
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([STORY], trainers.BpeTrainer(
        vocab_size=1_000, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    theirs.model.save(str(tmp_path))
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    save_tokenizer(train_bpe(STORY, 1_001), tmp_path / "ours")
    ours = (tmp_path / "ours" / "merges.txt").read_text(encoding="utf-8").split("\n")
    # Equally frequent pairs included: both sides take the one with the smaller ids.
    assert ours[1:] == lines[1:] and len(ours) == 1 + 744 + 1


def test_train_bpe_counts_over_all_texts() -> None:
    one = train_bpe(STORY, 600)
    several = train_bpe((part for part in regex.split(r"(?=\n\n)", STORY)), 600)
    assert mergeable_ranks(one) == mergeable_ranks(several)
    assert one.n_vocab == 600 and eos_token_id(one) == 599


def test_train_bpe_with_several_special_tokens() -> None:
    tokenizer = train_bpe("low low lower", 261, special_tokens=("<a>", "<b>", END_OF_TEXT))
    ids = [tokenizer.encode_single_token(s) for s in ("<a>", "<b>", END_OF_TEXT)]
    assert ids == [258, 259, 260]
    assert train_bpe("low", 256, special_tokens=()).n_vocab == 256


@pytest.mark.parametrize(("texts", "size", "message"), [
    ("", 300, "texts are empty"),
    ([], 300, "texts are empty"),
    (["", ""], 300, "texts are empty"),
    ("low low", 256, "256 bytes and 1 special tokens alone need 257"),
    ("low low", -1, "alone need 257"),
    ("low low", 300, "repeated pairs for only 259"),
    ("a b c", 258, "repeated pairs for only 257"),
    (["fine", "half \ud83d"], 257, r"lone surrogate, '\\ud83d' at position 5"),
])
def test_train_bpe_refuses(texts: str | list[str], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_bpe(texts, size)


@pytest.mark.parametrize("special_tokens", [("<a>", "<a>"), END_OF_TEXT])
def test_train_bpe_refuses_special_tokens_that_are_no_list_of_names(special_tokens: object) -> None:
    with pytest.raises(ValueError, match="a list of different tokens"):
        train_bpe(STORY, 500, special_tokens=special_tokens)


def test_special_tokens_in_a_text_are_not_special_to_the_trainer() -> None:
    tokenizer = train_bpe(f"{END_OF_TEXT} {END_OF_TEXT}" * 3, 262)
    assert eos_token_id(tokenizer) not in tokenizer.encode_ordinary(END_OF_TEXT)


# ---------------------------------------------------------------------------------------------
# Encoding


@pytest.fixture(scope="module")
def in_transformers() -> list:
    folder = str(data_path("models/tiny"))
    kinds = (GPT2Tokenizer, GPT2TokenizerFast, AutoTokenizer)
    return [kind.from_pretrained(folder) for kind in kinds]


@settings(deadline=None, max_examples=150)
@given(mixed)
def test_encoders_agree(in_transformers: list, text: str) -> None:
    ids = encode(TINY, text)
    assert encode_by_hand(text) == ids
    for tokenizer in in_transformers:
        assert tokenizer(text)["input_ids"] == ids
    assert TINY.decode(ids) == text


@pytest.mark.parametrize("text", [*HARD, STORY], ids=lambda text: ascii(text)[:20])
def test_encoders_agree_on_hard_text(in_transformers: list, text: str) -> None:
    ids = encode(TINY, text)
    assert encode_by_hand(text) == ids
    assert [tokenizer(text)["input_ids"] for tokenizer in in_transformers] == [ids] * 3
    assert TINY.decode(ids) == text


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from("aab"), max_size=40).map("".join), small_words)
def test_encoders_agree_for_any_merges(text: str, words: dict[bytes, int]) -> None:
    """Few letters and many merges: overlaps, runs, and merges that compete for a letter."""
    pairs = plain_merges(words, 40)
    tokenizer = make_encoding("x", [a + b for a, b in pairs])
    symbols = bytes_to_unicode()
    vocab = {symbols[b]: i for i, b in enumerate(symbols)}
    vocab |= {(a + b).decode(): 256 + i for i, (a, b) in enumerate(pairs)}
    theirs = Tokenizer(models.BPE(vocab=vocab, merges=[(a.decode(), b.decode()) for a, b in pairs]))
    ids = bpe(text.encode(), mergeable_ranks(tokenizer))
    assert ids == tokenizer.encode_ordinary(text) == theirs.encode(text).ids


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80))
@example(bytes(range(256)))
def test_any_bytes_survive(data: bytes) -> None:
    ids = bpe(data, RANKS)
    assert TINY.decode_bytes(ids) == data
    assert all(0 <= i < len(RANKS) for i in ids)


def test_bpe_with_a_limit() -> None:
    ranks = mergeable_ranks(make_encoding("x", [b"ab", b"abc"]))
    assert bpe(b"abc", ranks) == [257]
    assert bpe(b"abc", ranks, below=257) == [256, ranks[b"c"]]
    assert bpe(b"abc", ranks, below=256) == [ranks[b"a"], ranks[b"b"], ranks[b"c"]]
    assert bpe(b"", ranks) == []


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", END_OF_TEXT * 3, "<|endoftext"])
def test_special_tokens_in_user_text_are_letters(text: str) -> None:
    ids = encode(TINY, text)
    assert eos_token_id(TINY) not in ids and TINY.decode(ids) == text
    assert encode(TINY, text, end=True) == [*ids, eos_token_id(TINY)]


@pytest.mark.parametrize(("text", "position"),
                         [("\ud800", 0), ("ab\udfff", 2), ("🐈\udc00\ud800", 1)])
def test_encode_refuses_lone_surrogates(text: str, position: int) -> None:
    with pytest.raises(ValueError, match=f"lone surrogate, .* at position {position},"):
        encode(TINY, text)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_encode_refuses_what_is_no_text(text: object) -> None:
    with pytest.raises(TypeError, match=f"wants a str, got {type(text).__name__}"):
        encode(TINY, text)


def test_encode_refuses_white_space_that_would_crash_tiktoken() -> None:
    long = "a " + " " * 499_998 + "x"
    assert TINY.decode(encode(TINY, long)) == long
    for text in (" " * 500_000, "a \n" + " \n" * 700_000 + "x"):
        with pytest.raises(ValueError, match=r"characters in a row, from position [01]\b"):
            encode(TINY, text)


def test_eos_token_id_of_a_tokenizer_without_one() -> None:
    assert eos_token_id(TINY) == TINY.n_vocab - 1
    with pytest.raises(ValueError, match="has no <.endoftext.>; its special tokens are"):
        eos_token_id(make_encoding("bare", [], special_tokens=("<pad>",)))


@given(mixed)
def test_decode_is_the_inverse_of_encode(text: str) -> None:
    ids = encode(TINY, text)
    assert decode(TINY, ids) == decode(TINY, iter(ids)) == text
    assert decode(TINY, torch.tensor(ids, dtype=torch.int64)) == text


@pytest.mark.parametrize("unknown", [8_192, 50_303, 2**40, -1])
def test_decode_refuses_an_id_of_a_padded_vocabulary(unknown: int) -> None:
    message = f"The id {unknown} has no token: 'tiny' has the ids 0 to 8191"
    with pytest.raises(ValueError, match=message):
        decode(TINY, [5, unknown])


def test_decode_of_part_of_a_character() -> None:
    assert decode(TINY, encode(TINY, "猫")[:-1]) == "\N{REPLACEMENT CHARACTER}"
    assert decode(TINY, []) == ""


# ---------------------------------------------------------------------------------------------
# Saving and loading


def test_round_trip(tmp_path: Path) -> None:
    tokenizer = train_bpe(STORY, 700, special_tokens=("<a>", END_OF_TEXT, "<b>"))
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert mergeable_ranks(again) == mergeable_ranks(tokenizer)
    for special in ("<a>", END_OF_TEXT, "<b>"):
        assert again.encode_single_token(special) == tokenizer.encode_single_token(special)
    save_tokenizer(again, tmp_path / "twice")
    for path in (tmp_path / "twice").iterdir():
        assert path.read_bytes() == (tmp_path / "new" / "folder" / path.name).read_bytes()


def test_a_saved_tokenizer_in_transformers(tmp_path: Path) -> None:
    save_tokenizer(train_bpe(STORY, 900), tmp_path)
    ours = load_tokenizer(tmp_path)
    for kind in (GPT2TokenizerFast, AutoTokenizer):
        theirs = kind.from_pretrained(tmp_path)
        assert len(theirs) == ours.n_vocab == 900
        assert theirs.eos_token_id == eos_token_id(ours) == 899
        for text in (STORY, *HARD):
            assert theirs(text)["input_ids"] == encode(ours, text)


def test_what_transformers_saves_is_loaded(tmp_path: Path) -> None:
    GPT2TokenizerFast.from_pretrained(data_path("models/tiny")).save_pretrained(tmp_path)
    if not (tmp_path / "vocab.json").is_file():
        pytest.skip("this version of transformers writes tokenizer.json only")
    assert mergeable_ranks(load_tokenizer(tmp_path)) == RANKS


def test_the_shipped_files_are_those_that_save_writes(tmp_path: Path) -> None:
    save_tokenizer(TINY, tmp_path)
    for name in ("vocab.json", "merges.txt"):
        shipped = data_path("models/tiny") / name
        assert (tmp_path / name).read_bytes() == shipped.read_bytes()


def cl100k_like() -> tiktoken.Encoding:
    """Bytes in their own order, and a hole between the ranks and the special token."""
    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("other", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: 300})


def with_another_pattern() -> tiktoken.Encoding:
    ranks = {bytes([b]): i for i, b in enumerate(bytes_to_unicode())}
    return tiktoken.Encoding("other", pat_str=r"(?s).", mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: 256})


@pytest.mark.parametrize(("make", "message"), [
    (cl100k_like, "does not number its tokens as GPT-2"),
    (with_another_pattern, "splits text by another pattern"),
    (lambda: make_encoding("other", [], special_tokens=("<pad>",)), "has no <.endoftext.>"),
    (lambda: make_encoding("other", [], special_tokens=(END_OF_TEXT, "PAD")), "'PAD' reads like"),
])
def test_save_refuses(tmp_path: Path, make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_tokenizer(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_full_disk_leaves_the_old_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(TINY, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full(path: Path, content: str, **options: str) -> int:
        if "merges.txt" in path.name:                      # its temporary file
            write(path, content[:100], **options)
            raise OSError(28, "No space left on device")
        return write(path, content, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(train_bpe(STORY, 300), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Each takes (vocab, lines of merges.txt), changes them in place or returns other contents.
def swap_lines(vocab: dict, lines: list[str]) -> None:
    lines[5], lines[9] = lines[9], lines[5]


def swap_ids(vocab: dict, lines: list[str]) -> None:
    a, b = list(vocab)[300], list(vocab)[301]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def swap_bytes(vocab: dict, lines: list[str]) -> None:
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def reorder_both(vocab: dict, lines: list[str]) -> None:
    """Ids and lines agree, yet " the" comes before the " t" that it is made of."""
    i, j = lines.index("Ġ t"), lines.index("Ġt he")
    lines[i], lines[j] = lines[j], lines[i]
    vocab["Ġt"], vocab["Ġthe"] = vocab["Ġthe"], vocab["Ġt"]


def other_halves(vocab: dict, lines: list[str]) -> None:
    lines[lines.index("Ġt he")] = "Ġ the"


def lost_end_of_lines(vocab: dict, lines: list[str]) -> None:
    del lines[-20:]


def lost_merge(vocab: dict, lines: list[str]) -> None:
    del lines[40]


def doubled_merge(vocab: dict, lines: list[str]) -> None:
    lines[40] = lines[39]


def one_half(vocab: dict, lines: list[str]) -> None:
    lines[7] = lines[7].split(" ")[0]


def three_parts(vocab: dict, lines: list[str]) -> None:
    lines[7] += " x"


def foreign_letters(vocab: dict, lines: list[str]) -> None:
    lines[7] = "猫 a"


def lost_token(vocab: dict, lines: list[str]) -> None:
    del vocab[list(vocab)[300]]


def same_id_twice(vocab: dict, lines: list[str]) -> None:
    vocab["<a>"] = 5


def hole(vocab: dict, lines: list[str]) -> None:
    vocab["<a>"] = len(vocab) + 1


def ids_as_words(vocab: dict, lines: list[str]) -> None:
    vocab.update({token: str(i) for token, i in vocab.items()})


def null_id(vocab: dict, lines: list[str]) -> None:
    vocab["<a>"] = None


def no_end_of_text(vocab: dict, lines: list[str]) -> None:
    del vocab[END_OF_TEXT]


BROKEN_FOLDERS = [
    (swap_lines, "ids break the order of the merges"),
    (swap_ids, "ids break the order of the merges"),
    (swap_bytes, "ids break the order of the merges"),
    (reorder_both, "is not what the merges before it"),
    (other_halves, "is not what the merges before it"),
    (lost_end_of_lines, "has 20 tokens without a merge"),
    (lost_merge, "ids break the order of the merges"),
    (doubled_merge, "ids break the order of the merges"),
    (one_half, "line 8: expected two tokens"),
    (three_parts, "line 8: expected two tokens"),
    (foreign_letters, "line 8: expected two tokens"),
    (lost_token, "ids break the order of the merges"),
    (same_id_twice, "each once"),
    (hole, "each once"),
    (ids_as_words, "expected tokens with their ids"),
    (null_id, "expected tokens with their ids"),
    (no_end_of_text, "has no <.endoftext.>"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_FOLDERS,
                         ids=[change.__name__ for change, _ in BROKEN_FOLDERS])
def test_load_refuses(tmp_path: Path, change: Callable, message: str) -> None:
    save_tokenizer(train_bpe(STORY, 400), tmp_path)
    vocab_path, merges_path = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
    lines = merges_path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    change(vocab, lines)
    vocab_path.write_text(json.dumps(vocab), encoding="utf-8")
    merges_path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as failure:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(failure.value)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("vocab.json", b"", "not GPT-2 tokenizer files"),
    ("vocab.json", b'{"!": 0, "', "not GPT-2 tokenizer files"),
    ("vocab.json", b"[1, 2]", "expected tokens with their ids"),
    ("vocab.json", b"\xff\xfe", "not GPT-2 tokenizer files"),
    ("merges.txt", b"\xff\xfe", "not GPT-2 tokenizer files"),
    ("merges.txt", b"<!doctype html>", "line 1: expected two tokens|break the order"),
])
def test_load_refuses_damaged_files(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    save_tokenizer(train_bpe(STORY, 300), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_windows_line_ends_and_a_missing_version_do_no_harm(tmp_path: Path) -> None:
    tokenizer = train_bpe(STORY, 400)
    save_tokenizer(tokenizer, tmp_path)
    path = tmp_path / "merges.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    for content in ("\r\n".join(lines), "\n".join(lines[1:]), "\n".join(lines[1:-1])):
        path.write_bytes(content.encode())
        assert mergeable_ranks(load_tokenizer(tmp_path)) == mergeable_ranks(tokenizer)


def test_a_folder_that_lacks_a_file(tmp_path: Path) -> None:
    shutil.copy(data_path("models/tiny/vocab.json"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks merges\.txt; expected a folder"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["no such thing", "data/models/none/at/all", "nobody", "gpt-2"])
def test_an_unknown_tokenizer(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is neither a folder here"):
        load_tokenizer(name)


@pytest.mark.parametrize("reason", ["404 not found", ""])
def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    import huggingface_hub

    def refuse(repository: str, name: str) -> str:
        raise OSError(reason)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=f"did not give some/where .OSError: {reason}"):
        load_tokenizer("some/where")


@pytest.mark.parametrize(("name", "repository"), [
    ("gpt2-medium", "openai-community/gpt2-medium"), ("some/where", "some/where"),
])
def test_names_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, repository: str
) -> None:
    import huggingface_hub

    asked = []

    def give(repository: str, name: str) -> str:
        asked.append(repository)
        return str(data_path("models/tiny") / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give)
    assert load_tokenizer(name).n_vocab == TINY.n_vocab
    assert asked == [repository] * 2


def test_tiny_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "data/models/tiny", data_path("models/tiny")):
        assert find_files(name, ["merges.txt"]) == [data_path("models/tiny") / "merges.txt"]


def test_gpt2_is_fetched_by_its_name_in_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"gpt2-vocab": "vocab.json", "gpt2-merges": "merges.txt"}
    monkeypatch.setattr(module, "fetch", lambda name: data_path("models/tiny") / files[name])
    assert mergeable_ranks(load_tokenizer("gpt2")) == RANKS


def no_network(url: str, entry: dict, target: Path) -> Path:
    raise OSError("no network in the tests")


def test_gpt2_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("helpers.download._download", no_network)
    with pytest.raises(FileNotFoundError, match="(?s)no network in the tests.*LLM_DATA_DIR"):
        load_tokenizer("gpt2")


def test_tokenizer_json_alone_gets_a_remedy_that_works(tmp_path: Path) -> None:
    in_one_file = GPT2TokenizerFast.from_pretrained(data_path("models/tiny"))
    in_one_file.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FileNotFoundError, match="in tokenizer.json") as failure:
        load_tokenizer(tmp_path)
    call = str(failure.value).split("writes the two files: ")[1]
    exec(call, {"Tokenizer": Tokenizer, "folder": str(tmp_path)})
    assert mergeable_ranks(load_tokenizer(tmp_path)) == RANKS


def test_gpt2s_own_vocabulary(tmp_path: Path) -> None:
    """Where the public files lie beside the checkout, or in the cache; skipped elsewhere."""
    beside = find_root().parent / "shared" / "data"
    with pytest.MonkeyPatch.context() as patch:
        if beside.is_dir():
            patch.setenv("LLM_DATA_DIR", str(beside))
        patch.setattr("helpers.download._download", no_network)
        try:
            merges, verdict = fetch("gpt2-merges"), read_text(fetch("the-verdict"))
            tokenizer = load_tokenizer("gpt2")
        except (DownloadError, FileNotFoundError):
            pytest.skip("GPT-2's vocabulary is not on this machine")
    assert tokenizer.n_vocab == 50_257 and eos_token_id(tokenizer) == 50_256
    assert encode(tokenizer, "hello world") == [31373, 995]
    assert (len(verdict), len(encode(tokenizer, verdict))) == (20_479, 5_145)
    save_tokenizer(tokenizer, tmp_path)
    saved = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    assert saved == merges.read_text(encoding="utf-8")
    theirs = GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in (STORY, *HARD):
        assert theirs(text)["input_ids"] == encode(tokenizer, text)


