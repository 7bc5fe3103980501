"""The exporter, on small repositories of its own: what it writes, refuses, and warns about."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import export
from helpers.export import ExportError, export_notebook, main, render

DEFAULT = "#| default_exp text"
TEXT = "notebooks/02_text.ipynb"
HAND_WRITTEN = ("__init__.py", "export.py", "checks.py")

Cells = dict[str, str]


class Repository:
    """A repository in a temporary folder: `helpers/` by hand, and the notebooks of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "notebooks").mkdir()
        (root / "helpers").mkdir()
        for name in HAND_WRITTEN:
            (root / "helpers" / name).write_text('"""By hand."""\n', encoding="utf-8")

    def notebook(self, cells: Cells, path: str = TEXT, title: str = "# 2. Text") -> Path:
        """Write a notebook with these code cells, by id, below a title."""
        content = new_notebook(
            cells=[new_markdown_cell(title, id="title")]
            + [new_code_cell(source, id=name) for name, source in cells.items()]
        )
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(content, file)
        return file

    def module(self, name: str = "text") -> Path:
        return self.root / "helpers" / f"{name}.py"

    def names(self) -> set[str]:
        return {path.name for path in (self.root / "helpers").iterdir()}

    def export(self, path: str = TEXT) -> str:
        """Export one notebook and return the text of its module."""
        export_notebook(path, root=self.root)
        text = (self.root / path).read_text(encoding="utf-8")
        name = re.search(r"default_exp (\w+)", text)
        assert name is not None
        return self.module(name.group(1)).read_text(encoding="utf-8")

    def main(self, *arguments: str) -> int:
        return main(list(arguments), root=self.root)

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    # A folder above the temporary one may be a repository; these are not part of it.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return Repository(tmp_path)


CHAPTER: Cells = {
    "default-exp": DEFAULT,
    "imports": "#| export\nfrom __future__ import annotations\n\nimport math",
    "draft": "def area(radius):\n    return 3 * radius**2",
    "area": '#| export\ndef area(radius: float) -> float:\n    """Area."""\n'
    "    return math.pi * radius**2",
    "size": "#| export\nSIZE: int = 3",
    "show": "area(SIZE)",
    "last": f'from helpers.export import export_notebook\nexport_notebook("{TEXT}")',
}


# ---------------------------------------------------------------------------------------------
# What it writes


