"""Write the modules of this package from the notebooks.

A notebook names its module once, in a code cell of its own, `#| default_exp attention`. Each
code cell whose first line is `#| export` goes into that module; such a cell holds imports, or
one class, one function or one constant. The last code cell of the notebook exports it:

    from helpers.export import export_notebook
    export_notebook("notebooks/03_attention.ipynb")

On the command line, `python -m helpers.export` does all notebooks, and
`python -m helpers.export --check` writes nothing and lists what does not fit together. Both
work from any folder where `import helpers` works; `python path/to/helpers/export.py` works
from everywhere.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import keyword
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
import nbformat.reader

__all__ = ["ExportError", "export_notebook", "main", "render"]

HAND_WRITTEN = ("__init__", "export", "checks", "colab")

# How a module says where it comes from; `--check` finds stale modules by it.
MADE_FROM = "Made from {notebook} by helpers.export.\nEdit the notebook, not this file."
MADE_FROM_PATTERN = re.compile(r"^Made from (\S+\.ipynb) by helpers\.export\.$", re.MULTILINE)

# `#|` opens a directive. A space before the bar is a typing mistake only where one of our two
# words follows: `# | 1 0 |` may be a matrix in a comment.
DIRECTIVE_PATTERN = re.compile(r"^\s*(#\||#\s+\|\s*(default_exp|export)\b)")
MODULE_PATTERN = re.compile(r"[a-z][a-z0-9_]*")

# A line of IPython: `%magic`, `%%magic`, `!shell`, `?help`, `x = !shell`, `name?`.
MAGIC_PATTERN = re.compile(r"^\s*([%!?]|[\w.,\s\[\]]+=\s*[%!])|\?\s*$")

DIFF_LINES = 20  # of a difference, this many lines are shown

Owners = dict[str, list[str]]  # module: the notebooks that name it


class ExportError(Exception):
    """A notebook that cannot be exported; the message names the notebook and the cell."""


@dataclass(frozen=True)
class Cell:
    """One exported cell: its id, its source without the directive, what it defines."""

    id: str
    source: str
    tree: ast.Module
    names: tuple[str, ...]
    is_import: bool


@dataclass(frozen=True)
class Chapter:
    """What one notebook exports. `module` is None where the notebook has no directives."""

    notebook: str  # relative to the root, with forward slashes
    title: str
    module: str | None
    cells: tuple[Cell, ...]


# ---------------------------------------------------------------------------------------------
# Reading a notebook


def _root(root: str | Path | None) -> Path:
    return Path(root).resolve() if root is not None else Path(__file__).resolve().parents[1]


def _relative(path: str | Path, root: Path) -> str:
    """Return `path` relative to the root; a relative path is taken as relative to the root."""
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise ExportError(f"{path}: not inside the repository; give a path below its root")
    return full.relative_to(root).as_posix()


def _notebooks(root: Path) -> list[str]:
    """Return every notebook in the order of the chapters: 01 to 07, then A, B, C."""
    found = (
        path.relative_to(root).as_posix()
        for path in (root / "notebooks").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    )
    return sorted(found, key=_chapter_order)


def _chapter_order(notebook: str) -> tuple[str, str]:
    # File names begin with two digits or a capital letter, and digits sort before letters.
    return Path(notebook).name, notebook


def _code_cells(notebook: str, root: Path) -> tuple[list[tuple[str, str]], str]:
    """Return (id, source) of the code cells, and the title: the first `# heading`."""
    path = root / notebook
    try:
        # nbformat.reader, and not nbformat.read: the latter invents random ids for cells
        # without one, and the module would change with every export.
        content = nbformat.reader.reads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{notebook}: there is no such notebook") from None
    except (ValueError, TypeError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise ExportError(f"{notebook}: not a notebook ({type(error).__name__})") from error
    version = content.get("nbformat")
    if version != 4:
        raise ExportError(
            f"{notebook}: notebook format {version}, expected 4; open it in JupyterLab and save it"
        )
    code, title = [], ""
    for number, cell in enumerate(content.get("cells", []), start=1):
        source = cell.get("source", "").replace("\r\n", "\n")
        if cell.get("cell_type") == "code":
            code.append((cell.get("id") or f"cell {number}", source))
        elif cell.get("cell_type") == "markdown" and not title:
            heading = re.search(r"^# +(.+?)\s*$", source, re.MULTILINE)
            title = heading.group(1) if heading else ""
    return code, title


def _where(notebook: str, cell_id: str) -> str:
    return f"{notebook}, {_cell_label(cell_id)}"


def _cell_label(cell_id: str) -> str:
    return cell_id if cell_id.startswith("cell ") else f"cell {cell_id}"


def _directive(source: str, where: str) -> tuple[str | None, str]:
    """Split a cell into its directive and the rest.

    Example: `"#| export\\nx = 1"` gives `("export", "x = 1")`, and `"x = 1"` gives
    `(None, "x = 1")`. Raises ExportError for a directive that is misspelt or misplaced, which
    would otherwise leave the cell out in silence.
    """
    lines = source.split("\n")
    for number, line in enumerate(lines, start=1):
        if not DIRECTIVE_PATTERN.match(line):
            continue
        text = line.rstrip()
        if text != "#| export" and not text.startswith("#| default_exp "):
            raise ExportError(
                f"{where}: unknown directive {line.strip()!r}; there are two, written "
                "'#| export' and '#| default_exp NAME'"
            )
        if number > 1:
            raise ExportError(
                f"{where}: {text!r} is on line {number}; a directive stands on line 1"
            )
    first = lines[0].rstrip()
    if not first.startswith("#| "):
        return None, source
    return first[3:], "\n".join(lines[1:]).rstrip()


def _module_name(directive: str, rest: str, where: str) -> str:
    name = directive.removeprefix("default_exp").strip()
    if not MODULE_PATTERN.fullmatch(name) or keyword.iskeyword(name):
        raise ExportError(
            f"{where}: {name!r} is not a module name; use lower-case letters, digits and _"
        )
    if name in HAND_WRITTEN:
        raise ExportError(f"{where}: helpers/{name}.py is written by hand; choose another name")
    if rest.strip():
        raise ExportError(f"{where}: '#| default_exp {name}' must be alone in its cell")
    return name


def _declared_modules(sources: Sequence[str]) -> list[str]:
    """Return the modules that code cells name, forgiving everything else."""
    found = (re.match(r"#\| default_exp +(\w+)\s*$", source) for source in sources)
    return [match.group(1) for match in found if match]


def _parse(source: str, where: str) -> ast.Module:
    """Parse an exported cell; raise ExportError for IPython's own syntax and for mistakes."""
    try:
        tree = ast.parse(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape is a matter for the linter
            compile(source, where, "exec", dont_inherit=True)  # sees a stray `return` too
    except (SyntaxError, ValueError) as error:
        number = getattr(error, "lineno", None) or 1
        lines = source.split("\n")
        line = lines[number - 1] if number <= len(lines) else ""
        if MAGIC_PATTERN.search(line):
            raise ExportError(
                f"{where}: {line.strip()!r} works only in a notebook; move it to a cell that is "
                "not exported"
            ) from error
        message = getattr(error, "msg", str(error))
        raise ExportError(
            # The directive is line 1 of the cell as its author sees it.
            f"{where}: syntax error on line {number + 1}: {message}: {line.strip()!r}"
        ) from error
    return tree


def _bound_by_import(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.asname or alias.name.split(".")[0] for alias in node.names]


def _assigned_name(node: ast.stmt) -> str | None:
    """Return NAME for `NAME = ...`, `NAME: T = ...`, `NAME["key"] = ...`; else None."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return None
    names = set()
    for target in targets:
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        names.add(target.id if isinstance(target, ast.Name) else None)
    return names.pop() if len(names) == 1 else None


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_overload(node: ast.stmt) -> bool:
    """Tell whether a function is decorated with `overload` or `typing.overload`."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(item).split(".")[-1] == "overload" for item in decorators)


def _defined_names(tree: ast.Module) -> tuple[str, ...] | None:
    """Return what an exported cell defines, or None where it is more than it may hold."""
    body = tree.body
    if not body:
        return None
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
        return tuple(name for node in body for name in _bound_by_import(node))
    if len(body) == 1 and isinstance(body[0], ast.ClassDef):
        return (body[0].name,)
    if all(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in body):
        names = {node.name for node in body}
        one = len(names) == 1 and all(_is_overload(node) for node in body[:-1])
        return (body[-1].name,) if one else None
    assigned = [_assigned_name(node) for node in body if not _is_docstring(node)]
    if None not in assigned and len(set(assigned)) == 1 and not _is_docstring(body[0]):
        return (assigned[0],)
    return None


def _read_cell(cell_id: str, source: str, where: str) -> Cell:
    tree = _parse(source, where)
    names = _defined_names(tree)
    if names is None:
        raise ExportError(
            f"{where}: an exported cell holds imports, or one class, one function or one "
            "constant; split it, or remove '#| export'"
        )
    if "__all__" in names:
        raise ExportError(f"{where}: __all__ is written by the exporter; remove this cell")
    if "*" in names:
        raise ExportError(f"{where}: 'import *' hides where names come from; name them")
    is_import = isinstance(tree.body[0], (ast.Import, ast.ImportFrom))
    return Cell(cell_id, source, tree, names, is_import)


def _read_chapter(notebook: str, root: Path, owners: Owners) -> Chapter:
    """Read what a notebook exports; raise ExportError for everything that is wrong in it."""
    code, title = _code_cells(notebook, root)
    module, cells = None, []
    for cell_id, source in code:
        where = _where(notebook, cell_id)
        directive, rest = _directive(source, where)
        if directive is None:
            continue
        if directive == "export":
            cells.append(_read_cell(cell_id, rest, where))
        elif module is not None:
            raise ExportError(f"{where}: a second '#| default_exp'; the module is {module!r}")
        else:
            module = _module_name(directive, rest, where)
    if cells and module is None:
        raise ExportError(
            f"{_where(notebook, cells[0].id)}: '#| export', but no cell of this notebook says "
            "'#| default_exp NAME'"
        )
    if module is not None and not cells:
        raise ExportError(f"{notebook}: '#| default_exp {module}', but no cell says '#| export'")
    chapter = Chapter(notebook, title, module, tuple(cells))
    _refuse_duplicates(chapter)
    _refuse_wrong_modules(chapter, owners)
    return chapter


def _refuse_duplicates(chapter: Chapter) -> None:
    """Raise ExportError where two cells define one name; importing a name twice is harmless."""
    first: dict[str, Cell] = {}
    for cell in chapter.cells:
        for name in cell.names:
            other = first.setdefault(name, cell)
            if other is not cell and not (other.is_import and cell.is_import):
                raise ExportError(
                    f"{_where(chapter.notebook, cell.id)}: {name!r} is already defined in "
                    f"{_cell_label(other.id)}; export one of the two"
                )


def _helper_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of this package that code imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            elif node.module == "helpers":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("helpers."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from (part[1] for part in parts if part[0] == "helpers" and len(part) > 1)


def _module_owners(root: Path) -> Owners:
    """Map each module to the notebooks that name it in `#| default_exp`."""
    owners: Owners = {}
    for notebook in _notebooks(root):
        for module in _modules_named_in(notebook, root):
            owners.setdefault(module, []).append(notebook)
    return owners


def _modules_named_in(notebook: str, root: Path) -> list[str]:
    """Return the modules that a notebook names, forgiving everything else that is wrong."""
    try:
        return _declared_modules([source for _, source in _code_cells(notebook, root)[0]])
    except ExportError:
        return []  # reported where that notebook itself is exported


def _refuse_wrong_modules(chapter: Chapter, owners: Owners) -> None:
    """Raise ExportError for a module made twice and for an import of a later chapter."""
    if chapter.module is None:
        return
    others = [name for name in owners.get(chapter.module, []) if name != chapter.notebook]
    if others:
        raise ExportError(f"{chapter.notebook}: {others[0]} makes helpers.{chapter.module} too")
    for cell in chapter.cells:
        for module in _helper_imports(cell.tree):
            where = _where(chapter.notebook, cell.id)
            if module.startswith("."):
                raise ExportError(
                    f"{where}: the relative import of {module!r} cannot run in a notebook; "
                    "write helpers.NAME"
                )
            if module in HAND_WRITTEN:
                continue
            if module == chapter.module:
                raise ExportError(f"{where}: helpers.{module} is the module it goes into itself")
            if module not in owners:
                raise ExportError(f"{where}: no notebook makes helpers.{module}")
            if _chapter_order(owners[module][0]) > _chapter_order(chapter.notebook):
                raise ExportError(
                    f"{where}: helpers.{module} comes from a later chapter, {owners[module][0]}; "
                    "a module imports only from chapters before its own"
                )


# ---------------------------------------------------------------------------------------------
# Writing a module


def _docstring(chapter: Chapter) -> str:
    title = re.sub(r"[`*]", "", chapter.title).replace("\\", "/").replace('"', "'")
    first = title or f"The module {chapter.module}"
    if first[-1] not in ".?!":
        first += "."
    return f'"""{first}\n\n{MADE_FROM.format(notebook=chapter.notebook)}\n"""'


def _imports(cells: Sequence[Cell]) -> str:
    """Return the import cells one after the other, `from __future__` first."""
    future, other = [], []
    for cell in cells:
        lines = cell.source.split("\n")
        for node in reversed(cell.tree.body):
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                statement = ast.unparse(node)
                if statement not in future:
                    future.append(statement)
                del lines[node.lineno - 1 : node.end_lineno]
        rest = "\n".join(lines).strip("\n")
        if rest:
            other.append(rest)
    blocks = ["\n".join(future)] if future else []
    if other:
        blocks.append("\n".join(other))
    return "\n\n".join(blocks)


def _all(names: Sequence[str]) -> str:
    line = "__all__ = [" + ", ".join(f'"{name}"' for name in names) + "]"
    if len(line) <= 100:
        return line
    return "__all__ = [\n" + "".join(f'    "{name}",\n' for name in names) + "]"


def _render(chapter: Chapter) -> str:
    definitions = [cell for cell in chapter.cells if not cell.is_import]
    names = [name for cell in definitions for name in cell.names]
    imports = _imports([cell for cell in chapter.cells if cell.is_import])
    public = [name for name in names if not name.startswith("_")]
    head = [_docstring(chapter), imports, _all(public)]
    blocks = ["\n\n".join(part for part in head if part)]
    for cell in definitions:
        origin = f"# {_cell_label(cell.id)} of {chapter.notebook}\n"
        blocks.append(origin + cell.source.strip("\n"))
    if "main" in names:
        blocks.append('if __name__ == "__main__":\n    raise SystemExit(main())')
    text = "\n\n\n".join(blocks) + "\n"
    try:
        compile(text, f"helpers/{chapter.module}.py", "exec", dont_inherit=True)
    except SyntaxError as error:
        raise ExportError(
            f"{chapter.notebook}: helpers/{chapter.module}.py would have a syntax error on line "
            f"{error.lineno}: {error.msg}"
        ) from error
    return text


def render(notebook: str | Path, root: str | Path | None = None) -> str:
    """Return the text of the module that a notebook makes, or "" where it makes none.

    `notebook` is relative to the repository's root. Raises ExportError like export_notebook.
    Example: `render("notebooks/03_attention.ipynb")` begins with the module's docstring.
    """
    base = _root(root)
    chapter = _read_chapter(_relative(notebook, base), base, _module_owners(base))
    return _render(chapter) if chapter.module else ""


def _write(path: Path, text: str) -> bool:
    """Write a file whole or not at all; return False where it has this text already."""
    content = text.encode("utf-8")
    if path.is_file() and path.read_bytes() == content:
        return False
    # In the same folder, so that the replacement is one step on the same disk.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"{path.name}: not written, the old file stays ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _module_path(chapter: Chapter, root: Path) -> Path:
    return root / "helpers" / f"{chapter.module}.py"


def _summary(chapter: Chapter) -> str:
    if chapter.module is None:
        return f"{chapter.notebook}: no export directives, nothing to export"
    count = len(chapter.cells)
    cells = f"{count} cell" if count == 1 else f"{count} cells"
    return f"{chapter.notebook} -> helpers/{chapter.module}.py: {cells}"


def export_notebook(path: str | Path, root: str | Path | None = None) -> None:
    """Write the module of one notebook and say so in one line.

    `path` is relative to the repository's root, wherever the kernel runs. A notebook without
    directives makes no module. Nothing is returned, because the call ends a cell and Jupyter
    would show the value, a path of this machine. In a notebook it also warns where the
    file on disk is older than the cells that were run. Raises ExportError, with nothing
    written, where the notebook cannot be exported.

    Example: `export_notebook("notebooks/03_attention.ipynb")` writes helpers/attention.py.
    """
    base = _root(root)
    chapter = _read_chapter(_relative(path, base), base, _module_owners(base))
    if chapter.module:
        _write(_module_path(chapter, base), _render(chapter))
    print(_summary(chapter))
    if chapter.module:
        _report_live(chapter)


# ---------------------------------------------------------------------------------------------
# In a live notebook


def _run_sources() -> list[str]:
    """Return the source of the cells run in this kernel, in order; [] outside IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return list(shell.user_ns.get("In", []))[1:] if shell else []


def _on_colab() -> bool:
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def _same_source(source: str) -> str:
    """Normalise what saving and running may change: space at line ends, empty lines around."""
    return "\n".join(line.rstrip() for line in source.strip("\n").split("\n")).strip("\n")


def _run_definitions(source: str) -> tuple[bool, str, tuple[str, ...]]:
    """Return whether a cell that was run is an exported one, its source, what it defines."""
    try:
        directive, rest = _directive(source.strip("\n"), "")
        tree = ast.parse(rest)
    except (ExportError, SyntaxError, ValueError):
        return False, source, ()
    names = _defined_names(tree)
    if names is None:  # a draft cell may hold more than one thing
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        names = tuple(node.name for node in tree.body if isinstance(node, definitions))
    return directive == "export", _same_source(rest), names


def _outdated_names(chapter: Chapter, run: Sequence[str]) -> list[str]:
    """Return the names whose exported cell on disk is not the one that was run last.

    A name is outdated where its cell on disk was never run while another cell that defines it
    was, where the last exported cell run for it is not on disk, and where an exported cell
    that was run defines it and no cell on disk does.
    """
    declared = _declared_modules(run)
    if declared and declared[-1] != chapter.module:
        return []  # the cells of another notebook say nothing about this one
    on_disk = {_same_source(cell.source) for cell in chapter.cells}
    last: dict[str, str] = {}  # by name, the exported cell that was run last
    any_run: dict[str, set[str]] = {}  # by name, all cells that defined it, drafts too
    for exported, source, names in map(_run_definitions, run):
        for name in names:
            any_run.setdefault(name, set()).add(source)
            if exported:
                last[name] = source
    outdated = [name for name, source in last.items() if source not in on_disk]
    for cell in chapter.cells:
        sources = set().union(*(any_run.get(name, set()) for name in cell.names))
        if not cell.is_import and sources and _same_source(cell.source) not in sources:
            outdated += cell.names
    return sorted(set(outdated))


def _report_live(chapter: Chapter) -> None:
    """Say what a reader at a live notebook has to know; print nothing where all is well."""
    run = _run_sources()
    names = ", ".join(_outdated_names(chapter, run)) if run else ""
    if _on_colab():
        if names:
            print(f"Warning: the module does not have the cells you ran for: {names}.")
        print(
            "On Colab each notebook has a machine of its own: edits made here do not carry over "
            "to the next one.\n"
            "To keep them, File > Download > Download .ipynb. In the next notebook run the first "
            f"cells, upload the file over {chapter.notebook} (file panel on the left), and run:\n"
            "    from helpers.export import export_notebook; "
            f'export_notebook("{chapter.notebook}")\n'
            "To keep them for good, File > Save a copy in GitHub, into your fork; then in a clone "
            f"of it run python -m helpers.export and commit helpers/{chapter.module}.py."
        )
    elif names:
        print(
            f"Warning: {chapter.notebook} on disk is older than the cells you ran, for: {names}.\n"
            "Save the notebook (Ctrl+S) and run this cell again. If you removed or renamed one "
            "of them, restart the kernel and run all."
        )


# ---------------------------------------------------------------------------------------------
# The command line


def _difference(old: bytes, new: str, name: str) -> str:
    """Return a short unified difference, from the file to what the notebook makes."""
    before = old.decode("utf-8", errors="replace")
    if before.replace("\r\n", "\n") == new:
        return "  its line ends are not LF"
    lines = list(
        difflib.unified_diff(
            before.splitlines(), new.splitlines(), name, "notebook", n=1, lineterm=""
        )
    )
    more = len(lines) - DIFF_LINES
    shown = lines[:DIFF_LINES] + ([f"... and {more} more lines"] if more > 0 else [])
    return "\n".join("  " + line for line in shown)


def _undefined_names(text: str, name: str) -> list[str]:
    """Return the undefined names of a module; [] without pyflakes, which _check reports."""
    try:
        from pyflakes import checker, messages
    except ImportError:
        return []

    kinds = (messages.UndefinedName, messages.UndefinedLocal, messages.UndefinedExport)
    found = checker.Checker(ast.parse(text), filename=name).messages
    return [
        f"{name}:{item.lineno}: {item.message % item.message_args}"
        for item in found
        if isinstance(item, kinds)
    ]


def _tracked_modules(root: Path) -> set[str] | None:
    """Return the names of the files in helpers/ that git tracks; None where git cannot say."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        top = git("rev-parse", "--show-toplevel").strip()
        if Path(top).resolve() != root:  # unpacked inside another repository
            return None
        listed = git("ls-files", "-z", "--", "helpers")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {Path(name).name for name in listed.split("\0") if name}


def _check_module(chapter: Chapter, root: Path) -> list[str]:
    name = f"helpers/{chapter.module}.py"
    path = _module_path(chapter, root)
    text = _render(chapter)
    problems = []
    if not path.is_file():
        problems.append(f"{name}: missing; {chapter.notebook} makes it")
    elif path.read_bytes() != text.encode("utf-8"):
        difference = _difference(path.read_bytes(), text, name)
        problems.append(f"{name}: differs from {chapter.notebook}\n{difference}")
    return problems + [f"{found} ({chapter.notebook})" for found in _undefined_names(text, name)]


def _made_from(path: Path) -> str | None:
    """Return the notebook that a module says it was made from, or None."""
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (SyntaxError, ValueError):
        return None
    match = MADE_FROM_PATTERN.search(docstring)
    return match.group(1) if match else None


def _check_folder(root: Path, modules: dict[str, str]) -> list[str]:
    """Check the files in helpers/ against `modules`, which maps a module to its notebook."""
    problems = []
    tracked = _tracked_modules(root)
    if tracked is None:
        print("git does not answer here: not checked whether the modules are in git")
    for path in sorted((root / "helpers").glob("*.py")):
        name, source = f"helpers/{path.name}", _made_from(path)
        if path.stem in HAND_WRITTEN:
            continue
        if source is None and path.stem not in modules:
            problems.append(f"{name}: neither made from a notebook nor known as hand-written")
        elif source is not None and modules.get(path.stem) != source:
            gone = "no longer exports it" if (root / source).is_file() else "no longer exists"
            problems.append(f"{name}: stale, it was made from {source}, which {gone}; delete it")
        if source is not None and tracked is not None and path.name not in tracked:
            problems.append(f"{name}: made from {source}, but not in git; run git add {name}")
    return problems


def _check(notebooks: Sequence[str], root: Path, everything: bool) -> list[str]:
    """Return what is wrong, one text for each thing; [] where all fits together."""
    problems: list[str] = []
    modules: dict[str, str] = {}
    owners = _module_owners(root)
    for notebook in notebooks:
        try:
            chapter = _read_chapter(notebook, root, owners)
            if chapter.module:
                modules[chapter.module] = notebook
                problems += _check_module(chapter, root)
        except ExportError as error:
            problems.append(str(error))
            # The module of a notebook with a mistake is not stale for that.
            modules |= dict.fromkeys(_modules_named_in(notebook, root), notebook)
    if modules and importlib.util.find_spec("pyflakes") is None:
        problems.append("undefined names not checked: pip install -r tests/requirements.txt")
    return problems + (_check_folder(root, modules) if everything else [])


def _named_notebooks(names: Sequence[str], root: Path) -> list[str]:
    """Take each name as relative to the working folder, or else to the root."""
    here = [(Path.cwd() / name).resolve() for name in names]
    return [
        _relative(path if path.is_file() and path.is_relative_to(root) else name, root)
        for path, name in zip(here, names, strict=True)
    ]


def main(argv: Sequence[str] | None = None, root: str | Path | None = None) -> int:
    """Export or check from the command line; return 0, or 1 where something is wrong.

    Example: `main(["--check"])` returns 0 where every module fits its notebook.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.export",
        description="Write the modules of helpers/ from the notebooks.",
    )
    parser.add_argument("notebooks", nargs="*", help="default: all in notebooks/")
    parser.add_argument("--check", action="store_true", help="write nothing; list what is wrong")
    options = parser.parse_args(argv)
    base = _root(root)
    try:
        notebooks = _named_notebooks(options.notebooks, base) or _notebooks(base)
        if not notebooks:
            raise ExportError("notebooks/: there is no notebook")
        if options.check:
            problems = _check(notebooks, base, everything=not options.notebooks)
            print("\n".join(problems) or f"all modules fit; notebooks checked: {len(notebooks)}")
            return 1 if problems else 0
        owners = _module_owners(base)
        chapters = [_read_chapter(notebook, base, owners) for notebook in notebooks]
        # All are rendered before the first is written: a mistake leaves every module as it was.
        texts = [_render(chapter) if chapter.module else "" for chapter in chapters]
        for chapter, text in zip(chapters, texts, strict=True):
            if chapter.module:
                _write(_module_path(chapter, base), text)
            print(_summary(chapter))
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
