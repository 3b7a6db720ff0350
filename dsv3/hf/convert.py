"""A folder of released weights as a run, and a run as such a folder.

An imported run holds weights alone (`dsv3.hf.imported`), which count as step 0:
it can be evaluated, sampled and trained on from there.
"""

import pathlib
import shutil
from typing import Any

import numpy as np

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.hf import imported, read, write
from dsv3.train import run
from dsv3.train.restore import restore

_SIZES = {"bfloat16": 2, "float32": 4}
# What belongs to a tokenizer: its chat template is in one of the last two.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def report(folder: str, dtype: str) -> dict[str, Any]:
  """What an import would read and make, without reading weights."""
  source = read.open_source(folder)
  stored = source.folder.index.values()
  sizes = [np.prod(t.shape, dtype=np.int64) for t in source.tensors]
  n_parameters = sum(n for n, t in zip(sizes, source.tensors) if not t.is_copy)
  return {
    "network": source.values.name,
    "notes": list(source.notes),
    "files": len({s.path for s in stored}),
    "tensors": len(source.folder.index),
    "bytes": sum(s.end - s.begin for s in stored),
    "parameters": int(n_parameters),
    "bytes of the run": sum(_bytes(t, dtype) for t in source.tensors),
    "bytes on one device": int(n_parameters) * _SIZES[imported.COMPUTE[dtype]],
    "largest tensor, bytes as float32": 4 * int(max(sizes)),
  }


def _bytes(tensor, dtype: str) -> int:
  made = write.to_write(tensor, lambda: None, dtype)
  return sum(t.n_bytes for t in made)


def from_hf(
  folder: str, out: str, dtype: str, given: run.Given
) -> config.Config:
  """Makes the run `out` of a folder; returns its config.

  `dtype` is what the weights are kept in: bfloat16, float32, or fp8, blocks as
  the release has them, which are expanded to bfloat16 where they are loaded.
  Killed, the next call goes on after the last whole file.

  Raises ConfigError where the folder or `out` is not as it must be.
  """
  source = read.open_source(folder, imported.COMPUTE[dtype])
  out_path = pathlib.Path(out).expanduser()
  found = {p.name for p in out_path.iterdir()} if out_path.is_dir() else set()
  begun = {"hf", "lock", *_TOKENIZER} if "hf" in found else {"lock"}
  if found - begun:
    raise ConfigError(f"--out={out}: found files in it, wanted a new folder")
  with run.locked(out_path):
    imported.write_weights(out_path, source, dtype)
    values = source.values
    _copy_tokenizer(source.folder.folder, out_path)
    if (out_path / _TOKENIZER[0]).is_file():
      tree = run.as_tree(values)
      path = str((out_path / _TOKENIZER[0]).resolve())
      values = config.build(overlay.overlay(tree, {"data.tokenizer": path}))
    run.record(out_path, values, given)
  return values


def to_hf(
  workdir: str,
  out: str,
  *,
  step: int | None = None,
  ema: bool = False,
  fp8: bool = False,
  dtype: str = "bfloat16",
) -> int:
  """Writes a checkpoint of a run under the names of the release; its step.

  Blocks of an imported FP8 model that have not changed come out byte for byte.
  """
  out = pathlib.Path(out).expanduser()
  trained = restore(workdir, step, ema=ema, as_stored=True)
  published, scales = imported.way_back(workdir)
  write.write_folder(
    out,
    trained.values.model,
    (trained.params, trained.router),
    fp8=fp8,
    dtype=dtype,
    scales=scales,
    published=published,
    identity={
      "run": str(pathlib.Path(workdir).resolve()),
      "step": trained.step,
      "ema": ema,
    },
  )
  tokenizer = pathlib.Path(trained.values.data.tokenizer).expanduser()
  if tokenizer.suffix == ".json" and tokenizer.is_file():
    _copy_tokenizer(tokenizer.parent, out)
    shutil.copy(tokenizer, out / "tokenizer.json")
  return trained.step


def _copy_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
  for name in _TOKENIZER:
    if (source / name).is_file():
      shutil.copy(source / name, out / name)
