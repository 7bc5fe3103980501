"""The Colab path, simulated: a lone notebook in an empty folder fetches the series and runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import colab

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[0-9A-Z]*.ipynb"))

# Runs the code cells of a notebook one after the other in a process that cannot see this checkout:
# the editable install is taken off the import path, as on Colab, where there is none.
RUNNER = """
import json, sys
import matplotlib
matplotlib.use("agg")
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]
sys.path[:] = [p for p in sys.path if p not in ("", CHECKOUT) and "__editable__" not in p]
cells = [c for c in json.load(open(NOTEBOOK, encoding="utf-8"))["cells"]
         if c["cell_type"] == "code"]
for cell in cells[:LIMIT]:
    exec(compile("".join(cell["source"]), cell["id"], "exec"), globals())
import helpers
print(helpers.__file__)
"""


ADDRESS = "https://github.com/somebody/gpt-from-tensors"


def environment(origin: Path) -> dict[str, str]:
    """Colab's variables, and git told to find the public address in the local repository."""
    return os.environ | {
        "COLAB_RELEASE_TAG": "release-colab", "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS, "PYTHONPATH": "",
    }


def run_lone(notebook: Path, limit: int, variables: dict) -> subprocess.CompletedProcess:
    script = (RUNNER.replace("CHECKOUT", repr(str(ROOT))).replace("NOTEBOOK", repr(str(notebook)))
              .replace("LIMIT", str(limit)))
    return subprocess.run([sys.executable, "-c", script], cwd=notebook.parent, capture_output=True,
                          text=True, env=variables, timeout=300)


@pytest.mark.parametrize(("name", "limit"), [("02_text.ipynb", 12), ("04_gpt.ipynb", 8)])
def test_a_lone_notebook_runs(checkout: Path, tmp_path: Path, name: str, limit: int) -> None:
    assert colab.main([ADDRESS], root=checkout) == 0          # as the workflow stamps it
    lone = tmp_path / "content"
    lone.mkdir()
    notebook = Path(shutil.copy2(checkout / "notebooks" / name, lone / name))
    for _ in range(2):                      # and again, as after a restart of the kernel
        run = run_lone(notebook, limit, environment(checkout))
        assert run.returncode == 0, run.stderr[-2000:]
        assert str(lone) in run.stdout.splitlines()[-1]


@pytest.mark.parametrize(("url", "typed", "message"), [
    ("", "", "Put the address of the series"),
    (ADDRESS, ADDRESS, f"{ADDRESS} could not be fetched: "),
    ("", ADDRESS, f"{ADDRESS} could not be fetched: ")])    # by the learner, into the cell
def test_what_is_wrong_on_colab_is_said_in_a_sentence(tmp_path: Path, url: str, typed: str,
                                                      message: str) -> None:
    cells = [{"cell_type": "markdown", "source": ["# t"]},
             {"cell_type": "code", "id": "setup", "source": ["# On Colab"]}]
    notebook = tmp_path / "lone.ipynb"
    stamp = colab.stamped({"cells": cells}, url, "lone.ipynb")
    setup = "".join(stamp["cells"][1]["source"])
    stamp["cells"][1]["source"] = setup.replace(f'repository = "{url}"', f'repository = "{typed}"')
    notebook.write_text(json.dumps(stamp))
    run = run_lone(notebook, 1, environment(tmp_path / "nowhere"))
    assert run.returncode == 1 and message in run.stderr
    assert "Traceback" not in run.stderr


def test_elsewhere_the_cell_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    exec(colab.SETUP_CELL, {})
    assert sys.path == before and list(tmp_path.iterdir()) == []


def test_all_notebooks_carry_the_stamp(capsys: pytest.CaptureFixture[str]) -> None:
    assert colab.main(["--check"]) == 0, capsys.readouterr().out


def test_a_repository_sets_its_address_once(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "notebooks" / NOTEBOOKS[0].name
    shutil.copy2(NOTEBOOKS[0], target)
    for url in (ADDRESS, "https://github.com/somebody/a-fork"):
        assert colab.main([url], root=tmp_path) == 0
        assert colab.main(["--check"], root=tmp_path) == 0
        assert colab.repository(tmp_path) == url
        cells = json.loads(target.read_text(encoding="utf-8"))["cells"]
        assert f"{url[19:]}/blob/main/notebooks/" in "".join(cells[0]["source"])
        setup = next(c for c in cells if c["cell_type"] == "code")
        assert f'repository = "{url}"' in "".join(setup["source"])
        assert setup["metadata"]["jupyter"]["source_hidden"]
    assert ADDRESS not in target.read_text(encoding="utf-8")


def test_without_an_address_there_is_no_badge(tmp_path: Path) -> None:
    cells = [{"cell_type": "markdown", "source": ["[![Open in Colab](x)](y)\n", "\n", "# t"]},
             {"cell_type": "code", "source": ["# On Colab"]}]
    made = colab.stamped({"cells": cells}, "", "x.ipynb")["cells"]
    assert "".join(made[0]["source"]) == "# t" and 'repository = ""' in "".join(made[1]["source"])


@pytest.mark.parametrize("url", ["http://github.com/a/b", "github.com/a/b", "https://example.com/a/b"])
def test_a_strange_address_is_refused(tmp_path: Path, url: str) -> None:
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    with pytest.raises(ValueError, match="form"):
        colab.set_repository(tmp_path, url)


def test_a_notebook_without_the_cell_is_named() -> None:
    with pytest.raises(ValueError, match="x.ipynb.*On Colab"):
        colab.stamped({"cells": [{"cell_type": "markdown", "source": ["# t"]}]}, "u", "x.ipynb")
