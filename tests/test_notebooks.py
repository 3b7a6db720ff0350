"""Every notebook runs from top to bottom, and defines no model code."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SLOW = ("fp8", "mla", "routing", "speculation")  # half a minute each and more
NOTEBOOKS = [
  pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW))
  for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # a user has no eight devices
  book = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(book, timeout=300, kernel_name="python3")
  client.execute(cwd=str(ROOT))
  cells = [cell for cell in book.cells if cell.cell_type == "code"]
  assert cells and all(cell.outputs for cell in cells)
  for cell in cells:
    assert "class " not in cell.source and "nnx" not in cell.source
