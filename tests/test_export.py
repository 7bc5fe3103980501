"""The exporter, on small repositories of its own: what it writes, refuses, and warns about."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import export
from helpers.export import ExportError, export_notebook, main, render

DEFAULT = "#| default_exp text"
TEXT = "notebooks/02_text.ipynb"
HAND_WRITTEN = ("__init__.py", "export.py", "colab.py")
UNCHANGED = "helpers/text.py unchanged: it already fits the saved notebook\n"

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

    def read(self, name: str = "text") -> str:
        return self.module(name).read_text(encoding="utf-8")

    def names(self) -> set[str]:
        return {path.name for path in (self.root / "helpers").iterdir()}

    def export(self, path: str = TEXT) -> str:
        """Export one notebook and return the text of its first module."""
        export_notebook(path, root=self.root)
        text = (self.root / path).read_text(encoding="utf-8")
        name = re.search(r"default_exp (\w+)", text)
        assert name is not None
        return self.read(name.group(1))

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


def test_prints_what_was_written(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    assert capsys.readouterr() == (f"helpers/text.py written from {TEXT}\n", "")
    for _ in range(2):
        repository.export()
        assert capsys.readouterr() == (UNCHANGED, "")


def test_render_is_what_export_writes(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    assert render(TEXT, root=repository.root) == {"text": repository.export()}


def test_returned_module_runs(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    space: dict[str, object] = {}
    exec(compile(repository.export(), "text.py", "exec", dont_inherit=True), space)
    assert space["area"](1.0) == pytest.approx(3.14159, abs=1e-4)
    assert space["__all__"] == ["area", "SIZE"]


def test_main_gets_its_last_lines(repository: Repository) -> None:
    body = "def main() -> int:\n    return 7"
    cells = {"d": DEFAULT, "m": f"#| export\n{body}", "x": "#| export\nX = 1"}
    repository.notebook(cells)
    text = repository.export()
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
    assert repository.export().startswith(f'"""{TEXT}.\n\nMade from {TEXT} by')


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
    with pytest.raises(type(error)):
        repository.export()
    assert repository.read() == old
    assert repository.names() == {*HAND_WRITTEN, "text.py"}


