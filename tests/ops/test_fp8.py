"""The quantisers, bit for bit against the oracle, and what bites in FP8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import fp8
from tests.oracle import fp8 as oracle

TILES = [(1, 128), (128, 1), (128, 128), (0, 0), (32, 1)]
# Multiples of every tile, ragged edges, and smaller than a tile.
SHAPES = [(256, 384), (130, 200), (3, 5)]


def numbers(shape, seed=0):
  """Magnitudes over 20 octaves, so that small ones underflow in their tile."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * 2.0 ** rng.integers(-20, 1, shape)
  return x.astype(np.float32)


def as_float(q):
  return np.asarray(q.values.astype(jnp.float32))


@pytest.mark.parametrize("scale", fp8.SCALES)
@pytest.mark.parametrize("form", fp8.FORMATS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sec332_bits_are_the_oracles(shape, tile, form, scale):
  x = numbers(shape)
  how = fp8.Operand(form, tile, scale)
  found = jax.jit(lambda x: fp8.quantise(x, how))(x)
  values, scales = oracle.quantise(x, form, tile, scale)
  np.testing.assert_array_equal(np.asarray(found.scale), scales)
  np.testing.assert_array_equal(as_float(found), values)
  np.testing.assert_array_equal(
    np.asarray(found.dequantise()), oracle.dequantise(values, scales, tile)
  )


@pytest.mark.parametrize("form", fp8.FORMATS)
def test_every_value_of_a_format_stays_and_halfway_goes_to_even(form):
  table = oracle.TABLES[form].astype(np.float32)
  halfway = (table[1:] + table[:-1]) / 2
  for x in (table, -table, halfway, np.nextafter(halfway, np.float32(0))):
    x = x[None]
    ones = jnp.ones((1, 1), jnp.float32)
    found = fp8.quantise(x, fp8.Operand(form, (0, 0)), scale=ones)
    wanted = oracle.nearest(x, oracle.TABLES[form])
    np.testing.assert_array_equal(as_float(found), wanted)
  assert fp8.FORMATS[form].largest == table[-1]


def test_sec332_relative_error_of_a_gaussian():
  """2.57% with float32 scales, 2.66% with powers of two (a known figure)."""
  x = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
  for scale, wanted in (("float32", 0.0257), ("power2", 0.0266)):
    q = fp8.quantise(x, fp8.Operand("e4m3", (1, 128), scale))
    error = np.linalg.norm(q.dequantise() - x) / np.linalg.norm(x)
    assert error == pytest.approx(wanted, abs=2e-4)


def test_values_saturate_and_do_not_overflow():
  """A plain cast makes NaN of 465; delayed scales can be too small."""
  x = jnp.array([[465.0, -1e9, 448.0, 463.9]])
  assert jnp.isnan(x.astype("float8_e4m3fn")).any()
  one = jnp.ones((1, 1), jnp.float32)
  q = fp8.quantise(x, fp8.Operand("e4m3", (0, 0)), scale=one)
  assert as_float(q).tolist() == [[448.0, -448.0, 448.0, 448.0]]


def test_a_tile_of_zeros_has_a_scale():
  q = fp8.quantise(jnp.zeros((2, 256)), fp8.operand("e4m3 1x128"))
  np.testing.assert_array_equal(q.scale, np.float32(1e-4) * np.float32(1 / 448))
  assert not q.dequantise().any()


def test_a_long_division_is_a_division():
  """What accelerators multiply by: all exponents, and mantissas at their ends."""
  rng = np.random.default_rng(0)
  fraction = rng.integers(0, 2**23, (250, 500), np.uint32)
  fraction[:, :4] = 0, 1, 2**23 - 2, 2**23 - 1
  bits = fraction | np.arange(2, 252, dtype=np.uint32)[:, None] << 23
  x = bits.view(np.float32)
  found = np.asarray(jax.jit(fp8.long_division)(x))
  np.testing.assert_array_equal(found.view(np.uint32), (1 / x).view(np.uint32))


def test_no_platform_divides_by_a_scale():
  """Compiled for another than the CPU, a quantiser has no division left."""
  how = fp8.operand("e4m3 1x128")
  shape = jax.ShapeDtypeStruct((4, 256), jnp.float32)
  function = jax.jit(lambda x: fp8.quantise(x, how).values)
  for platform in ("cuda", "tpu"):
    lowered = jax.export.export(function, platforms=[platform])(shape)
    assert "stablehlo.divide" not in lowered.mlir_module()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", fp8.SCALES)
@pytest.mark.parametrize("form", fp8.FORMATS)
def test_not_finite_becomes_nan_there_and_nowhere_else(form, scale, bad):
  x = numbers((128, 256))
  how = fp8.Operand(form, (128, 128), scale)
  x[3, 7] = 0
  clean = fp8.quantise(x, how).dequantise()
  x[3, 7] = bad
  found = fp8.quantise(x, how).dequantise()
  assert np.isnan(found[3, 7])
  np.testing.assert_array_equal(found.at[3, 7].set(0), clean)


def test_tiles_do_not_cross_panels():
  """Gate and up of SwiGLU stand side by side and are two matrices."""
  x = numbers((130, 2, 96))
  how = fp8.operand("e4m3 128x128")
  both = fp8.quantise(x, how, panels=1)
  for p in (0, 1):
    alone = fp8.quantise(x[:, p], how)
    np.testing.assert_array_equal(as_float(both)[:, p], as_float(alone))
    np.testing.assert_array_equal(both.scale[:, p], alone.scale)


def test_leading_dims_are_a_batch():
  x = numbers((3, 130, 200))
  how = fp8.operand("e4m3 *x*")
  stacked = fp8.quantise(x, how)
  assert stacked.scale.shape == (3, 1, 1)
  for i in range(3):
    alone = fp8.quantise(x[i], how).dequantise()
    np.testing.assert_array_equal(stacked.dequantise()[i], alone)


def test_transposed_is_the_same_numbers():
  q = fp8.quantise(numbers((130, 200)), fp8.operand("e4m3 1x128"))
  np.testing.assert_array_equal(q.T.dequantise(), q.dequantise().T)


def test_power_of_two_scales_make_requantising_exact():
  """Why the report rounds scales where a tile is turned (Sec. 3.3.3)."""
  x = numbers((256, 256), seed=5)
  along, across = "e5m6 1x128 power2", "e5m6 128x1 power2"
  kept = fp8.quantise(np.clip(x, 0.5, 2.0), fp8.operand(along)).dequantise()
  turned = fp8.quantise(kept, fp8.operand(across)).dequantise()
  np.testing.assert_array_equal(turned, kept)


@pytest.mark.parametrize("form", fp8.FORMATS)
def test_stochastic_rounding_is_unbiased_and_to_a_neighbour(form):
  table = oracle.TABLES[form]
  x = np.float32(
    [0.3 * table[1], 1.0 + 0.3 * 2.0 ** -fp8.FORMATS[form].mantissa]
  )
  one, n = jnp.ones((1, 1), jnp.float32), 20_000
  q = fp8.quantise(
    jnp.broadcast_to(x, (n, 2)),
    fp8.Operand(form, (0, 0)),
    scale=one,
    key=jax.random.key(1),
  )
  values = as_float(q)
  for column, exact in zip(values.T, x):
    above = table[np.searchsorted(table, exact)]
    below = table[np.searchsorted(table, exact) - 1]
    assert set(np.unique(column)) == {np.float32(below), np.float32(above)}
    # Five standard deviations of the mean of n such draws.
    bound = 5 * (above - below) * np.sqrt(0.3 * 0.7 / n)
    assert abs(column.mean(dtype=np.float64) - exact) < bound


def test_stochastic_rounding_leaves_what_needs_none():
  x = oracle.TABLES["e4m3"][None].astype(np.float32)
  q = fp8.quantise(
    x,
    fp8.Operand("e4m3", (0, 0)),
    scale=jnp.ones((1, 1), jnp.float32),
    key=jax.random.key(0),
  )
  np.testing.assert_array_equal(as_float(q), x)


@pytest.mark.parametrize(
  "text", ["", "fp8", "e4m3", "e4m3 128", "e4m3 1x0", "e4m3 1x-1", "e4m3 1x1 x"]
)
def test_an_operand_that_is_none_is_named(text):
  with pytest.raises(
    ValueError, match=f"found '{text}', wanted bf16 or FORMAT"
  ):
    fp8.operand(text)
