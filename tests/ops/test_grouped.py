"""Every grouped matmul kernel is the dense one, forward and gradient."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import grouped, tiles
from dsv3.ops.grouped import grouped_matmul

N_ROWS = 67
LOADS = {
  "even": [17, 17, 17, 16],
  "an expert without tokens": [0, 40, 0, 27],
  "all tokens to one expert": [0, 0, 67, 0],
  "all tokens to the last expert": [0, 0, 0, 67],
  "rows past the last expert": [9, 0, 16, 8],
  "no tokens": [0, 0, 0, 0],
  "exact tiles": [16, 32, 0, 16],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """So that few rows, cheap to test, make several tiles."""
  monkeypatch.setattr(tiles, "TILES", (16, 8))


def inputs(dtype="float32"):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return draw(N_ROWS, 12), draw(4, 12, 8)


def value_and_gradients(x_AI, w_EIO, load, kernel):
  """Of a loss that weighs every output differently; also the output."""

  def loss(x_AI, w_EIO, load_E):
    y_AO = grouped_matmul(x_AI, w_EIO, load_E, kernel=kernel)
    weigh = jnp.cos(jnp.arange(y_AO.size)).reshape(y_AO.shape)
    return (weigh * y_AO).sum(), y_AO

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (_, y_AO), gradients = step(x_AI, w_EIO, jnp.asarray(load, jnp.int32))
  return y_AO, *gradients


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_eq12_dense_multiplies_each_row_by_its_expert(load):
  x_AI, w_EIO = inputs()
  y_AO, dx_AI, dw_EIO = value_and_gradients(x_AI, w_EIO, load, "dense")
  weigh = np.cos(np.arange(N_ROWS * 8)).reshape(N_ROWS, 8)
  expert_A = np.repeat(np.arange(4), load)
  for a in range(N_ROWS):
    w_IO = w_EIO[expert_A[a]] if a < sum(load) else jnp.zeros_like(w_EIO[0])
    np.testing.assert_allclose(y_AO[a], x_AI[a] @ w_IO, atol=1e-5)
    np.testing.assert_allclose(dx_AI[a], w_IO @ weigh[a], atol=1e-5)
  for e in range(4):
    mine = np.flatnonzero(expert_A == e)
    np.testing.assert_allclose(dw_EIO[e], x_AI[mine].T @ weigh[mine], atol=1e-5)


@pytest.mark.parametrize("kernel", ["tiles", "ragged"])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_eq12_every_kernel_equals_dense(kernel, load):
  arrays = inputs()
  found = value_and_gradients(*arrays, load, kernel)
  want = value_and_gradients(*arrays, load, "dense")
  for x, y in zip(found, want):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("kernel", ["tiles", "ragged"])
def test_eq12_every_kernel_equals_dense_in_bfloat16(kernel):
  load = LOADS["rows past the last expert"]
  exact = [np.asarray(x, np.float32) for x in inputs("bfloat16")]
  found = value_and_gradients(*inputs("bfloat16"), load, kernel)
  want = value_and_gradients(*exact, load, "dense")
  assert [x.dtype for x in found] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
  for x, y in zip(found, want):
    error = np.linalg.norm(np.asarray(x, np.float32) - y)
    assert error < 0.005 * np.linalg.norm(y)


@pytest.mark.parametrize("kernel", ["tiles", "ragged", "dense"])
def test_weight_gradient_is_summed_and_kept_in_float32(kernel):
  x_AI, _ = inputs("bfloat16")
  _, w_EIO = inputs()
  load = [0, 0, 67, 0]
  _, dx_AI, dw_EIO = value_and_gradients(x_AI, w_EIO, load, kernel)
  assert (dx_AI.dtype, dw_EIO.dtype) == (jnp.bfloat16, jnp.float32)
  rounded = dw_EIO.astype(jnp.bfloat16).astype(jnp.float32)
  assert np.abs(dw_EIO - rounded).max() > 0


@pytest.mark.parametrize("kernel", ["tiles", "ragged", "dense"])
def test_what_is_not_finite_stays_with_its_expert(kernel):
  """Rows of two experts share a tile: infinity times zero would be NaN."""
  x_AI, w_EIO = inputs()
  load_E = jnp.array([20, 0, 30, 17], jnp.int32)
  x_AI = x_AI.at[20, 3].set(jnp.inf).at[19, 3].set(jnp.nan)
  product = lambda *a: grouped_matmul(*a, load_E, kernel=kernel)
  y_AO, pull = jax.vjp(product, x_AI, w_EIO)
  assert np.flatnonzero(~np.isfinite(y_AO).all(1)).tolist() == [19, 20]
  wgrad = grouped.grouped_wgrad(x_AI, y_AO, load_E, kernel=kernel)
  for dw_EIO in (pull(jnp.ones_like(y_AO))[1], wgrad):
    finite = np.isfinite(dw_EIO).all((1, 2)).tolist()
    assert finite == [False, True, False, True]


def test_auto_equals_dense_and_out_dtype_is_honoured():
  x_AI, w_EIO = inputs()
  load_E = jnp.asarray(LOADS["even"], jnp.int32)
  found = grouped_matmul(x_AI, w_EIO, load_E, out_dtype=jnp.bfloat16)
  want = grouped_matmul(x_AI, w_EIO, load_E, kernel="dense")
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("kernel", ["tiles", "ragged", "auto"])
def test_kernels_run_in_scan_under_remat(kernel):
  x_AI, w_EIO = inputs()
  w_EII = 0.3 * jnp.concatenate([w_EIO, w_EIO[:, :, :4]], axis=2)
  load_E = jnp.asarray(LOADS["rows past the last expert"], jnp.int32)

  def loss(x_AI, w_EII, kernel):
    @jax.checkpoint
    def layer(x_AI, _):
      return grouped_matmul(x_AI, w_EII, load_E, kernel=kernel), None

    return (jax.lax.scan(layer, x_AI, length=2)[0] ** 2).sum()

  gradient = lambda kernel: jax.jit(
    jax.grad(functools.partial(loss, kernel=kernel), argnums=(0, 1))
  )(x_AI, w_EII)
  for x, y in zip(gradient(kernel), gradient("dense")):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["tiles", "auto"])
def test_kernels_run_in_shard_map(kernel):
  x_AI, w_EIO = inputs()
  load_E = jnp.asarray(LOADS["even"], jnp.int32)
  mesh = jax.sharding.Mesh(jax.devices()[:1], "expert")
  run = functools.partial(grouped_matmul, kernel=kernel)
  sharded = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("expert"), jax.P("expert")),
    out_specs=jax.P(),
    check_vma=False,
  )
  square = lambda f: jax.jit(
    jax.grad(lambda x, w: (f(x, w, load_E) ** 2).sum(), argnums=(0, 1))
  )
  for x, y in zip(square(sharded)(x_AI, w_EIO), square(run)(x_AI, w_EIO)):
    np.testing.assert_array_equal(x, y)


def test_errors_name_the_choices(monkeypatch):
  x_AI, w_EIO = inputs()
  load_E = jnp.asarray(LOADS["even"], jnp.int32)
  with pytest.raises(ValueError, match="'fast', want one of auto, dense"):
    grouped_matmul(x_AI, w_EIO, load_E, kernel="fast")
  monkeypatch.setitem(sys.modules, "tokamax", None)
  with pytest.raises(ImportError, match="pip install tokamax"):
    grouped_matmul(x_AI, w_EIO, load_E, kernel="tokamax")


@pytest.mark.parametrize("load", [[1, 0, 2, 0], [0, 0, 0, 4], [0, 0, 0, 0]])
def test_few_rows_one_by_one_equal_dense(load):
  x_AI, w_EIO = inputs()
  x_AI, n_experts = x_AI[:7], len(load)
  assert len(x_AI) <= tiles.FEW_ROWS * n_experts
  load_E = jnp.asarray(load, jnp.int32)
  both = [
    grouped_matmul(x_AI, w_EIO[:n_experts], load_E, kernel=kernel)
    for kernel in ("tiles", "dense")
  ]
  np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_eq12_tiles_of_any_size_read_bits_of_bfloat16(size, few, monkeypatch):
  monkeypatch.setattr(tiles, "FEW_ROWS", few)
  monkeypatch.setattr(tiles, "_tile_size", lambda n_rows, n_experts: size)
  x_AI, w_EIO = inputs("bfloat16")
  bits_EIO = jax.lax.bitcast_convert_type(w_EIO, jnp.uint16)
  load_E = jnp.array([9, 0, 16, 8], jnp.int32)
  want = grouped_matmul(x_AI, w_EIO, load_E, kernel="dense")
  # Without an old program of another size.
  by_tiles = jax.jit(lambda *args: grouped_matmul(*args, kernel="tiles"))
  for w in (w_EIO, bits_EIO):
    np.testing.assert_allclose(by_tiles(x_AI, w, load_E), want, atol=1e-5)
  with pytest.raises(ValueError, match="bits of bfloat16 for 'ragged'"):
    grouped_matmul(x_AI, bits_EIO, load_E, kernel="ragged")
