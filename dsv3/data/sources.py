"""Where text comes from: a source string to documents, in a stable order.

  python            the standard library of this interpreter, and its notes
  FOLDER            its text files (`TEXT_SUFFIXES`), recursively
  FILE or a glob    text; rows of *.jsonl, *.jsonl.gz and *.parquet

Whether a document is held out hangs on its name alone, so files that join the
corpus later move none of those that are there.
"""

import glob
import gzip
import hashlib
import json
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsv3 import config
from dsv3.config import ConfigError

TEXT_SUFFIXES = frozenset(
  ".txt .md .rst .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .java .js .ts .go "
  ".rs .rb .sh .sql .tex .html .css .xml .json .toml .yaml .yml .csv".split()
)
_PYTHON_SUFFIXES = frozenset((".py", ".rst", ".txt", ".md"))
# Distributions leave the tests of the library out, and they hold files that
# are broken on purpose; without them the corpus is much the same everywhere.
_PYTHON_SKIPS = frozenset(
  ("test", "tests", "idle_test", "site-packages", "dist-packages")
)
_ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PIECE = 16_384  # characters of a piece of a lone text file
_LEAST_PIECES = 20  # of a lone text file, so that 5% can be held out


class Document(NamedTuple):
  """A text, its identity, and the share from which on it is held out."""

  name: str  # path relative to the source's root; row or character after "#"
  text: str
  chance: float  # in [0, 1): held out where data.heldout is larger


class Files(NamedTuple):
  """The files of a source, sorted; names are relative to `root`."""

  source: str
  root: pathlib.Path
  paths: tuple[pathlib.Path, ...]


def find(source: str) -> Files:
  """The files of a source; ConfigError where there are none."""
  if source == "python":
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = _walk(root, _PYTHON_SUFFIXES, _PYTHON_SKIPS)
    # Written by the build, another one on every machine.
    paths = [p for p in paths if not p.name.startswith("_sysconfigdata")]
    wanted = "*.py files in the standard library's folder"
  else:
    root, paths, wanted = _find_paths(os.path.expanduser(source))
  if not paths:
    raise ConfigError(f"config.data.sources: {source}: found no {wanted}")
  return Files(source, root, tuple(sorted(paths)))


def documents(files: Files, text_key: str) -> Iterator[Document]:
  """All documents of a source that hold text, in the order of their names.

  A source that is one text file is cut at line ends into pieces of about 16 Ki
  characters, at least 20; the pieces at its end are the ones held out.

  Raises:
    ConfigError: for bytes that are not UTF-8 (files of the standard library
      that declare another encoding are left out instead), rows that are no
      JSON or have no text under `text_key`; it names the file and the place.
  """
  lone = len(files.paths) == 1
  for path in files.paths:
    name = path.relative_to(files.root).as_posix()
    if path.name.endswith(_ROW_SUFFIXES):
      for n, text in _rows(path, text_key):
        if text:
          yield _hashed(f"{name}#{n}", text)
      continue
    try:
      text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
      if files.source == "python":
        continue
      raise ConfigError(
        f"{path}: found 0x{error.object[error.start]:02x} at byte "
        f"{error.start}, wanted UTF-8 text"
      ) from error
    except OSError as error:
      raise ConfigError(f"{path}: {error.strerror}, wanted text") from error
    if lone:
      yield from _pieces(name, text)
    elif text:
      yield _hashed(name, text)


def chance_of(name: str) -> float:
  """A number in [0, 1) that hangs on `name` alone, evenly spread."""
  digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=6)
  return int.from_bytes(digest.digest()) / 2**48


def _hashed(name: str, text: str) -> Document:
  return Document(name, text, chance_of(name))


