"""FP8 blocks of 128 x 128: edges, exact return, powers of two."""

import ml_dtypes
import numpy as np
import pytest

from dsv3.hf import blocks

SHAPES = [(128, 128), (130, 257), (5, 3), (576, 200)]


def random(shape, seed=0):
  rng = np.random.default_rng(seed)
  size = rng.lognormal(0, 2, [-(-n // 128) for n in shape])
  spread = np.kron(size, np.ones((128, 128)))[: shape[0], : shape[1]]
  return (rng.normal(size=shape) * spread).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantize_equals_the_definition_element_by_element(shape, power_of_two):
  weight = random(shape)
  found, scale = blocks.quantize(weight, power_of_two=power_of_two)
  assert scale.shape == tuple(-(-n // 128) for n in shape)
  assert scale.dtype == np.float32
  for i, j in np.ndindex(scale.shape):
    block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
    wanted = np.float32(max(np.abs(block).max(), 1e-4)) / np.float32(448)
    if power_of_two:
      wanted = 2.0 ** np.ceil(np.log2(wanted))
    assert scale[i, j] == np.float32(wanted)
    q = (block / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    piece = found[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
    assert piece.tobytes() == q.tobytes()
  back = blocks.dequantize(found, scale)
  assert np.abs(back - weight).max() <= np.abs(weight).max() / 16


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_unchanged_weights_come_back_byte_for_byte_whatever_the_scales(
  shape, dtype
):
  """All 254 finite bytes, -0 included; scales that amax would not give."""
  rng = np.random.default_rng(1)
  bytes_ = rng.integers(0, 256, shape).astype(np.uint8)
  bytes_[(bytes_ & 0x7F) == 0x7F] = 0x80  # NaN to -0
  stored = bytes_.view(ml_dtypes.float8_e4m3fn)
  grid = [-(-n // 128) for n in shape]
  scale = np.exp(rng.normal(-6, 2, grid)).astype(np.float32)
  weight = blocks.dequantize(stored, scale).astype(dtype)
  found, kept = blocks.quantize(weight, scale)
  assert found.tobytes() == stored.tobytes()
  np.testing.assert_array_equal(kept, scale)


def test_a_changed_block_gets_a_scale_of_its_own_and_the_others_keep_theirs():
  stored, scale = blocks.quantize(random((256, 256)), power_of_two=True)
  weight = blocks.dequantize(stored, scale)
  weight[3, 200] *= 5
  found, new = blocks.quantize(weight, scale)
  assert (new != scale).tolist() == [[False, True], [False, False]]
  assert found[128:].tobytes() == stored[128:].tobytes()
  assert float(blocks.dequantize(found, new)[3, 200]) == pytest.approx(
    float(weight[3, 200]), rel=1 / 16
  )


def test_a_block_of_zeros_has_a_finite_scale():
  found, scale = blocks.quantize(np.zeros((4, 4), np.float32))
  assert scale[0, 0] == np.float32(1e-4) / np.float32(448)
  assert not found.astype(np.float32).any()
