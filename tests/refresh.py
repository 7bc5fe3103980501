"""Refresh the stored outputs of the notebooks, the modules made from them, or only the metadata.

    python tests/refresh.py                          all notebooks, in the order of the chapters
    python tests/refresh.py notebooks/02_text.ipynb  only these
    python tests/refresh.py --clean                  do not run; normalise what is stored

Each notebook runs top to bottom in a fresh kernel, in its own folder, on the CPU, with the
default source and base. It is written only after its last cell has run: the first error stops
the run and leaves that notebook as it was. At the end of a run of all, all modules are exported.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image, UnidentifiedImageError  # matplotlib brings it

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from helpers import colab  # noqa: E402

# The same in every notebook, so that neither the version of Python nor the name that somebody
# gave a kernel shows up as a change; complete, in JupyterLab's own form, so that a notebook is
# not marked as changed as soon as it is opened.
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3.11.7",
    },
}

# These choose another source, base or judge, so no stored output may depend on them.
CHOICES = ("LLM_SOURCE", "LLM_BASE", "LLM_DATA_DIR", "LLM_JUDGE_URL", "LLM_JUDGE_MODEL")

CELL_TIMEOUT = 3600  # seconds; the longest training cell takes minutes


class RefreshError(Exception):
    """A notebook that did not run to its end; the message names the notebook and the cell."""


# ---------------------------------------------------------------------------------------------
# Cleaning


def clean(notebook: NotebookNode, root: Path = ROOT) -> NotebookNode:
    """Remove from a notebook what is not content, in place, and return it.

    Kept are sources, cell ids, tags, execution counts, outputs as text or pictures, and which
    cells are collapsed.
    Example: cleaning twice gives what cleaning once gives.
    """
    notebook["metadata"] = nbformat.from_dict(METADATA)
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        kept = {"tags": tags} if tags else {}
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            kept["jupyter"] = {"source_hidden": True}
        cell["metadata"] = nbformat.from_dict(kept)
        if cell["cell_type"] == "code":
            shown = [output for output in cell["outputs"] if not _is_widget(output)]
            # Joined before they are cleaned: a progress bar arrives in many pieces.
            cleaned = [_clean_output(output, root) for output in _merge_streams(shown)]
            cell["outputs"] = [output for output in cleaned if output]
    return notebook


def _is_widget(output: NotebookNode) -> bool:
    # The text beside a widget is its first state, a progress bar at 0 %: worse than none.
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _clean_output(output: NotebookNode, root: Path) -> NotebookNode | None:
    """Clean one output in place; return None where nothing of it is worth storing."""
    if output["output_type"] == "stream":
        output["text"] = _relative_paths(_last_state(output["text"]), root)
        return output if output["text"] else None
    if output["output_type"] in ("display_data", "execute_result"):
        output["metadata"] = NotebookNode()
        output["data"] = _clean_data(output["data"], root)
        return output if output["data"] else None
    return output


def _clean_data(data: NotebookNode, root: Path) -> NotebookNode:
    """Keep text, pictures, and of HTML the tables of pandas, which are better than their text."""
    table = 'class="dataframe"' in data.get("text/html", "")
    kept = NotebookNode(
        (kind, _relative_paths(value, root) if kind.startswith("text/") else value)
        for kind, value in data.items()
        if not kind.startswith("application/")
        and (kind != "text/html" or table or "text/plain" not in data)
    )
    if "image/png" in kept:
        kept["image/png"] = _smaller_picture(kept["image/png"])
    return kept


def _smaller_picture(png: str) -> str:
    """A figure with a palette of 32 colours: the same to the eye, in a quarter of the bytes."""
    raw = base64.b64decode(png)
    try:
        picture = Image.open(io.BytesIO(raw))
    except UnidentifiedImageError:
        return png
    if picture.mode == "P":                # has one already
        return png
    packed = io.BytesIO()
    picture = picture.convert("RGB").quantize(32, Image.Quantize.MAXCOVERAGE,
                                              dither=Image.Dither.NONE)
    picture.save(packed, "PNG", optimize=True)
    smaller = len(packed.getvalue()) < len(raw)
    return base64.b64encode(packed.getvalue()).decode("ascii") + "\n" if smaller else png


def _last_state(text: str) -> str:
    """Keep of a line that was overwritten with carriage returns what a terminal shows last."""
    return re.sub(r"[^\n]*\r(?=[^\r\n])", "", text.replace("\r\n", "\n")).replace("\r", "")


def _relative_paths(text: str, root: Path) -> str:
    return text.replace(f"{root}{os.sep}", "")


def _merge_streams(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of one stream; where a kernel cuts them is a matter of chance."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] += output["text"]
        else:
            merged.append(output)
    return merged


# ---------------------------------------------------------------------------------------------
# Running and writing


def environment() -> dict[str, str]:
    """Return the environment of the kernels: the defaults, the CPU, and not Colab."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in CHOICES and not name.startswith("COLAB")
    }
    return kept | {"LLM_DEVICE": "cpu"}


