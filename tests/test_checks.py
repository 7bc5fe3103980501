"""The exercise checks: a typical wrong answer fails with a message that names the mistake.

`tests/wrong_answers/*.py` hold two lists: WRONG, with (check, answer, part of the message), and
RIGHT, with (check, answer), for other forms of a right answer than the worked solution. That a
check accepts the solution is shown by `notebooks/solutions/`, and that it accepts an unanswered
starter by the chapters: nbval runs both.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import checks
from helpers.checks import _core

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = sorted(name for name in vars(checks) if name.startswith("check_"))


def answers() -> tuple[list[tuple[str, Any, str]], list[tuple[str, Any]]]:
    """The WRONG and the RIGHT lists of tests/wrong_answers/*.py, joined."""
    wrong, right = [], []
    for path in sorted((ROOT / "tests" / "wrong_answers").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        wrong += module.WRONG
        right += getattr(module, "RIGHT", [])
    return wrong, right


WRONG, RIGHT = answers()


@pytest.mark.parametrize(("name", "answer", "message"), WRONG,
                         ids=[f"{i}-{case[0]}" for i, case in enumerate(WRONG)])
def test_a_wrong_answer_is_told_what_is_wrong(name: str, answer: Any, message: str) -> None:
    with pytest.raises(checks.CheckFailed) as failure:
        getattr(checks, name)(answer)
    assert message.lower() in str(failure.value).lower()
    assert "could not use this answer" not in str(failure.value)       # a diagnosis, not the guard


@pytest.mark.parametrize(("name", "answer"), RIGHT,
                         ids=[f"{i}-{case[0]}" for i, case in enumerate(RIGHT)])
def test_another_form_of_a_right_answer_passes(name: str, answer: Any,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    getattr(checks, name)(answer)
    assert "correct" in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("answer", [7, "an answer", [1, 2], lambda *given: given,
                                    lambda *given: "an answer"],
                         ids=["number", "text", "list", "what it was given", "another text"])
def test_no_check_ends_in_a_traceback_of_its_own(name: str, answer: Any) -> None:
    """Whatever the answer is, it gets a message; a good one, or at least the guard's."""
    with pytest.raises(checks.CheckFailed):
        getattr(checks, name)(answer)


def test_an_error_of_the_check_itself_becomes_a_message() -> None:
    def check_sum(answer: Any) -> None:
        """Exercise 0.1."""
        return answer() + 1

    guarded = _core.guard(check_sum)
    assert guarded(lambda: 1) == 2 and inspect.getdoc(guarded) == "Exercise 0.1."
    with pytest.raises(checks.CheckFailed, match="could not use this answer.*TypeError"):
        guarded(lambda: "1")


def test_ipython_shows_the_message_and_no_traceback(tmp_path: Path) -> None:
    """A real IPython shell: without this, the lines of the check show the right answer."""
    code = "from helpers.checks import check_training_days as c\nc(lambda n, d, r: 6 * n * d / r)"
    options = ["--colors=NoColor", "--HistoryManager.enabled=False", "-c", code]
    run = subprocess.run([sys.executable, "-m", "IPython", *options], cwd=ROOT, text=True,
                         capture_output=True, env={**os.environ, "IPYTHONDIR": str(tmp_path)})
    shown = run.stdout.strip().splitlines()
    assert len(shown) == 1, run.stdout + run.stderr
    assert shown[0].startswith("Not right yet. training_days: this is the time in seconds")


@pytest.mark.parametrize("name", PUBLIC)
def test_each_check_has_a_wrong_answer_and_a_docstring(name: str) -> None:
    assert name in {case[0] for case in WRONG}
    assert inspect.getdoc(getattr(checks, name))


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("starter", [None, ...])
def test_an_unanswered_starter_passes_with_a_note(name: str, starter: Any,
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


def test_is_unanswered_sees_an_empty_body() -> None:
    def only_doc(x):
        """Say what to do."""
        ...

    def done(x):
        """Say what to do."""
        return x

    assert checks.is_unanswered(only_doc) and checks.is_unanswered(lambda: None)
    assert not checks.is_unanswered(done) and not checks.is_unanswered(0)
