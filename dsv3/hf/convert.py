"""A folder of released weights as a run, and a run as such a folder.

An imported run holds weights alone, as its checkpoint 0: it can be evaluated,
sampled and trained on from there. Beside them lie what makes the way back
exact: hf/config.json, and the scales of FP8 blocks in hf/scales.npz.
"""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.hf import read, write
from dsv3.train import run
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.restore import restore

_SIZES = {"bfloat16": 2, "float32": 4}


def report(folder: str, dtype: str) -> dict[str, Any]:
  """What an import would read and make, without reading weights."""
  source = read.open_source(folder, dtype)
  stored = source.folder.index.values()
  n_parameters = sum(
    np.prod(t.shape, dtype=np.int64) for t in source.tensors if not t.is_copy
  )
  return {
    "network": source.values.name,
    "notes": list(source.notes),
    "files": len({s.path for s in stored}),
    "tensors": len(source.folder.index),
    "bytes": sum(s.end - s.begin for s in stored),
    "parameters": int(n_parameters),
    "bytes on one device": int(n_parameters) * _SIZES[dtype],
    "largest tensor, bytes as float32": 4
    * max(int(np.prod(t.shape, dtype=np.int64)) for t in source.tensors),
  }


def from_hf(
  folder: str, out: str, dtype: str, given: run.Given
) -> config.Config:
  """Makes the run `out` of a folder; returns its config.

  Raises ConfigError where the folder or `out` is not as it must be. Killed, it
  leaves a folder without a checkpoint, which the next call replaces.
  """
  source, out_path = read.open_source(folder, dtype), pathlib.Path(out)
  if out_path.exists() and any(out_path.iterdir()):
    if (
      not (out_path / "hf").is_dir()
      or (out_path / "checkpoints" / "0").exists()
    ):
      raise ConfigError(f"--out={out}: found files in it, wanted a new folder")
    shutil.rmtree(out_path)
  values = source.values
  tokenizer = source.folder.folder / "tokenizer.json"
  extra = out_path / "hf"
  extra.mkdir(parents=True)
  if tokenizer.is_file():
    shutil.copy(tokenizer, out_path / "tokenizer.json")
    tree = run.as_tree(values)
    path = str((out_path / "tokenizer.json").resolve())
    values = config.build(overlay.overlay(tree, {"data.tokenizer": path}))
  _, params, router = read.parameters(source, dtype=dtype)
  (extra / "config.json").write_text(json.dumps(source.published, indent=2))
  np.savez(extra / "scales.npz", **read.read_scales(source))
  run.record(out_path, values, given)
  trees = {"params": params, "router": router}
  checkpoints = Checkpoints(out_path / "checkpoints")
  checkpoints.save(
    0,
    {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)},
    {"weights_only": True, "from": str(source.folder.folder.resolve())},
  )
  checkpoints.wait()
  checkpoints.close()
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
  trained = restore(workdir, step, ema=ema, as_stored=True)
  extra = pathlib.Path(workdir) / "hf"
  published, scales = None, None
  if (extra / "config.json").is_file():
    published = json.loads((extra / "config.json").read_text())
  if fp8 and (extra / "scales.npz").is_file():
    with np.load(extra / "scales.npz") as file:
      scales = {name: file[name] for name in file.files}
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
  tokenizer = pathlib.Path(workdir) / "tokenizer.json"
  if tokenizer.is_file():
    shutil.copy(tokenizer, pathlib.Path(out) / "tokenizer.json")
  return trained.step