def _find_paths(source: str):
  path = pathlib.Path(source)
  if path.is_dir():
    suffixes = " ".join(sorted(TEXT_SUFFIXES))
    wanted = (
      f"text file ({suffixes}) in the folder; for rows name the files, as in "
      f"{source}/*.parquet"
    )
    return path, _walk(path, TEXT_SUFFIXES, frozenset()), wanted
  if path.is_file():
    return path.parent, [path], "file"
  fixed = path
  while glob.has_magic(str(fixed)):
    fixed = fixed.parent
  found = glob.glob(source, recursive=True)
  paths = [p for p in map(pathlib.Path, found) if p.is_file()]
  return fixed, paths, "such file or folder, nor a glob that matches one"


def _walk(root, suffixes, skips) -> list[pathlib.Path]:
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [
      f
      for f in folders
      if f not in skips and f != "__pycache__" and not f.startswith(".")
    ]
    paths += [
      pathlib.Path(folder, name)
      for name in names
      if os.path.splitext(name)[1].lower() in suffixes
      and os.path.isfile(os.path.join(folder, name))  # no dangling links
    ]
  return paths


def _pieces(name: str, text: str) -> Iterator[Document]:
  size = max(1, min(_PIECE, len(text) // _LEAST_PIECES))
  begin = 0
  while begin < len(text):
    end = text.find("\n", begin + size - 1, begin + 2 * size) + 1
    end = min(end or begin + size, len(text))
    chance = (len(text) - end) / len(text)
    yield Document(f"{name}#{begin}", text[begin:end], chance)
    begin = end


def _rows(path: pathlib.Path, key: str) -> Iterator[tuple[int, str]]:
  """Row numbers from 1 and texts; blank lines of jsonl count as rows."""
  if path.suffix == ".parquet":
    yield from _parquet_rows(path, key)
    return
  opener = gzip.open if path.suffix == ".gz" else open
  n = 0
  try:
    with opener(path, "rb") as lines:
      for n, line in enumerate(lines, 1):
        if not line.isspace():
          row = json.loads(line)
          yield n, _text_of(row, key, f"{path}: line {n}")
  except ConfigError:
    raise
  except UnicodeDecodeError as error:
    raise ConfigError(
      f"{path}: line {n}: found 0x{error.object[error.start]:02x} at byte "
      f"{error.start} of the line, wanted UTF-8 JSON"
    ) from error
  except ValueError as error:
    raise ConfigError(f"{path}: line {n}: {error}; wanted JSON") from error
  except (OSError, EOFError, zlib.error) as error:
    raise ConfigError(f"{path}: after line {n}: {error}") from error


def _parquet_rows(path: pathlib.Path, key: str) -> Iterator[tuple[int, str]]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise ConfigError(
      f"{path}: wanted the package pyarrow: pip install pyarrow"
    ) from error
  try:
    table = pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowInvalid, OSError) as error:
    raise ConfigError(f"{path}: {error}; wanted Parquet") from error
  with table:
    columns = table.schema_arrow.names
    if key not in columns:
      _text_of(dict.fromkeys(columns), key, str(path))
    n = 0
    try:
      for batch in table.iter_batches(batch_size=1024, columns=[key]):
        for text in batch.column(0).to_pylist():
          n += 1
          yield n, _text_of({key: text}, key, f"{path}: row {n}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      reason = str(error).split("\n")[0]
      raise ConfigError(f"{path}: after row {n}: {reason}") from error


def _text_of(row: Any, key: str, where: str) -> str:
  if not isinstance(row, dict):
    raise ConfigError(f"{where}: found {type(row).__name__}, wanted an object")
  if key not in row:
    raise ConfigError(
      f"{where}: found the keys {', '.join(row)}; wanted config.data.text_key "
      f"= {key}{config.nearest(key, row)}"
    )
  if not isinstance(row[key], str):
    kind = type(row[key]).__name__
    raise ConfigError(f"{where}: found {kind} under {key}, wanted text")
  try:
    row[key].encode()
  except UnicodeEncodeError as error:
    raise ConfigError(
      f"{where}: found half a surrogate pair at character {error.start} of "
      f"{key}, wanted Unicode text"
    ) from error
  return row[key]
