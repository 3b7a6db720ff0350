"""Time and peak memory of an import, on a synthetic FP8 release.

  python experiments/performance/import_memory.py --folder=/tmp/synthetic

Writes a release of about 6.5 GB into the folder (random FP8 blocks, the names
of DeepSeek-V3, 3 MoE layers of 64 experts), then imports it as bfloat16 and as
fp8 and reads each run back, every step in a process of its own. Prints a JSON
line for each. Peaks are those of the processes, libraries included.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from dsv3 import config, overlay
from dsv3.hf import configs, names, write
from dsv3.hf.files import ToWrite

DIFF = {
  "model.vocab_size": 32_768,
  "model.dim": 4096,
  "model.n_layers": 4,
  "model.n_dense_layers": 1,
  "model.dense_hidden": 8192,
  "model.attention.n_heads": 32,
  "model.attention.n_kv_heads": 32,
  "model.moe.n_routed": 128,
  "model.moe.hidden": 1024,
  "model.mtp.concat": "embedding_hidden",
}
READ = """
import sys, jax
from dsv3.train.restore import restore
found = restore(sys.argv[1], as_stored=True)
print(sum(x.nbytes for x in jax.tree.leaves(found.params)))
"""


def release(folder: pathlib.Path) -> int:
  """Writes the release; its bytes."""
  values = config.build(overlay.overlay(overlay.load("v3_671b"), DIFF))
  rng = np.random.default_rng(0)

  def tensor(t: names.Tensor) -> list[ToWrite]:
    if t.dtype != "F8_E4M3":
      ones = lambda: np.full(t.shape, 0.5, np.float32)
      return write.to_write(t, ones, "bfloat16")
    bits = lambda: rng.bytes(t.shape[0] * t.shape[1])
    blocks = lambda: (
      (np.frombuffer(bits(), np.uint8) & 0x6F)
      .view(ml_dtypes.float8_e4m3fn)
      .reshape(t.shape)
    )
    scales = lambda: np.full(t.scale_shape, 1e-3, np.float32)
    return [
      ToWrite(t.name, "F8_E4M3", t.shape, blocks),
      ToWrite(t.scale_name, "F32", t.scale_shape, scales),
    ]

  groups = (tensor(t) for t in names.tensors(values.model))
  published = write.release_config(
    configs.to_hf(values.model), "fp8", values.model
  )
  write.write_groups(folder, groups, published, {"identity": "synthetic"})
  return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def measured(words: list[str]) -> tuple[float, float, str]:
  """Seconds, peak GB and output of a process."""
  begin = time.perf_counter()
  with subprocess.Popen(
    words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  ) as process:
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError(f"{words} ended with {process.returncode}")
  assert isinstance(usage, resource.struct_rusage)
  return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9, out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  folder = parser.parse_args().folder
  source = folder / "release"
  size = release(source)
  dsv3 = [sys.executable, "-m", "dsv3", "convert", "from-hf", str(source)]
  for dtype in ("bfloat16", "fp8"):
    run = folder / dtype
    seconds, peak, _ = measured([*dsv3, f"--out={run}", f"--dtype={dtype}"])
    read_s, read_peak, out = measured([sys.executable, "-c", READ, str(run)])
    print(
      json.dumps(
        {
          "bench": "import",
          "release_gb": round(size / 1e9, 2),
          "dtype": dtype,
          "import_seconds": round(seconds, 1),
          "import_peak_gb": round(peak, 2),
          "read_seconds": round(read_s, 1),
          "read_peak_gb": round(read_peak, 2),
          "parameters_gb": round(int(out) / 1e9, 2),
        }
      )
    )


if __name__ == "__main__":
  main()
