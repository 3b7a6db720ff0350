"""Folders of safetensors files, read and written one tensor at a time.

A file is eight bytes, the length of a JSON header, the header, and the bytes of
all tensors. Reading fetches the tensor that is asked for and writing streams, so
neither holds a file in memory. No pickle is ever opened.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dsv3.config import ConfigError

INDEX = "model.safetensors.index.json"
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class Stored(NamedTuple):
  """Where a tensor lies."""

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  begin: int  # in the file
  end: int


class Folder:
  """The tensors of a folder, by name. Raises ConfigError for a damaged one."""

  def __init__(self, folder: str | pathlib.Path):
    self.folder = pathlib.Path(folder).expanduser()
    if not self.folder.is_dir():
      raise ConfigError(f"{folder}: found no folder")
    self.index: dict[str, Stored] = {}
    for path in self._paths():
      header = read_header(path)
      for name in header.keys() & self.index.keys():
        raise ConfigError(
          f"{path}: {name}: is in {self.index[name].path.name} as well"
        )
      self.index |= header
    self._check_index()

  def _paths(self) -> list[pathlib.Path]:
    """The files that the index names, or all there are where there is none."""
    self._listed = {}
    path = self.folder / INDEX
    if path.is_file():
      try:
        self._listed = json.loads(path.read_text())["weight_map"]
        names = sorted(set(self._listed.values()))
      except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ConfigError(f"{path}: damaged: {e}") from e
      for name in names:
        if not isinstance(name, str) or "/" in name or name == "..":
          raise ConfigError(f"{path}: names {name!r}, outside the folder")
        if not (self.folder / name).is_file():
          raise ConfigError(f"{self.folder / name}: missing; {INDEX} names it")
      return [self.folder / name for name in names]
    paths = sorted(self.folder.glob("*.safetensors"))
    if not paths:
      others = [p.name for p in self.folder.glob("*.bin")]
      hint = f" (found {others[0]}; pickles are not read)" if others else ""
      raise ConfigError(f"{self.folder}: no *.safetensors{hint}")
    return paths

  def _check_index(self) -> None:
    for name, file in self._listed.items():
      found = self.index.get(name)
      if found is None or found.path.name != file:
        where = found.path.name if found else "no file"
        raise ConfigError(
          f"{self.folder / INDEX}: {name}: found in {where}, wanted in {file}"
        )

  def __getitem__(self, name: str) -> np.ndarray:
    """A tensor, read now: mapped pages would stay as long as the map."""
    stored = self.index[name]
    size = stored.end - stored.begin
    raw = np.fromfile(stored.path, np.uint8, size, offset=stored.begin)
    return raw.view(DTYPES[stored.dtype]).reshape(stored.shape)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
  """The tensors of a file; ConfigError if it is cut short or no such file."""
  size = path.stat().st_size
  try:
    with open(path, "rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      if length > size - 8:
        raise ValueError(f"its header of {length:,} bytes is cut short")
      header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    out, end_of_all = {}, 8 + length
    for name, entry in header.items():
      begin, end = (8 + length + n for n in entry["data_offsets"])
      shape, dtype = tuple(entry["shape"]), entry["dtype"]
      out[name] = Stored(path, dtype, shape, begin, end)
      end_of_all = max(end_of_all, end)
      if dtype not in DTYPES:
        raise ConfigError(
          f"{path}: {name}: found dtype {dtype}, wanted one of "
          f"{', '.join(DTYPES)}"
        )
      wanted = math.prod(shape) * DTYPES[dtype].itemsize
      if begin < 8 + length or end - begin != wanted:
        raise ValueError(f"{name} has {end - begin:,} bytes, wanted {wanted:,}")
    if end_of_all > size:
      raise ValueError(f"found {size:,} bytes, wanted {end_of_all:,}")
  except ConfigError:
    raise
  except (ValueError, KeyError, TypeError, struct.error) as error:
    raise ConfigError(f"{path}: damaged: {error}") from error
  return out


class ToWrite(NamedTuple):
  """A tensor of a file to be written; `make` gives its bytes when it is due."""

  name: str
  dtype: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def n_bytes(self) -> int:
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_file(
  path: pathlib.Path,
  tensors: Iterable[ToWrite],
  tell: Callable[[int], object] = lambda _: None,
) -> None:
  """Writes a file under another name and renames it: whole or not at all.

  `tell` hears the bytes of every tensor that is written.
  """
  tensors, header, at = list(tensors), {"__metadata__": {"format": "pt"}}, 0
  for t in tensors:
    offsets = [at, at + t.n_bytes]
    header[t.name] = {
      "dtype": t.dtype,
      "shape": list(t.shape),
      "data_offsets": offsets,
    }
    at = offsets[1]
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  draft = path.with_name(f"{path.name}.tmp")
  with open(draft, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for t in tensors:
      array = np.ascontiguousarray(t.make())
      found = array.dtype, array.shape
      assert found == (DTYPES[t.dtype], tuple(t.shape)), (t.name, found)
      file.write(array.reshape(-1).view(np.uint8).data)
      tell(t.n_bytes)
  draft.replace(path)