def export(path: Path, root: Path = ROOT) -> None:
    """Export a notebook's modules before it runs, so that its export cell finds nothing to do.

    Else that cell would store "written", and say "unchanged" at the next run.
    """
    if path.parent != root / "notebooks":                # a solution makes no module
        return
    name = path.relative_to(root).as_posix()
    done = subprocess.run([sys.executable, "-m", "helpers.export", name], cwd=root,
                          capture_output=True, text=True)
    if done.returncode:
        raise RefreshError(f"{name} could not be exported: {done.stdout}{done.stderr}".rstrip())


def execute(notebook: NotebookNode, path: Path, root: Path = ROOT) -> None:
    """Run every cell of a notebook, in place. Raises RefreshError at the first error."""
    current = ["none"]

    def remember(cell: NotebookNode, cell_index: int) -> None:
        current[0] = cell.get("id", f"number {cell_index + 1}")

    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=remember,
    )
    try:
        client.execute(env=environment())
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        name = path.relative_to(root).as_posix()
        raise RefreshError(f"{name}, cell {current[0]}: {error}") from error


def to_text(notebook: NotebookNode) -> str:
    """Return the text of the file: indent 1, plain Unicode, one newline at the end."""
    return nbformat.writes(notebook, indent=1, ensure_ascii=False).rstrip("\n") + "\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refresh(path: Path, run: bool = True, root: Path = ROOT) -> bool:
    """Stamp, run and clean a notebook and write it; return whether the file changed.

    Raises RefreshError, with the file left alone, where a cell fails or where somebody saved
    the notebook while it ran.
    """
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    if any(cell.source.startswith("# On Colab") for cell in notebook.cells):
        name = path.relative_to(root).as_posix()
        notebook = nbformat.from_dict(colab.stamped(notebook, colab.repository(root), name))
        for cell in notebook.cells:
            cell.source = "".join(cell.source)          # the stamp is in lines, as in the file
    if run:
        export(path, root)
        execute(notebook, path, root)
    after = to_text(clean(notebook, root))
    if path.read_text(encoding="utf-8") != before:
        name = path.relative_to(root).as_posix()
        raise RefreshError(f"{name}: saved by somebody while it ran; run it again")
    if after != before:
        write(path, after)
    return after != before


def notebooks(root: Path = ROOT) -> list[Path]:
    """Return the chapters in order, then the solutions, which use what the chapters export."""
    found = [
        path
        for path in (root / "notebooks").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    ]
    return sorted(found, key=lambda path: (len(path.relative_to(root).parts), path.name))


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Refresh from the command line; return 0, or 1 at the first error."""
    parser = argparse.ArgumentParser(description="Refresh the stored outputs of the notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in notebooks/")
    parser.add_argument("--clean", action="store_true", help="do not run; normalise the files")
    options = parser.parse_args(argv)
    paths = [path.resolve() for path in options.notebooks] or notebooks(root)
    for path in paths:
        start = time.perf_counter()
        try:
            changed = refresh(path, run=not options.clean, root=root)
        except (RefreshError, OSError, nbformat.reader.NotJSONError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        state = "changed" if changed else "unchanged"
        name = path.relative_to(root).as_posix()
        print(f"{name}: {state}, {time.perf_counter() - start:.0f} s", flush=True)
    if options.clean or options.notebooks:      # a chapter that ran has exported itself
        return 0
    return subprocess.run([sys.executable, "-m", "helpers.export"], cwd=root).returncode


if __name__ == "__main__":
    raise SystemExit(main())
