"""tests/benchmarks/instruction_generator.py: every example it makes is right and is kept apart."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import test_instruction_data as data

from helpers.instruction import group_key, train_val_test_split
from helpers.tokenizer import encode, load_tokenizer

PATH = Path(__file__).parent / "benchmarks" / "instruction_generator.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("instruction_generator", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load()
TOKENIZER = load_tokenizer("tiny")
MADE = GENERATOR.generate_examples(3000, words=GENERATOR.copy_words(TOKENIZER))


@pytest.mark.parametrize("kind", sorted({e["kind"] for e in MADE}))
def test_answers_are_right(kind: str) -> None:
    """By the rules with which the shipped examples are checked, which are not the generator's."""
    found = [e for e in MADE if e["kind"] == kind]
    assert len(found) >= 20
    assert [e for e in found if not data.CHECKS[kind](e)] == []


def test_form() -> None:
    assert len(MADE) == 3000
    for e in MADE:
        assert set(e) == {"kind", "instruction", "input", "output"} and e["kind"] in data.KINDS
        for text in e.values():
            assert text == text.strip() and text.isascii() and "  " not in text, e
        assert len(encode(TOKENIZER, data.format_prompt(e) + e["output"])) < 256
        for vowel in "aeiou":
            assert f" a {vowel}" not in e["output"] or e["kind"] in ("grammar", "add_word")


def test_no_prompt_twice_and_no_group_of_validation_or_test() -> None:
    assert max(Counter((e["instruction"], e["input"]) for e in MADE).values()) == 1
    _, val, test = train_val_test_split(data.EXAMPLES)
    assert not {group_key(e) for e in MADE} & {group_key(e) for e in (*val, *test)}


def test_the_held_out_kind_is_not_made() -> None:
    assert "negative" not in {e["kind"] for e in MADE}


def test_equal_seeds_make_equal_examples() -> None:
    words = GENERATOR.copy_words(TOKENIZER)
    assert GENERATOR.generate_examples(200, words=words) == MADE[:200]
    assert GENERATOR.generate_examples(200, seed=1, words=words) != MADE[:200]


def test_words_that_rhyme_do_so_with_their_own_row_only() -> None:
    words = [word for row in GENERATOR.RHYMES for word in row]
    assert len(words) == len(set(words)) and min(map(len, GENERATOR.RHYMES)) >= 3


def test_it_writes_a_file_of_the_shipped_form(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "more.json"
    monkeypatch.setattr("sys.argv", ["generator", "--n", "50", "--out", str(path)])
    assert GENERATOR.main() == 0
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 50
