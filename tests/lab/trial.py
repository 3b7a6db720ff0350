"""An experiment of runs that take no training: what the launcher's tests run.

The process in place of `dsv3 train` says what a run says in its folder: the
numbers of `loss(diff, seed)`, a step at a time.
"""

import json
import math
import pathlib
import sys

from dsv3.lab import experiment, results
from dsv3.train import run as run_folder
from tests import micro

SWEEP = """
from dsv3.lab.sweep import arms

BASE = "base"
SEEDS = range(2)

def runs():
  return arms({"a": {}, "b": {"schedule.lr_peak": 0.002}})
"""


def write(folder: pathlib.Path, sweep: str = SWEEP, **diff) -> pathlib.Path:
  """The experiment `folder`/experiments/q; `diff` by names like train__steps."""
  place = folder / "experiments" / "q"
  place.mkdir(parents=True, exist_ok=True)
  dotted = {key.replace("__", "."): value for key, value in diff.items()}
  micro.write_config(place / "base.py", dotted)
  (place / "sweep.py").write_text(sweep)
  return place


def trains(folder: pathlib.Path) -> dict[str, object]:
  """What makes its runs train for real: a text, and of all else little."""
  few = {"train.steps": 2, "train.checkpoint_every": 2, "model.n_layers": 2}
  found = {**micro.write_corpus(folder), **few, "model.mtp.depth": 0}
  return {key.replace(".", "__"): value for key, value in found.items()}


def assert_trained(place: pathlib.Path, *wanted: tuple[str, int]) -> None:
  """The results are those of such runs of `trains`, which ended as they should."""
  found = lines(place)
  assert sorted((x["name"], x["seed"]) for x in found) == sorted(wanted)
  for line in found:
    assert line["error"] is None
    assert line["steps"] == 2 and len(line["curve"]["loss/main"]) == 2
    assert math.isfinite(line["final"]["loss"]) and line["final"]["loss"] > 0
    assert all(map(math.isfinite, line["curve"]["loss/main"]))


def command(behaviour: str):
  """A stand-in for `dsv3.lab.process.command` that does `behaviour`."""

  def words(sweep, run, workdir):
    run_folder.record(workdir, run.values, run_folder.Given())
    return [sys.executable, "-c", _PROGRAM, str(workdir), behaviour, str(run)]

  return words


_PROGRAM = """
import json, os, pathlib, signal, sys, time
workdir, behaviour, name = pathlib.Path(sys.argv[1]), *sys.argv[2:]
print("begins", name, flush=True)
with open(workdir / "count", "a") as file:
  file.write("x")
if behaviour == "fail" and name.startswith("a"):
  print("dsv3: error: no luck", file=sys.stderr)
  sys.exit(1)
if behaviour == "die" and name.startswith("a"):
  os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "wait":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  (workdir / "ready").touch()
  time.sleep(60)
with open(workdir / "starts.jsonl", "a") as file:
  file.write(json.dumps({"commit": "c" * 40, "dirty": False}) + "\\n")
lines = [
  {"step": s, "loss/main": 5.0 - s / 10, "max_vio": 0.5, "tokens": 128 * s,
   "batch_tokens": 128, "tokens_per_second": 1000.0} for s in range(1, 9)
]
lines.append({"step": 8, "heldout/loss": 4.5, "heldout/max_vio": 0.3})
lines.append({"step": 8, "heldout_final/loss": 4.4, "heldout_final/max_vio": 0.2})
(workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\\n" for x in lines))
"""


def lines(place: pathlib.Path) -> list[dict]:
  path = place / "results.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def load(place: pathlib.Path, *overrides: str) -> experiment.Experiment:
  return experiment.load(place, None, overrides)


def result(run: experiment.Run, loss: float, **more) -> dict:
  """A line of results.jsonl as of a run of 40 steps that ended at `loss`."""
  steps = list(range(1, 41))
  line = {
    "name": run.name,
    "seed": run.seed,
    "id": run.id,
    "diff": run.diff,
    "error": None,
    "steps": 40,
    "tokens": 40 * 128,
    "flops": 1e9,
    "parameters": 1000,
    "final": {"loss": loss, "bits_per_byte": loss / 0.69, "max_vio": 0.5},
    "best": {"loss": loss + 0.1},
    "train": {"accuracy/main": 0.5},
    "commit": "abcdef0123",
    "dirty": False,
    "device": {"kind": "cpu"},
    "versions": {"jax": "0"},
    "corpus": [["text", "x", 3]],
    "wall_seconds": 9.0,
    "curve": {
      "step": steps,
      "loss/main": [loss + 3 * 0.9**s for s in steps],
      "max_vio": [0.5] * 40,
    },
  }
  return line | more


def record(place: pathlib.Path, losses: dict[str, list[float]], **more) -> None:
  """Results of arms a and b: a loss a seed."""
  for run in load(place).runs:
    if run.seed < len(losses[run.name]):
      changed = more.get(run.name, {})
      line = result(run, losses[run.name][run.seed], **changed)
      results.append(place / "results.jsonl", line)
