"""Time and peak memory of reading a long prompt, on random tokens.

  python experiments/performance/long_prefill.py --config=tiny --length=131072

Prints one JSON line. The peak is of the whole process (VmHWM), weights and
compiler included; another length is another process.
"""

import argparse
import json
import pathlib
import re
import time

import jax
import numpy as np

from dsv3 import config, overlay
from dsv3.infer import Decoder
from dsv3.nn.transformer import make_model


def peak_bytes() -> int:
  """The largest resident size that this process has had."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="tiny")
  parser.add_argument("--length", type=int, required=True)
  parser.add_argument("--chunk", type=int, default=512)
  args = parser.parse_args()
  values = config.build(overlay.load(args.config))
  model = jax.jit(lambda key: make_model(values.model, key))(jax.random.key(0))
  decoder = Decoder(model)
  rng = np.random.default_rng(0)
  prompt = rng.integers(0, values.model.vocab_size, args.length).tolist()
  before, begin = peak_bytes(), time.perf_counter()
  logits_BW, cache = decoder.prefill([prompt], 64, args.chunk)
  assert np.isfinite(logits_BW).all()
  print(
    json.dumps(
      {
        "bench": "long_prefill",
        "config": values.name,
        "dtype": values.model.dtype,
        "length": args.length,
        "chunk": args.chunk,
        "seconds": round(time.perf_counter() - begin, 1),
        "peak_gib": round(peak_bytes() / 2**30, 2),
        "peak_before_gib": round(before / 2**30, 2),
        "cache_mib": round(
          sum(x.nbytes for x in jax.tree.leaves(cache.layers)) / 2**20, 1
        ),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
      }
    )
  )


if __name__ == "__main__":
  main()
