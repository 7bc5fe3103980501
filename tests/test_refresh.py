"""The refreshing of stored outputs, and what nbval's sanitising file hides and does not hide."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]

spec = importlib.util.spec_from_file_location("refresh", ROOT / "tests" / "refresh.py")
refresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refresh)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the real exporter and no notebooks."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "helpers").mkdir()
    for name in ("__init__.py", "export.py"):
        shutil.copyfile(ROOT / "helpers" / name, tmp_path / "helpers" / name)
    return tmp_path


def save(root: Path, name: str, *sources: str) -> Path:
    path = root / "notebooks" / name
    cells = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources, start=1)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def one_cell(*outputs: NotebookNode) -> NotebookNode:
    return new_notebook(cells=[new_code_cell("x", id="x", outputs=list(outputs))])


def cleaned(*outputs: NotebookNode, root: Path = ROOT) -> list[NotebookNode]:
    return refresh.clean(one_cell(*outputs), root).cells[0].outputs


def test_clean_removes_volatile_metadata() -> None:
    notebook = one_cell()
    notebook.metadata = {"widgets": {"x": 1}, "language_info": {"name": "python", "version": "3"}}
    notebook.cells[0].metadata = {
        "tags": ["nbval-ignore-output"],
        "execution": {"iopub.execute_input": "now"},
        "collapsed": True,
        "jupyter": {"outputs_hidden": True, "source_hidden": True},
    }
    refresh.clean(notebook)
    assert notebook.metadata == refresh.METADATA
    assert notebook.cells[0].metadata == {
        "tags": ["nbval-ignore-output"], "jupyter": {"source_hidden": True}
    }
    assert notebook.cells[0].id == "x"


def test_clean_merges_streams_of_one_name() -> None:
    parts = [("stdout", "a"), ("stdout", "b\n"), ("stderr", "c"), ("stdout", "d")]
    outputs = cleaned(*(new_output("stream", name=name, text=text) for name, text in parts))
    assert [(out.name, out.text) for out in outputs] == [
        ("stdout", "ab\n"),
        ("stderr", "c"),
        ("stdout", "d"),
    ]


def test_clean_keeps_the_last_state_of_a_progress_bar() -> None:
    parts = ["\r  0%|", "\r 50%|", "\r100%|\n", "done\r\n"]
    outputs = cleaned(*(new_output("stream", name="stderr", text=text) for text in parts))
    assert [out.text for out in outputs] == ["100%|\ndone\n"]


def test_clean_chooses_one_form_of_an_output() -> None:
    table = '<table class="dataframe"></table>'
    png = {"image/png": "AAAA", "text/plain": "<Figure>"}
    outputs = cleaned(
        new_output("execute_result", {"text/plain": "x", "text/html": "<b>x</b>"}),
        new_output("execute_result", {"text/plain": "x", "text/html": table}),
        new_output("display_data", png | {"application/vnd.x+json": {}}, metadata={"a": 1}),
        new_output(
            "display_data",
            {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"},
        ),
    )
    assert [out.data for out in outputs] == [
        {"text/plain": "x"},
        {"text/plain": "x", "text/html": table},
        png,
    ]
    assert outputs[-1].metadata == {}


def test_clean_stores_paths_without_the_machine(tmp_path: Path) -> None:
    text = f"{tmp_path / 'data' / 'story.txt'}\n"
    (output,) = cleaned(new_output("stream", name="stdout", text=text), root=tmp_path)
    assert Path(output.text.strip()) == Path("data/story.txt")


def test_run_stores_outputs_and_exports(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLM_SOURCE", "LLM_BASE", "LLM_DATA_DIR", "COLAB_RELEASE_TAG"):
        monkeypatch.setenv(name, "x")
    show = "import os\nprint(os.getcwd().split(os.sep)[-1], os.environ['LLM_DEVICE'])\n"
    show += "print([n for n in os.environ if n.startswith(('LLM_', 'COLAB'))])"
    path = save(root, "01_one.ipynb", "#| default_exp one", "#| export\nx = 1", show, "x")
    assert refresh.main([], root=root) == 0
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert [(cell.id, cell.execution_count) for cell in notebook.cells] == [
        ("c1", 1),
        ("c2", 2),
        ("c3", 3),
        ("c4", 4),
    ]
    assert notebook.cells[2].outputs[0].text == "notebooks cpu\n['LLM_DEVICE']\n"
    assert notebook.cells[3].outputs[0].data == {"text/plain": "1"}
    assert (root / "helpers" / "one.py").is_file()
    assert text.startswith('{\n "cells"') and text.endswith("}\n")


def test_the_first_run_already_stores_that_the_module_fits(root: Path) -> None:
    last = "from helpers.export import export_notebook\nexport_notebook('notebooks/01_one.ipynb')"
    set_up = f"import sys\nsys.path.insert(0, {str(root)!r})"
    path = save(root, "01_one.ipynb", set_up, "#| default_exp one", "#| export\nx = 1", last)
    stored = []
    for _ in range(2):
        refresh.refresh(path, root=root)
        stored.append(nbformat.read(path, as_version=4).cells[3].outputs[0].text)
    assert stored[0] == stored[1] and "unchanged" in stored[0]


def test_an_error_leaves_the_file_and_names_the_cell(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = save(root, "01_bad.ipynb", "1", "1 / 0", "2")
    later = save(root, "02_later.ipynb", "1")
    before = [bad.read_bytes(), later.read_bytes()]
    assert refresh.main([], root=root) == 1
    assert [bad.read_bytes(), later.read_bytes()] == before
    error = capsys.readouterr().err
    assert error.startswith("error: notebooks/01_bad.ipynb, cell c2: ")
    assert "ZeroDivisionError" in error
    assert sorted(path.name for path in bad.parent.iterdir()) == [bad.name, later.name]


def test_clean_does_not_run_and_is_idempotent(root: Path) -> None:
    path = save(root, "01_one.ipynb", "1 / 0")
    assert refresh.main(["--clean"], root=root) == 0
    assert refresh.refresh(path, run=False, root=root) is False
    assert nbformat.read(path, as_version=4).cells[0].outputs == []


def test_a_notebook_saved_meanwhile_is_not_overwritten(root: Path) -> None:
    touch = "p = Path('01_one.ipynb')\np.write_text(p.read_text() + ' ')"
    path = save(root, "01_one.ipynb", "from pathlib import Path", touch)
    before = path.read_text(encoding="utf-8")
    with pytest.raises(refresh.RefreshError, match="saved by somebody"):
        refresh.refresh(path, root=root)
    assert path.read_text(encoding="utf-8") == before + " "


# ---------------------------------------------------------------------------------------------
# tests/sanitize.cfg


def sanitized(text: str) -> str:
    """Replace as nbval does, with its own reading of the file."""
    from nbval.plugin import get_sanitize_patterns

    patterns = get_sanitize_patterns((ROOT / "tests" / "sanitize.cfg").read_text(encoding="utf-8"))
    assert len(patterns) == 3
    for pattern, replacement in patterns:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<function f at 0x7f3b2c1d5e40>", "<function f at 0x10d5e4a0>"),
        ("took 1.23 s", "took 11.0 s"),
        ("0.5ms", "812.75ms"),
        ("data/story.txt", "/srv/llm/data/story.txt"),
        ("data/story.txt", r"D:\llm\data/story.txt"),
    ],
)
def test_sanitized_alike(one: str, other: str) -> None:
    assert sanitized(one) == sanitized(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("loss 1.23", "loss 1.24"),
        ("0x1f", "0x2f"),
        ("stop after 5 s", "stop after 6 s"),
        ("data/story.txt", "data/sms.tsv"),
        ("3.5 spans", "3.6 spans"),
    ],
)
def test_not_sanitized(one: str, other: str) -> None:
    assert sanitized(one) != sanitized(other)
