import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dsv3.config import ConfigError
from dsv3.data import sources


def read(source, key="text"):
  return list(sources.documents(sources.find(str(source)), key))


def test_folder_is_read_recursively_in_the_order_of_names(folder):
  (folder / "image.png").write_bytes(b"\xff")
  (folder / "empty.txt").write_text("")
  (folder / "gone.txt").symlink_to(folder / "nowhere")
  found = {d.name: d.text for d in read(folder)}
  paths = sorted(p for p in folder.rglob("[0-9]*.txt"))
  assert list(found) == [p.relative_to(folder).as_posix() for p in paths]
  assert list(found.values()) == [p.read_text() for p in paths]


def test_glob_names_files_from_its_fixed_folder(folder):
  assert [d.name for d in read(folder / "*/0[12].txt")] == [
    "sub/01.txt",
    "sub/02.txt",
  ]


def test_python_is_the_library_without_its_tests():
  files = sources.find("python")
  names = {p.relative_to(files.root).as_posix() for p in files.paths}
  assert {"ast.py", "json/decoder.py", "pydoc_data/topics.py"} <= names
  assert not any("/tests/" in n or n.startswith("test/") for n in names)
  assert not any("site-packages" in n for n in names)
  assert not any("_sysconfigdata" in n for n in names)


def test_new_files_move_no_old_ones_between_the_splits(folder):
  before = {d.name: d.chance for d in read(folder)}
  (folder / "00-new.txt").write_text("first in order")
  after = {d.name: d.chance for d in read(folder)}
  assert after.items() > before.items()


def test_chance_is_even():
  chances = np.array([sources.chance_of(f"{i}.py") for i in range(4000)])
  assert 0 <= chances.min() and chances.max() < 1
  # Three standard deviations of 4000 uniform draws.
  assert abs(chances.mean() - 0.5) < 3 * np.sqrt(1 / 12 / 4000)


def test_lone_file_is_cut_at_line_ends_and_its_end_held_out(tmp_path):
  text = "".join(f"line {i}\n" for i in range(5000))
  (tmp_path / "one.txt").write_text(text)
  pieces = read(tmp_path / "one.txt")
  assert "".join(d.text for d in pieces) == text
  assert all(d.text.endswith("\n") for d in pieces)
  chances = [d.chance for d in pieces]
  assert chances == sorted(chances, reverse=True) and chances[-1] == 0
  held = sum(len(d.text) for d in pieces if d.chance < 0.1)
  assert 0.1 <= held / len(text) < 0.17


def test_lone_file_without_line_ends_is_cut_all_the_same(tmp_path):
  (tmp_path / "one.txt").write_text("x" * 1000)
  pieces = read(tmp_path / "one.txt")
  assert len(pieces) == 20 and "".join(d.text for d in pieces) == "x" * 1000


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_carry_the_file_and_their_number(tmp_path, kind):
  path = tmp_path / f"rows.{kind}"
  texts = ["one", "", "drei é"]
  lines = "\n".join(json.dumps({"body": t, "n": 1}) for t in texts) + "\n\n"
  if kind == "parquet":
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), path)
  elif kind == "jsonl":
    path.write_text(lines)
  else:
    path.write_bytes(gzip.compress(lines.encode()))
  found = [(d.name, d.text) for d in read(path, "body")]
  assert found == [(f"{path.name}#1", "one"), (f"{path.name}#3", "drei é")]


GOOD = b'{"text": "a"}\n'
BAD = {
  "undecodable.txt": (b"abc\xff", ["0xff at byte 3", "UTF-8"]),
  "undecodable.jsonl": (GOOD + b'{"text": "\xff"}', ["line 2", "0xff"]),
  "cut.jsonl": (GOOD + b'{"text": ', ["line 2", "JSON"]),
  "other.jsonl": (b'{"txt": "a"}', ["line 1", "txt", "did you mean txt?"]),
  "list.jsonl": (b"[1]", ["line 1", "found list"]),
  "number.jsonl": (b'{"text": 3}', ["line 1", "found int under text"]),
  "half.jsonl": (b'{"text": "\\ud800"}', ["line 1", "surrogate"]),
  "plain.jsonl.gz": (GOOD, ["gzip"]),
  "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:-12], ["after line"]),
  "fake.parquet": (b"no parquet in here", ["wanted Parquet"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_one_line_with_file_and_place(tmp_path, name):
  content, wanted = BAD[name]
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ConfigError) as caught:
    read(path)
  message = str(caught.value)
  assert message.startswith(str(path)) and "\n" not in message
  assert all(part in message for part in wanted), message


def test_parquet_without_the_column_names_those_it_has(tmp_path):
  path = tmp_path / "rows.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"texts": ["a"]}), path)
  with pytest.raises(ConfigError, match="did you mean texts"):
    read(path)


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.txt", "."])
def test_missing_or_empty_source_is_named(tmp_path, monkeypatch, source):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match="config.data.sources: .*found no"):
    read(source)