def test_the_module_is_never_half_written(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole file, in the same folder, takes the place of the old one in one step."""
    repository.notebook(CHAPTER)
    old = repository.export()
    repository.notebook(CHAPTER | {"size": "#| export\nSIZE = 4"})
    replaced = []
    real = os.replace

    def spy(source: Path, target: Path) -> None:
        replaced.append((source.parent, source.read_text(encoding="utf-8")[-9:], target))
        assert repository.read() == old
        real(source, target)

    monkeypatch.setattr(os, "replace", spy)
    repository.export()
    assert replaced == [(repository.module().parent, "SIZE = 4\n", repository.module())]


# ---------------------------------------------------------------------------------------------
# Imports: each module gets what it uses


def imports_of(repository: Repository, imports: str, *cells: str, module: str = "text") -> str:
    """Return what stands between the docstring of a module and its __all__."""
    named = {f"c{number}": source for number, source in enumerate(cells)}
    repository.notebook({"d": DEFAULT, "i": f"#| export\n{imports}"} | named)
    repository.export()
    return repository.read(module).split('"""\n\n', 1)[1].split("__all__", 1)[0].strip("\n")


IMPORTS = """\
import json
import os.path

import numpy as np
import torch  # tensors
from torch import Tensor, nn
from torch.nn import functional as F"""

USES = {
    "in a function": ("def f():\n    return json.dumps(1)", "import json"),
    "in a nested function": ("def f():\n    return lambda: [json for _ in ()]", "import json"),
    "dotted": ("def f(x):\n    return os.path.join(x)", "import os.path"),
    "renamed": ("X = np.zeros(3)", "import numpy as np"),
    "with its comment": ("X = torch.ones(3)", "import torch  # tensors"),
    "cut down": ("class A(nn.Module): ...", "from torch import nn"),
    "all of a statement": ("def f(x: Tensor) -> nn.Module: ...", "from torch import Tensor, nn"),
    "annotation": ("def f(*, x: Tensor): ...", "from torch import Tensor"),
    "return annotation": ("def f() -> Tensor: ...", "from torch import Tensor"),
    "string annotation": ("def f(x: 'list[Tensor]'): ...", "from torch import Tensor"),
    "nested string annotation": ("class A:\n    x: list['Tensor']", "from torch import Tensor"),
    "annotation of a local": ("def f():\n    x: Tensor = 1", "from torch import Tensor"),
    "annotation of a constant": ("X: 'Tensor | None' = None", "from torch import Tensor"),
    "decorator": ("@torch.no_grad()\ndef f(): ...", "import torch  # tensors"),
    "default": ("def f(x=F.gelu): ...", "from torch.nn import functional as F"),
    "base class": ("class A(json.JSONEncoder): ...", "import json"),
    "read and bound by a class body": ("class A:\n    json = json", "import json"),
    "step of a constant": ("X = {}\nX['a'] = json.loads('1')", "import json"),
    "groups": ("def f():\n    return json, F", "import json\n\n"
               "from torch.nn import functional as F"),
    "nothing": ("X = 1", ""),
    "a local of that name": ("def f(json):\n    np = json\n    return np", ""),
    "a variable of a comprehension": ("X = [json for json in 'ab']", ""),
    "an attribute of that name": ("def f(x):\n    return x.json", ""),
    "a keyword of that name": ("X = dict(json=1)", ""),
    "a local import": ("def f():\n    import json\n    return json", ""),
    "a word in a Literal": ("def f(x: Literal['json']): ...", "from typing import Literal"),
    "a word in a quoted Literal": ("X: \"Literal['json']\" = ''", "from typing import Literal"),
}


@pytest.mark.parametrize(("source", "expected"), USES.values(), ids=USES)
def test_a_module_gets_the_imports_that_it_uses(
    repository: Repository, source: str, expected: str
) -> None:
    imports = IMPORTS + ("\nfrom typing import Literal" if "Literal" in source else "")
    assert imports_of(repository, imports, f"#| export\n{source}") == expected


def test_a_statement_that_is_cut_down_is_wrapped_at_100(repository: Repository) -> None:
    names = [f"a_name_of_the_module_{i}" for i in range(9)]
    imports = f"from somewhere import {', '.join(names)}"
    uses = [f"#| export\nX{i} = {name}" for i, name in enumerate(names[:-1])]
    lines = imports_of(repository, imports, *uses).split("\n")
    assert lines[0].startswith(f"from somewhere import ({names[0]}, {names[1]}, ")
    assert all(line.startswith(" " * 23 + "a_name") for line in lines[1:])
    assert len(lines) > 1
    assert max(map(len, lines)) <= 100
    assert re.findall(r"a_name_of_the_module_\d", "".join(lines)) == names[:-1]


def test_a_statement_over_several_lines_stays_as_it_is(repository: Repository) -> None:
    imports = "# Why.\nfrom os.path import (\n    join,  # kept\n    split,\n)"
    assert imports_of(repository, imports, "#| export\nX = join, split") == imports


def test_statements_of_one_line_are_separated(repository: Repository) -> None:
    imports = "import os; import sys; import json"
    assert imports_of(repository, imports, "#| export\nX = os, json") == "import os\nimport json"


def test_one_import_in_two_cells_is_written_once(repository: Repository) -> None:
    cells = {"d": DEFAULT, "a": "#| export\nimport os", "b": "#| export\nimport os, sys",
             "x": "#| export\nX = os, sys"}  # fmt: skip
    repository.notebook(cells)
    assert '"""\n\nimport os\nimport sys\n\n__all__' in repository.export()


def test_future_import_of_a_later_cell_comes_first(repository: Repository) -> None:
    cells = {
        "default-exp": DEFAULT,
        "one": "#| export\nimport math  # kept",
        "two": "#| export\nfrom __future__ import annotations\nimport sys",
        "size": "#| export\nSIZE = math.pi + sys.maxsize",
    }
    repository.notebook(cells)
    text = repository.export()
    assert "from __future__ import annotations\n\nimport math  # kept\nimport sys\n\n__all" in text
    assert text.count("__future__") == 1


@pytest.mark.parametrize(
    "imports",
    [
        "from __future__ import annotations; import math",
        "from __future__ import annotations; import math; import os",
        "from __future__ import (\n    annotations,\n); import math",
        "from __future__ import annotations\nimport os, math",
    ],
)
def test_nothing_beside_a_future_import_is_dropped(repository: Repository, imports: str) -> None:
    found = imports_of(repository, imports, "#| export\nX = math.pi")
    assert found == "from __future__ import annotations\n\nimport math"


def test_undefined_names(repository: Repository) -> None:
    """The name exists in the notebook, but its cell is not exported."""
    cells = {"d": DEFAULT, "hidden": "hidden = 1", "fine": "#| export\nfine = 1"}
    wrong = {"wrong": "#| export\ndef f() -> int:\n    return hidden"}
    assert_refused(repository, cells | wrong, "wrong", "undefined name 'hidden'")


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: Hidden): ...",
        "@hidden\ndef f(): ...",
        "class A(Hidden): ...",
        "class A:\n    x = hidden",
        "class A:\n    def f(self):\n        return hidden",
        "X = [hidden for _ in 'ab']",
        "def f():\n    def g():\n        return hidden",
        "def f():\n    get_ipython()",
    ],
)
def test_undefined_names_are_found_everywhere(repository: Repository, source: str) -> None:
    cells = {"d": DEFAULT, "wrong": f"#| export\n{source}"}
    assert_refused(repository, cells, "wrong", "undefined name")


