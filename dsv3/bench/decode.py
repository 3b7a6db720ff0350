"""Tokens per second of decoding, or of prefill with --new=1, on random tokens.

  python -m dsv3.bench.decode --config=v3_100m --batch=8 --prompt=128 --new=128
  python -m dsv3.bench.decode --workdir=runs/tiny --drafts=2

prints one JSON line: median, fastest and slowest of three runs after one that
does not count. Prefill counts the prompt's tokens, decoding the new ones, with
the prefill in its time; `step_ms` is the time of one run of the model after it.
With a run its weights and its held-out text are used, where drafts are kept.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import numpy as np

from dsv3 import config, overlay
from dsv3.data.batches import Batches
from dsv3.huge_pages import restart_with_huge_pages
from dsv3.infer import Decoder, Sampling, acceptance, stream
from dsv3.nn.transformer import make_model
from dsv3.train.restore import restore

GREEDY = Sampling(temperature=0.0)


def measure(
  decoder: Decoder, prompts: list[list[int]], new: int, drafts: int
) -> dict:
  """Greedy decoding of `new` tokens after prompts, four times."""
  totals, step_times = [], []
  for _ in range(4):
    begin, accepted, times = time.perf_counter(), [], []
    for step in stream(
      decoder, prompts, max_tokens=new, sampling=GREEDY, drafts=drafts
    ):
      times.append(time.perf_counter())
      accepted += [n for n in step.accepted if n is not None]
    totals.append(times[-1] - begin)
    step_times.append(float(np.median(np.diff(times))) if new > 2 else None)
  totals, n_tokens = totals[1:], len(prompts) * (new if new > 1 else 0)
  n_tokens = n_tokens or sum(map(len, prompts))
  found = {
    "tokens_per_second": round(n_tokens / statistics.median(totals), 1),
    "fastest": round(n_tokens / min(totals), 1),
    "slowest": round(n_tokens / max(totals), 1),
  }
  if new > 2:
    found["step_ms"] = round(1e3 * statistics.median(step_times[1:]), 3)
  if drafts:
    found["accepted"] = [round(x, 3) for x in acceptance(accepted, drafts)]
  return found


def _of_run(workdir: str, batch: int, length: int, cache: str | None):
  """Decoder, beginnings of held-out documents, and config of a run."""
  trained = restore(workdir)
  heldout = Batches(trained.values, 0, "heldout")
  documents = (heldout.tokenizer.encode(text) for text in heldout.texts())
  long = (ids[:length].tolist() for ids in documents if len(ids) >= length)
  prompts = list(itertools.islice(long, batch))
  if not prompts:
    raise SystemExit(f"no held-out document has {length} tokens")
  return Decoder(trained.model, cache_dtype=cache), prompts, trained.values


def _of_config(name: str, overrides, batch: int, length: int, cache):
  """Decoder of random weights, random prompts, and the config."""
  values = config.build(overlay.load(name, overrides))
  model = jax.jit(lambda key: make_model(values.model, key))(jax.random.key(0))
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, values.model.vocab_size, (batch, length)).tolist()
  return Decoder(model, cache_dtype=cache), prompts, values


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="v3_100m")
  parser.add_argument("--workdir")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--new", type=int, default=128)
  parser.add_argument("--drafts", type=int, default=0)
  parser.add_argument(
    "--cache", choices=("float32", "bfloat16", "float8_e4m3fn")
  )
  args, rest = parser.parse_known_args()
  overrides = [text.removeprefix("--config.") for text in rest]
  size = args.batch, args.prompt, args.cache
  decoder, prompts, values = (
    _of_run(args.workdir, *size)
    if args.workdir
    else _of_config(args.config, overrides, *size)
  )
  about = {
    "config": values.name,
    "dtype": values.model.dtype,
    "cache": args.cache or values.model.dtype,
    "batch": len(prompts),
    "prompt": args.prompt,
    "new": args.new,
    "drafts": args.drafts,
  }
  found = measure(decoder, prompts, args.new, args.drafts)
  machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
  print(json.dumps(about | found | machine))


if __name__ == "__main__":
  restart_with_huge_pages()  # as the dsv3 command does
  main()
