"""Under FP8 every device quantises and multiplies the tokens that it has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import gemm, recipes
from dsv3.ops.linear import Weight
from dsv3.ops.products import Products
from dsv3.train import layout
from tests import micro

MESHES = [{"data": 2}, {"fsdp": 2, "context": 2}]


@dataclasses.dataclass(frozen=True)
class Watched(Products):
  """Notes how many rows each product of a device has."""

  rows: tuple[list, ...] = ([],)

  def fprop(self, x_MI, w_IPO, load_E=None):
    self.rows[0].append(len(x_MI.values))
    return super().fprop(x_MI, w_IPO, load_E)

  def wgrad(self, x_MI, g_MPO, load_E=None):
    self.rows[0].append(len(g_MPO.values))
    return super().wgrad(x_MI, g_MPO, load_E)


def placement_of(mesh):
  diff = {f"mesh.{axis}": n for axis, n in mesh.items()}
  return layout.of_run(micro.config_of(diff)).placement


def arrays():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(2, 512, 96), draw(96, 1, 72), draw(2, 512, 1, 72)


@pytest.mark.parametrize(
  "mesh, swiglu",
  [
    (MESHES[1], True),
    *(
      pytest.param(*both, marks=pytest.mark.slow)
      for both in ((MESHES[0], False), (MESHES[0], True), (MESHES[1], False))
    ),
  ],
  ids=str,
)
def test_a_device_has_its_own_rows_and_the_result_is_that_of_one(mesh, swiglu):
  recipe = recipes.recipe("deepseek_v3")
  x_BLI, w_IPO, dy = arrays()
  if swiglu:
    x_BLI = jnp.stack([x_BLI, jnp.cos(x_BLI)], axis=2)
  outcomes, rows = [], []
  for placement in (placement_of({}), placement_of(mesh)):
    watched = Watched(rows=([],))
    made = gemm.deal(gemm.make(recipe, "float32", products=watched), placement)
    dot = made.swiglu_dot if swiglu else made.dot
    y, pull = jax.vjp(lambda x, w, dot=dot: dot(x, Weight(w)), x_BLI, w_IPO)
    outcomes.append((y, *pull(dy)))
    rows.append(set(watched.rows[0]))
  n_devices = np.prod(list(mesh.values()))
  assert rows == [{1024}, {1024 // n_devices}]
  for wanted, found in zip(*outcomes, strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.slow  # a product on two meshes
def test_stochastic_rounding_is_another_draw_on_each_device():
  recipe = recipes.recipe("deepseek_v3", ["rounding=stochastic"])
  x_BLI, w_IPO, _ = arrays()
  made = gemm.deal(gemm.make(recipe, "float32"), placement_of({"data": 2}))
  weight = Weight(w_IPO, seed=jnp.uint32(7))
  same = jnp.broadcast_to(arrays()[2][:1], (2, 512, 1, 72))
  _, pull = jax.vjp(lambda x: made.dot(x, weight), x_BLI)
  first, second = pull(same)[0]
  assert np.any(first != second)  # gradients are equal, their rounding is not
  np.testing.assert_allclose(first.mean(), second.mean(), atol=0.02)
