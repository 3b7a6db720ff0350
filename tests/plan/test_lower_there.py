"""A whole training step compiled for GPUs and for a TPU slice that are not there."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dsv3 import config, overlay
from dsv3.config import Mesh
from dsv3.nn.transformer import make_model, split
from dsv3.parallel import table
from dsv3.parallel.placement import dims_of, is_variable

ROOT = pathlib.Path(__file__).parent.parent.parent
# Micro's sizes are too small for the TPU's compiler: libtpu 0.0.42 ends with an
# error of its own.
SIZES = {
  "model.dtype": "bfloat16",
  "model.n_layers": 3,
  "schedule.batch_size": 16,
  "schedule.batch_size_start": 16,
}

MESH = "fsdp=2,expert=4,expert_rows=2"
LAYERS_OF_671B = {  # three dense ones, one of experts and the MTP module
  "model.n_layers": 4,
  "model.precision.recipe": "bf16",
  "model.moe.kernel": "tokamax",
  "schedule.batch_size": 16,
  "schedule.batch_size_start": 16,
}


def lowered(target: str, base="tiny", sizes=SIZES, mesh=MESH) -> dict:
  """What `dsv3 plan --lower` says of a model, in a process of its own."""
  # What a test's process has for its CPU devices.
  mine = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
  kept = {k: v for k, v in os.environ.items() if k not in mine}
  options = [f"--mesh={mesh}", "--microbatches=2"]
  options += [f"--config.{name}={value}" for name, value in sizes.items()]
  run = subprocess.run(
    [sys.executable, "-m", "dsv3", "plan", f"--config={base}", "--json"]
    + [f"--lower={target}", *options],
    env=kept,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-2000:]
  return json.loads(run.stdout)


def bytes_in_float32(**mesh) -> int:
  """Of the weights of a MoE layer that are stored over `fsdp`."""
  model = config.build(overlay.overlay(overlay.load("tiny"), SIZES)).model
  make = lambda: split(make_model(model, jax.random.key(0)))[1]
  total = 0
  stack = jax.eval_shape(make)["moe"]
  for w in jax.tree.leaves(stack, is_leaf=is_variable):
    dims, shape = dims_of(w), w.get_value().shape
    if "fsdp" in str(table.stored(dims, shape, Mesh(**mesh))):
      total += (
        4 * math.prod(shape[1:]) // (mesh["expert"] if "E" in dims else 1)
      )
  return total


def check(found: dict) -> None:
  """It holds something, sends rows and weights in its layers, and no more."""
  assert found["surprises"] == []
  held = found["bytes"]
  assert min(held["arguments"], held["temporary"]) > 0
  assert held["total"] < 1e8  # a model of 600,000 parameters
  sent = {(r["place"], r["kind"]): r for r in found["sent"]}
  for way in ("forward", "backward"):
    for place in ("MoE layer", "MTP module"):
      rows = sent[f"{place}, {way}", "ragged-all-to-all"]
      assert rows["number_each"] >= 2 and rows["bytes_each"] > 0
  layer = sent["MoE layer, forward", "all-gather"]
  assert (layer["layers"], layer["microbatches"]) == (2, 2)
  assert ("optimizer", "all-reduce") in sent  # of the gradients' norm
  other = sum(r["bytes"] for r in found["sent"] if r["place"] == "other")
  assert other < sum(r["bytes"] for r in found["sent"]) / 20


@pytest.mark.hopper
@pytest.mark.skipif(
  not importlib.util.find_spec("jax_cuda13_plugin"),
  reason="needs CUDA's compiler: pip install -e '.[hopper-compile]'",
)
def test_a_step_compiles_for_eight_h200s():
  found = lowered("h200:1x8")
  check(found)
  shared = found["shared"]
  assert 0 < shared["inside"] <= shared["all"]
  sent = {(r["place"], r["kind"]): r for r in found["sent"]}
  gathered = sent["MoE layer, forward", "all-gather"]["bytes_each"]
  assert gathered < 0.55 * bytes_in_float32(fsdp=2, expert=4)


@pytest.mark.hopper
@pytest.mark.skipif(
  not importlib.util.find_spec("jax_cuda13_plugin"),
  reason="needs CUDA's compiler: pip install -e '.[hopper-compile]'",
)
@pytest.mark.skipif(
  not importlib.util.find_spec("tokamax"), reason="its grouped products"
)
def test_layers_of_671b_compile_for_eight_h200s():
  """In their true widths: nothing that should not be there, and little else sent."""
  found = lowered(
    "h200:1x8", "v3_671b", LAYERS_OF_671B, "expert=8,expert_rows=2"
  )
  assert found["surprises"] == []  # and it fits
  sent = {(r["place"], r["kind"]): r for r in found["sent"]}
  rows = sent["MoE layer, forward", "ragged-all-to-all"]["bytes_each"]
  each_way = 4096 * 8 * 7168 * 2  # a token to eight experts, in BF16
  assert 2 * each_way < rows < 6 * each_way  # buffers are for twice the mean
  whole = 256 * 3 * 7168 * 2048 * 2  # of the layer's experts
  gathered = sent.get(("MoE layer, forward", "all-gather"))
  assert not gathered or gathered["bytes_each"] < whole / 100


@pytest.mark.tpu
@pytest.mark.skipif(
  not importlib.util.find_spec("libtpu"),
  reason="needs the TPU's compiler: pip install 'jax[tpu]'",
)
def test_a_step_compiles_for_a_slice_of_v5e():
  found = lowered("v5e:2x4")
  check(found)
  gathers = [r for r in found["sent"] if r["kind"] == "all-gather"]
  assert len(gathers) > 3  # also those that are in fusions
