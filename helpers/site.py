"""The series as a small web site that needs neither a server nor the network.

    python -m helpers.site                 into build/site; open build/site/index.html
    python -m helpers.site FOLDER          into another folder

It renders the notebooks as they are stored and runs nothing. Links between chapters lead to their
pages, formulas become MathML, which browsers draw by themselves, and collapsed cells stay
collapsed. It needs one package more: `pip install latex2mathml`.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbformat import NotebookNode

try:
    from latex2mathml.converter import convert
except ImportError:                                    # only this module needs it
    raise ModuleNotFoundError("Rendering the site needs the package latex2mathml: "
                              "pip install latex2mathml") from None

# Of nbconvert's page: no scripts from elsewhere, and a collapsed cell folded away.
TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_css -%}{{ super() }}
<style>details.folded { margin: 0 0 0.5em 5em; font-family: sans-serif; font-size: 85%; }
math[display="block"] { margin: 0.8em 0; }</style>{%- endblock -%}
{%- block input -%}
{%- if cell.metadata.get('jupyter', {}).get('source_hidden') -%}
<details class="folded"><summary>Code of this cell</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
"""
# Code comes first, so that a dollar in it is left alone.
CODE_OR_FORMULA = re.compile(
    r"(?P<code>^(?P<fence>```|~~~).*?^(?P=fence)|(?P<tick>`+).+?(?P=tick))"
    r"|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?![\w$])",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:|attachment:)(?P<path>[^)#\s]+)")


def formulas(text: str) -> str:
    """Markdown with its TeX formulas turned into MathML; code is left alone.

    Example:
        >>> formulas("so $x$ and `$x$`").count("<math")
        1
    """
    def replace(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        if match["block"]:
            made = convert(" ".join(match["block"].split()), display="block")
            return f"\n\n{made}\n\n"
        return convert(match["inline"])

    return CODE_OR_FORMULA.sub(replace, text)


def links(text: str, follow: Callable[[str], str]) -> str:
    """Markdown with each relative link replaced by what `follow` makes of its path."""
    return LINK.sub(lambda match: follow(match["path"]), text)


def title(notebook: NotebookNode, default: str) -> str:
    """The first heading of a notebook."""
    found = re.search(r"^# +(.+?)\s*$", notebook.cells[0].source, re.MULTILINE)
    return found[1] if found else default


def render(path: Path, root: Path, folder: Path) -> str:
    """Write the page of one notebook, with copies of the files that it links to; return its title.

    Raises:
        ValueError: a link leads nowhere, or a formula cannot be read; names the notebook and cell.
    """
    notebook = nbformat.read(path, as_version=4)
    page = folder / path.relative_to(root / "notebooks").with_suffix(".html")

    def follow(link: str) -> str:
        target = (path.parent / link).resolve()
        if not target.exists():
            raise ValueError(f"the link to {link} leads nowhere")
        if target.suffix == ".ipynb":
            return link.removesuffix(".ipynb") + ".html"
        copy = folder / "linked" / target.relative_to(root)
        if target.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)
        up = "../" * len(page.relative_to(folder).parts[:-1])
        return up + copy.relative_to(folder).as_posix()

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            try:
                cell.source = formulas(links(cell.source, follow))
            except Exception as error:
                raise ValueError(f"{path.name}, cell {cell.id}: {error}") from error
    exporter = HTMLExporter(extra_loaders=[DictLoader({"series.html.j2": TEMPLATE})],
                            template_file="series.html.j2")
    body, _ = exporter.from_notebook_node(
        notebook, resources={"metadata": {"name": title(notebook, path.stem)}})
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(body, encoding="utf-8", newline="\n")
    return title(notebook, path.stem)


def build(root: Path, folder: Path) -> list[Path]:
    """Render all chapters and solutions, and an index of them; return the pages."""
    found = sorted(p for p in (root / "notebooks").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
    found.sort(key=lambda path: (len(path.relative_to(root).parts), path.name))
    rows, pages = [], []
    for path in found:
        name = render(path, root, folder)
        page = path.relative_to(root / "notebooks").with_suffix(".html")
        rows.append(f'<li><a href="{page.as_posix()}">{html.escape(name)}</a></li>')
        pages.append(folder / page)
    index = ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
             "<title>GPT from tensors</title></head>\n"
             '<body style="font-family: sans-serif; max-width: 40em; margin: 2em auto">\n'
             "<h1>GPT from tensors</h1>\n<ul>\n" + "\n".join(rows) + "\n</ul></body></html>\n")
    (folder / "index.html").write_text(index, encoding="utf-8", newline="\n")
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m helpers.site", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/site"))
    folder = parser.parse_args(argv).folder
    pages = build(Path(__file__).resolve().parents[1], folder)
    print(f"{len(pages)} pages; open {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
