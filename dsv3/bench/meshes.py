"""Steps of one model on 1, 2, 4 and 8 CPU devices: what a mesh costs.

  python -m dsv3.bench.meshes --config=tiny --repeats=5

All devices share the cores that there are, so this is the overhead and not the
speed-up. Strong: one global batch on all of them. Weak: as many sequences more as
devices; both as tokens a second over those of one device, timed in turn. Prints one
JSON line a mesh, with compile time and the rows of a token and layer that went to
experts elsewhere, one way.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax

from dsv3 import config, overlay
from dsv3.bench.train_step import random_batch
from dsv3.huge_pages import restart_with_huge_pages
from dsv3.train import layout, metrics, program, schedule

NO_LIMIT = {"model.moe.n_groups": 1, "model.moe.top_groups": 1}
AXES = ("data", "fsdp", "expert", "context", "tensor")
MESHES = (
  {"data": 2},
  {"data": 4},
  {"data": 8},
  {"fsdp": 8},
  {"expert": 2},
  {"expert": 8},
  {"expert": 8, "expert_rows": 1.5},
  {"expert": 8, "expert_nodes": 4},
  {"expert": 8, "expert_nodes": 4, **NO_LIMIT},
  {"context": 8},
  {"tensor": 2},
)
ROWS = 8  # sequences of a strong batch, and of a device in a weak one


class Timed:
  """A compiled step on a mesh, its state and a batch."""

  def __init__(self, tree: Any, changes: dict[str, Any], n_rows: int):
    diff = {"mesh.data": 1}
    diff |= {k if "." in k else f"mesh.{k}": v for k, v in changes.items()}
    diff |= {"schedule.batch_size": n_rows, "schedule.batch_size_start": n_rows}
    values = config.build(overlay.overlay(copy.deepcopy(tree), diff))
    self.where = layout.of_devices(values)
    plan = schedule.make(values)
    made = program.make(values, self.where, plan)
    create = jax.jit(lambda: made.create()[1], out_shardings=made.shardings)
    self.state = create()
    batch = random_batch(values, n_rows)
    self.batch = jax.device_put(batch, self.where.of_batch())
    self.tokens, self.model = n_rows * values.data.seq_len, values.model
    start = time.perf_counter()
    self.step = made.step.lower(self.state, self.batch).compile()
    self.compile_seconds = time.perf_counter() - start
    self.seconds, self.metrics = [], {}

  def run(self) -> None:
    start = time.perf_counter()
    self.state, found = self.step(self.state, self.batch)
    self.metrics = jax.device_get(found)
    self.seconds.append(time.perf_counter() - start)

  def tokens_per_second(self) -> float:
    return self.tokens / statistics.median(self.seconds[2:])

  def rows(self) -> dict[str, float]:
    """Rows that left a token's device or node, of a token and layer, one way."""
    m = self.model
    row = metrics.ways(m) * metrics.row_bytes(m) / 1e9
    layers = m.n_moe_layers + m.mtp.depth
    return {
      name.split("/")[1]: round(float(gb) / row / layers / self.tokens, 3)
      for name, gb in self.metrics.items()
      if name.startswith("exchange_gb/")
    }

  def bytes_between(self) -> float:
    """That a token and layer sends between nodes, there and back.

    By Sec. 3.2.2 at most M nodes' rows, in FP8 there and BF16 back; here both ways
    are in the model's type.
    """
    rows = self.rows().get("between_nodes", 0.0)
    return round(2 * rows * metrics.row_bytes(self.model), 1)


def measure(tree: Any, repeats: int) -> Iterator[dict[str, Any]]:
  """A row for every mesh, each timed in turn with one device."""
  alone = Timed(tree, {}, ROWS)
  for changes in MESHES:
    n = math.prod(changes.get(axis, 1) for axis in AXES)
    strong = Timed(tree, changes, ROWS)
    weak = Timed(tree, changes, ROWS * n)
    alone.seconds = []
    for _ in range(repeats + 2):
      for timed in (alone, strong, weak):
        timed.run()
    base = alone.tokens_per_second()
    yield {
      "mesh": str(weak.where.sizes),
      "groups": f"{weak.model.moe.top_groups} of {weak.model.moe.n_groups}",
      "devices": n,
      "strong": round(strong.tokens_per_second() / base, 3),
      "weak": round(weak.tokens_per_second() / base, 3),
      "alone_tokens_per_second": round(base),
      "compile_seconds": round(strong.compile_seconds, 1),
      "rows": weak.rows(),
      "bytes_between_nodes": weak.bytes_between(),
    }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="tiny")
  parser.add_argument("--repeats", type=int, default=5)
  args, rest = parser.parse_known_args()
  tree = overlay.load(args.config, [x.removeprefix("--config.") for x in rest])
  jax.config.update("jax_num_cpu_devices", 8)
  print(json.dumps({"jax": jax.__version__, "repeats": args.repeats}))
  for row in measure(tree, args.repeats):
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  restart_with_huge_pages()  # as the dsv3 command does
  main()
