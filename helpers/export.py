"""Write the modules of this package from the notebooks.

A notebook names its module once, in a code cell of its own: `#| default_exp gpt`. A code cell
whose first line is `#| export` goes into that module, and one that begins with
`#| export generation` into another module of the same notebook. Such a cell holds imports, or one
class, one function or one constant. The imports serve all modules of the notebook: each module
gets those that it uses. The last code cell of the notebook exports it:

    from helpers.export import export_notebook
    export_notebook("notebooks/04_gpt.ipynb")

On the command line, `python -m helpers.export` does all notebooks, or those that are named, and
`python -m helpers.export --check` writes nothing and lists what does not fit together.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import difflib
import graphlib
import json
import keyword
import os
import re
import subprocess
import symtable
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

__all__ = ["ExportError", "export_notebook", "main", "render"]

ROOT = Path(__file__).resolve().parents[1]
HAND_WRITTEN = ("__init__", "checks", "colab", "export", "site")
APPENDIX_AFTER = {"A": 1, "B": 7, "C": 5, "D": 5}  # the chapter that an appendix follows
MADE_FROM = re.compile(r"^Made from (\S+\.ipynb) by helpers\.export\.$", re.MULTILINE)

# `#|` opens a directive. A space before the bar is a typing mistake only where one of our two
# words follows: `# | 1 0 |` may be a matrix in a comment.
LIKE_A_DIRECTIVE = re.compile(r"\s*(#\||#\s+\|\s*(default_exp|export)\b)")
DIRECTIVE = re.compile(r"#\| (export|default_exp(?= ))(?: ([a-z][a-z0-9_]*))?")
NAMED_IN_FILE = re.compile(r'"#\| (?:default_exp|export) (\w+)\s*(?:\\[nr]|")')

IMPORTS = (ast.Import, ast.ImportFrom)


class ExportError(Exception):
    """A notebook that cannot be exported; the message names the notebook and the cell."""


@dataclass(frozen=True)
class Cell:
    """One exported cell: its source without the directive, what it defines and what it uses."""

    where: str  # "cell area of notebooks/02_text.ipynb"; "cell 3 of ..." where the file has no ids
    module: str  # "" for imports, which serve all modules of the notebook
    source: str
    tree: ast.Module
    names: list[str]
    uses: dict[str, bool]  # see _global_names


def _directive(source: str, where: str) -> tuple[str, str, str]:
    """Split a cell into its directive, the module that it names, and the rest.

    Example: `"#| export gpt\\nx = 1"` gives `("export", "gpt", "x = 1")`, and `"x = 1"` gives
    `("", "", "x = 1")`. A directive that is misspelt or misplaced raises ExportError: it would
    otherwise leave the cell out in silence.
    """
    for number, line in enumerate(map(str.rstrip, source.split("\n")), start=1):
        if LIKE_A_DIRECTIVE.match(line) and (number > 1 or not DIRECTIVE.fullmatch(line)):
            raise ExportError(f"{where}: {line.strip()!r} on line {number} is no directive; those "
                              "are '#| default_exp NAME', '#| export' and '#| export NAME', on "
                              "line 1, with a NAME of lower-case letters, digits and _")
    first, _, rest = source.partition("\n")
    match = DIRECTIVE.fullmatch(first.rstrip())
    if not match:
        return "", "", source
    if match[2] in (*HAND_WRITTEN, *keyword.kwlist):
        raise ExportError(f"{where}: {match[2]!r} is taken, by a hand-written module or by Python")
    return match[1], match[2] or "", rest.rstrip()


def _defined(node: ast.stmt) -> list[str]:
    """Return what a statement defines: nothing for text, "" for what no exported cell may hold."""
    if isinstance(node, IMPORTS):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
        return []
    names = []
    for target in getattr(node, "targets", None) or [getattr(node, "target", None)]:
        while isinstance(target, (ast.Subscript, ast.Attribute)):  # NAME["key"] = ...
            target = target.value
        names.append(getattr(target, "id", "") if hasattr(node, "value") else "")
    return names


def _global_names(tree: ast.Module, source: str) -> dict[str, bool]:
    """Return the global names that a cell uses; False for a name that may be something else.

    That is a name that a class body both binds and reads, and a word in an annotation. Example:
    `"def f(x: 'Tensor', n=2):\\n    return math.pi * x"` gives `{"math": True, "Tensor": False}`.
    """
    names: dict[str, bool] = {}
    tables = [symtable.symtable(source, "cell", "exec")]
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            name, sure = symbol.get_name(), symbol.is_global() and not symbol.is_local()
            if symbol.is_referenced() and (sure or table.get_type() in ("class", "module")):
                names[name] = sure or names.get(name, False)
    # Names in strings are not in the table, and Pythons differ in where it has annotations.
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        text = " ".join(ast.unparse(part) for part in parts if part)
        text = re.sub(r"Literal\[.*?\]", "Literal", text)  # the strings in it are values
        for word in re.findall(r"(?<![\w.])[^\W\d]\w*", text):
            names.setdefault(word, False)
    return names


def _read_cell(where: str, module: str, source: str) -> Cell:
    """Read one exported cell; raise ExportError where it holds what it may not."""
    try:
        compile(source, where, "exec", dont_inherit=True)  # sees a stray `return` too
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        number = getattr(error, "lineno", None) or 1
        line = "".join(source.split("\n")[number - 1 : number]).strip()
        if re.search(r"^[%!?]|^[\w.,\s\[\]]+=\s*[%!]|\?$", line):
            raise ExportError(f"{where}: {line!r} works only in a notebook; move it to a cell that "
                              "is not exported") from error
        # The directive is line 1 of the cell as its author sees it.
        raise ExportError(f"{where}: syntax error on line {number + 1}: {line!r}") from error
    names = [name for node in tree.body for name in _defined(node)]
    imports = [isinstance(node, IMPORTS) for node in tree.body]
    one_name = len(set(names)) == 1 and names[0] and _defined(tree.body[0]) and not any(imports)
    if not one_name and not (imports and all(imports)):
        raise ExportError(f"{where}: an exported cell holds imports, or one class, one function or "
                          "one constant; split it, or remove '#| export'")
    if {"*", "__all__"} & {*names}:
        raise ExportError(f"{where}: write neither 'import *' nor __all__; name what is imported")
    module = "" if imports[0] else module
    return Cell(where, module, source, tree, names, _global_names(tree, source))


def _read_notebook(notebook: str, root: Path) -> tuple[str, list[Cell]]:
    """Return the title of a notebook, which is its first heading, and its exported cells."""
    try:
        content = json.loads((root / notebook).read_text(encoding="utf-8"))
        found = [(cell["cell_type"], f"cell {cell.get('id') or number} of {notebook}",
                  "".join(cell["source"]).replace("\r\n", "\n"))
                 for number, cell in enumerate(content["cells"], start=1)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{notebook}: not a notebook of format 4: {error!r}") from error
    title, default, cells = "", "", []
    for kind, where, source in found:
        heading = re.search(r"^# +(.+?)\s*$", source, re.MULTILINE)
        if kind == "markdown" and heading:
            title = title or heading[1]
        directive, name, rest = _directive(source, where) if kind == "code" else ("", "", "")
        if directive == "export":
            if not default:
                raise ExportError(f"{where}: '#| export' without '#| default_exp NAME' above it")
            cells.append(_read_cell(where, name or default, rest))
        elif directive and (default or rest):
            raise ExportError(f"{where}: '#| default_exp {name}' must stand alone, and only once")
        default = default or name
    if default and default not in {cell.module for cell in cells}:
        raise ExportError(f"{notebook}: '#| default_exp {default}', but no cell says '#| export'")
    return title, cells


def _owners(root: Path) -> dict[str, list[str]]:
    """Return which notebooks name which module, whatever else is wrong in them."""
    owners: dict[str, list[str]] = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for name in dict.fromkeys(NAMED_IN_FILE.findall(text)):
            owners.setdefault(name, []).append(f"notebooks/{path.name}")
    return owners


def _position(notebook: str) -> tuple[int, str]:
    """Return where a notebook stands in the series: 01, A, 02, ..., 05, C, D, 06, 07, B, 08."""
    name = Path(notebook).stem
    number = re.match(r"\d+", name)
    return (int(number[0]), "") if number else (APPENDIX_AFTER.get(name[:1], 99), name)


def _refuse_wrong_imports(cell: Cell, notebook: str, owners: dict[str, list[str]]) -> None:
    """Raise ExportError where a cell imports a module of helpers that is made later or never."""
    for node in ast.walk(cell.tree):
        for alias in node.names if isinstance(node, IMPORTS) else ():
            start = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
            package, module, *_ = f"{start}{alias.name}.".split(".")
            if package != "helpers" or module in ("", *HAND_WRITTEN):
                continue
            maker = owners.get(module, ["no notebook"])[0]
            if _position(maker) >= _position(notebook):
                raise ExportError(f"{cell.where}: helpers.{module} is made by {maker}, and not in "
                                  "an earlier chapter")


def _links(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, Cell]]]:
    """Return what modules use of each other: by module, other module and name, the cell using it.

    Raises ExportError for a name that two cells define, or none, and for modules in a cycle.
    """
    definition: dict[str, Cell] = {}
    for cell in cells:
        for name in cell.names:
            other = definition.setdefault(name, cell)
            if other is not cell and (other.module or cell.module):  # importing twice is harmless
                raise ExportError(f"{cell.where}: {name!r} is already defined in {other.where}")
    links: dict[str, dict[str, dict[str, Cell]]] = {c.module: {} for c in cells if c.module}
    for cell in cells:
        for name, sure in cell.uses.items():
            source = definition.get(name)
            if source and source.module not in ("", cell.module):
                links[cell.module].setdefault(source.module, {}).setdefault(name, cell)
            elif sure and not source and not hasattr(builtins, name) and name[:2] != "__":
                raise ExportError(f"{cell.where}: undefined name {name!r}: no exported cell "
                                  "defines or imports it")
    try:
        graphlib.TopologicalSorter(links).prepare()
    except graphlib.CycleError as error:
        uses = []
        for other, module in pairwise(error.args[1]):
            name, cell = next(iter(links[module][other].items()))
            uses.append(f"{cell.where} (helpers.{module}) uses {name!r} of helpers.{other}")
        raise ExportError(f"modules that need each other: {'; '.join(uses)}") from None
    return links


def _from(module: str, names: Sequence[str]) -> str:
    """Return an import statement, wrapped where it is too long for one line."""
    head, listed = f"from {module} import ", ", ".join(names)
    return head + listed if len(head + listed) <= 100 else textwrap.fill(
        listed + ")", 100, initial_indent=head + "(",
        subsequent_indent=" " * (len(head) + 1), break_long_words=False)


def _imports(cells: Sequence[Cell], used: set[str], links: dict[str, dict[str, Cell]]) -> str:
    """Return what a module needs of the notebook's imports and of its other modules.

    A statement of which every name is needed stays as it is written; others are cut down.
    """
    future, other, seen, gap = [], [], set(), False
    for cell in (cell for cell in cells if not cell.module):
        lines, end = cell.source.split("\n"), 0
        for node in cell.tree.body:
            above, end = lines[end : node.lineno - 1], node.end_lineno
            gap = gap or not all(map(str.strip, above))
            text, origin = "\n".join(lines[node.lineno - 1 : end]), getattr(node, "module", None)
            kept = [alias for alias, name in zip(node.names, _defined(node), strict=True)
                    if (name in used or origin == "__future__")
                    and (origin, alias.name, alias.asname) not in seen]
            seen |= {(origin, alias.name, alias.asname) for alias in kept}
            names = [f"{a.name} as {a.asname}" if a.asname else a.name for a in kept]
            if len(kept) < len(node.names) or ";" in text:
                text = _from(origin, names) if origin else "import " + ", ".join(names)
            if kept and origin == "__future__":
                future.append(text)
            elif kept:
                other += [""] * (gap and bool(other)) + [*filter(str.strip, above), text]
                gap = False
    if links and other and not other[-1].startswith("from helpers"):
        other.append("")
    other += [_from(f"helpers.{sibling}", sorted(links[sibling])) for sibling in sorted(links)]
    return "\n\n".join("\n".join(block) for block in (future, other) if block)


def render(notebook: str, root: Path = ROOT) -> dict[str, str]:
    """Return the text of each module that a notebook makes; {} where it makes none.

    Raises ExportError like export_notebook.
    Example: `list(render("notebooks/04_gpt.ipynb"))` gives `["gpt", "generation"]`.
    """
    if Path(notebook).parent != Path("notebooks"):
        raise ExportError(f"{notebook}: expected notebooks/NAME.ipynb; only those are exported")
    title, cells = _read_notebook(notebook, root)
    owners, links, texts = _owners(root), _links(cells), {}
    for cell in cells:
        _refuse_wrong_imports(cell, notebook, owners)
    title = re.sub(r"[`*]", "", title).replace("\\", "/").replace('"', "'") or notebook
    title += "." * (title[-1] not in ".?!")
    for module in links:
        for maker in set(owners.get(module, ())) - {notebook}:
            raise ExportError(f"{notebook}: {maker} makes helpers.{module} too")
        own = [cell for cell in cells if cell.module == module]
        lines = [title, "", f"Made from {notebook} by helpers.export.",
                 "Edit the notebook, not this file."]
        siblings = ", ".join(f"helpers.{other}" for other in links if other != module)
        lines += [f"The same notebook makes {siblings}."] if siblings else []
        public = [f'"{cell.names[0]}"' for cell in own if not cell.names[0].startswith("_")]
        listed = f"__all__ = [{', '.join(public)}]"
        if len(listed) > 100:
            listed = "__all__ = [\n" + "".join(f"    {name},\n" for name in public) + "]"
        imports = _imports(cells, {name for cell in own for name in cell.uses}, links[module])
        head = ['"""' + "\n".join(lines) + '\n"""', imports, listed]
        blocks = ["\n\n".join(filter(None, head))]
        blocks += [f"# {cell.where}\n" + cell.source.strip("\n") for cell in own]
        if '"main"' in public:
            blocks.append('if __name__ == "__main__":\n    raise SystemExit(main())')
        texts[module] = "\n\n\n".join(blocks) + "\n"
    return texts


def _write(notebook: str, texts: dict[str, str], root: Path) -> None:
    """Write each module whole or not at all, and only where it changed."""
    for module, text in texts.items():
        path = root / "helpers" / f"{module}.py"
        news = "unchanged: it already fits the saved notebook"
        if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
            # In the same folder, so that the replacement is one step on the same disk.
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                temporary.write_text(text, encoding="utf-8", newline="\n")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            news = f"written from {notebook}"
        print(f"helpers/{module}.py {news}")
    if not texts:
        print(f"{notebook}: no export directives, nothing to export")


def export_notebook(notebook: str, root: Path = ROOT) -> None:
    """Write the modules of one notebook, named from the repository's root; print a line for each.

    In a live notebook it also warns where the saved file and the cells that were run differ.
    Raises ExportError, with nothing written, where the notebook cannot be exported.
    Example: `export_notebook("notebooks/03_attention.ipynb")` writes helpers/attention.py.
    """
    texts = render(notebook, root)
    _write(notebook, texts, root)
    run = getattr(sys.modules["__main__"], "In", [])  # IPython's list of the cells that were run
    unsaved, not_run = _compare(_read_notebook(notebook, root)[1], run)
    if texts and ("google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ):
        if unsaved or not_run:
            print(f"Warning: the modules lack the cells you ran, for: {unsaved or not_run}.")
        print("On Colab each notebook has a machine of its own: edits do not carry over. To keep "
              "them: File > Save a copy in\nGitHub, into your fork. To use them in the next "
              f"notebook: File > Download .ipynb; there upload it over\n{notebook} and run\n"
              f'    from helpers.export import export_notebook; export_notebook("{notebook}")')
        return
    if unsaved:
        print(f"Warning: you ran cells that are not saved, for: {unsaved}. Save the notebook "
              "(Ctrl+S) and run this cell again; if you removed one, restart the kernel.")
    if not_run:
        print(f"Warning: the saved cell was not run here, for: {not_run}. Run it, save the "
              "notebook (Ctrl+S), and run this cell again.")


def _compare(cells: Sequence[Cell], run: Sequence[str]) -> tuple[str, str]:
    """Compare the saved cells with those that were run, in order; return names, in two lists.

    First those whose cell was run, but is not in the file. Then those whose saved cell was never
    run, where others of this notebook were: the module has code that nobody has tried.
    """

    def plain(text: str) -> str:  # without what saving and running may change
        return "\n".join(map(str.rstrip, text.split("\n"))).strip("\n")

    last: dict[str, str] = {}  # by name, the exported cell that was run last
    ever: set[str] = set()
    own = True  # the cells of another notebook say nothing about this one
    for first, _, rest in (plain(source).partition("\n") for source in run):
        match = DIRECTIVE.fullmatch(first)
        if match and match[1] == "default_exp":
            own = match[2] in {cell.module for cell in cells}
        elif match and own:
            try:
                names = [name for node in ast.parse(rest).body for name in _defined(node)]
            except (SyntaxError, ValueError):
                continue
            ever.add(plain(rest))
            last |= dict.fromkeys(filter(None, names), plain(rest))
    saved = {plain(cell.source): cell for cell in cells}
    not_run = {cell.names[0] for source, cell in saved.items()
               if cell.module and ever and source not in ever}
    unsaved = {name for name, source in last.items() if source not in saved} - not_run
    return ", ".join(sorted(unsaved)), ", ".join(sorted(not_run))


def _check(made: dict[str, dict[str, str]], root: Path) -> list[str]:
    """Return where notebooks and modules do not fit together, one text for each line."""
    problems, owners = [], _owners(root)
    for notebook, texts in made.items():
        for name, text in ((f"helpers/{module}.py", text) for module, text in texts.items()):
            old = (root / name).read_bytes() if (root / name).is_file() else b""
            if old != text.encode("utf-8"):
                lines = old.decode("utf-8", errors="replace").splitlines()
                lines = [*difflib.unified_diff(lines, text.splitlines(), name, "notebook", n=1,
                                               lineterm="")] or ["its line ends are not LF"]
                lines[20:] = [f"... and {len(lines) - 20} more lines"] if lines[20:] else []
                state = "differs from" if old else "missing; it is made by"
                problems += [f"{name}: {state} {notebook}", *("  " + line for line in lines)]
    command = ["git", "-C", str(root), "ls-files", "helpers"]
    try:
        tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        tracked = []
    if not tracked:  # no git, no repository, or an archive unpacked inside somebody's repository
        print("git does not know this folder: not checked whether the modules are in git")
    for path in sorted((root / "helpers").glob("*.py")):
        found = MADE_FROM.search(path.read_text(encoding="utf-8", errors="replace"))
        name = f"helpers/{path.name}"
        if found and found[1] not in owners.get(path.stem, []):
            problems.append(f"{name}: stale, {found[1]} does not make it; remove it: rm {name}")
        elif found and tracked and name not in tracked:
            problems.append(f"{name}: not in git; add it: git add {name}")
    return problems


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Export all notebooks or those named, or check them; return 0, or 1 if something is wrong.

    Example: `main(["--check"])` returns 0 where every module fits its notebook.
    """
    parser = argparse.ArgumentParser("python -m helpers.export", description="Make the modules.")
    parser.add_argument("--check", action="store_true", help="write nothing; list what is wrong")
    parser.add_argument("notebooks", nargs="*", help="notebooks/NAME.ipynb; all unless named")
    options = parser.parse_args(argv)
    check, made, errors = options.check, {}, []
    paths = (root / "notebooks").glob("*.ipynb")
    names = options.notebooks or sorted((f"notebooks/{p.name}" for p in paths), key=_position)
    for notebook in names:
        try:
            made[notebook] = render(notebook, root)
        except ExportError as error:
            errors.append(f"error: {error}")
    for notebook, texts in made.items() if not check and not errors else ():
        _write(notebook, texts, root)  # a mistake in one notebook leaves every module as it was
    problems = errors + (_check(made, root) if check or not errors else [])
    print("\n".join(problems) or f"all modules fit; notebooks checked: {len(made)}",
          file=sys.stderr if errors and not check else sys.stdout)
    return 1 if errors or (check and problems) else 0


if __name__ == "__main__":
    raise SystemExit(main())