@pytest.mark.parametrize(
    "source",
    [
        "def f(x, *y, z=1, **u):\n    return f, len(x), y, z, u",
        "class A:\n    def f(self) -> 'A':\n        return __class__, super().f, A",
        "class A:\n    x = 1\n    y = x",
        "X = [(a, b) for a in 'ab' for b in a]",
        "X = {}\nX |= {'a': X}",
        "def f():\n    global COUNT\n    COUNT = 1",
        "def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = 2\n    return g",
        "def f():\n    try:\n        import a.b as c\n    except OSError as error:\n"
        "        print(error, c, __file__, __name__)",
        "def f(x):\n    match x:\n        case [y, *z]:\n            return y, z",
        "def f():\n    if (n := 1):\n        return n, lambda m: m + n",
        "def f():\n    for i in range(3):\n        with open('x') as file:\n            yield i, "
        "file",
    ],
)
def test_names_that_are_defined(repository: Repository, source: str) -> None:
    repository.notebook({"d": DEFAULT, "x": f"#| export\n{source}"})
    assert source in repository.export()


def test_the_exporter_needs_the_standard_library_only() -> None:
    tree = ast.parse(Path(export.__file__).read_text(encoding="utf-8"))
    imported = {name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                for name in (alias.name for alias in node.names)}  # fmt: skip
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom)}  # fmt: skip
    assert imported <= set(sys.stdlib_module_names)


# ---------------------------------------------------------------------------------------------
# Several modules of one notebook

TWO: Cells = {
    "d": DEFAULT,
    "i": "#| export\nimport json\nimport math\nimport os",
    "size": "#| export\nSIZE = math.pi",
    "kind": "#| export\nclass Kind: ...",
    "draw": "#| export data\ndef draw(kind: Kind):\n    return json, SIZE, kind",
    "_more": "#| export data\n_more = draw",
}


