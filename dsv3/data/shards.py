"""A tokenised corpus on disk, memory-mapped.

A folder of four files: `tokens.bin` (all documents one after the other, uint16
or uint32), `index.npz` (per document: start, bytes of text, merged tokens that
can be split, chance of being held out), `names.json`, and `meta.json`. It is
written whole or not at all, and a start of the same run finds it again.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import tqdm

from dsv3.config import ConfigError
from dsv3.data import sources
from dsv3.data.sources import Document
from dsv3.data.tokenizer import Tokenizer

_VERSION = 2  # of the format and of what sources and tokenizers make
_CHUNK = 4 << 20  # characters that are tokenised at once
_UNREADABLE = OSError, EOFError, ValueError, LookupError, TypeError, BadZipFile


class Corpus(NamedTuple):
  """A tokenised source. `n` documents; arrays are per document."""

  source: str
  folder: pathlib.Path
  tokens: np.ndarray
  digest: str  # of tokens.bin: equal digests, equal text
  start: np.ndarray  # n + 1: document i is tokens[start[i] : start[i + 1]]
  n_bytes: np.ndarray
  n_splittable: np.ndarray
  chance: np.ndarray

  def names(self) -> list[str]:
    """Names of all documents; read when asked for."""
    return json.loads((self.folder / "names.json").read_text())


def prepare(
  source: str, tokenizer: Tokenizer, text_key: str, cache: str
) -> Corpus:
  """The tokens of a source: opened where they are cached, else made there.

  `tokens:FOLDER` is a folder that `write` has made, wherever it lies.
  """
  if source.startswith("tokens:"):
    folder = pathlib.Path(source.removeprefix("tokens:")).expanduser()
    return open_folder(folder, tokenizer, source)
  files = sources.find(source)
  key = hashlib.blake2b(digest_size=12)
  key.update(repr((_VERSION, source, text_key, tokenizer.digest)).encode())
  size = 0
  for path in files.paths:
    stat = path.stat()
    size += stat.st_size
    key.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
  folder = cache_folder(cache) / key.hexdigest()
  if not folder.exists():
    found = sources.documents(files, text_key)
    write(folder, found, tokenizer, source, size)
  return open_folder(folder, tokenizer, source)


def cache_folder(cache: str) -> pathlib.Path:
  """`config.data.cache`, or the user's cache folder where that is empty."""
  if cache:
    return pathlib.Path(cache).expanduser()
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "dsv3" / "tokens"


def write(
  folder: pathlib.Path,
  documents: Iterable[Document],
  tokenizer: Tokenizer,
  source: str,
  size: int | None = None,
) -> None:
  """Tokenises documents into `folder`, which appears when all is there.

  Args:
    size: bytes of the source's files, for the progress bar.
  """
  temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
  try:
    temporary.mkdir(parents=True)
    _write(temporary, documents, tokenizer, source, size)
    try:
      temporary.rename(folder)
    except OSError:
      if not folder.exists():  # else another process was faster: same content
        raise
  except OSError as error:
    raise ConfigError(
      f"config.data.cache: {folder}: {error}; wanted a folder to write in"
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write(folder, documents, tokenizer, source, size) -> None:
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
  first_W = tokenizer.splits.first_W
  names, rows = [], []
  digest = hashlib.blake2b(digest_size=16)
  # Nothing is shown for what takes less than a second.
  bar = tqdm.tqdm(
    total=size, unit="B", unit_scale=True, delay=1, desc=f"tokenise {source}"
  )
  with open(folder / "tokens.bin", "wb") as out, bar:
    for chunk in _chunks(documents):
      for document, ids in zip(
        chunk, tokenizer.encode_batch([d.text for d in chunk])
      ):
        raw = ids.astype(dtype).tobytes()
        out.write(raw)
        digest.update(raw)
        n_bytes = len(document.text.encode())
        n_splittable = int((first_W[ids] >= 0).sum())
        rows.append((len(ids), n_bytes, n_splittable, document.chance))
        names.append(document.name)
        bar.update(n_bytes)
  if not rows:
    raise ConfigError(f"config.data.sources: {source}: found no text in it")
  lengths, n_bytes, n_splittable, chance = map(np.array, zip(*rows))
  np.savez(
    folder / "index.npz",
    start=np.concatenate([[0], np.cumsum(lengths)]),
    n_bytes=n_bytes,
    n_splittable=n_splittable,
    chance=chance,
  )
  (folder / "names.json").write_text(json.dumps(names))
  meta = {
    "version": _VERSION,
    "source": source,
    "tokenizer": tokenizer.digest,
    "dtype": dtype.name,
    "digest": digest.hexdigest(),
  }
  (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
  chunk, length = [], 0
  for document in documents:
    chunk.append(document)
    length += len(document.text)
    if length >= _CHUNK:
      yield chunk
      chunk, length = [], 0
  if chunk:
    yield chunk


def open_folder(
  folder: pathlib.Path, tokenizer: Tokenizer, source: str
) -> Corpus:
  """The corpus in `folder`, memory-mapped; ConfigError if it is not ours."""
  try:
    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "index.npz") as file:
      index = {name: file[name] for name in file.files}
    tokens = np.memmap(folder / "tokens.bin", meta["dtype"], mode="r")
    corpus = Corpus(source, folder, tokens, meta["digest"], **index)
    identity = meta["version"], meta["tokenizer"]
  except _UNREADABLE as error:
    raise ConfigError(
      f"{folder}: {error}; wanted a folder of prepared tokens (if it lies in "
      "the cache, delete it and it is made again)"
    ) from error
  for what, found, wanted in (
    ("version", identity[0], _VERSION),
    ("tokenizer", identity[1], tokenizer.digest),
    ("tokens in tokens.bin", len(tokens), int(corpus.start[-1])),
  ):
    if found != wanted:
      raise ConfigError(f"{folder}: {what}: found {found}, wanted {wanted}")
  return corpus
