"""FP8 products of Hopper: plain ones against NumPy, kernels against plain ones.

No GPU: the kernels run in Pallas's interpreter of Hopper, which knows threads,
asynchronous copies and barriers, and which JAX has since 0.11.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import hopper

ROOT = pathlib.Path(__file__).parents[2]
needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11),
  reason="JAX interprets Mosaic kernels since 0.11",
)
BLOCK, E, A = 128, 4, 640  # the experts' rows have five blocks
LOADS = {
  "one row, two blocks, none": [1, 0, 130, 0],
  "none at all": [0, 0, 0, 0],
  "all to one": [0, 640, 0, 0],
  "all blocks, odd rows": [127, 128, 129, 3],
}


def fp8(rng, *shape):
  """Values that fill the range of E4M3, which ends at 448."""
  x = rng.normal(size=shape) * 100
  return jnp.asarray(np.clip(x, -448, 448), jnp.float8_e4m3fn)


def whole(x):
  """Whole numbers up to 7 in place of values up to 448."""
  return jnp.round(x.astype(jnp.float32) / 64).astype(x.dtype)


def scales(rng, *shape):
  return jnp.asarray(rng.uniform(1e-3, 1, shape), jnp.float32)


def dense_case(M, K, N, by_block):
  rng, J = np.random.default_rng(M + K + N), K // BLOCK
  b_scale = scales(rng, N // BLOCK, J) if by_block else scales(rng, J, N)
  return fp8(rng, M, K), scales(rng, J, M), fp8(rng, N, K), b_scale


def grouped_case(load, K=256, N=256):
  """Arguments of `grouped_matmul`: zeros between the experts, past them NaN."""
  rng, load = np.random.default_rng(sum(load)), np.array(load, np.int32)
  a_AK = np.zeros((A, K), np.float32)
  used = sum(-(-n // BLOCK) for n in load)
  a_AK[used * BLOCK :] = np.nan
  for rows in rows_of_expert(load):
    a_AK[rows] = fp8(rng, len(rows), K)
  b_scale = scales(rng, E, N // BLOCK, K // BLOCK)
  a = jnp.asarray(a_AK, jnp.float8_e4m3fn), scales(rng, K // BLOCK, A)
  return *a, fp8(rng, E, N, K), b_scale, jnp.asarray(load)


def wgrad_case(load, n_in=256, n_out=128):
  rng = np.random.default_rng(sum(load))
  a_AI, _, _, _, load_E = grouped_case(load, n_in, n_out)
  b_OA = fp8(rng, n_out, A)
  scale = scales(rng, A // BLOCK, n_in), scales(rng, A // BLOCK, n_out)
  return a_AI.T, scale[0], b_OA, scale[1], load_E


def rows_of_expert(load):
  """Independent of `first_block`: each expert begins where blocks are used up."""
  rows, start = [], 0
  for n in load:
    rows.append(np.arange(start, start + n))
    start += (n + BLOCK - 1) // BLOCK * BLOCK
  return rows


def exact(values, scale, axes):
  """Values times scales that stand for 128 of them along `axes`, in float64."""
  scale = np.asarray(scale, np.float64)
  for axis in axes:
    scale = scale.repeat(BLOCK, axis)
  return np.asarray(values, np.float64) * scale


def exact_dense(a_MK, a_scale_JM, b_NK, b_scale):
  by_block = b_scale.shape != (a_MK.shape[1] // BLOCK, len(b_NK))
  b = exact(b_NK, *((b_scale, (0, 1)) if by_block else (b_scale.T, (1,))))
  return exact(a_MK, a_scale_JM.T, (1,)) @ b.T


def exact_grouped(a_AK, a_scale_JA, b_ENK, b_scale_ENJ, load_E):
  a, b = exact(a_AK, a_scale_JA.T, (1,)), exact(b_ENK, b_scale_ENJ, (1, 2))
  y_AN = np.zeros((len(a), b.shape[1]))
  for e, rows in enumerate(rows_of_expert(load_E)):
    y_AN[rows] = a[rows] @ b[e].T
  return y_AN


def exact_wgrad(a_IA, a_scale_JI, b_OA, b_scale_JO, load_E):
  a = exact(a_IA, a_scale_JI.T, (1,))
  b = exact(b_OA, b_scale_JO.T, (1,))
  return np.stack([a[:, r] @ b[:, r].T for r in rows_of_expert(load_E)])


def assert_near(found, wanted, relative):
  """Errors relative to the largest value: sums of both signs cancel."""
  size = np.abs(wanted).max() or 1
  found = np.asarray(found, np.float64)
  np.testing.assert_allclose(found / size, wanted / size, 0, relative)


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize(
  "M, K, N", [(128, 128, 128), (256, 384, 512), (128, 128 * 128, 128)]
)
def test_sec332_plain_product_is_that_of_the_scaled_values(M, K, N, by_block):
  case = dense_case(M, K, N, by_block)
  found = hopper.plain_matmul(*case, out_dtype=jnp.float32)
  assert_near(found, exact_dense(*case), 1e-6)
  assert hopper.plain_matmul(*case).dtype == jnp.bfloat16


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_eq12_plain_grouped_product_multiplies_rows_by_their_expert(load):
  case = grouped_case(load)
  found = hopper.plain_grouped_matmul(*case, out_dtype=jnp.float32)
  assert_near(found, exact_grouped(*case), 1e-6)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_eq12_plain_grouped_wgrad_sums_over_the_rows_of_an_expert(load):
  case = wgrad_case(load)
  assert_near(hopper.plain_grouped_wgrad(*case), exact_wgrad(*case), 1e-6)


@functools.cache
def interpreted(product, races=False, **keywords):
  """A kernel as two cores run it, so that each makes several tiles."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from dsv3.ops import hopper_kernel

  def fenced(*arguments, load=hopper_kernel._load):
    """These reads end before the barrier; the race detector wants a fence."""
    read = load(*arguments)
    plgpu.commit_smem()
    return read

  def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(hopper_kernel, "_cores", lambda: 2)
      if races:
        patch.setattr(hopper_kernel, "_load", fenced)
      params = plgpu.InterpretGPUParams(detect_races=races)
      with plgpu.force_gpu_interpret_mode(params):
        return product(*arguments, **keywords)

  return jax.jit(run)


