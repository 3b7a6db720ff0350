"""The same batch under any mesh: equal loads, biases, losses and gradients.

A new axis, or a mixture of axes, joins with a line of MESHES. Loads and biases are
equal to the bit. Losses are equal to 1e-6, and the gradient of every loss term
alone to 3e-6 of its norm, array by array, in float32: sums go in another order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.nn import precision
from dsv3.ops import losses
from dsv3.train import layout, step
from dsv3.train.schedule import Hyper
from tests import micro
from tests.nn import weights
from tests.train.test_invariants import ALONE, assert_equal_gradients

BASE = {
  "schedule.z_weight": 1.0,  # the gradient of the z-loss is made at all
  "schedule.batch_size": 16,
  "schedule.batch_size_start": 16,
  "model.attention.n_heads": 4,
  "model.attention.n_kv_heads": 4,
  "model.moe.n_routed": 8,
  "model.moe.n_groups": 4,
  "model.moe.top_groups": 2,
}
MESHES = [
  {"data": 2, "expert": 2, "context": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
]
MORE = [  # twenty seconds each, most of it compilation: pytest -m slow
  {"fsdp": 2},
  {"tensor": 2},
  {"context": 2},
  {"data": 2, "expert": 4},
  {"expert": 4, "expert_nodes": 2},
  {"expert": 4, "expert_rows": 1.0, "data": 2},
  {"expert": 4, "expert_nodes": 2, "expert_rows": 0.5},
  {"data": 2},
  {"data": 8},
  {"fsdp": 8},
  {"tensor": 4},
  {"expert": 2},
  {"expert": 8},
  {"context": 8},
  {"expert": 2, "context": 2, "tensor": 2},
]
ALL = [*MESHES, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE)]
# Two packed rows, one of padding, one that ends early; the others are whole.
SEGMENTS = np.ones((16, 33), int)
SEGMENTS[1, :9], SEGMENTS[1, 9:20], SEGMENTS[1, 20:] = 1, 2, 0
SEGMENTS[2] = 0
SEGMENTS[3, 30:] = 2


def named(mesh) -> str:
  return ",".join(f"{axis}={n}" for axis, n in mesh.items())


@functools.cache
def batch():
  rows = np.random.default_rng(3).integers(0, 264, SEGMENTS.shape)
  return weights.batch_of(rows, 1, SEGMENTS)


@functools.cache
def compiled(items):
  """(weights of terms) -> loss, term means, loads, biases, flat gradients."""
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
    return loss, means, sums.load_XE, moved, grads

  program = jax.jit(
    run,
    in_shardings=(shardings, where.of_batch(), None),
    out_shardings=(None, None, None, None, shardings.params),
  )
  return values, functools.partial(program, state, batch())


@functools.cache
def outcome(items, term):
  values, run = compiled(items)
  loss, means, load_XE, moved, grads = run(ALONE[term])
  to_flat = functools.partial(weights.to_oracle, model=values.model)
  return loss, means, load_XE, to_flat(moved), to_flat(grads)


def same(mesh, term, **more) -> None:
  """Holds the outcome under a mesh against that of one device."""
  wanted = outcome(tuple(sorted(more.pop("also", {}).items())), term)
  diff = {f"mesh.{axis}": n for axis, n in {"data": 1, **mesh}.items()}
  found = outcome(tuple(sorted({**diff, **more}.items())), term)
  assert found[2].dtype == jnp.int32
  np.testing.assert_array_equal(found[2], wanted[2])
  for key, bias_E in wanted[3].items():
    np.testing.assert_array_equal(found[3][key], bias_E)
  assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6)
  for name, mean in wanted[1].items():
    assert float(found[1][name]) == pytest.approx(float(mean), rel=1e-6), name
  assert_equal_gradients(found[4], wanted[4], 3e-6)


@pytest.mark.parametrize("mesh", ALL, ids=named)
def test_mesh_changes_nothing(mesh):
  for term in ALONE:  # of one program, which takes long to compile
    same(mesh, term)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[-1:], ids=named)
def test_mesh_and_microbatches_change_nothing(mesh):
  for term in ALONE:
    same(mesh, term, **{"train.microbatches": 2})


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["dense", "tiles", "ragged"])
def test_kernels_of_experts_change_nothing_on_a_mesh(kernel):
  for term in ALONE:
    same({"data": 2, "expert": 4}, term, **{"model.moe.kernel": kernel})


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", [{"data": 2, "expert": 2, "fsdp": 2}], ids=named
)
def test_tiles_of_fp8_are_those_of_one_device(mesh):
  """Sums in another order round an operand to its neighbour here and there."""
  fp8 = {"model.precision.recipe": "deepseek_v3"}
  wanted, plain = (outcome(tuple(d.items()), "main") for d in (fp8, {}))
  diff = {f"mesh.{axis}": n for axis, n in mesh.items()}
  found = outcome(tuple(sorted({**diff, **fp8}.items())), "main")
  assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-4)
  far = lambda a, b: max(
    np.linalg.norm(a[key] - b[key]) / np.linalg.norm(b[key])
    for key in b
    if np.any(b[key])
  )
  assert far(found[4], wanted[4]) < 0.2 * far(plain[4], wanted[4])