def test_module_layout(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    assert repository.export() == (
        '"""2. Text.\n\n'
        "Made from notebooks/02_text.ipynb by helpers.export.\n"
        "Edit the notebook, not this file.\n"
        '"""\n\n'
        "from __future__ import annotations\n\n"
        "import math\n\n"
        '__all__ = ["area", "SIZE"]\n\n\n'
        "# cell area of notebooks/02_text.ipynb\n"
        "def area(radius: float) -> float:\n"
        '    """Area."""\n'
        "    return math.pi * radius**2\n\n\n"
        "# cell size of notebooks/02_text.ipynb\n"
        "SIZE: int = 3\n"
    )


def test_prints_one_line_that_stays_the_same(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.notebook(CHAPTER)
    for _ in range(2):
        repository.export()
        assert capsys.readouterr() == ("notebooks/02_text.ipynb -> helpers/text.py: 3 cells\n", "")


def test_render_is_what_export_writes(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    assert render(TEXT, root=repository.root) == repository.export()


def test_returned_module_runs(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    space: dict[str, object] = {}
    exec(compile(repository.export(), "text.py", "exec", dont_inherit=True), space)
    assert space["area"](1.0) == pytest.approx(3.14159, abs=1e-4)
    assert space["__all__"] == ["area", "SIZE"]


def test_future_import_of_a_later_cell_comes_first(repository: Repository) -> None:
    cells = {
        "default-exp": DEFAULT,
        "one": "#| export\nimport math  # kept",
        "two": "#| export\nfrom __future__ import annotations\nimport sys",
        "size": "#| export\nSIZE = 1",
    }
    repository.notebook(cells)
    text = repository.export()
    assert "from __future__ import annotations\n\nimport math  # kept\nimport sys\n\n__all" in text
    assert text.count("__future__") == 1


def test_imports_of_helpers_stay_as_they_are(repository: Repository) -> None:
    earlier = {"d": "#| default_exp setup", "x": "#| export\nx = 1"}
    repository.notebook(earlier, "notebooks/01_overview.ipynb")
    cells = {"d": DEFAULT, "i": "#| export\nfrom helpers.setup import x", "y": "#| export\ny = x"}
    repository.notebook(cells)
    assert "\nfrom helpers.setup import x\n\n__all__" in repository.export()


def test_main_gets_its_last_lines(repository: Repository) -> None:
    body = "def main() -> int:\n    return 7"
    cells = {"d": DEFAULT, "m": f"#| export\n{body}", "x": "#| export\nX = 1"}
    repository.notebook(cells)
    repository.export()
    text = repository.module().read_text(encoding="utf-8")
    assert text.endswith('X = 1\n\n\nif __name__ == "__main__":\n    raise SystemExit(main())\n')
    assert subprocess.run([sys.executable, str(repository.module())]).returncode == 7


def test_no_last_lines_without_main(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    assert "__main__" not in repository.export()


def test_private_names_are_not_in_all(repository: Repository) -> None:
    cells = {"d": DEFAULT, "a": "#| export\n_A = 1", "b": "#| export\nclass B:\n    pass"}
    repository.notebook(cells)
    assert '__all__ = ["B"]\n' in repository.export()


def test_long_all_is_one_name_a_line(repository: Repository) -> None:
    names = [f"a_rather_long_name_{i}" for i in range(9)]
    repository.notebook({"d": DEFAULT} | {n: f"#| export\n{n} = 1" for n in names})
    text = repository.export()
    assert f'__all__ = [\n    "{names[0]}",\n' in text
    assert max(map(len, text.split("\n"))) <= 100


def test_title_cannot_break_the_docstring(repository: Repository) -> None:
    title = '[badge](url)\n# A "quoted" `title` \\N{x} """'
    repository.notebook({"d": DEFAULT, "x": "#| export\nx = 1"}, title=title)
    docstring = ast.get_docstring(ast.parse(repository.export()))
    assert docstring is not None
    assert docstring.startswith("A 'quoted' title")
    assert f"Made from {TEXT} by helpers.export." in docstring


def test_notebook_without_title(repository: Repository) -> None:
    repository.notebook({"d": DEFAULT, "x": "#| export\nx = 1"}, title="Only words.")
    assert repository.export().startswith('"""The module text.\n')


def test_line_ends_and_encoding(repository: Repository) -> None:
    cells = {"d": DEFAULT, "x": '#| export\r\nx = "\u00e9\u4e16"\r\n\r\n'}
    repository.notebook(cells)
    repository.export()
    content = repository.module().read_bytes()
    assert b"\r" not in content
    assert content.endswith('x = "\u00e9\u4e16"\n'.encode())


def test_cells_without_ids_are_numbered(repository: Repository) -> None:
    file = repository.notebook({"d": DEFAULT, "x": "#| export\nx = 1"})
    content = nbformat.read(file, as_version=4)
    for cell in content.cells:
        del cell["id"]
    content.nbformat_minor = 4
    nbformat.write(content, file)
    assert "# cell 3 of notebooks/02_text.ipynb\nx = 1\n" in repository.export()


def test_second_run_writes_nothing(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    os.utime(repository.module(), ns=(1, 1))
    repository.export()
    assert repository.main() == 0
    assert repository.module().stat().st_mtime_ns == 1


def test_a_changed_notebook_is_written(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    repository.notebook(CHAPTER | {"size": "#| export\nSIZE = 4"})
    assert repository.export().endswith("SIZE = 4\n")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    repository.notebook(CHAPTER)
    old = repository.export()
    repository.notebook(CHAPTER | {"size": "#| export\nSIZE = 4"})

    def fail(source: object, target: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((ExportError, KeyboardInterrupt)):
        repository.export()
    assert repository.module().read_text(encoding="utf-8") == old
    assert repository.names() == {*HAND_WRITTEN, "text.py"}


def test_the_module_is_never_half_written(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is opened for writing is another one, in the same folder."""
    repository.notebook(CHAPTER)
    written: list[Path] = []
    real = builtins.open

    def spy(file: str | Path, mode: str = "r", **options: object) -> object:
        if "w" in mode:
            written.append(Path(file))
        return real(file, mode, **options)

    monkeypatch.setattr(builtins, "open", spy)
    repository.export()
    assert [path.parent for path in written] == [repository.root / "helpers"]
    assert repository.module() not in written


# ---------------------------------------------------------------------------------------------
# Notebooks without a module


def test_no_directives_no_module(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.notebook({"x": "x = 1\n# | 1 0 |\n# | 0 1 |"}, "notebooks/A_pytorch.ipynb")
    export_notebook("notebooks/A_pytorch.ipynb", root=repository.root)
    assert "nothing to export" in capsys.readouterr().out
    assert render("notebooks/A_pytorch.ipynb", root=repository.root) == ""
    assert repository.main() == 0
    assert repository.main("--check") == 0
    assert repository.names() == set(HAND_WRITTEN)


# ---------------------------------------------------------------------------------------------
# What it accepts and what it refuses in an exported cell

GOOD = {
    "decorated class": "@dataclass\nclass A:\n    x: int = 0",
    "decorated function": "@torch.no_grad()\ndef f():\n    pass",
    "async function": "async def f():\n    pass",
    "overloads": "@overload\ndef f(x: int) -> int: ...\n@typing.overload\n"
    "def f(x: str) -> str: ...\ndef f(x):\n    return x",
    "constant with docstring": 'X = 1\n"""What it is."""',
    "constant made in steps": 'X = {}\nX["a"] = 1\nX |= {"b": 2}',
    "annotated constant": "X: int",
    "comment above": "# Why this is here.\n\ndef f():\n    pass",
    "text with a percent sign": 'X = """\n%d\n!ls\n"""',
    "imports": "import os\nfrom sys import (\n    path,\n)",
}


@pytest.mark.parametrize("source", GOOD.values(), ids=GOOD)
def test_accepted(repository: Repository, source: str) -> None:
    repository.notebook({"d": DEFAULT, "good": f"#| export\n{source}"})
    assert source.split("\n")[-1] in repository.export()


BAD_CELLS = {
    "line magic": ("%timeit 1", "works only in a notebook"),
    "cell magic": ("%%time\nx = 1", "works only in a notebook"),
    "shell": ("!ls", "works only in a notebook"),
    "magic in a function": ("def f():\n    %timeit 1", "works only in a notebook"),
    "assigned shell": ("files = !ls", "works only in a notebook"),
    "help": ("x = 1\nx?", "works only in a notebook"),
    "syntax error": ("x = 1 +", "syntax error on line 2"),
    "syntax error below": ("\n\ndef f():\n    return (", "syntax error on line 5"),
    "return outside a function": ("x = 1\nreturn x", "syntax error on line 3"),
    "empty": ("", "holds imports, or one"),
    "only a comment": ("# nothing", "holds imports, or one"),
    "only text": ('"""text"""', "holds imports, or one"),
    "text before a constant": ('"""text"""\nX = 1', "holds imports, or one"),
    "two constants": ("x = 1\ny = 2", "holds imports, or one"),
    "unpacking": ("x, y = 1, 2", "holds imports, or one"),
    "two functions": ("def f(): ...\ndef g(): ...", "holds imports, or one"),
    "one function twice": ("def f(): ...\ndef f(): ...", "holds imports, or one"),
    "overload of another": ("@overload\ndef f(): ...\ndef g(): ...", "holds imports, or one"),
    "import and function": ("import os\ndef f(): ...", "holds imports, or one"),
    "class and constant": ("class A: ...\nX = A()", "holds imports, or one"),
    "a call": ("print(1)", "holds imports, or one"),
    "a main block": ("if __name__ == '__main__':\n    pass", "holds imports, or one"),
    "__all__": ("__all__ = ['x']", "written by the exporter"),
    "import star": ("from os.path import *", "name them"),
    "relative import": ("from .setup import x", "relative import"),
}


@pytest.mark.parametrize(("source", "message"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_refused_cell(repository: Repository, source: str, message: str) -> None:
    cells = {"d": DEFAULT, "fine": "#| export\nfine = 1", "wrong": f"#| export\n{source}"}
    assert_refused(repository, cells, "wrong", message)


def assert_refused(repository: Repository, cells: Cells, cell: str, message: str) -> None:
    """The error names the notebook and the cell, and nothing is written."""
    repository.notebook(cells)
    repository.module().write_text("old = 1\n", encoding="utf-8")
    with pytest.raises(ExportError) as caught:
        export_notebook(TEXT, root=repository.root)
    assert str(caught.value).startswith(f"{TEXT}, cell {cell}: ")
    assert message in str(caught.value)
    assert repository.main() == 1
    assert repository.main("--check") == 1
    assert repository.module().read_text(encoding="utf-8") == "old = 1\n"
    assert repository.names() == {*HAND_WRITTEN, "text.py"}


BAD_DIRECTIVES = {
    "no space": ("#|export\nx = 1", "unknown directive"),
    "two spaces": ("#|  export\nx = 1", "unknown directive"),
    "space before the bar": ("# | export\nx = 1", "unknown directive"),
    "plural": ("#| exports\nx = 1", "unknown directive"),
    "misspelt": ("#| exprot\nx = 1", "unknown directive"),
    "indented": ("  #| export\nx = 1", "unknown directive"),
    "with a word": ("#| export text\nx = 1", "unknown directive"),
    "of nbdev": ("#| hide\nx = 1", "unknown directive"),
    "on line 2": ("# first\n#| export\nx = 1", "is on line 2"),
    "after an empty line": ("\n#| export\nx = 1", "is on line 2"),
    "no module name": ("#| default_exp", "unknown directive"),
    "second default_exp": ("#| default_exp other", "a second"),
    "same default_exp again": (DEFAULT, "a second"),
}


@pytest.mark.parametrize(("source", "message"), BAD_DIRECTIVES.values(), ids=BAD_DIRECTIVES)
def test_refused_directive(repository: Repository, source: str, message: str) -> None:
    cells = {"d": DEFAULT, "fine": "#| export\nfine = 1", "wrong": source}
    assert_refused(repository, cells, "wrong", message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("#| default_exp my-text", "not a module name"),
        ("#| default_exp Text", "not a module name"),
        ("#| default_exp 2text", "not a module name"),
        ("#| default_exp class", "not a module name"),
        ("#| default_exp a b", "not a module name"),
        ("#| default_exp ../text", "not a module name"),
        ("#| default_exp export", "written by hand"),
        ("#| default_exp checks", "written by hand"),
        ("#| default_exp text\nx = 1", "alone in its cell"),
    ],
)
def test_refused_default_exp(repository: Repository, source: str, message: str) -> None:
    cells = {"wrong": source, "x": "#| export\nx = 1"}
    assert_refused(repository, cells, "wrong", message)


def test_export_without_default_exp(repository: Repository) -> None:
    assert_refused(repository, {"wrong": "#| export\nx = 1"}, "wrong", "default_exp NAME")


def test_default_exp_without_export(repository: Repository) -> None:
    repository.notebook({"d": DEFAULT, "x": "x = 1"})
    with pytest.raises(ExportError, match="no cell says '#| export'"):
        repository.export()


@pytest.mark.parametrize("other", ["def x(): ...", "class x: ...", "x = 2", "import x"])
def test_one_name_in_two_cells(repository: Repository, other: str) -> None:
    cells = {"d": DEFAULT, "first": "#| export\nx = 1", "wrong": f"#| export\n{other}"}
    assert_refused(repository, cells, "wrong", "'x' is already defined in cell first")


def test_one_import_in_two_cells_is_fine(repository: Repository) -> None:
    cells = {"d": DEFAULT, "a": "#| export\nimport os", "b": "#| export\nimport os, sys"}
    repository.notebook(cells)
    assert "import os\nimport os, sys\n" in repository.export()


def test_two_notebooks_for_one_module(repository: Repository) -> None:
    repository.notebook({"d": DEFAULT, "x": "#| export\nx = 1"})
    repository.notebook({"d": DEFAULT, "y": "#| export\ny = 1"}, "notebooks/03.ipynb")
    with pytest.raises(ExportError, match=r"notebooks/03\.ipynb makes helpers\.text too"):
        repository.export()
    assert repository.main() == 1
    assert repository.names() == set(HAND_WRITTEN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a notebook"),
        ("[]", "not a notebook"),
        ('{"nbformat": 4}', "not a notebook"),
        ('{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}', "format 3"),
    ],
)
def test_not_a_notebook(repository: Repository, content: str, message: str) -> None:
    (repository.root / TEXT).write_text(content, encoding="utf-8")
    with pytest.raises(ExportError, match=message):
        repository.export()


def test_missing_notebook_and_path_outside(repository: Repository) -> None:
    with pytest.raises(ExportError, match="there is no such notebook"):
        repository.export()
    with pytest.raises(ExportError, match="not inside the repository"):
        export_notebook("../other.ipynb", root=repository.root)


# ---------------------------------------------------------------------------------------------
# The order of the chapters


@pytest.fixture
def three_chapters(repository: Repository) -> Repository:
    for number, name in (("01", "setup"), ("03", "attention"), ("B", "lora")):
        cells = {"d": f"#| default_exp {name}", "x": "#| export\nx = 1"}
        repository.notebook(cells, f"notebooks/{number}_{name}.ipynb")
    return repository


IMPORTS_OF = [
    "from helpers.{} import x",
    "import helpers.{}",
    "import helpers.{} as y",
    "from helpers import {}",
    "def f():\n    from helpers.{} import x",
]


@pytest.mark.parametrize("form", IMPORTS_OF)
@pytest.mark.parametrize("module", ["attention", "lora"])
def test_import_of_a_later_chapter(three_chapters: Repository, form: str, module: str) -> None:
    cells = {"d": DEFAULT, "wrong": "#| export\n" + form.format(module)}
    assert_refused_import(three_chapters, TEXT, cells, "comes from a later chapter")


def assert_refused_import(repository: Repository, path: str, cells: Cells, message: str) -> None:
    repository.notebook(cells, path)
    with pytest.raises(ExportError, match=message) as caught:
        repository.export(path)
    assert str(caught.value).startswith(f"{path}, cell wrong: ")


@pytest.mark.parametrize("form", IMPORTS_OF)
def test_import_of_an_earlier_chapter(three_chapters: Repository, form: str) -> None:
    cells = {"d": "#| default_exp scaling", "i": "#| export\n" + form.format("lora")}
    three_chapters.notebook(cells, "notebooks/C_scaling.ipynb")
    assert form.format("lora") in three_chapters.export("notebooks/C_scaling.ipynb")


def test_import_of_itself_and_of_nothing(three_chapters: Repository) -> None:
    cells = {"d": DEFAULT, "wrong": "#| export\nfrom helpers.text import y"}
    assert_refused_import(three_chapters, TEXT, cells, "goes into itself")
    cells["wrong"] = "#| export\nfrom helpers.nowhere import y"
    assert_refused_import(three_chapters, TEXT, cells, r"no notebook makes helpers\.nowhere")


def test_import_of_a_hand_written_module(three_chapters: Repository) -> None:
    cells = {"d": DEFAULT, "i": "#| export\nfrom helpers.checks import check"}
    three_chapters.notebook(cells)
    assert "helpers.checks" in three_chapters.export()


# ---------------------------------------------------------------------------------------------
# The command line


def test_all_notebooks_or_none(
    three_chapters: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in the last notebook leaves the modules of all others unwritten."""
    last = "notebooks/C_scaling.ipynb"
    three_chapters.notebook({"d": "#| default_exp scaling", "w": "#| export\n!ls"}, last)
    assert three_chapters.main() == 1
    assert f"error: {last}, cell w: " in capsys.readouterr().err
    assert three_chapters.names() == set(HAND_WRITTEN)

    three_chapters.notebook({"d": "#| default_exp scaling", "w": "#| export\nw = 1"}, last)
    assert three_chapters.main() == 0
    modules = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert modules == [f"helpers/{name}.py:" for name in ("setup", "attention", "lora", "scaling")]


def test_some_notebooks(three_chapters: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    assert three_chapters.main("notebooks/03_attention.ipynb") == 0
    assert three_chapters.names() == {*HAND_WRITTEN, "attention.py"}
    monkeypatch.chdir(three_chapters.root / "notebooks")
    assert three_chapters.main("B_lora.ipynb") == 0
    assert three_chapters.names() == {*HAND_WRITTEN, "attention.py", "lora.py"}


def test_checkpoints_are_not_notebooks(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    repository.notebook(CHAPTER, "notebooks/.ipynb_checkpoints/02_text-checkpoint.ipynb")
    assert repository.main() == 0


def test_no_notebooks_at_all(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    assert repository.main("--check") == 1
    assert "there is no notebook" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [".", "notebooks", "helpers"])
@pytest.mark.parametrize("as_module", [True, False])
def test_as_a_command_from_any_folder(repository: Repository, folder: str, as_module: bool) -> None:
    copy = repository.root / "helpers" / "export.py"
    shutil.copyfile(export.__file__, copy)
    repository.notebook(CHAPTER)
    command = [sys.executable, *(["-m", "helpers.export"] if as_module else [str(copy)])]
    done = subprocess.run(
        command,
        cwd=repository.root / folder,
        env=os.environ | {"PYTHONPATH": str(repository.root)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "notebooks/02_text.ipynb -> helpers/text.py: 3 cells\n"
    assert repository.module().is_file()


# ---------------------------------------------------------------------------------------------
# --check


def checked(repository: Repository, capsys: pytest.CaptureFixture[str], rc: int = 1) -> str:
    """Run --check, which must write nothing, and return what it prints."""
    before = {path: path.read_bytes() for path in (repository.root / "helpers").iterdir()}
    capsys.readouterr()
    assert repository.main("--check") == rc
    after = {path: path.read_bytes() for path in (repository.root / "helpers").iterdir()}
    assert before == after
    return capsys.readouterr().out


def test_check_passes(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    assert "all modules fit" in checked(repository, capsys, rc=0)


def test_check_missing_module(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    assert "helpers/text.py: missing" in checked(repository, capsys)


def test_check_drift(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    text = repository.export()
    repository.module().write_text(text.replace("SIZE: int = 3", "SIZE: int = 4"), encoding="utf-8")
    out = checked(repository, capsys)
    assert "helpers/text.py: differs from notebooks/02_text.ipynb" in out
    assert "  -SIZE: int = 4\n  +SIZE: int = 3\n" in out


def test_check_shows_little_of_a_large_difference(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.notebook(CHAPTER)
    repository.module().write_text("x = 1\n" * 500, encoding="utf-8")
    out = checked(repository, capsys)
    assert "more lines" in out
    assert len(out.splitlines()) < 30


def test_check_line_ends(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    text = repository.export()
    repository.module().write_bytes(text.replace("\n", "\r\n").encode())
    assert "line ends are not LF" in checked(repository, capsys)


def test_check_stale(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    file = repository.notebook(CHAPTER)
    repository.export()
    repository.notebook({"d": "#| default_exp other", "x": "#| export\nx = 1"})
    repository.export()
    assert "helpers/text.py: stale, it was made from notebooks/02_text.ipynb, which no longer " \
        "exports it" in checked(repository, capsys)  # fmt: skip
    file.rename(file.with_name("02_renamed.ipynb"))
    assert "which no longer exists" in checked(repository, capsys)


def test_check_unknown_module(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    repository.module("mine").write_text("x = 1\n", encoding="utf-8")
    out = checked(repository, capsys)
    assert "helpers/mine.py: neither made from a notebook nor known as hand-written" in out


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_check_untracked(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    assert "git does not answer here" in checked(repository, capsys, rc=0)
    repository.git("init")
    out = checked(repository, capsys)
    assert "helpers/text.py: made from notebooks/02_text.ipynb, but not in git" in out
    repository.git("add", "helpers/text.py")
    assert "git" not in checked(repository, capsys, rc=0)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_check_inside_another_repository(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive unpacked below somebody's repository: nothing of it is in that one's git."""
    repository.git("init")
    inner = repository.root / "inner"
    inner.mkdir()
    unpacked = Repository(inner)
    unpacked.notebook(CHAPTER)
    unpacked.export()
    assert "git does not answer here" in checked(unpacked, capsys, rc=0)


def test_check_without_git(
    repository: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    monkeypatch.setenv("PATH", str(repository.root))
    assert "git does not answer here" in checked(repository, capsys, rc=0)


def test_check_undefined_names(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    """The name exists in the notebook, but its cell is not exported."""
    cells = {
        "default-exp": DEFAULT,
        "hidden": "hidden = 1",
        "f": "#| export\ndef f() -> int:\n    return hidden",
    }
    repository.notebook(cells)
    repository.export()
    out = checked(repository, capsys)
    assert "helpers/text.py:12: undefined name 'hidden' (notebooks/02_text.ipynb)" in out


def test_check_without_pyflakes(
    repository: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.notebook(CHAPTER)
    monkeypatch.setitem(sys.modules, "pyflakes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out = checked(repository, capsys)
    assert "undefined names not checked: pip install -r tests/requirements.txt" in out
    assert "helpers/text.py: missing" in out


def test_check_lists_everything(
    three_chapters: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert three_chapters.main() == 0
    three_chapters.notebook({"d": "#| default_exp setup", "w": "#| export\n!ls"},
                            "notebooks/01_setup.ipynb")  # fmt: skip
    three_chapters.module("lora").write_text("x = 2\n", encoding="utf-8")
    three_chapters.module("mine").write_text("x = 2\n", encoding="utf-8")
    out = checked(three_chapters, capsys)
    assert "01_setup.ipynb, cell w" in out
    assert "helpers/lora.py: differs" in out
    assert "helpers/mine.py" in out
    assert "stale" not in out  # a mistake in a notebook does not make its module stale


# ---------------------------------------------------------------------------------------------
# In a live notebook

Run = Callable[..., str]


@pytest.fixture
def run_cells(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """A function that exports as a kernel would that ran these cells, and returns the output."""

    def run(*sources: str) -> str:
        shell = SimpleNamespace(user_ns={"In": ["", *sources]})
        ipython = ModuleType("IPython")
        ipython.get_ipython = lambda: shell
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        capsys.readouterr()
        repository.export()
        return capsys.readouterr().out

    repository.notebook(CHAPTER)
    return run


def test_silent_where_the_cells_that_ran_are_on_disk(run_cells: Run) -> None:
    assert len(run_cells(*CHAPTER.values()).splitlines()) == 1
    assert len(run_cells().splitlines()) == 1
    assert len(run_cells(CHAPTER["last"]).splitlines()) == 1


def test_silent_about_space_at_line_ends(run_cells: Run) -> None:
    assert "Warning" not in run_cells(CHAPTER["default-exp"], CHAPTER["size"] + "  \n\n")


def test_warns_of_an_unsaved_change(run_cells: Run) -> None:
    out = run_cells(*CHAPTER.values(), "#| export\nSIZE: int = 4\n", CHAPTER["last"])
    assert "notebooks/02_text.ipynb on disk is older than the cells you ran, for: SIZE." in out
    assert "Save the notebook (Ctrl+S) and run this cell again" in out


def test_warns_where_only_another_version_ran(run_cells: Run) -> None:
    assert "for: SIZE." in run_cells("SIZE = 5")


def test_warns_of_an_unsaved_new_cell(run_cells: Run) -> None:
    assert "for: new." in run_cells(*CHAPTER.values(), "#| export\nnew = 1")


def test_warns_of_an_unsaved_import(run_cells: Run) -> None:
    out = run_cells(*CHAPTER.values(), CHAPTER["imports"] + "\nimport os")
    assert "os" in out.partition("for: ")[2]


def test_silent_after_a_change_is_saved(repository: Repository, run_cells: Run) -> None:
    new = "#| export\nSIZE = 4"
    repository.notebook(CHAPTER | {"size": new})
    assert "Warning" not in run_cells(*CHAPTER.values(), new)


def test_silent_about_drafts_and_other_cells(run_cells: Run) -> None:
    draft = "def area(r):\n    return 4"
    assert "Warning" not in run_cells(draft, "get_ipython().system('ls')", "1 +",
                                      *CHAPTER.values(), draft)  # fmt: skip


def test_silent_about_the_cells_of_another_notebook(run_cells: Run) -> None:
    assert "Warning" not in run_cells("#| default_exp other", "#| export\nSIZE = 9")


@pytest.mark.parametrize("signal", ["COLAB_RELEASE_TAG", "google.colab"])
def test_colab(run_cells: Run, monkeypatch: pytest.MonkeyPatch, signal: str) -> None:
    if signal == "google.colab":
        monkeypatch.setitem(sys.modules, signal, ModuleType(signal))
    else:
        monkeypatch.setenv(signal, "release")
    out = run_cells(*CHAPTER.values())
    assert "edits made here do not carry over" in out
    assert "File > Save a copy in GitHub" in out
    assert "Warning" not in out
    assert "does not have the cells you ran for: SIZE." in run_cells("#| export\nSIZE = 5")


def execute(repository: Repository, cells: Cells) -> str:
    """Run cells in a real kernel, in notebooks/, and return what the last one prints."""
    shutil.copyfile(export.__file__, repository.root / "helpers" / "export.py")
    path = {"path": "import sys\nsys.path.insert(0, '..')"}
    notebook = new_notebook(cells=[new_code_cell(source) for source in (path | cells).values()])
    where = {"metadata": {"path": str(repository.root / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=120, resources=where, kernel_name="python3").execute()
    (output,) = notebook.cells[-1].outputs  # no value is shown, and nothing on stderr
    assert output.name == "stdout"
    return output.text


def test_in_a_real_kernel(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    line = "notebooks/02_text.ipynb -> helpers/text.py: 3 cells\n"
    assert execute(repository, CHAPTER) == line
    assert repository.module().is_file()
    out = execute(repository, CHAPTER | {"size": "#| export\nSIZE: int = 4"})
    assert out.startswith(line)
    assert "on disk is older than the cells you ran, for: SIZE." in out
