"""RoPE of Eq. 3 and 8, and YaRN (Sec. 4.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import rope
from tests.oracle import rope as oracle

PLAIN = dict(
  theta=10_000.0,
  yarn_factor=1.0,
  original_len=4096,
  beta_fast=32.0,
  beta_slow=1.0,
  mscale=1.0,
)
V3 = {**PLAIN, "yarn_factor": 40.0}


def yarn(rope_dim, fields):
  return rope.yarn_frequencies(
    rope_dim,
    fields["theta"],
    fields["yarn_factor"],
    fields["original_len"],
    fields["beta_fast"],
    fields["beta_slow"],
  )


def test_eq3_eq8_rotation_of_adjacent_pairs():
  x_BLHR = np.random.default_rng(0).normal(size=(2, 7, 3, 8)).astype("float32")
  positions_L = 100 + jnp.arange(7)
  found = jax.jit(rope.rotate)(x_BLHR, rope.frequencies(8), positions_L)
  for b, i, h in np.ndindex(2, 7, 3):
    wanted = oracle.rotate(
      x_BLHR[b, i, h].astype(np.float64),
      100 + i,
      oracle.frequencies(8, PLAIN),
    )
    np.testing.assert_allclose(found[b, i, h], wanted, atol=2e-5)


def test_rotation_is_not_the_half_split_order():
  x = np.zeros((1, 2, 1, 4), np.float32)
  x[..., 0] = 1.0
  turned = rope.rotate(x, rope.frequencies(4))[0, 1, 0]
  assert turned[1] == pytest.approx(np.sin(1.0))  # the neighbour, not x[2]
  assert turned[2] == 0


def test_rotation_is_float32_inside_and_keeps_the_type():
  """bfloat16 has no integer between 256 and 258: positions must not be in it."""
  x = jax.numpy.ones((1, 300, 1, 2), jax.numpy.bfloat16)
  turned = rope.rotate(x, rope.frequencies(2))
  assert turned.dtype == jax.numpy.bfloat16
  wanted = np.cos(257.0) - np.sin(257.0)
  assert float(turned[0, 257, 0, 0]) == pytest.approx(wanted, abs=0.01)


def test_yarn_frequencies_of_v3():
  found = yarn(64, V3)
  at = [10, 11, 12, 16, 20, 22, 23, 31]
  golden = [
    0.0562341325,
    0.0390069266,
    0.0268793601,
    0.0055,
    7.90569415e-4,
    1.77827941e-4,
    3.33380358e-5,
    3.33380358e-6,
  ]
  np.testing.assert_allclose(found[at], golden, rtol=2e-7)
  np.testing.assert_allclose(found, oracle.frequencies(64, V3), rtol=2e-7)


@pytest.mark.parametrize("original_len", [8, 64, 4096, 32768])
def test_yarn_frequencies_are_the_oracles(original_len):
  for rope_dim in (8, 64):
    fields = {**V3, "original_len": original_len, "yarn_factor": 4.0}
    wanted = oracle.frequencies(rope_dim, fields)
    np.testing.assert_allclose(yarn(rope_dim, fields), wanted, rtol=2e-7)


def test_softmax_scale_of_v3_and_v2():
  assert rope.softmax_scale(192) == pytest.approx(0.0721687836, abs=5e-11)
  assert rope.softmax_scale(192, 40.0) == pytest.approx(0.1352337789, abs=5e-11)
  v2 = rope.softmax_scale(192, 40.0, 0.707)  # 0.0707 ln s + 1
  assert v2 == pytest.approx(0.1147213868, abs=5e-11)


def test_plain_frequencies_are_the_oracles():
  wanted = oracle.frequencies(64, PLAIN)
  np.testing.assert_allclose(rope.frequencies(64), wanted, rtol=1e-7)
