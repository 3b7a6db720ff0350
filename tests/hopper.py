"""Compiles the FP8 kernels for an H200 that is not there, and says what came out.

  python -m tests.hopper

needs the compiler of the CUDA plugin (pip install -e '.[hopper-compile]'), but
no GPU and no CUDA. It prints one JSON line a kernel, at the sizes of the 671B
model, and what XLA makes of the same products in plain JAX. Nothing runs.
"""

import os
import pathlib
import re
import tempfile
import time

# Read when JAX starts, so this is a program of its own.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu,cuda"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ["MOSAIC_GPU_DUMP_PTX"] = os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import functools
import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from dsv3.ops import gemm, hopper, hopper_kernel, hopper_products, recipes
from dsv3.plan.h200 import TARGET

# An H200 as its driver describes it to XLA.
T, D, F, E = 4096, 7168, 2048, 64  # tokens; v3_671b's width and expert; experts
A = T * 8 + E * 128  # 8 experts a token, every expert's rows padded
BLOCK = 128
PAIRS = hopper_kernel.Tiling(pairs=True)


def fp8(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)


def scale(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def products() -> dict:
  """Name: product, its keywords, and its arguments' shapes."""
  load = jax.ShapeDtypeStruct((E,), jnp.int32)
  bf16, f32 = dict(out_dtype=jnp.bfloat16), dict(out_dtype=jnp.float32)

  def dense(M, K, N, by_block):
    rows, J = N // BLOCK, K // BLOCK
    b_scale = scale(rows, J) if by_block else scale(J, N)
    return fp8(M, K), scale(J, M), fp8(N, K), b_scale

  def grouped(K, N):
    b_scale = scale(E, N // BLOCK, K // BLOCK)
    return fp8(A, K), scale(K // BLOCK, A), fp8(E, N, K), b_scale, load

  outer = fp8(D, A), scale(A // BLOCK, D), fp8(F, A), scale(A // BLOCK, F), load
  return {
    "fprop": ("matmul", bf16, dense(T, D, 4096, True)),
    "dgrad": ("matmul", bf16, dense(T, 4096, D, True)),
    "wgrad": ("matmul", f32, dense(D, T, 4096, False)),
    "pairs": ("matmul", bf16 | {"tiling": PAIRS}, dense(T, D, 4096, True)),
    "odd": ("matmul", f32, dense(128, 128, 384, True)),
    "grouped_fprop": ("grouped_matmul", bf16, grouped(D, F)),
    "grouped_dgrad": ("grouped_matmul", bf16, grouped(F, D)),
    "grouped_wgrad": ("grouped_wgrad", {}, outer),
  }


def compiled(function, arguments):
  """The program of an H200 for arrays of these shapes."""
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=TARGET, topology="1x1x1"
  )
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
  there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  device = AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
  with jax.sharding.use_abstract_mesh(
    AbstractMesh((), (), abstract_device=device)
  ):
    return jax.jit(function).lower(*jax.tree.map(there, arguments)).compile()


def kernel_report(function, arguments) -> dict:
  """Tensor-core instructions of the kernel, and what ptxas says of it."""
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    program = compiled(function, arguments)
    (ptx,) = (path.read_text() for path in pathlib.Path(folder).glob("*.ptx"))
    (ptxas,) = (p.read_text() for p in pathlib.Path(folder).glob("*.ptxas"))
  number = lambda pattern: int(re.search(pattern, ptxas)[1])
  return {
    "target": re.search(r"\.target (\S+)", ptx)[1],
    "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\.\S+", ptx))),
    "wgmmas": len(re.findall(r"wgmma\.mma_async", ptx)),
    "copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
    "shared_copies": ptx.count(".multicast::cluster"),
    "registers": number(r"Used (\d+) registers"),
    "spill_stores": number(r"(\d+) bytes spill stores"),
    "spill_loads": number(r"(\d+) bytes spill loads"),
    "temp_bytes": program.memory_analysis().temp_size_in_bytes,
  }


def plain_report(function, arguments) -> dict:
  program = compiled(function, arguments)
  hlo = program.as_text()
  return {
    "fp8_products": len(re.findall(r"__cublas\$lt\$matmul\$f8", hlo)),
    "triton_products": len(re.findall(r"__triton_[a-z_]*gemm", hlo)),
    "temp_bytes": program.memory_analysis().temp_size_in_bytes,
  }


def linears() -> dict:
  """Name: value and gradients of a Linear of the report, and its arguments."""
  recipe = recipes.RECIPES["deepseek_v3"]
  products = hopper_products.HopperProducts()
  linear = gemm.fp8(recipe, "bfloat16", products=products)

  def of(dot):
    loss = lambda x, *rest: jnp.sin(dot(x, *rest).astype(jnp.float32)).sum()
    return jax.value_and_grad(loss, argnums=(0, 1))

  array = jax.ShapeDtypeStruct
  x = array((1, T, D), jnp.bfloat16), array((T * 8, D), jnp.bfloat16)
  w = array((D, 1, 4096), jnp.float32), array((E, D, 2, F), jnp.float32)
  load = array((E,), jnp.int32)
  return {
    "linear": (of(linear.dot), (x[0], w[0])),
    "experts": (of(linear.grouped_dot), (x[1], w[1], load)),
  }


def linear_report(function, arguments) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder  # else it goes to stdout
    program = compiled(function, arguments)
  hlo = program.as_text()
  return {
    "kernels": hlo.count('custom_call_target="mosaic_gpu'),
    "other_products": len(re.findall(r" dot\(|__cublas", hlo)),
    "temp_bytes": program.memory_analysis().temp_size_in_bytes,
  }


def main() -> None:
  for name, (product, keywords, arguments) in products().items():
    for report, prefix in [(kernel_report, ""), (plain_report, "plain_")]:
      if prefix and "tiling" in keywords:
        continue  # the same product as another's
      function = getattr(hopper, prefix + product)
      start = time.perf_counter()
      found = report(functools.partial(function, **keywords), arguments)
      found["seconds"] = round(time.perf_counter() - start, 1)
      print(
        json.dumps({"product": prefix + name, "jax": jax.__version__} | found)
      )
  for name, (function, arguments) in linears().items():
    found = linear_report(function, arguments)
    print(json.dumps({"product": name, "jax": jax.__version__} | found))


if __name__ == "__main__":
  main()
