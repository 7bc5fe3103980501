"""The exercise checks: a typical wrong answer fails with a message that names the mistake.

That a check accepts the worked solution is shown by `notebooks/solutions/`, and that it lets an
untouched starter be by the chapters: nbval runs both.
"""

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from helpers import checks

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = sorted(name for name in vars(checks) if name.startswith("check_"))


def wrong_answers() -> list[tuple[str, Any, str]]:
    """The WRONG lists of tests/wrong_answers/*.py: check, answer, part of the message."""
    found = []
    for path in sorted((ROOT / "tests" / "wrong_answers").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.WRONG
    return found


WRONG = wrong_answers()


@pytest.mark.parametrize(("name", "answer", "message"), WRONG,
                         ids=[f"{i}-{case[0]}" for i, case in enumerate(WRONG)])
def test_a_wrong_answer_is_told_what_is_wrong(name: str, answer: Any, message: str) -> None:
    with pytest.raises(checks.CheckFailed) as failure:
        getattr(checks, name)(answer)
    assert message.lower() in str(failure.value).lower()


@pytest.mark.parametrize("name", PUBLIC)
def test_each_check_has_a_wrong_answer_and_a_docstring(name: str) -> None:
    assert name in {case[0] for case in WRONG}
    assert inspect.getdoc(getattr(checks, name))


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("starter", [None, ...])
def test_an_untouched_starter_is_let_be(name: str, starter: Any,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    getattr(checks, name)(starter)
    assert "not tried yet" in capsys.readouterr().out


def calls(folder: Path) -> dict[str, str]:
    """Check name to what was printed, over the notebooks of a folder."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            for name in PUBLIC:
                if cell["cell_type"] == "code" and f"\n{name}(" in f"\n{source}":
                    printed = ["".join(o.get("text", [])) for o in cell["outputs"]]
                    found[name] = "".join(printed)
    return found


def test_each_check_is_used_by_a_chapter_and_met_by_a_solution() -> None:
    starters, solved = calls(ROOT / "notebooks"), calls(ROOT / "notebooks" / "solutions")
    assert sorted(starters) == PUBLIC
    assert sorted(solved) == PUBLIC
    assert [n for n in PUBLIC if "not tried yet" not in starters[n]] == []
    assert [n for n in PUBLIC if "correct" not in solved[n]] == []


def test_untouched_sees_an_empty_body() -> None:
    def only_doc(x):
        """Say what to do."""
        ...

    def done(x):
        """Say what to do."""
        return x

    assert checks.is_unanswered(only_doc) and checks.untouched(lambda: None)
    assert not checks.is_unanswered(done) and not checks.untouched(0)
