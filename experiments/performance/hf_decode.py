"""Hugging Face's DeepseekV3 with its cache: greedy decoding and prefill.

  python experiments/performance/hf_decode.py s30m --batch=1

Prints one JSON line, as `python -m dsv3.bench.decode` does.
"""

import argparse
import json
import statistics
import time

import torch
import transformers

from dsv3 import config, overlay
from experiments.performance.hf_train_step import HERE, hugging_face_config


def measure(name: str, batch: int, prompt: int, new: int, dtype: str) -> dict:
  """Seconds of three runs after one that does not count, and what follows."""
  torch.manual_seed(0)
  torch.set_num_threads(2)
  values = config.build(overlay.load(str(HERE / f"{name}.py")))
  made = hugging_face_config(values.model)
  made.use_cache = True
  model = transformers.AutoModelForCausalLM.from_config(
    made, attn_implementation="sdpa", dtype=getattr(torch, dtype)
  ).eval()
  ids = torch.randint(values.model.vocab_size, (batch, prompt))
  run = lambda: model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    max_new_tokens=new,
    min_new_tokens=new,
    do_sample=False,
    pad_token_id=0,
  )
  seconds = []
  with torch.no_grad():
    for _ in range(4):
      start = time.perf_counter()
      run()
      seconds.append(time.perf_counter() - start)
  median = statistics.median(seconds[1:])
  return {
    "config": name,
    "stack": "transformers, DynamicCache",
    "dtype": dtype,
    "batch": batch,
    "prompt": prompt,
    "new": new,
    "tokens_per_second": round(
      batch * (new if new > 1 else prompt) / median, 1
    ),
    "fastest": round(
      batch * (new if new > 1 else prompt) / min(seconds[1:]), 1
    ),
    "slowest": round(
      batch * (new if new > 1 else prompt) / max(seconds[1:]), 1
    ),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("name")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--new", type=int, default=128)
  parser.add_argument("--dtype", default="float32")
  a = parser.parse_args()
  print(json.dumps(measure(a.name, a.batch, a.prompt, a.new, a.dtype)))
