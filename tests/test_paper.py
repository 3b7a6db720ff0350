"""PAPER.md is true: what it names exists, cites the paper, and is tested."""

import ast
import functools
import pathlib
import re

import pytest

from dsv3 import overlay

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "PAPER.md").read_text()
CITED = re.compile(r"Eq\.\s+(\d+(?:(?:-|,\s+|\s+and\s+)\d+)*)|\"eq(\d+)\"")


def table(title: str) -> list[list[str]]:
  """Cells of the rows under the heading `title`, without the header."""
  section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in section.splitlines()
    if line.startswith("|")
  ]
  return rows[2:]


@functools.cache
def definitions(file: str) -> dict[str, str]:
  """Source of every function and class of a file, by dotted name."""
  source, found = (ROOT / file).read_text(), {}

  def walk(node, prefix):
    for child in ast.iter_child_nodes(node):
      kinds = (ast.FunctionDef, ast.ClassDef)
      if isinstance(child, kinds):
        name = f"{prefix}{child.name}"
        found[name] = ast.get_source_segment(source, child)
        walk(child, f"{name}.")

  walk(ast.parse(source), "")
  return found


def cited(source: str) -> set[int]:
  """Numbers of all equations that a piece of code cites."""
  numbers = set()
  for listed, scope in CITED.findall(source):
    for part in re.split(r",\s+|\s+and\s+", listed or scope):
      first, _, last = part.partition("-")
      numbers |= set(range(int(first), int(last or first) + 1))
  return numbers


def places(cell: str) -> list[tuple[str, str]]:
  """`file:name` of a cell, more than one parted by `<br>`."""
  return [
    tuple(part.strip(" `").split(":")) for part in cell.split("<br>") if part
  ]


EQUATIONS, SECTIONS = table("Equations"), table("Sections")


def test_each_of_the_25_equations_has_its_row():
  assert [row[0] for row in EQUATIONS] == [f"Eq. {n}" for n in range(1, 26)]


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda r: r[0])
def test_code_of_an_equation_cites_it_and_its_test_is_named_for_it(row):
  number = int(row[0].removeprefix("Eq. "))
  for file, name in places(row[2]):
    assert number in cited(definitions(file)[name]), f"{file}:{name}"
  names = [name for _, name in places(row[3])]
  assert all(re.search(rf"eq{number}(_|$)", name) for name in names), names


@pytest.mark.parametrize(
  "row", EQUATIONS + SECTIONS, ids=lambda r: f"{r[0]} {r[1]}"
)
def test_code_and_tests_of_a_row_exist(row):
  assert places(row[2]) and places(row[3])
  for file, name in places(row[2]) + places(row[3]):
    assert name in definitions(file), f"{file}:{name}"
  assert all(name.startswith("test_") for _, name in places(row[3]))


def test_the_numbers_of_section_42_are_those_of_the_config():
  """All that `configs/v3_671b.py` marks with Sec. 4.2, value for value."""
  lines = (overlay.CONFIGS / "v3_671b.py").read_text().splitlines()
  values = overlay.flat(overlay.load("v3_671b"))
  marked = {}
  for line in lines:
    target = re.match(r"\s+(\w+)\.(\w+) = .*# Sec\. 4\.2", line)
    if target:
      group, name = target.groups()
      keys = [k for k in values if k.endswith(f"{group}.{name}")]
      assert len(keys) == 1, line
      marked[keys[0]] = str(values[keys[0]])
  found = {row[1].strip("`"): row[2] for row in table("Numbers of Sec. 4.2")}
  assert len(marked) > 35
  assert found == marked


def departures() -> dict[str, str]:
  """The `Departs:` note of every docstring of dsv3, by `file:name`."""
  notes = {}
  for path in sorted((ROOT / "dsv3").rglob("*.py")):
    file = str(path.relative_to(ROOT))
    for name, source in definitions(file).items():
      node = ast.parse(source).body[0]
      _, mark, note = (ast.get_docstring(node) or "").partition("Departs:")
      if mark:
        notes[f"{file}:{name}"] = " ".join(note.split("\n\n")[0].split())
  return notes


def test_departures_are_those_of_the_docstrings():
  found = {row[0].strip("`"): row[1] for row in table("Departures")}
  assert found == departures()


def test_rows_that_depart_say_so():
  departing = set(departures())
  for row in EQUATIONS:
    here = {":".join(place) for place in places(row[2])} & departing
    assert bool(row[4]) == bool(here), row[0]