def test_two_modules(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(TWO)
    export_notebook(TEXT, root=repository.root)
    assert capsys.readouterr().out == (f"helpers/text.py written from {TEXT}\n"
                                       f"helpers/data.py written from {TEXT}\n")
    assert repository.read("text") == (
        f'"""2. Text.\n\nMade from {TEXT} by helpers.export.\nEdit the notebook, not this file.\n'
        'The same notebook makes helpers.data.\n"""\n\n'
        'import math\n\n__all__ = ["SIZE", "Kind"]\n\n\n'
        f"# cell size of {TEXT}\nSIZE = math.pi\n\n\n# cell kind of {TEXT}\nclass Kind: ...\n"
    )
    assert repository.read("data") == (
        f'"""2. Text.\n\nMade from {TEXT} by helpers.export.\nEdit the notebook, not this file.\n'
        'The same notebook makes helpers.text.\n"""\n\n'
        'import json\n\nfrom helpers.text import Kind, SIZE\n\n__all__ = ["draw"]\n\n\n'
        f"# cell draw of {TEXT}\ndef draw(kind: Kind):\n    return json, SIZE, kind\n\n\n"
        f"# cell _more of {TEXT}\n_more = draw\n"
    )
    assert repository.main("--check") == 0


def test_both_modules_import(repository: Repository) -> None:
    repository.notebook(TWO | {"i": "#| export\nfrom __future__ import annotations\n"
                                    "import json, math, os"})  # fmt: skip
    export_notebook(TEXT, root=repository.root)
    assert repository.read("text").count("__future__") == 1
    assert repository.read("data").count("__future__") == 1
    code = "import helpers.data, helpers.text; print(helpers.data._more(1)[1] > 3.14)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository.root, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(repository.root)})
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_an_import_of_another_module_joins_those_of_helpers(repository: Repository) -> None:
    earlier = {"d": "#| default_exp setup", "x": "#| export\nx = 1"}
    repository.notebook(earlier, "notebooks/01_overview.ipynb")
    found = imports_of(repository, "import os\n\nfrom helpers.setup import x", "#| export\nY = 1",
                       "#| export data\nZ = Y, x, os", module="data")
    assert found == "import os\n\nfrom helpers.setup import x\nfrom helpers.text import Y"


def test_naming_the_first_module_again_is_the_same(repository: Repository) -> None:
    repository.notebook({"d": DEFAULT, "x": "#| export text\nX = 1"})
    assert repository.export().endswith("X = 1\n")


def test_modules_that_need_each_other(repository: Repository) -> None:
    cells = {"d": DEFAULT, "one": "#| export\ndef f():\n    return g()",
             "two": "#| export data\ndef g():\n    return f()"}  # fmt: skip
    assert_refused(repository, cells, None, f"cell one of {TEXT} (helpers.text) uses 'g' of "
                                            "helpers.data")
    assert_refused(repository, cells, None, f"cell two of {TEXT} (helpers.data) uses 'f' of "
                                            "helpers.text")


def test_three_modules_in_a_circle(repository: Repository) -> None:
    cells = {"d": DEFAULT, "one": "#| export\nA = [lambda: B]", "two": "#| export data\nB = C",
             "three": "#| export more\nC = A"}  # fmt: skip
    for cell in ("one", "two", "three"):
        assert_refused(repository, cells, None, f"cell {cell} of {TEXT} (helpers.")


def test_one_name_in_two_modules(repository: Repository) -> None:
    cells = {"d": DEFAULT, "first": "#| export\nx = 1", "wrong": "#| export data\nx = 2"}
    assert_refused(repository, cells, "wrong", f"'x' is already defined in cell first of {TEXT}")


def test_a_mistake_in_one_module_leaves_the_other_unwritten(repository: Repository) -> None:
    wrong = {"wrong": "#| export data\nx = undefined"}
    assert_refused(repository, TWO | wrong, "wrong", "undefined name 'undefined'")


def test_two_notebooks_for_one_module(repository: Repository) -> None:
    repository.notebook({"d": DEFAULT, "x": "#| export\nx = 1"})
    repository.notebook({"d": "#| default_exp more", "y": "#| export\ny = 1",
                         "z": "#| export text\nz = 1"}, "notebooks/03.ipynb")  # fmt: skip
    with pytest.raises(ExportError, match=r"notebooks/03\.ipynb makes helpers\.text too"):
        repository.export()
    assert repository.main() == 1
    assert repository.names() == set(HAND_WRITTEN)


# ---------------------------------------------------------------------------------------------
# Notebooks without a module


def test_no_directives_no_module(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.notebook({"x": "x = 1\n# | 1 0 |\n# | 0 1 |"}, "notebooks/A_pytorch.ipynb")
    export_notebook("notebooks/A_pytorch.ipynb", root=repository.root)
    assert "nothing to export" in capsys.readouterr().out
    assert render("notebooks/A_pytorch.ipynb", root=repository.root) == {}
    assert repository.main() == 0
    assert repository.main("--check") == 0
    assert repository.names() == set(HAND_WRITTEN)


def test_solutions_export_nothing(repository: Repository) -> None:
    path = "notebooks/solutions/02_text.ipynb"
    repository.notebook(CHAPTER)
    repository.notebook(CHAPTER | {"wrong": "#| export\n!ls"}, path)
    with pytest.raises(ExportError, match=f"^{path}: expected notebooks/NAME.ipynb"):
        export_notebook(path, root=repository.root)
    assert repository.main() == 0
    assert repository.names() == {*HAND_WRITTEN, "text.py"}


def test_checkpoints_are_not_notebooks(repository: Repository) -> None:
    repository.notebook(CHAPTER)
    repository.notebook(CHAPTER, "notebooks/.ipynb_checkpoints/02_text-checkpoint.ipynb")
    assert repository.main() == 0


# ---------------------------------------------------------------------------------------------
# What it accepts and what it refuses in an exported cell

GOOD = {
    "decorated class": "@property\nclass A:\n    x: int = 0",
    "decorated function": "@staticmethod\ndef f():\n    pass",
    "async function": "async def f():\n    pass",
    "overloads": "@overload\ndef f(x: int) -> int: ...\n@typing.overload\n"
    "def f(x: str) -> str: ...\ndef f(x):\n    return x",
    "constant with docstring": 'X = 1\n"""What it is."""',
    "constant made in steps": 'X = {}\nX["a"] = 1\nX |= {"b": 2}',
    "annotated constant": "X: int",
    "comment above": "# Why this is here.\n\ndef f():\n    pass",
    "text with a percent sign": 'X = """\n%d\n!ls\n"""',
}


@pytest.mark.parametrize("source", GOOD.values(), ids=GOOD)
def test_accepted(repository: Repository, source: str) -> None:
    imports = "#| export\nimport typing\nfrom typing import overload"
    repository.notebook({"d": DEFAULT, "imports": imports, "good": f"#| export\n{source}"})
    assert source in repository.export()


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
    "late future": ("import os\nfrom __future__ import annotations", "syntax error on line 3"),
    "empty": ("", "holds imports, or one"),
    "only a comment": ("# nothing", "holds imports, or one"),
    "only text": ('"""text"""', "holds imports, or one"),
    "text before a constant": ('"""text"""\nX = 1', "holds imports, or one"),
    "two constants": ("x = 1\ny = 2", "holds imports, or one"),
    "unpacking": ("x, y = 1, 2", "holds imports, or one"),
    "two functions": ("def f(): ...\ndef g(): ...", "holds imports, or one"),
    "overload of another": ("@overload\ndef f(): ...\ndef g(): ...", "holds imports, or one"),
    "import and function": ("import os\ndef f(): ...", "holds imports, or one"),
    "import and its name": ("import os\nos = 1", "holds imports, or one"),
    "class and constant": ("class A: ...\nX = A()", "holds imports, or one"),
    "a call": ("print(1)", "holds imports, or one"),
    "a main block": ("if __name__ == '__main__':\n    pass", "holds imports, or one"),
    "a loop": ("for x in 'ab':\n    pass", "holds imports, or one"),
    "__all__": ("__all__ = ['x']", "neither 'import *' nor __all__"),
    "import star": ("from os.path import *", "neither 'import *' nor __all__"),
}


@pytest.mark.parametrize(("source", "message"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_refused_cell(repository: Repository, source: str, message: str) -> None:
    cells = {"d": DEFAULT, "fine": "#| export\nfine = 1", "wrong": f"#| export\n{source}"}
    assert_refused(repository, cells, "wrong", message)


def assert_refused(repository: Repository, cells: Cells, cell: str | None, message: str) -> None:
    """The error names the notebook and the cell, and nothing is written."""
    repository.notebook(cells)
    repository.module().write_text("old = 1\n", encoding="utf-8")
    with pytest.raises(ExportError) as caught:
        export_notebook(TEXT, root=repository.root)
    assert cell is None or str(caught.value).startswith(f"cell {cell} of {TEXT}: ")
    assert message in str(caught.value)
    assert repository.main() == 1
    assert repository.main("--check") == 1
    assert repository.read() == "old = 1\n"
    assert repository.names() == {*HAND_WRITTEN, "text.py"}


NO_DIRECTIVE = {
    "no space": "#|export\nx = 1",
    "two spaces": "#|  export\nx = 1",
    "space before the bar": "# | export\nx = 1",
    "plural": "#| exports\nx = 1",
    "misspelt": "#| exprot\nx = 1",
    "indented": "  #| export\nx = 1",
    "of nbdev": "#| hide\nx = 1",
    "on line 2": "# first\n#| export\nx = 1",
    "after an empty line": "\n#| export\nx = 1",
    "no module name": "#| default_exp",
    "two words": "#| export text data\nx = 1",
    "capital letter": "#| export Text\nx = 1",
    "hyphen": "#| export my-text\nx = 1",
}


@pytest.mark.parametrize("source", NO_DIRECTIVE.values(), ids=NO_DIRECTIVE)
def test_refused_directive(repository: Repository, source: str) -> None:
    cells = {"d": DEFAULT, "fine": "#| export\nfine = 1", "wrong": source}
    assert_refused(repository, cells, "wrong", "is no directive")


@pytest.mark.parametrize("source", ["#| default_exp other", DEFAULT])
def test_second_default_exp(repository: Repository, source: str) -> None:
    cells = {"d": DEFAULT, "fine": "#| export\nfine = 1", "wrong": source}
    assert_refused(repository, cells, "wrong", "only once")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("#| default_exp my-text", "is no directive"),
        ("#| default_exp Text", "is no directive"),
        ("#| default_exp 2text", "is no directive"),
        ("#| default_exp a b", "is no directive"),
        ("#| default_exp ../text", "is no directive"),
        ("#| default_exp class", "taken"),
        ("#| default_exp export", "taken"),
        ("#| default_exp checks", "taken"),
        ("#| default_exp text\nx = 1", "must stand alone"),
    ],
)
def test_refused_default_exp(repository: Repository, source: str, message: str) -> None:
    cells = {"wrong": source, "x": "#| export\nx = 1"}
    assert_refused(repository, cells, "wrong", message)


@pytest.mark.parametrize("name", ["colab", "checks", "import"])
def test_refused_second_module(repository: Repository, name: str) -> None:
    cells = {"d": DEFAULT, "x": "#| export\nx = 1", "wrong": f"#| export {name}\ny = 1"}
    assert_refused(repository, cells, "wrong", "taken")


@pytest.mark.parametrize("later", [{}, {"d": DEFAULT}])
def test_export_without_default_exp(repository: Repository, later: Cells) -> None:
    assert_refused(repository, {"wrong": "#| export\nx = 1"} | later, "wrong", "default_exp NAME")


@pytest.mark.parametrize("source", ["x = 1", "#| export\nimport os", "#| export data\nx = 1"])
def test_default_exp_without_export(repository: Repository, source: str) -> None:
    repository.notebook({"d": DEFAULT, "x": source})
    with pytest.raises(ExportError, match="no cell says '#| export'"):
        repository.export()


@pytest.mark.parametrize("other", ["def x(): ...", "class x: ...", "x = 2", "import x"])
def test_one_name_in_two_cells(repository: Repository, other: str) -> None:
    cells = {"d": DEFAULT, "first": "#| export\nx = 1", "wrong": f"#| export\n{other}"}
    assert_refused(repository, cells, "wrong", "'x' is already defined in cell first")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"nbformat": 4}',
        '{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}',
    ],
)
def test_not_a_notebook(repository: Repository, content: str) -> None:
    (repository.root / TEXT).write_text(content, encoding="utf-8")
    with pytest.raises(ExportError, match=f"^{TEXT}: not a notebook of format 4"):
        repository.export()
    assert repository.main("--check") == 1


def test_missing_notebook_and_path_outside(repository: Repository) -> None:
    with pytest.raises(ExportError, match=f"^{TEXT}: .*FileNotFoundError"):
        repository.export()
    with pytest.raises(ExportError, match=r"^\.\./other\.ipynb: expected notebooks/NAME\.ipynb"):
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
    "from helpers.{} import x\n#| export\ny = x",
    "import helpers.{}\n#| export\ny = helpers",
    "import helpers.{} as y\n#| export\nz = y",
    "from helpers import {0}\n#| export\ny = {0}",
    "def f():\n    from helpers.{} import x",
]


def importing(module: str, form: str) -> Cells:
    """The cells of a notebook that imports a module in one of these forms."""
    first, _, second = form.format(module).partition("\n#| export\n")
    cells = {"d": DEFAULT, "wrong": f"#| export\n{first}"}
    return cells | ({"second": f"#| export\n{second}"} if second else {})


def assert_refused_import(repository: Repository, path: str, cells: Cells, message: str) -> None:
    repository.notebook(cells, path)
    with pytest.raises(ExportError, match=message) as caught:
        repository.export(path)
    assert str(caught.value).startswith(f"cell wrong of {path}: ")


@pytest.mark.parametrize("form", IMPORTS_OF)
@pytest.mark.parametrize(("number", "module"), [("03", "attention"), ("B", "lora")])
def test_import_of_a_later_chapter(
    three_chapters: Repository, form: str, number: str, module: str
) -> None:
    message = rf"helpers\.{module} is made by notebooks/{number}_{module}\.ipynb, and not in an "
    assert_refused_import(three_chapters, TEXT, importing(module, form), message)


