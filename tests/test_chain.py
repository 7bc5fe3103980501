"""The promise of the series: what a reader changes in one chapter is what the next one runs."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

USE = """
import torch
from helpers.gpt import GPT, GPTConfig
model = GPT(GPTConfig(vocab_size=9, context_length=4, n_embd=8, n_head=2, n_layer=1))
print(model(torch.tensor([[1, 2, 3]])).shape, model.blocks[0].attention.mine)
"""


def test_a_change_in_chapter_3_is_what_chapter_4_runs(checkout: Path, monkeypatch) -> None:
    path = checkout / "notebooks" / "03_attention.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if "class CausalSelfAttention" in c.source)
    cell.source = cell.source.replace("self.n_head, self.dropout =",
                                      "self.mine = 'my attention'\n        "
                                      "self.n_head, self.dropout =")
    assert "my attention" in cell.source
    nbformat.write(notebook, path)
    keep = [c for c in notebook.cells if c.cell_type == "code"
            and ("#| " in c.source or "export_notebook" in c.source)]
    shorter = notebook.copy()
    shorter.cells = keep                       # run, as a reader would: definitions, then export
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    NotebookClient(shorter, timeout=120, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    run = subprocess.run([sys.executable, "-c", USE], cwd=checkout, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(checkout)})
    assert run.stdout.strip() == "torch.Size([1, 3, 9]) my attention", run.stderr[-2000:]
