"""The smallest model with every part: what tests train, in milliseconds.

One dense and two MoE layers, four experts in two groups, one MTP module.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dsv3 import config, overlay

DIFF = {
  "name": "micro",
  "model.dim": 32,
  "model.n_layers": 3,
  "model.dense_hidden": 64,
  "model.attention.n_heads": 2,
  "model.attention.n_kv_heads": 2,
  "model.attention.q_rank": 16,
  "model.attention.kv_rank": 16,
  "model.attention.nope_dim": 16,
  "model.attention.rope_dim": 8,
  "model.attention.v_dim": 16,
  "model.moe.n_routed": 4,
  "model.moe.top_k": 2,
  "model.moe.hidden": 16,
  "model.moe.n_groups": 2,
  "model.moe.top_groups": 1,
  "data.seq_len": 32,
  "schedule.warmup_steps": 2,
  "schedule.bias_speed": 0.001,
  "schedule.batch_size": 4,
  "schedule.batch_size_start": 4,
  "train.steps": 8,
  "train.log_every": 1,
  "train.eval_every": 0,
  "train.eval_batches": 2,
  "train.final_eval_batches": 2,
  "train.checkpoint_every": 2,
  "mesh.data": 1,
}


def values(diff: Mapping[str, Any] | None = None) -> ConfigDict:
  """The micro config with the dotted keys of `diff` on top, locked."""
  return overlay.overlay(overlay.load("tiny"), {**DIFF, **(diff or {})})


def config_of(diff: Mapping[str, Any] | None = None) -> config.Config:
  """The same, checked and frozen."""
  return config.build(values(diff))


def write_corpus(folder: pathlib.Path) -> dict[str, Any]:
  """A small corpus in `folder`; returns the diff that reads it."""
  text = folder / "text"
  text.mkdir(parents=True)
  for i in range(20):
    lines = [f"line {n} of file {i}: {n * n + i}\n" for n in range(60)]
    (text / f"{i}.txt").write_text("".join(lines))
  return {
    "data.sources": (str(text),),
    "data.cache": str(folder / "cache"),
    "data.heldout": 0.2,
  }


def write_config(path: pathlib.Path, diff: Mapping[str, Any]) -> pathlib.Path:
  """A config file: the micro config with `diff` on top, a diff of tiny."""
  path.write_text(f"BASE = 'tiny'\nDIFF = {dict({**DIFF, **diff})!r}\n")
  return path