@needs_interpreter
def test_sec332_kernel_promotes_blocks_as_the_plain_product():
  """The same order of sums: equal to the last bit. A row with NaN is its own.

  Of whole numbers, whose sum in a block is exact: processors differ in its order.
  """
  a_MK, a_scale_JM, b_NK, b_scale_NJ = dense_case(256, 384, 512, True)
  case = whole(a_MK), a_scale_JM, whole(b_NK), b_scale_NJ
  kernel = interpreted(hopper.matmul, out_dtype=jnp.float32)
  wanted = hopper.plain_matmul(*case, out_dtype=jnp.float32)
  np.testing.assert_array_equal(kernel(*case), wanted)

  a_MK, *rest = case
  found = kernel(a_MK.at[5, 200].set(jnp.nan), *rest)
  np.testing.assert_array_equal(found, wanted.at[5].set(jnp.nan))


@needs_interpreter
@pytest.mark.parametrize("pairs", [False, True])
def test_sec332_kernel_scales_columns_as_the_plain_product(pairs):
  """Two tiles a core, in which five blocks go through a ring of two: no race."""
  from dsv3.ops.hopper_kernel import Tiling

  case = dense_case(256, 640, 256, False)
  tiling = Tiling(columns=1, stages=2, pairs=pairs)
  how = {"out_dtype": jnp.float32}
  kernel = interpreted(hopper.matmul, tiling=tiling, races=True, **how)
  assert_near(kernel(*case), hopper.plain_matmul(*case, **how), 1e-6)


@needs_interpreter
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_eq12_grouped_kernel_is_the_plain_product(load):
  case = grouped_case(load)
  found = interpreted(hopper.grouped_matmul)(*case)
  np.testing.assert_array_equal(found, hopper.plain_grouped_matmul(*case))


@needs_interpreter
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_eq12_grouped_wgrad_kernel_is_the_plain_product(load):
  case = wgrad_case(load)
  found = interpreted(hopper.grouped_wgrad)(*case)
  assert_near(found, hopper.plain_grouped_wgrad(*case), 1e-6)


def test_why_not_names_the_size_or_the_device():
  assert hopper.why_not(128, 0) == "size 0 is no multiple of 128"
  assert hopper.why_not(256, 7168) == "the backend is cpu, no Hopper GPU"


def test_plain_products_need_no_pallas():
  code = "import sys, dsv3.ops.hopper; assert not any('pallas' in m for m in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.hopper
@pytest.mark.skipif(
  not importlib.util.find_spec("jax_cuda13_plugin"),
  reason="needs CUDA's compiler: pip install -e '.[hopper-compile]'",
)
def test_sec35_kernels_compile_to_fp8_tensor_core_instructions():
  """At the sizes of the 671B model, for an H200, in a process of their own."""
  environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  run = subprocess.run(
    [sys.executable, "-m", "tests.hopper"],
    env=environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-2000:]
  lines = [json.loads(x) for x in run.stdout.splitlines()]
  kernels = [x for x in lines if "wgmma" in x]
  assert len(kernels) == 8
  for found in kernels:
    assert found["target"] == "sm_90a"
    (instruction,) = found["wgmma"]
    assert instruction.endswith("m64n128k32.f32.e4m3.e4m3")
    assert (found["shared_copies"] > 0) == (found["product"] == "pairs")
    assert found["wgmmas"] in (4, 8)  # 128 / 32 for each block of columns
    assert found["spill_loads"] < 200  # bytes: a few of 232 registers
    assert found["temp_bytes"] < 10_000  # the tables of the grouped products
  # Forward and both gradients of a Linear: three kernels, nothing beside them.
  linears = {x["product"]: x for x in lines if "kernels" in x}
  assert linears.keys() == {"linear", "experts"}
  for found in linears.values():
    assert (found["kernels"], found["other_products"]) == (3, 0)
