"""A report is of the matmuls that training has, and changes none of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import fp8, gemm, recipes, report
from dsv3.ops.linear import Weight
from tests.ops.test_linear import arrays, as_oracle
from tests.oracle import fp8_linear as oracle

COLUMN = {name: i for i, name in enumerate(report.COLUMNS)}


def found(name, x, w, dy, changes=(), load_E=None, **beside):
  """y, dx, dw and the report of a Linear."""
  made = gemm.make(recipes.recipe(name, changes), "float32")

  def call(x, w, zeros):
    weight = Weight(w, report=zeros, **beside)
    if load_E is None:
      return made.dot(x, weight)
    return made.grouped_dot(x, weight, load_E)

  def both(x, w, dy):
    y, pull = jax.vjp(call, x, w, jnp.zeros(report.SHAPE))
    return y, *pull(dy)

  return jax.jit(both)(x, w, dy)


@pytest.mark.parametrize("name", ["deepseek_v3", "mxfp8"])
def test_errors_are_those_of_the_oracles_matmuls(name):
  x, w, dy = arrays(200, 160, 1, 72)
  table = found(name, x, w, dy)[-1]
  low = oracle.linear(as_oracle(recipes.recipe(name)), x, w, dy)
  exact = oracle.linear(
    dict.fromkeys(as_oracle(recipes.recipe(name))), x, w, dy
  )
  for row, a, b in zip(table, low, exact):
    wanted = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert float(row[0]) == pytest.approx(wanted, rel=1e-3)


def test_a_report_changes_nothing():
  x, w, dy = arrays(40, 160, 1, 72)
  made = gemm.make(recipes.recipe("deepseek_v3"), "float32")
  y, pull = jax.vjp(made.dot, x, w)
  for a, b in zip(found("deepseek_v3", x, w, dy), (y, *pull(dy))):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shares_of_underflow_and_saturation_and_range_of_scales():
  """One tile of 128: three numbers that become 0, of 100 that are not."""
  x = np.zeros((1, 128), np.float32)
  x[0, :97], x[0, 97:100] = 448.0, 1e-4
  w, dy = np.ones((128, 1, 128), np.float32), np.ones((1, 1, 128), np.float32)
  row = found("deepseek_v3", x, w, dy)[-1][0]
  assert float(row[COLUMN["a_underflow"]]) == pytest.approx(0.03)
  assert float(row[COLUMN["a_saturation"]]) == 0
  assert float(row[COLUMN["a_scale_min"]]) == 0 == row[COLUMN["a_scale_max"]]
  past = jnp.float32([224.0, 1.0, 1.0])  # half of what comes
  row = found("delayed", x, w, dy, past=past)[-1][0]
  assert float(row[COLUMN["a_saturation"]]) == pytest.approx(0.97)
  assert float(row[COLUMN["a_scale_max"]]) == -1


def test_a_report_of_experts_counts_their_rows_alone():
  """Rows past the last expert's are in no share; zeros lie between experts."""
  x, w, dy = arrays(320, 128, 1, 128)
  load_E = jnp.array([130, 0, 100], jnp.int32)
  w = np.stack([w] * 3)
  table = found("deepseek_v3", x, w, dy, load_E=load_E)[-1]
  clean = [a.copy() for a in (x, dy)]
  for a in clean:
    a[230:] = 0
  again = found("deepseek_v3", clean[0], w, clean[1], load_E=load_E)[-1]
  np.testing.assert_allclose(table[:, 0], again[:, 0], rtol=1e-5)
  assert (table[:, 0] > 0.005).all() and (table[:, 0] < 0.06).all()


def test_blocks_of_experts_rows_are_counted_like_those_of_one_matrix():
  """Their operand of Dgrad is gathered out of tiles that lie within an expert."""
  x, w, dy = arrays(256, 128, 1, 128)
  dy[:3] = 1e-7 * dy[:3]  # beside ordinary rows of a block they become 0
  alone = found("blockwise_128", x, w, dy)[-1]
  load_E = jnp.array([128, 128], jnp.int32)
  grouped = found("blockwise_128", x, np.stack([w] * 2), dy, load_E=load_E)[-1]
  column = COLUMN["a_underflow"]
  assert float(alone[1, column]) > 2.9 / 256
  np.testing.assert_allclose(grouped[1], alone[1], rtol=1e-4)


@pytest.mark.parametrize("changes", [(), ("kept_x=e4m3 32x1 e8m0",)], ids=str)
def test_what_is_quantised_as_it_is_kept_is_counted(changes):
  x, w, dy = arrays(128, 128, 1, 128)
  x = x * np.exp(4 * np.random.default_rng(0).normal(size=(128, 1)))
  x = x.astype(np.float32)
  table = found("mxfp8", x, w, dy, changes)[-1]
  low = fp8.quantise(x, fp8.operand("e4m3 32x1 e8m0"))
  lost = np.mean(np.asarray(low.values, np.float32) == 0)
  assert lost > 0.1
  row = table[report.PASSES.index("wgrad")]
  assert float(row[COLUMN["a_underflow"]]) == pytest.approx(lost, abs=0.01)


def test_what_stays_high_has_no_figures():
  x, w, dy = arrays(40, 160, 1, 72)
  keep = [f"{name}=bf16" for name in ("fprop_x", "fprop_w")]
  table = found("deepseek_v3", x, w, dy, keep)[-1]
  assert np.isnan(table[0]).all()
  assert float(table[1, 0]) > 0.01 and np.isfinite(table[1:]).all()
  one = found("deepseek_v3", x, w, dy, keep[:1])[-1]
  is_of_x = [name.startswith("a_") for name in report.COLUMNS]
  assert np.isnan(one[0]).tolist() == is_of_x


@pytest.mark.parametrize("high", [True, False])
def test_a_linear_that_is_kept_high_has_no_figures(high):
  x, w, dy = arrays(40, 160, 1, 72)
  y, *_, table = found("deepseek_v3", x, w, dy, high=jnp.array(high))
  assert np.isnan(table).all() == high != np.isfinite(table).all()
  exact = np.einsum("mi,ipo->mpo", x, w)
  assert np.allclose(y, exact, rtol=1e-5, atol=1e-5) == high


def test_an_error_that_is_not_finite_is_infinite_and_not_missing():
  x, w, dy = arrays(40, 160, 1, 72)
  x[3, 4] = np.nan
  table = found("deepseek_v3", x, w, dy)[-1]
  assert table[:, 0].tolist()[::2] == [np.inf, np.inf]
  assert np.isfinite(table[1, 0])
