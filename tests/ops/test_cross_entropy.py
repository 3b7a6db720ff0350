"""The chunked cross-entropy is the plain one, gradient included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops.cross_entropy import cross_entropy
from tests.oracle import layers as oracle

B, L, D, W = 2, 11, 5, 9
LABELS_BL = np.random.default_rng(0).integers(0, W, (B, L))
LABELS_BL[0, 3:6] = -1
LABELS_BL[1, -1] = -1


def plain(hidden_BLD, head_DW):
  """Sums of cross-entropy and of log_z squared, in one piece."""
  logits_BLW = jnp.einsum(
    "BLD,DW->BLW", hidden_BLD, head_DW, precision="highest"
  )
  log_z_BL = jax.nn.logsumexp(logits_BLW, -1)
  label_BL1 = np.maximum(LABELS_BL, 0)[..., None]
  logit_BL = jnp.take_along_axis(logits_BLW, label_BL1, -1)[..., 0]
  valid_BL = LABELS_BL >= 0
  return (
    jnp.where(valid_BL, log_z_BL - logit_BL, 0).sum(),
    jnp.where(valid_BL, log_z_BL**2, 0).sum(),
  )


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(B, L, D), draw(D, W)


@pytest.mark.parametrize("chunk", [4, 11, 512])  # 4 does not divide 11
@pytest.mark.parametrize("z_loss", [False, True])
def test_eq24_chunks_give_the_plain_sums_and_gradients(arrays, chunk, z_loss):
  def ours(hidden_BLD, head_DW):
    loss = cross_entropy(
      hidden_BLD, head_DW, jnp.asarray(LABELS_BL), z_loss=z_loss, chunk=chunk
    )
    return loss.cross_entropy, loss.log_z_squared

  found, pull = jax.vjp(jax.jit(ours), *arrays)
  wanted, pull_plain = jax.vjp(plain, *arrays)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  for term in (0, 1):
    weights = tuple(jnp.float32(i == term) for i in range(2))
    wanted = pull_plain(weights)
    if term == 1 and not z_loss:
      wanted = [0 * w for w in wanted]
    for mine, theirs in zip(pull(weights), wanted):
      np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_eq24_is_the_oracles_and_counts_correct_labels(arrays):
  hidden_BLD, head_DW = arrays
  found = cross_entropy(hidden_BLD, head_DW, jnp.asarray(LABELS_BL))
  logits_BLW = np.asarray(hidden_BLD, np.float64) @ np.asarray(head_DW)
  places = [place for place in np.ndindex(B, L) if LABELS_BL[place] >= 0]
  wanted = sum(
    oracle.cross_entropy(logits_BLW[place], LABELS_BL[place])
    for place in places
  )
  assert float(found.cross_entropy) == pytest.approx(wanted, rel=1e-6)
  best_BL = logits_BLW.argmax(-1)
  hits = sum(best_BL[place] == LABELS_BL[place] for place in places)
  assert 0 < hits < len(places)
  assert int(found.correct) == hits


def test_huge_logits_overflow_nothing(arrays):
  hidden_BLD, head_DW = arrays
  function = lambda h: (
    cross_entropy(h, head_DW, jnp.asarray(LABELS_BL)).cross_entropy
  )
  loss, gradient = jax.value_and_grad(function)(1e4 * hidden_BLD)
  assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_no_label_no_loss_no_gradient(arrays):
  none_BL = jnp.full((B, L), -1)
  ours = functools.partial(cross_entropy, labels_BL=none_BL, z_loss=True)
  loss, pull = jax.vjp(lambda *a: ours(*a)[:2], *arrays)
  assert [float(x) for x in loss] == [0, 0]
  for gradient in pull((jnp.float32(1), jnp.float32(1))):
    assert not np.asarray(gradient).any()


def test_gradient_of_a_bfloat16_head_is_summed_in_float32(arrays):
  hidden_BLD, head_DW = arrays
  function = lambda h, w: (
    cross_entropy(h, w, jnp.asarray(LABELS_BL)).cross_entropy
  )
  d_hidden, d_head = jax.grad(function, (0, 1))(
    hidden_BLD.astype(jnp.bfloat16), head_DW
  )
  assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