@pytest.mark.parametrize("form", IMPORTS_OF)
def test_import_of_an_earlier_chapter(three_chapters: Repository, form: str) -> None:
    path = "notebooks/08_llama.ipynb"
    three_chapters.notebook(importing("lora", form), path)
    assert form.partition("\n#|")[0].format("lora") in three_chapters.export(path)


ORDER = ["01", "A", "02", "05", "C", "D", "06", "07", "B", "08", "12"]


@pytest.mark.parametrize("later", range(1, len(ORDER)))
def test_the_order_of_chapters_and_appendices(repository: Repository, later: int) -> None:
    """Each notebook may import from the one before it, and not the other way round."""
    before, after = f"notebooks/{ORDER[later - 1]}_x.ipynb", f"notebooks/{ORDER[later]}_x.ipynb"
    first = {"d": "#| default_exp first", "x": "#| export\nx = 1"}
    second = importing("first", IMPORTS_OF[0])
    repository.notebook(first, before)
    repository.notebook(second, after)
    assert "from helpers.first import x" in repository.export(after)
    repository.notebook(first, after)
    assert_refused_import(repository, before, second, "not in an earlier chapter")


def test_import_of_itself_and_of_nothing(three_chapters: Repository) -> None:
    cells = importing("text", IMPORTS_OF[0])
    assert_refused_import(three_chapters, TEXT, cells, "not in an earlier chapter")
    cells = importing("data", IMPORTS_OF[0]) | {"z": "#| export data\nz = 1"}
    assert_refused_import(three_chapters, TEXT, cells, f"helpers.data is made by {TEXT}")
    cells = importing("nowhere", IMPORTS_OF[0])
    assert_refused_import(three_chapters, TEXT, cells, r"helpers\.nowhere is made by no notebook")


def test_import_of_a_hand_written_module(three_chapters: Repository) -> None:
    cells = {"d": DEFAULT, "i": "#| export\nfrom helpers.checks.text import check_all",
             "x": "#| export\nx = check_all"}  # fmt: skip
    three_chapters.notebook(cells)
    assert "\nfrom helpers.checks.text import check_all\n" in three_chapters.export()


# ---------------------------------------------------------------------------------------------
# The command line


