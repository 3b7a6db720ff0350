"""Every notebook runs from top to bottom, and defines no model code."""

import os
import pathlib
import resource

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SLOW = ("fp8", "mla", "routing", "speculation")  # half a minute each and more
NOTEBOOKS = [
  pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW))
  for path in PATHS
]
LARGEST = 150_000  # bytes: a figure of a notebook's width, and its words
SECONDS = 60  # of a core, see `one_core`


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_keeps_one_figure_and_is_small(path):
  book = nbformat.read(path, as_version=4)
  assert len(_figures(book)) == 1
  assert path.stat().st_size < LARGEST


@pytest.fixture
def one_core():
  """A kernel on one core, whose time is then that of its work.

  The clock tells how busy the machine is, and of several threads that wait for
  each other on busy cores the waiting counts. A user has more cores than this.
  """
  cores = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
  yield
  os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, one_core):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # a user has no eight devices
  book = nbformat.read(path, as_version=4)
  kept, before = _figures(book), _seconds_of_children()
  client = nbclient.NotebookClient(book, timeout=300, kernel_name="python3")
  client.execute(cwd=str(path.parent))  # as Jupyter does
  seconds = _seconds_of_children() - before
  assert 1 < seconds < SECONDS  # 0 would be of a kernel that has not ended
  assert _figures(book) == kept
  cells = [cell for cell in book.cells if cell.cell_type == "code"]
  assert cells and all(cell.outputs for cell in cells)
  for cell in cells:
    assert "class " not in cell.source and "nnx" not in cell.source


def _figures(book) -> list[int]:
  """The cell of every picture among the outputs."""
  return [
    i
    for i, cell in enumerate(book.cells)
    for output in cell.get("outputs", [])
    if any(kind.startswith("image/") for kind in output.get("data", {}))
  ]


def _seconds_of_children() -> float:
  """Processor time of processes that have ended: a notebook's kernel is one."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime
