"""Both attention kernels are Eq. 10, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import attention as module
from dsv3.ops.attention import attention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """So that short sequences, cheap to test, have several blocks."""
  monkeypatch.setattr(module, "BLOCK", 16)


def inputs(
  n_queries, n_keys, *, n_heads=4, n_groups=4, dtype="float32", n_docs=0
):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  q_BLHX = draw(2, n_queries, n_heads, 12)
  k_BMHX = draw(2, n_keys, n_groups, 12)
  v_BMHV = draw(2, n_keys, n_groups, 8)
  segments = {}
  if n_docs:  # sorted ids, the last ones padding
    ids_BM = np.sort(rng.integers(1, n_docs + 1, (2, n_keys)), axis=1)
    ids_BM[:, -5:] = 0
    segments["segments_BL"] = jnp.asarray(ids_BM[:, n_keys - n_queries :])
    segments["segments_BM"] = jnp.asarray(ids_BM)
  return (q_BLHX, k_BMHX, v_BMHV), segments


def by_hand(q_BLHX, k_BMHX, v_BMHV, scale, segments_BL=None, segments_BM=None):
  """Eq. 10 one query at a time, in float64."""
  q_BLHX, k_BMHX, v_BMHV = (
    np.asarray(x, np.float64) for x in (q_BLHX, k_BMHX, v_BMHV)
  )
  (n_seqs, n_queries, n_heads, _), n_keys = q_BLHX.shape, k_BMHX.shape[1]
  ratio = n_heads // k_BMHX.shape[2]
  o_BLHV = np.zeros((n_seqs, n_queries, n_heads, v_BMHV.shape[-1]))
  for b, i, h in np.ndindex(n_seqs, n_queries, n_heads):
    keys = list(range(i + n_keys - n_queries + 1))
    if segments_BL is not None:
      mine = int(segments_BL[b, i])
      keys = [j for j in keys if mine and int(segments_BM[b, j]) == mine]
    if keys:
      weight = np.exp(scale * k_BMHX[b, keys, h // ratio] @ q_BLHX[b, i, h])
      o_BLHV[b, i, h] = weight / weight.sum() @ v_BMHV[b, keys, h // ratio]
  return o_BLHV


SHAPES = {
  "whole blocks": dict(n_queries=32, n_keys=32),
  "partial blocks": dict(n_queries=37, n_keys=37),
  "shorter than a block": dict(n_queries=5, n_keys=5),
  "one query, long past": dict(n_queries=1, n_keys=41),
  "some queries, long past": dict(n_queries=19, n_keys=50),
  "fewer key heads": dict(n_queries=37, n_keys=37, n_groups=2),
  "documents": dict(n_queries=37, n_keys=37, n_docs=3),
  "documents, past, one key head": dict(
    n_queries=19, n_keys=50, n_groups=1, n_docs=3
  ),
}


@pytest.mark.parametrize("kernel", ["naive", "flash"])
@pytest.mark.parametrize("shape", SHAPES)
def test_eq10_equals_the_equation_by_hand(kernel, shape):
  arrays, segments = inputs(**SHAPES[shape])
  o_BLHV = attention(*arrays, scale=0.3, kernel=kernel, **segments)
  np.testing.assert_allclose(
    o_BLHV, by_hand(*arrays, 0.3, **segments), atol=2e-6
  )


def gradients(arrays, segments, kernel):
  """Of a loss that weighs every output differently."""

  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradient(q_BLHX, k_BMHX, v_BMHV):
    o_BLHV = attention(
      q_BLHX, k_BMHX, v_BMHV, scale=0.3, kernel=kernel, **segments
    )
    weigh = jnp.cos(jnp.arange(o_BLHV.size)).reshape(o_BLHV.shape)
    return (weigh * o_BLHV.astype(jnp.float32)).sum()

  return jax.jit(gradient)(*arrays)


@pytest.mark.parametrize("shape", SHAPES)
def test_eq10_flash_has_the_gradient_of_naive(shape):
  arrays, segments = inputs(**SHAPES[shape])
  want = gradients(arrays, segments, "naive")
  found = gradients(arrays, segments, "flash")
  for x, y in zip(found, want):
    np.testing.assert_allclose(x, y, atol=5e-6)


def test_eq10_flash_equals_naive_in_bfloat16():
  arrays, segments = inputs(37, 37, dtype="bfloat16", n_docs=3)
  for x, y in zip(
    (
      attention(*arrays, scale=0.3, **segments),
      *gradients(arrays, segments, "flash"),
    ),
    (
      attention(*arrays, scale=0.3, kernel="naive", **segments),
      *gradients(arrays, segments, "naive"),
    ),
  ):
    assert x.dtype == y.dtype == jnp.bfloat16
    y = np.asarray(y, np.float32)
    error = np.linalg.norm(np.asarray(x, np.float32) - y)
    assert error < 0.01 * np.linalg.norm(y)


@pytest.mark.parametrize("kernel", ["naive", "flash"])
def test_eq10_padding_gives_zero_and_gets_no_gradient(kernel):
  arrays, segments = inputs(37, 37, n_docs=2)
  real_BL = np.asarray(segments["segments_BL"]) > 0
  o_BLHV = attention(*arrays, scale=0.3, kernel=kernel, **segments)
  for x in (o_BLHV, *gradients(arrays, segments, kernel)):
    assert (np.asarray(x)[~real_BL] == 0).all()
    assert (np.asarray(x)[real_BL] != 0).any()


@pytest.mark.parametrize("kernel", ["naive", "flash"])
def test_eq10_softmax_survives_scores_of_thousands(kernel):
  arrays, segments = inputs(37, 37, n_docs=2)
  arrays = (1e3 * arrays[0], *arrays[1:])
  for x in (
    attention(*arrays, scale=1.0, kernel=kernel, **segments),
    *gradients(arrays, segments, kernel),
  ):
    assert np.isfinite(x).all()


def test_flash_memory_grows_with_length_not_its_square():
  def temporary_bytes(length):
    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, scale=1.0).sum()
    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape)
    return step.compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(4096) < 2.5 * temporary_bytes(2048)


def test_naive_has_a_forward_derivative():
  arrays, _ = inputs(5, 5)
  loss = lambda q: attention(q, *arrays[1:], scale=0.3, kernel="naive").sum()
  _, slope = jax.jvp(loss, arrays[:1], (jnp.ones_like(arrays[0]),))
  step = 1e-2
  rise = loss(arrays[0] + step) - loss(arrays[0] - step)
  np.testing.assert_allclose(slope, rise / (2 * step), rtol=2e-2, atol=1e-3)


def test_flash_runs_in_scan_under_remat():
  arrays, segments = inputs(37, 37, n_docs=2)

  def loss(v_BMHV, kernel):
    @jax.checkpoint
    def layer(v_BMHV, _):
      o_BLHV = attention(
        *arrays[:2], v_BMHV, scale=0.3, kernel=kernel, **segments
      )
      return o_BLHV, None

    return (jax.lax.scan(layer, v_BMHV, length=2)[0] ** 2).sum()

  found, want = (
    jax.jit(jax.grad(functools.partial(loss, kernel=kernel)))(arrays[2])
    for kernel in ("flash", "naive")
  )
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_errors_name_found_and_wanted():
  (q_BLHX, k_BMHX, v_BMHV), _ = inputs(5, 5)
  with pytest.raises(ValueError, match="'fast', want one of auto, naive"):
    attention(q_BLHX, k_BMHX, v_BMHV, scale=1.0, kernel="fast")
  with pytest.raises(ValueError, match="3 key heads do not divide 4"):
    attention(q_BLHX, k_BMHX[:, :, :3], v_BMHV[:, :, :3], scale=1.0)
  with pytest.raises(ValueError, match=r"\(2, 4\), want \(2, 5\)"):
    attention(
      q_BLHX, k_BMHX, v_BMHV, scale=1.0, segments_BL=jnp.ones((2, 4), int)
    )
