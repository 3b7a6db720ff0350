"""Tokens per second of decoding, or of prefill with --new=1, on random tokens.

  python -m dsv3.bench.decode --config=v3_100m --batch=8 --prompt=128 --new=128

prints one JSON line: median, fastest and slowest of three runs after one that
does not count. Prefill counts the prompt's tokens, decoding the new ones, with
the prefill in its time.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from dsv3 import config, overlay
from dsv3.huge_pages import restart_with_huge_pages
from dsv3.infer import Decoder, Sampling, generate
from dsv3.nn.transformer import make_model


def measure(
  values: config.Config, batch: int, prompt: int, new: int, cache: str | None
) -> dict:
  """Greedy decoding of `new` tokens after random prompts."""
  model = jax.jit(lambda key: make_model(values.model, key))(jax.random.key(0))
  decoder = Decoder(model, cache_dtype=cache)
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, values.model.vocab_size, (batch, prompt)).tolist()
  seconds = []
  for _ in range(4):
    start = time.perf_counter()
    generate(
      decoder, prompts, max_tokens=new, sampling=Sampling(temperature=0.0)
    )
    seconds.append(time.perf_counter() - start)
  seconds, tokens = seconds[1:], batch * (new if new > 1 else prompt)
  return {
    "config": values.name,
    "dtype": values.model.dtype,
    "cache": cache or values.model.dtype,
    "batch": batch,
    "prompt": prompt,
    "new": new,
    "tokens_per_second": round(tokens / statistics.median(seconds), 1),
    "fastest": round(tokens / min(seconds), 1),
    "slowest": round(tokens / max(seconds), 1),
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="v3_100m")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--new", type=int, default=128)
  parser.add_argument(
    "--cache", choices=("float32", "bfloat16", "float8_e4m3fn")
  )
  args, rest = parser.parse_known_args()
  overrides = [text.removeprefix("--config.") for text in rest]
  values = config.build(overlay.load(args.config, overrides))
  found = measure(values, args.batch, args.prompt, args.new, args.cache)
  print(json.dumps(found))


if __name__ == "__main__":
  restart_with_huge_pages()  # as the dsv3 command does
  main()
