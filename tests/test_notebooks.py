"""What holds for every notebook, whatever it teaches: how it is stored, built and written.

nbval runs the notebooks and compares their outputs; these tests read the files only. Where one
fails, `python tests/refresh.py notebooks/NAME.ipynb` runs that notebook and stores it again.
"""

from __future__ import annotations

import ast
import base64
import copy
import importlib.util
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbformat import NotebookNode

from helpers import export

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"

# The chapters and appendices that there must be; more of them may be there.
NAMES = {
    "01_overview",
    "02_text",
    "03_attention",
    "04_gpt",
    "05_pretraining",
    "06_spam_classification",
    "07_instruction_tuning",
    "08_llama",
    "A_pytorch",
    "B_lora",
    "C_long_runs",
    "D_scaling",
}

IGNORE_OUTPUT = "nbval-ignore-output"
MAX_BYTES = 300_000
MAX_WIDTH = 1000  # pixels of a figure
MAX_LINE = 100  # characters of a line of code
# Of a code cell, docstrings and empty lines apart.
MAX_LINES, MAX_LINES_DEFINITION = 15, 40
MAX_TAGGED = 1 / 5  # of the code cells
MAX_MODULE = 600  # lines

# Folders that lie elsewhere on another machine, and those of the machine that runs this test.
# /content is where Colab puts everyone's files.
MACHINE_PATH = re.compile(
    r"(?<![\w.:])(?:/home/|/root/|/Users/|/tmp/|/opt/)|\b[A-Z]:\\|(?:site|dist)-packages[\\/]|"
    + "|".join(re.escape(folder) for folder in (str(ROOT), sys.prefix))
)
BANNED_WORDS = re.compile(r"\bsimply\b|\bas we all know\b|\bdelv(?:e|es|ed|ing)\b", re.IGNORECASE)
# What stood for attention weights and fractions, a standard deviation, a derivative, ...
OWN_WORDS = re.compile(
    r"\b(shares?|mixtures?|spread|slopes?|the way back|there and back|looked at|bend|by heart|"
    r"shortcuts?)\b",
    re.IGNORECASE,
)
MAX_OWN_WORDS = 3  # in a chapter
# What is no prose: code blocks, code spans, formulas, comments, the ! of an image.
NO_PROSE = re.compile(
    r"^(```|~~~).*?^\1|(`+).+?\2|\$\$.+?\$\$|\$[^$\n]+\$|<!--.*?-->|!(?=\[)",
    re.DOTALL | re.MULTILINE,
)


# ---------------------------------------------------------------------------------------------
# Reading


def all_notebooks() -> list[Path]:
    found = FOLDER.rglob("*.ipynb")
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


ALL = all_notebooks()
every = pytest.mark.parametrize("path", ALL, ids=relative)
chapters = pytest.mark.parametrize(
    "path", [path for path in ALL if path.parent == FOLDER],
    ids=relative,
)  # fmt: skip


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def markdown_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "markdown"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def is_tagged(cell: NotebookNode) -> bool:
    return IGNORE_OUTPUT in tags(cell)


def texts(output: NotebookNode) -> Iterator[str]:
    """Yield the texts of an output; pictures, in base64, are none."""
    if output.output_type == "stream":
        yield output.text
    elif output.output_type == "error":
        yield "\n".join(output.traceback)
    else:
        yield from (text for kind, text in output.data.items() if kind.startswith("text/"))


def pictures(cell: NotebookNode) -> list[bytes]:
    """Return the PNG pictures that a cell shows."""
    found = (output.get("data", {}).get("image/png") for output in cell.outputs)
    return [base64.b64decode(picture) for picture in found if picture]