def test_all_notebooks_or_none(
    three_chapters: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in the last notebook leaves the modules of all others unwritten."""
    last = "notebooks/08_llama.ipynb"
    three_chapters.notebook({"d": "#| default_exp llama", "w": "#| export\n!ls"}, last)
    assert three_chapters.main() == 1
    assert f"error: cell w of {last}: " in capsys.readouterr().err
    assert three_chapters.names() == set(HAND_WRITTEN)

    three_chapters.notebook({"d": "#| default_exp llama", "w": "#| export\nw = 1"}, last)
    assert three_chapters.main() == 0
    modules = re.findall(r"^helpers/(\w+)\.py written", capsys.readouterr().out, re.MULTILINE)
    assert modules == ["setup", "attention", "lora", "llama"]


def test_every_mistake_is_listed(
    three_chapters: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("notebooks/03_attention.ipynb", "notebooks/08_llama.ipynb"):
        three_chapters.notebook({"w": "#| export\nx = 1"}, path)
    assert three_chapters.main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_unknown_argument(repository: Repository) -> None:
    """A misspelt --check must not write."""
    repository.notebook(CHAPTER)
    with pytest.raises(SystemExit):
        repository.main("--chek")
    assert repository.names() == set(HAND_WRITTEN)


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
    assert done.stdout.startswith(f"helpers/text.py written from {TEXT}\n")
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
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_check_passes(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    assert "all modules fit" in checked(repository, capsys, rc=0)


@pytest.mark.parametrize("name", ["text", "data"])
def test_check_missing_module(
    repository: Repository, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    repository.notebook(TWO)
    repository.export()
    repository.module(name).unlink()
    assert f"helpers/{name}.py: missing; it is made by {TEXT}\n" in checked(repository, capsys)


@pytest.mark.parametrize("name", ["text", "data"])
def test_check_drift(
    repository: Repository, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    repository.notebook(TWO)
    repository.export()
    text = repository.read(name)
    repository.module(name).write_text(text.replace("SIZE", "WIDTH"), encoding="utf-8")
    out = checked(repository, capsys)
    assert f"\nhelpers/{name}.py: differs from {TEXT}\n" in out
    assert re.search(r"^  -.*WIDTH.*\n(  .*\n)*  \+.*SIZE", out, re.MULTILINE)


def test_check_shows_little_of_a_large_difference(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.notebook(CHAPTER)
    repository.module().write_text("x = 1\n" * 500, encoding="utf-8")
    out = checked(repository, capsys)
    assert re.search(r"\.\.\. and 5\d\d more lines", out)
    assert len(out.splitlines()) < 30


def test_check_line_ends(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(CHAPTER)
    text = repository.export()
    repository.module().write_bytes(text.replace("\n", "\r\n").encode())
    assert "line ends are not LF" in checked(repository, capsys)


def test_check_stale(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    """A stale module is reported with the command that removes it, and stays."""
    file = repository.notebook(TWO)
    repository.export()
    repository.notebook({"d": "#| default_exp other", "x": "#| export data\nx = 1",
                         "y": "#| export\ny = 1"})  # fmt: skip
    repository.main()
    stale = f"helpers/text.py: stale, {TEXT} does not make it; remove it: rm helpers/text.py"
    assert stale in capsys.readouterr().out
    out = checked(repository, capsys)
    assert stale in out
    assert "helpers/data.py" not in out
    file.rename(file.with_name("02_renamed.ipynb"))
    assert f"helpers/other.py: stale, {TEXT} does not make it" in checked(repository, capsys)


def test_a_file_by_hand_is_not_stale(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    repository.module("mine").write_text("x = 1\n", encoding="utf-8")
    assert "mine" not in checked(repository, capsys, rc=0)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_check_untracked(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.notebook(TWO)
    repository.export()
    assert "git does not know this folder" in checked(repository, capsys, rc=0)
    repository.git("init")
    repository.git("add", "helpers/export.py", "helpers/text.py")
    out = checked(repository, capsys)
    assert out == "helpers/data.py: not in git; add it: git add helpers/data.py\n"
    assert repository.main() == 0  # it is written; adding it is for its author
    repository.git("add", "helpers/data.py")
    assert "git" not in checked(repository, capsys, rc=0)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_check_inside_another_repository(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive unpacked below somebody's repository: nothing of it is in that one's git."""
    repository.git("init")
    repository.git("add", "helpers")
    inner = repository.root / "inner"
    inner.mkdir()
    unpacked = Repository(inner)
    unpacked.notebook(CHAPTER)
    unpacked.export()
    assert "git does not know this folder" in checked(unpacked, capsys, rc=0)


def test_check_without_git(
    repository: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.notebook(CHAPTER)
    repository.export()
    monkeypatch.setenv("PATH", str(repository.root))
    assert "git does not know this folder" in checked(repository, capsys, rc=0)


def test_check_undefined_names_without_pyflakes(
    repository: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyflakes", None)
    repository.notebook(CHAPTER)
    repository.export()
    assert "all modules fit" in checked(repository, capsys, rc=0)
    repository.notebook(CHAPTER | {"size": "#| export\nSIZE: int = hidden"})
    out = checked(repository, capsys)
    assert f"error: cell size of {TEXT}: undefined name 'hidden'" in out


def test_only_the_notebook_that_is_named(
    three_chapters: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert three_chapters.main("notebooks/03_attention.ipynb") == 0
    assert three_chapters.module("attention").is_file()
    assert not three_chapters.module("setup").exists()
    assert three_chapters.main("--check", "notebooks/03_attention.ipynb") == 0
    assert "notebooks checked: 1" in capsys.readouterr().out
    assert three_chapters.main("notebooks/99_none.ipynb") == 1
    assert "notebooks/99_none.ipynb: not a notebook" in capsys.readouterr().err


def test_check_lists_everything(
    three_chapters: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert three_chapters.main() == 0
    three_chapters.notebook({"d": "#| default_exp setup", "w": "#| export\n!ls"},
                            "notebooks/01_setup.ipynb")  # fmt: skip
    three_chapters.module("lora").write_text("x = 2\n", encoding="utf-8")
    (three_chapters.root / "notebooks" / "03_attention.ipynb").unlink()
    out = checked(three_chapters, capsys)
    assert "cell w of notebooks/01_setup.ipynb" in out
    assert "helpers/lora.py: differs" in out
    assert "helpers/attention.py: stale" in out
    assert out.count("stale") == 1  # a mistake in a notebook does not make its module stale


# ---------------------------------------------------------------------------------------------
# In a live notebook

Run = Callable[..., str]


@pytest.fixture
def run_cells(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """A function that exports as a kernel would that ran these cells, and returns the output."""

    def run(*sources: str) -> str:
        monkeypatch.setattr(sys.modules["__main__"], "In", ["", *sources], raising=False)
        capsys.readouterr()
        export_notebook(TEXT, root=repository.root)
        return capsys.readouterr().out

    repository.notebook(CHAPTER)
    return run


NOT_SAVED = "Warning: you ran cells that are not saved, for: {}. Save the notebook (Ctrl+S)"
NOT_RUN = "Warning: the saved cell was not run here, for: {}. Run it, save the notebook (Ctrl+S)"


def test_silent_where_the_cells_that_ran_are_on_disk(run_cells: Run) -> None:
    assert len(run_cells(*CHAPTER.values()).splitlines()) == 1
    assert run_cells() == UNCHANGED
    assert run_cells(CHAPTER["last"]) == UNCHANGED
    assert run_cells(*CHAPTER.values(), *CHAPTER.values()) == UNCHANGED


def test_silent_about_space_at_line_ends(run_cells: Run) -> None:
    run_cells()
    spaced = [f"\n{source}  \n\n" for source in CHAPTER.values()]
    assert run_cells(*spaced) == UNCHANGED


def test_an_unsaved_change(run_cells: Run) -> None:
    out = run_cells(*CHAPTER.values(), "#| export\nSIZE: int = 4\n", CHAPTER["last"])
    assert NOT_SAVED.format("SIZE") in out
    assert len(out.splitlines()) == 2


def test_an_unsaved_new_cell(run_cells: Run) -> None:
    out = run_cells(*CHAPTER.values(), "#| export\nnew = 1", "#| export data\nmore = 1")
    assert NOT_SAVED.format("more, new") in out
    assert len(out.splitlines()) == 2


def test_an_unsaved_import(run_cells: Run) -> None:
    out = run_cells(*CHAPTER.values(), CHAPTER["imports"] + "\nimport os")
    assert NOT_SAVED.format("annotations, math, os") in out


def test_an_unsaved_change_that_was_undone(run_cells: Run) -> None:
    run_cells()
    assert run_cells(*CHAPTER.values(), "#| export\nSIZE = 4", *CHAPTER.values()) == UNCHANGED


def test_a_change_saved_but_not_run(repository: Repository, run_cells: Run) -> None:
    """Edit, save, export without running: the warning must not ask to save alone."""
    repository.notebook(CHAPTER | {"size": "#| export\nSIZE = 4"})
    out = run_cells(*CHAPTER.values())
    assert NOT_RUN.format("SIZE") in out
    assert "not saved" not in out
    assert len(out.splitlines()) == 2


def test_a_new_cell_saved_but_not_run(repository: Repository, run_cells: Run) -> None:
    repository.notebook(CHAPTER | {"new": "#| export\nnew = 1"})
    out = run_cells(*CHAPTER.values())
    assert NOT_RUN.format("new") in out
    assert len(out.splitlines()) == 2


def test_a_change_run_before_it_was_saved(run_cells: Run) -> None:
    """In a fresh kernel the saved cell never ran; running it, saving and exporting mends that."""
    out = run_cells(*(CHAPTER | {"size": "#| export\nSIZE = 4"}).values())
    assert NOT_RUN.format("SIZE") in out
    assert len(out.splitlines()) == 2


def test_only_a_part_was_run(run_cells: Run) -> None:
    out = run_cells(CHAPTER["default-exp"], CHAPTER["size"])
    assert NOT_RUN.format("area") in out


def test_edited_but_neither_run_nor_saved(repository: Repository, run_cells: Run) -> None:
    """Nobody can know of the edit: what is printed says only that nothing changed."""
    run_cells()
    assert run_cells(*CHAPTER.values()) == UNCHANGED


def test_silent_after_a_change_is_run_and_saved(repository: Repository, run_cells: Run) -> None:
    new = "#| export\nSIZE = 4"
    repository.notebook(CHAPTER | {"size": new})
    assert run_cells(*CHAPTER.values(), new) == f"helpers/text.py written from {TEXT}\n"


def test_silent_about_drafts_and_other_cells(run_cells: Run) -> None:
    draft = "def area(r):\n    return 4"
    assert "Warning" not in run_cells(draft, "get_ipython().system('ls')", "1 +", "#| exprot\nx",
                                      "#| export\n1 +", *CHAPTER.values(), draft)  # fmt: skip


def test_silent_about_the_cells_of_another_notebook(run_cells: Run) -> None:
    other = ["#| default_exp other", "#| export\nSIZE = 9"]
    assert "Warning" not in run_cells(*other)
    assert "Warning" not in run_cells(*CHAPTER.values(), *other)
    assert NOT_SAVED.format("SIZE") in run_cells(*other, *CHAPTER.values(), other[1])


@pytest.mark.parametrize("signal", ["COLAB_RELEASE_TAG", "google.colab"])
def test_colab(run_cells: Run, monkeypatch: pytest.MonkeyPatch, signal: str) -> None:
    if signal == "google.colab":
        monkeypatch.setitem(sys.modules, signal, ModuleType(signal))
    else:
        monkeypatch.setenv(signal, "release")
    out = run_cells(*CHAPTER.values())
    assert "edits do not carry over" in out
    assert "File > Save a copy" in out
    assert f'export_notebook("{TEXT}")' in out
    assert "Warning" not in out
    out = run_cells(*CHAPTER.values(), "#| export\nSIZE = 5")
    assert "Warning: the modules lack the cells you ran, for: SIZE." in out
    assert "Ctrl+S" not in out  # saving there does not reach the file that is exported


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
    assert execute(repository, CHAPTER) == f"helpers/text.py written from {TEXT}\n"
    assert repository.module().is_file()
    changed = {"changed": "#| export\nSIZE: int = 4", "again": CHAPTER["last"]}
    out = execute(repository, CHAPTER | changed)
    assert out.startswith(UNCHANGED + NOT_SAVED.format("SIZE"))
    assert len(out.splitlines()) == 2
