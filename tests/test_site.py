"""The series as web pages: formulas and links without the network, collapsed cells folded."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import site

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of two notebooks, the second among the solutions, and a file."""
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "story.txt").write_text("A fox.")
    return tmp_path


def save(root: Path, name: str, *cells: nbformat.NotebookNode) -> Path:
    path = root / "notebooks" / name
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A title & more"), *cells]), path)
    return path


def test_links_lead_to_pages_and_to_copies(root: Path) -> None:
    save(root, "solutions/01_one.ipynb", new_markdown_cell("[back](../01_one.ipynb#part)"))
    text = "[s](solutions/01_one.ipynb) [d](../data/story.txt) [w](https://example.org/a.ipynb)"
    save(root, "01_one.ipynb", new_markdown_cell(text))
    pages = site.build(root, root / "out")
    assert [page.is_file() for page in pages] == [True, True]
    first, second = (page.read_text(encoding="utf-8") for page in pages)
    assert 'href="solutions/01_one.html"' in first and 'href="linked/data/story.txt"' in first
    assert 'href="https://example.org/a.ipynb"' in first
    assert 'href="../01_one.html#part"' in second
    assert (root / "out" / "linked" / "data" / "story.txt").read_text() == "A fox."
    index = (root / "out" / "index.html").read_text(encoding="utf-8")
    assert 'href="01_one.html"' in index and "A title &amp; more" in index


def test_formulas_are_mathml_and_code_keeps_its_dollars() -> None:
    text = "so $x_1$ and `$y$`\n\n```sh\necho $HOME $PATH\n```\n\n$$\n\\frac{1}{2}\n$$\n"
    made = site.formulas(text)
    assert made.count("<math") == 2 and "<mfrac>" in made and 'display="block"' in made
    assert "`$y$`" in made and "echo $HOME $PATH" in made
    assert site.formulas("5$ and 6$ and $7") == "5$ and 6$ and $7"


def test_a_collapsed_cell_is_folded_and_nothing_comes_from_elsewhere(root: Path) -> None:
    hidden = new_code_cell("a_hidden_line = 1", metadata={"jupyter": {"source_hidden": True}})
    path = save(root, "01_one.ipynb", hidden, new_code_cell("a_plain_line = 2"))
    site.render(path, root, root / "out")
    page = (root / "out" / "01_one.html").read_text(encoding="utf-8")
    folded = re.search(r"<details.*?</details>", page, re.DOTALL)[0]
    assert "a_hidden_line" in folded and "a_plain_line" not in folded
    assert not re.findall(r"<script[^>]+src=|<link[^>]+href=\"https?:", page)


def test_a_dead_link_is_named(root: Path) -> None:
    path = save(root, "01_one.ipynb", new_markdown_cell("[x](02_two.ipynb)", id="dead"))
    with pytest.raises(ValueError, match=r"01_one.ipynb, cell dead: the link to 02_two.ipynb"):
        site.render(path, root, root / "out")


def test_the_whole_series_is_rendered(tmp_path: Path) -> None:
    pages = site.build(ROOT, tmp_path)
    assert len(pages) == len(list((ROOT / "notebooks").rglob("[0-9A-Z]*.ipynb")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script src" not in text
        for link in re.findall(r'<a href="(?!https?:|#|mailto:)([^"#]+)', text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