def parse(cell: NotebookNode) -> ast.Module | None:
    """Parse a cell; None where it holds something of IPython's, a magic."""
    try:
        return ast.parse(cell.source)
    except SyntaxError:
        return None


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines of docstrings, those below a constant or a field too."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def count_lines(cell: NotebookNode) -> int:
    tree = parse(cell)
    docstrings = docstring_lines(tree) if tree else set()
    return sum(
        bool(line.strip()) and not line.startswith("#| ") and number not in docstrings
        for number, line in enumerate(cell.source.split("\n"), start=1)
    )


def defines_something(cell: NotebookNode) -> bool:
    tree = parse(cell)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return tree is not None and any(isinstance(node, kinds) for node in tree.body)


def called_name(node: ast.Call) -> str:
    """Return `f` for `f()` and for `module.f()`."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def asserts(cell: NotebookNode) -> bool:
    """Tell whether running a cell checks something: assert, assert_close(), check_mask()."""
    tree = parse(cell)
    return tree is not None and any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and called_name(node).startswith(("check", "assert")))
        for node in ast.walk(tree)
    )


def assert_none(found: Iterable[object]) -> None:
    """Fail with one line for each thing found; pytest would show the first and cut the rest."""
    lines = [" ".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in found]
    assert not lines, "\n" + "\n".join(lines)


def prose(cell: NotebookNode) -> str:
    return NO_PROSE.sub(" ", cell.source)


# ---------------------------------------------------------------------------------------------
# Which notebooks there are


CHAPTERS = {path.stem for path in ALL if path.parent == FOLDER}


def test_there_are_notebooks() -> None:
    assert CHAPTERS >= NAMES


def test_each_chapter_with_exercise_checks_has_solutions() -> None:
    solved = {path.stem for path in ALL if path.parent == FOLDER / "solutions"}
    checked = {
        path.stem
        for path in ALL
        if path.parent == FOLDER and "from helpers.checks import" in path.read_text("utf-8")
    }
    assert checked <= solved <= CHAPTERS


# ---------------------------------------------------------------------------------------------
# How they are stored


@every
def test_valid(path: Path) -> None:
    notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    # The exporter names cells by id; eight hexadecimal digits are an id that nobody chose.
    assert_none(name for name in ids if re.fullmatch(r"[0-9a-f]{8}", name))


@every
def test_run_top_to_bottom(path: Path) -> None:
    cells = code_cells(path)
    assert_none(f"{cell.id} is empty" for cell in cells if not cell.source.strip())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@every
def test_no_errors_and_no_warnings(path: Path) -> None:
    """Errors nowhere; words on stderr only where the output is not compared."""
    found = [
        (cell.id, text)
        for cell in code_cells(path)
        for output in cell.outputs
        for text in texts(output)
        if output.output_type == "error" or (output.get("name") == "stderr" and not is_tagged(cell))
    ]
    assert_none(found)


@every
def test_size(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES


@every
def test_outputs_are_text_and_png(path: Path) -> None:
    assert_none(
        (cell.id, kind)
        for cell in code_cells(path)
        for output in cell.outputs
        for kind in output.get("data", {})
        if kind != "image/png" and not kind.startswith("text/")
    )


@every
def test_stored_as_refresh_writes_it(path: Path) -> None:
    """No widget state, no timings, no version of a kernel: `python tests/refresh.py --clean`."""
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "tests" / "refresh.py")
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    notebook = read(path)
    assert "widgets" not in notebook.metadata
    cleaned = refresh.clean(copy.deepcopy(notebook))
    assert notebook.metadata == cleaned.metadata
    different = [
        old.id for old, new in zip(notebook.cells, cleaned.cells, strict=True) if old != new
    ]
    assert_none(different)


@every
def test_no_path_of_a_machine(path: Path) -> None:
    cells = [(cell.id, cell.source) for cell in read(path).cells]
    outputs = [
        (cell.id, text)
        for cell in code_cells(path)
        for output in cell.outputs
        for text in texts(output)
    ]
    found = [(name, MACHINE_PATH.findall(text)) for name, text in cells + outputs]
    assert_none((name, paths) for name, paths in found if paths)


# ---------------------------------------------------------------------------------------------
# Code cells


@every
def test_short_cells(path: Path) -> None:
    """One idea per cell: 15 lines, or 40 for a finished class or function, or folded away."""
    too_long = []
    for cell in code_cells(path):
        exported = cell.source.startswith("#| export")
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        long = exported or folded or defines_something(cell)
        limit = MAX_LINES_DEFINITION if long else MAX_LINES
        if count_lines(cell) > limit:
            too_long.append(f"{cell.id}: {count_lines(cell)} lines, at most {limit}")
    assert_none(too_long)


@every
def test_short_lines(path: Path) -> None:
    found = [
        (cell.id, line)
        for cell in code_cells(path)
        for line in cell.source.split("\n")
        if len(line) > MAX_LINE
    ]
    assert_none(found)


@every
def test_the_same_colab_cell(path: Path) -> None:
    """The set-up cell is the first code cell, there once, the same in all notebooks."""
    sources = [cell.source for cell in code_cells(path)]
    starts = [source.split("\n")[0] for source in sources]
    assert [start.startswith("# On Colab") for start in starts].count(True) == 1
    assert starts[0].startswith("# On Colab")
    first = next(cell.source for cell in code_cells(ALL[0]))
    assert sources[0] == first


@every
def test_exports_itself_last(path: Path) -> None:
    """A notebook with directives ends in the call that exports it, under its own name."""
    cells = code_cells(path)
    exported = [cell.id for cell in cells if cell.source.startswith("#| export")]
    calls = [
        [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        for node in ast.walk(parse(cells[-1]) or ast.Module([], []))
        if isinstance(node, ast.Call) and called_name(node) == "export_notebook"
    ]
    assert calls == ([[relative(path)]] if exported else [])


# ---------------------------------------------------------------------------------------------
# What nbval compares


@every
def test_tags(path: Path) -> None:
    """nbval has one tag, IGNORE_OUTPUT, in the metadata, on a fifth of the cells at most."""
    cells = code_cells(path)
    others = [
        (cell.id, tag)
        for cell in cells
        for tag in tags(cell)
        if tag != IGNORE_OUTPUT and (tag.startswith("nbval") or "skip" in tag or "raises" in tag)
    ]
    assert_none(others)
    marker = re.compile(r"^\s*#\s*(NBVAL_|PYTEST_VALIDATE_)", re.MULTILINE)
    assert_none(cell.id for cell in cells if marker.search(cell.source))
    tagged = [cell.id for cell in cells if is_tagged(cell)]
    assert len(tagged) <= MAX_TAGGED * len(cells), tagged


@every
def test_what_is_not_compared_is_asserted(path: Path) -> None:
    """After a tagged cell the next code cell is compared and asserts."""
    cells = code_cells(path)
    unchecked = []
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        checked = following is not None and not is_tagged(following) and asserts(following)
        if is_tagged(cell) and not checked:
            unchecked.append(cell.id)
    assert_none(unchecked)


@every
def test_no_assert_on_a_time(path: Path) -> None:
    """A busy machine makes any bound on a duration, or on a ratio of two, wrong."""
    timed = re.compile(r"\b(seconds|elapsed|duration|took|taken|timings?|per_s|perf_counter)\b")
    assert_none(
        (cell.id, ast.unparse(node.test))
        for cell in code_cells(path)
        for node in ast.walk(parse(cell) or ast.Module([], []))
        if isinstance(node, ast.Assert) and timed.search(ast.unparse(node.test))
    )


# ---------------------------------------------------------------------------------------------
# Figures


@every
def test_figures(path: Path) -> None:
    """Opaque, so that they can be read on a dark page; at most 1000 pixels wide; shown last."""
    problems = []
    for cell in code_cells(path):
        for picture in pictures(cell):
            pixels = matplotlib.image.imread(io.BytesIO(picture), format="png")
            if pixels.shape[1] > MAX_WIDTH:
                problems.append((cell.id, f"{pixels.shape[1]} pixels wide"))
            if pixels.ndim == 3 and pixels.shape[2] in (2, 4) and pixels[..., -1].min() < 1:
                problems.append((cell.id, "transparent"))
        last = cell.source.rstrip().split("\n")[-1].strip()
        if pictures(cell) and last != "plt.show()":
            problems.append((cell.id, f"ends in {last!r}, not in plt.show()"))
    assert_none(problems)


# ---------------------------------------------------------------------------------------------
# Words


@every
def test_begins_with_a_title(path: Path) -> None:
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.search(r"^# \S", first.source, re.MULTILINE)


@chapters
def test_ends_of_a_chapter(path: Path) -> None:
    """Summary, exercises, next: each once, in this order."""
    headings = re.findall(
        r"^##+ +(?:[\d.]+ +)?(Summary|Exercises|Next)\b",
        "\n\n".join(cell.source for cell in markdown_cells(path)),
        re.MULTILINE,
    )
    assert headings == ["Summary", "Exercises", "Next"]


@every
def test_plain_words(path: Path) -> None:
    found = []
    for cell in markdown_cells(path):
        text = prose(cell)
        found += [(cell.id, match.group()) for match in BANNED_WORDS.finditer(text)]
        found += [(cell.id, line) for line in text.split("\n") if "!" in line]
        found += [(cell.id, sign) for sign in text if ord(sign) >= 0x1F000]  # emoji
    assert_none(found)


@chapters
def test_the_fields_terms(path: Path) -> None:
    """The words of our own that stood for a standard term are gone; each idea has its formula."""
    text = "\n\n".join(prose(cell) for cell in markdown_cells(path))
    found = [word.lower() for word in OWN_WORDS.findall(text)]
    assert len(found) <= MAX_OWN_WORDS, found      # a share of the market may still be one
    assert any("$$" in cell.source for cell in markdown_cells(path)), "no displayed formula"


@chapters
def test_exercises_run_in_a_fresh_kernel(path: Path) -> None:
    """Each starter cell holds the imports that it needs."""
    starters = [
        cell
        for cell in code_cells(path)
        if re.search(r"^from helpers\.checks import", cell.source, re.MULTILINE)
    ]
    for cell in starters:
        try:
            exec(compile(cell.source, cell.id, "exec"), {"__name__": "starter"})
        except NameError as error:
            pytest.fail(f"{cell.id}: {error}")


# ---------------------------------------------------------------------------------------------
# The modules


def test_modules_fit_the_notebooks(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m helpers.export --check`: no drift, nothing stale, untracked or undefined."""
    status = export.main(["--check"])
    captured = capsys.readouterr()
    assert status == 0, captured.out + captured.err


def test_part_one_needs_no_appendix() -> None:
    """Chapters 1 to 7 run without the appendices; the exporter itself refuses later chapters."""
    made = {path.stem: export.render(relative(path)) for path in ALL if path.parent == FOLDER}
    home = {module: name for name, modules in made.items() for module in modules}
    assert_none(
        (module, "of", name, "imports", other, "of", home[other])
        for name, modules in made.items()
        if name[:2] <= "07"
        for module, text in modules.items()
        for other in re.findall(r"^\s*from helpers\.(\w+) import", text, re.MULTILINE)
        if not home[other][0].isdigit()
    )


def test_no_module_is_too_large() -> None:
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines())
             for path in (ROOT / "helpers").rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > MAX_MODULE} == {}


@every
def test_links_lead_somewhere(path: Path) -> None:
    """A link to another file of the repository is there."""
    targets = [
        target
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
        for target in re.findall(r"\]\((?!https?://|#|attachment:)([^)#\s]+)", prose(cell))
    ]
    assert_none([target for target in targets if not (path.parent / target).exists()])
