"""FP8 against BF16 matrix products of a Linear, right first and then fast.

  python -m dsv3.bench.fp8_gemm --m=4096 --k=7168 --n=4096 --experts=64

prints a JSON line for each of Fprop, Dgrad and Wgrad, dense and grouped: the
errors against float32 products of the same FP8 values and against BF16, then ms
as [median, fastest, slowest] of rounds in which all take turns. `fp8` quantises
its activations and gradients and multiplies; the weight is quantised beforehand,
as once a step. `kernel` only multiplies, `xla` does so in plain JAX. `ratio` is
the best BF16 time over that of `fp8`, `roofline` the share of the H200's or
H100's limits that `kernel` reaches. `--sweep` tries tilings of the kernel.

The grouped products give every token to 8 of the experts, as many rows to each;
BF16 multiplies them as a batch, and by tokamax where it is installed.

Without a Hopper GPU small plain products run, so that this command is tested.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.ops import grouped, hopper

BLOCK = hopper.BLOCK
LARGEST, LEAST_AMAX = 448, 1e-4  # of E4M3; Sec. 3.3.2 and the released kernels
TOP_K = 8  # experts of a token (Sec. 4.2)
# BF16 rounds to 1e-3, Hopper's sums within a block as much; quantising normal
# numbers costs 0.037.
TOLERANCE = {"error": 1e-2, "error_to_bf16": 5e-2}
# FLOP/s and bytes/s of NVIDIA's data sheets: FP8 and BF16 dense, memory.
LIMITS = {"H200": (1979e12, 989e12, 4.8e12), "H100": (1979e12, 989e12, 3.35e12)}


class Case(NamedTuple):
  """One product in FP8 and in BF16."""

  name: str
  product: str  # of dsv3.ops.hopper
  keywords: dict
  quantise: Callable  # of `inputs`, to the product's arguments
  inputs: tuple
  bf16: dict[str, Callable]  # of `bf16_inputs`
  bf16_inputs: tuple
  size: tuple[int, int, int]  # rows, contraction, columns


def tiles(x_MK):
  """E4M3 values and scales [J, M] of 1 x 128."""
  M, K = x_MK.shape
  x = x_MK.astype(jnp.float32).reshape(M, K // BLOCK, BLOCK)
  scale = jnp.maximum(jnp.abs(x).max(2), LEAST_AMAX) / LARGEST
  values = (x / scale[..., None]).astype(jnp.float8_e4m3fn)
  return values.reshape(M, K), scale.T


def blocks(w_NK):
  """E4M3 values and scales [N / 128, K / 128] of 128 x 128."""
  N, K = w_NK.shape
  w = w_NK.astype(jnp.float32).reshape(N // BLOCK, BLOCK, K // BLOCK, BLOCK)
  scale = jnp.maximum(jnp.abs(w).max((1, 3)), LEAST_AMAX) / LARGEST
  values = (w / scale[:, None, :, None]).astype(jnp.float8_e4m3fn)
  return values.reshape(N, K), scale


def with_weight(x, w8, *load):
  return *tiles(x), *w8, *load


def transposed(x, g, *load):
  return *tiles(x.T), *tiles(g.T), *load


def draw(seed: int, *shape):
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def dense(m: int, k: int, n: int) -> list[Case]:
  """x_MK times w_KN, and its gradients."""
  x, g, w = draw(0, m, k), draw(1, m, n), draw(2, k, n)
  w_NK, w_KN = jax.jit(blocks)(w.T), jax.jit(blocks)(w)
  half, full = {"out_dtype": jnp.bfloat16}, {"out_dtype": jnp.float32}

  def bf16(subscripts, dtype):
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return {"xla": lambda a, b: dot(subscripts, a, b).astype(dtype)}

  case = functools.partial(Case, product="matmul")
  return [
    case(
      name="fprop",
      keywords=half,
      quantise=with_weight,
      inputs=(x, w_NK),
      bf16=bf16("mk,kn->mn", jnp.bfloat16),
      bf16_inputs=(x, w),
      size=(m, k, n),
    ),
    case(
      name="dgrad",
      keywords=half,
      quantise=with_weight,
      inputs=(g, w_KN),
      bf16=bf16("mn,kn->mk", jnp.bfloat16),
      bf16_inputs=(g, w),
      size=(m, n, k),
    ),
    case(
      name="wgrad",
      keywords=full,
      quantise=transposed,
      inputs=(x, g),
      bf16=bf16("mk,mn->kn", jnp.float32),
      bf16_inputs=(x, g),
      size=(k, m, n),
    ),
  ]


def experts(m: int, k: int, n: int, n_experts: int) -> list[Case]:
  """The same with a matrix an expert and 8 experts a token."""
  rows = -(-m * TOP_K // n_experts // BLOCK) * BLOCK  # of an expert, rounded up
  A = rows * n_experts
  load = jnp.full((n_experts,), rows, jnp.int32)
  x, g, w = draw(0, A, k), draw(1, A, n), draw(2, n_experts, k, n)
  w_ENK = jax.jit(jax.vmap(blocks))(w.swapaxes(1, 2))
  w_EKN = jax.jit(jax.vmap(blocks))(w)

  def bf16(subscripts, dtype, out_shape):
    def batch(a, b, load):
      a = a.reshape(n_experts, rows, -1)
      b = b.reshape(n_experts, -1, b.shape[-1])
      y = jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
      return y.astype(dtype).reshape(out_shape)

    return {"batch": batch}

  found = [
    Case(
      name="grouped_fprop",
      product="grouped_matmul",
      keywords={"out_dtype": jnp.bfloat16},
      quantise=with_weight,
      inputs=(x, w_ENK, load),
      bf16=bf16("erk,ekn->ern", jnp.bfloat16, (A, n)),
      bf16_inputs=(x, w, load),
      size=(A, k, n),
    ),
    Case(
      name="grouped_dgrad",
      product="grouped_matmul",
      keywords={"out_dtype": jnp.bfloat16},
      quantise=with_weight,
      inputs=(g, w_EKN, load),
      bf16=bf16("ern,ekn->erk", jnp.bfloat16, (A, k)),
      bf16_inputs=(g, w, load),
      size=(A, n, k),
    ),
    Case(
      name="grouped_wgrad",
      product="grouped_wgrad",
      keywords={},
      quantise=transposed,
      inputs=(x, g, load),
      bf16=bf16("erk,ern->ekn", jnp.float32, (n_experts, k, n)),
      bf16_inputs=(x, g, load),
      size=(k, A, n),
    ),
  ]
  if importlib.util.find_spec("tokamax"):
    multiply = functools.partial(
      grouped.grouped_matmul, kernel="tokamax", out_dtype=jnp.bfloat16
    )
    found[0].bf16["tokamax"] = multiply
  return found


def rounding(case: Case, arguments, y) -> float:
  """Error of the product, against float32 products of the same FP8 values."""
  keywords = {"out_dtype": jnp.float32} if case.keywords else {}
  plain = getattr(hopper, f"plain_{case.product}")

  def exact(*arguments):  # in float32 and in TF32: FP8 has 4 bits
    to_float32 = lambda x: x.astype(jnp.float32) if x.dtype.itemsize == 1 else x
    return plain(*map(to_float32, arguments), **keywords)

  return distance(y, jax.jit(exact)(*arguments))


@jax.jit
def distance(found, wanted):
  """Relative, in the Frobenius norm."""
  found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
  return norm(found - wanted) / norm(wanted)


def runnable(calls: dict) -> tuple[dict, dict]:
  """Those calls that end well, and what the others said: a GPU is lent for
  minutes, and one rival without memory must not end the benchmark."""
  good, problems = {}, {}
  for name, (function, arguments) in calls.items():
    try:
      jax.block_until_ready(function(*arguments))
      good[name] = function, arguments
    except Exception as problem:
      problems[name] = str(problem).split("\n")[0]
  return good, problems


def milliseconds(calls: dict, rounds: int, inner: int) -> dict:
  """[median, fastest, slowest] of each; `inner` calls are one measurement."""
  taken = {name: [] for name in calls}
  for i, (name, (function, arguments)) in itertools.product(
    range(rounds + 1), calls.items()
  ):
    start = time.perf_counter()
    for _ in range(inner):
      y = function(*arguments)
    jax.block_until_ready(y)
    if i:  # the first round compiles
      taken[name].append((time.perf_counter() - start) / inner * 1e3)
  return {
    name: [round(f(x), 4) for f in (statistics.median, min, max)]
    for name, x in taken.items()
  }


def limit_ms(case: Case, arguments, y, limits) -> float:
  """The least time: that of the products or that of reading and writing."""
  traffic = sum(x.nbytes for x in (*arguments, y))
  return max(flops(case) / limits[0], traffic / limits[2]) * 1e3


def flops(case: Case) -> int:
  return 2 * math.prod(case.size)


def measure(case: Case, rounds: int, inner: int, why_not: str, limits) -> dict:
  """One line of the report: first the error, then the times."""
  plain = functools.partial(
    getattr(hopper, f"plain_{case.product}"), **case.keywords
  )
  kernel = plain
  if not why_not:
    kernel = functools.partial(getattr(hopper, case.product), **case.keywords)
  quantise, product = jax.jit(case.quantise), jax.jit(kernel)
  arguments = quantise(*case.inputs)
  y = product(*arguments)
  baseline = next(iter(case.bf16.values()))
  report = {
    "product": case.name,
    "size": case.size,
    "error": rounding(case, arguments, y),
    "error_to_bf16": distance(y, jax.jit(baseline)(*case.bf16_inputs)),
  }
  report |= {k: float(f"{report[k]:.3g}") for k in TOLERANCE}
  if not all(report[k] < limit for k, limit in TOLERANCE.items()):
    return report
  whole = jax.jit(lambda *inputs: kernel(*case.quantise(*inputs)))
  calls = {"fp8": (whole, case.inputs), "kernel": (product, arguments)}
  if not why_not:
    calls["xla"] = jax.jit(plain), arguments
  for name, function in case.bf16.items():
    calls[f"bf16_{name}"] = jax.jit(function), case.bf16_inputs
  calls, report["problems"] = runnable(calls)
  taken = milliseconds(calls, rounds, inner)
  bf16 = min(x[0] for name, x in taken.items() if name.startswith("bf16"))
  report |= {"ms": taken, "ratio": round(bf16 / taken["fp8"][0], 3)}
  report["kernel_ratio"] = round(bf16 / taken["kernel"][0], 3)
  report["kernel_tflops"] = round(flops(case) / taken["kernel"][0] / 1e9, 3)
  if limits:
    least = limit_ms(case, arguments, y, limits)
    report["roofline"] = round(least / taken["kernel"][0], 3)
    report["bf16_roofline"] = round(flops(case) / limits[1] * 1e3 / bf16, 3)
  return report


def sweep(case: Case, rounds: int, inner: int) -> list[dict]:
  """Times of the kernel by tiling; those that do not fit say so."""
  from dsv3.ops.hopper_kernel import Tiling

  arguments = jax.jit(case.quantise)(*case.inputs)
  lines = []
  for columns, stripe, pairs in itertools.product(
    (1, 2), (8, 16), (False, True)
  ):
    tiling = Tiling(columns, 6 - columns, stripe, pairs)  # stages that fit
    product = functools.partial(
      getattr(hopper, case.product), **case.keywords, tiling=tiling
    )
    line = {"product": case.name, "tiling": dataclasses.asdict(tiling)}
    try:
      calls = {"kernel": (jax.jit(product), arguments)}
      line |= milliseconds(calls, rounds, inner)
    except (AssertionError, ValueError) as problem:  # pairs, shared memory
      line["problem"] = str(problem).split("\n")[0]
    lines.append(line)
  return lines


def parse() -> argparse.Namespace:
  cpu = jax.default_backend() == "cpu"
  small = lambda on_cpu, elsewhere: on_cpu if cpu else elsewhere
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  add = functools.partial(parser.add_argument, type=int)
  add("--m", default=small(256, 4096), help="tokens")
  add("--k", default=small(384, 7168), help="inputs")
  add("--n", default=small(256, 4096), help="outputs")
  add("--experts", default=0, help="0: only the dense products")
  add("--expert-n", default=small(256, 2048), help="outputs of an expert")
  add("--rounds", default=small(2, 7))
  add("--inner", default=small(1, 20), help="calls that are timed together")
  parser.add_argument("--sweep", action="store_true", help="try tilings")
  args = parser.parse_args()
  for key in ("m", "k", "n", "expert_n"):
    if (size := getattr(args, key)) % BLOCK or size < 1:
      sys.exit(f"found --{key}={size}, wanted a multiple of {BLOCK}")
  if args.experts < 0:
    sys.exit(f"found --experts={args.experts}, wanted 0 or more")
  return args


def main() -> None:
  args = parse()
  device = jax.devices()[0]
  why_not = hopper.why_not(args.m, args.k, args.n)
  limits = next((v for d, v in LIMITS.items() if d in device.device_kind), None)
  about = {
    "device": device.device_kind,
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
    "kernel": f"plain: {why_not}" if why_not else "hopper",
  }
  print(json.dumps(about))
  kinds = [lambda: dense(args.m, args.k, args.n)]
  if args.experts:
    kinds.append(lambda: experts(args.m, args.k, args.expert_n, args.experts))
  wrong = []
  for case in itertools.chain.from_iterable(make() for make in kinds):
    try:
      report = measure(case, args.rounds, args.inner, why_not, limits)
    except Exception as problem:  # the other products may still be measured
      report = {"product": case.name, "problem": str(problem).split("\n")[0]}
    print(json.dumps(report), flush=True)
    if "ms" not in report:
      wrong.append(case.name)
    elif args.sweep and not why_not:
      for line in sweep(case, args.rounds, args.inner):
        print(json.dumps(line), flush=True)
  if wrong:
    sys.exit(f"wrong or failed, not timed: {', '.join(wrong)}")


if __name__ == "__main__":
  main()
