"""The same batch under any mesh: equal loads, biases, losses and gradients.

A new axis, a mixture of axes, or what else changes nothing on one, joins with a
line of MORE. Loads and biases are equal to the bit. Losses are equal to 1e-6, and
the gradient of every loss term alone to 3e-6 of its norm, array by array, in
float32: sums go in another order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3.nn import precision
from dsv3.ops import losses
from dsv3.parallel import placement
from dsv3.train import layout, step
from dsv3.train.schedule import Hyper
from tests import micro
from tests.nn import weights
from tests.parallel.test_exchange import ragged_all_to_all
from tests.train.test_invariants import ALONE, assert_equal_gradients

BASE = {
  "schedule.z_weight": 1.0,  # the gradient of the z-loss is made at all
  "schedule.batch_size": 16,
  "schedule.batch_size_start": 16,
  "train.microbatches": 1,
  "model.remat": "none",
  "model.layers": "scan",
  "model.moe.kernel": "tiles",
  "model.attention.kernel": "naive",
  "model.attention.n_heads": 4,
  "model.attention.n_kv_heads": 4,
  "model.moe.n_routed": 8,
  "model.moe.n_groups": 4,
  "model.moe.top_groups": 2,
}
# Axes of a mesh, and keys of the config that the one device does not have: it
# computes in one microbatch, keeps all, and multiplies experts by "tiles".
TWO, PAPER = {"train.microbatches": 2}, {"model.remat": "paper"}
LINES = [  # every axis once, and what the paper trains with
  {"data": 2, "expert": 2, "context": 2, **PAPER},
  {"data": 2, "fsdp": 2, "tensor": 2, **TWO},
]
MORE = [  # twenty seconds each, most of it compilation: pytest -m slow
  {"data": 2},
  {"data": 8},
  {"fsdp": 2},
  {"data": 4},
  {"fsdp": 4},
  {"fsdp": 8},
  {"tensor": 2},
  {"tensor": 4},
  {"context": 2},
  {"context": 4},
  {"context": 8},
  {"expert": 2},
  {"expert": 4},
  {"expert": 8},
  {"data": 2, "expert": 4},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"data": 2, "expert": 2, "context": 2},
  {"expert": 2, "context": 2, "tensor": 2},
  {"expert": 4, "expert_nodes": 2},
  {"expert": 4, "expert_rows": 1.0, "data": 2},
  {"expert": 4, "expert_nodes": 2, "expert_rows": 0.5},
  {"data": 4, **TWO},
  {"fsdp": 2, "context": 4, **TWO},
  {"data": 2, "expert": 2, "tensor": 2, **TWO},
  {"expert": 4, "expert_nodes": 2, "expert_rows": 0.5, **TWO},
  {"fsdp": 2, "expert": 2, "context": 2, **TWO, **PAPER},
  {"fsdp": 2, "expert": 2, "tensor": 2, **PAPER},
  {"expert": 4, "expert_rows": 0.5, "data": 2, **TWO, **PAPER},
  {"data": 2, "expert": 4, "model.moe.kernel": "dense"},
  {"expert": 2, "fsdp": 2, "model.moe.kernel": "dense", **TWO},
  {"data": 2, "expert": 4, "model.moe.kernel": "tiles"},
  {"data": 2, "expert": 4, "model.moe.kernel": "ragged"},
  {"expert": 2, "tensor": 2, "model.moe.kernel": "ragged", **TWO, **PAPER},
  {"expert": 2, "context": 2, "model.attention.kernel": "flash", **PAPER},
  {"expert": 2, "fsdp": 2, "model.layers": "unrolled", **TWO, **PAPER},
]
ALL = [*LINES, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE)]
# Two packed rows, one of padding, one that ends early; the others are whole.
SEGMENTS = np.ones((16, 33), int)
SEGMENTS[1, :9], SEGMENTS[1, 9:20], SEGMENTS[1, 20:] = 1, 2, 0
SEGMENTS[2] = 0
SEGMENTS[3, 30:] = 2


def named(line) -> str:
  return ",".join(f"{key.split('.')[-1]}={n}" for key, n in line.items())


def diff_of(line) -> dict:
  """A key without a dot is an axis."""
  return {key if "." in key else f"mesh.{key}": n for key, n in line.items()}


@functools.cache
def batch():
  rows = np.random.default_rng(3).integers(0, 264, SEGMENTS.shape)
  return weights.batch_of(rows, 1, SEGMENTS)


@functools.cache
def compiled(items):
  """(weights of terms) -> loss, term means, loads, biases, flat gradients, rows
  that went to experts elsewhere."""
  values = micro.config_of({**BASE, **dict(items)})
  where = layout.of_run(values)
  flat = weights.random(values.model, std=0.1)
  graphdef, params, router = weights.from_oracle(
    flat, values.model, where.placement
  )
  state = step.TrainState(*[None] * 8).replace(
    step=jnp.int32(0),
    params=params,
    router=router,
    precision=precision.first_memory(params, values.model),
  )
  shardings = where.of_state(state)

  def run(state, batch, weight):
    hyper = Hyper(0.0, weight.mtp, weight.balance, weight.z, 0.001, 0.0)
    loss, sums, count, grads, _ = step.accumulate(
      state,
      batch,
      hyper,
      graphdef=graphdef,
      values=values,
      placement=where.placement,
    )
    moved = step.update_router(state.router, sums.load_XE, 0.001)
    means = losses.means(sums.terms, count)
    return loss, means, sums.load_XE, moved, grads, sums.moved_X

  program = jax.jit(
    run,
    in_shardings=(shardings, where.of_batch(), None),
    out_shardings=(None, None, None, None, shardings.params, None),
  )
  return values, functools.partial(program, state, batch())


@functools.cache
def outcome(items, term):
  values, run = compiled(items)
  loss, means, load_XE, moved, grads, rows = run(ALONE[term])
  to_flat = functools.partial(weights.to_oracle, model=values.model)
  return loss, means, load_XE, to_flat(moved), to_flat(grads), rows


def same(line, term) -> None:
  """Holds the outcome of a line against that of one device."""
  wanted = outcome((), term)
  found = outcome(tuple(sorted(diff_of(line).items())), term)
  assert found[2].dtype == jnp.int32
  np.testing.assert_array_equal(found[2], wanted[2])
  for key, bias_E in wanted[3].items():
    np.testing.assert_array_equal(found[3][key], bias_E)
  assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6)
  for name, mean in wanted[1].items():
    assert float(found[1][name]) == pytest.approx(float(mean), rel=1e-6), name
  assert_equal_gradients(found[4], wanted[4], 3e-6)


@pytest.mark.parametrize("line", ALL, ids=named)
def test_mesh_changes_nothing(line):
  for term in ALONE:  # of one program, which takes long to compile
    same(line, term)


RAGGED = [  # what GPUs and TPUs send by; here by an emulation of the operation
  {"data": 2, "expert": 4, "expert_rows": 1.0, **PAPER},
  {"fsdp": 2, "expert": 4, "expert_nodes": 2, "expert_rows": 0.5, **TWO},
]


@pytest.mark.slow
@pytest.mark.parametrize("line", RAGGED, ids=named)
def test_mesh_with_ragged_exchange_changes_nothing(line, monkeypatch):
  calls = []

  def emulated(*args, **how):
    calls.append(how)
    return ragged_all_to_all(*args, **how)

  monkeypatch.setattr(lax, "ragged_all_to_all", emulated)
  monkeypatch.setattr(placement, "kernel_of", lambda platform: "ragged")
  compiled.cache_clear()  # of the same mesh with the other kernel
  outcome.cache_clear()
  for term in ALONE:
    same(line, term)
  assert calls


@pytest.mark.slow  # a program of two meshes
def test_each_part_of_a_cut_expert_has_whole_rows_sent():
  rows = lambda **mesh: (
    outcome(tuple(sorted(diff_of(mesh).items())), "main")[5].inside_nodes
  )
  whole, cut = rows(expert=2), rows(expert=2, tensor=2)
  assert whole.sum() > 0
  np.testing.assert_array_equal(cut, 2 * whole)
