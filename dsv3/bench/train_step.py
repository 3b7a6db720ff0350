"""Tokens per second of the training step, on random tokens.

  python -m dsv3.bench.train_step --config=v3_100m --batch=8 --repeats=5

prints one JSON line: the median, the fastest and the slowest of the repeats,
compile time, and FLOP/s by `plan.count.flops_per_token`.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dsv3 import config, overlay
from dsv3.huge_pages import restart_with_huge_pages
from dsv3.plan import count
from dsv3.train import optimizer, schedule, state, step


def random_batch(values: config.Config, batch_size: int) -> step.Batch:
  """Uniform tokens with the labels of the main model and every MTP depth."""
  length, depths = values.data.seq_len, 1 + values.model.mtp.depth
  row = np.random.default_rng(0).integers(
    0, values.model.vocab_size, (batch_size, length + 1), np.int32
  )
  labels = np.full((batch_size, depths, length), -1, np.int32)
  for p in range(depths):
    labels[:, p, : length - p] = row[:, p + 1 :]
  segments = np.ones((batch_size, length), np.int32)
  return step.Batch(*map(jnp.asarray, (row[:, :-1], labels, segments)))


def measure(values: config.Config, batch_size: int, repeats: int) -> dict:
  """Seconds of `repeats` steps after two that do not count, and what follows."""
  opt, plan = optimizer.make(values.optimizer), schedule.make(values)
  graphdef, at = state.create(values, opt)
  run = functools.partial(
    step.train_step,
    graphdef=graphdef,
    optimizer=opt,
    schedule=plan,
    values=values,
  )
  batch = random_batch(values, batch_size)
  start = time.perf_counter()
  compiled = jax.jit(run, donate_argnums=0).lower(at, batch).compile()
  compile_seconds = time.perf_counter() - start
  seconds = []
  for i in range(repeats + 2):
    start = time.perf_counter()
    at, _ = jax.block_until_ready(compiled(at, batch))
    if i >= 2:
      seconds.append(time.perf_counter() - start)
  tokens = batch_size * values.data.seq_len
  flops = count.flops_per_token(values.model, values.data.seq_len)
  median = statistics.median(seconds)
  return {
    "config": values.name,
    "dtype": values.model.dtype,
    "tokens_per_step": tokens,
    "tokens_per_second": round(tokens / median, 1),
    "fastest": round(tokens / min(seconds), 1),
    "slowest": round(tokens / max(seconds), 1),
    "repeats": repeats,
    "gflops": round(tokens / median * flops / 1e9, 1),
    "compile_seconds": round(compile_seconds, 1),
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="v3_100m")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=5)
  args, rest = parser.parse_known_args()
  overrides = [text.removeprefix("--config.") for text in rest]
  values = config.build(overlay.load(args.config, overrides))
  print(json.dumps(measure(values, args.batch, args.repeats)))


if __name__ == "__main__":
  restart_with_huge_pages()  # as the dsv3 command does
  main()
