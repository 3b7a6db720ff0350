"""A run folder as a line of results.jsonl: cost, scores, curves, origin."""

import functools
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3 import config
from dsv3.lab import measure
from dsv3.lab.experiment import Run
from dsv3.plan import count
from dsv3.train.logs import read_metrics

# Kept over all steps, with so many digits, in at most POINTS points.
CURVES = {"loss/main": 6, "max_vio": 4}
POINTS = 1000


def of_run(run: Run, workdir: pathlib.Path) -> dict[str, Any]:
  """What a run that has ended was, cost and reached.

  `final` are scores on `final_eval_batches` of held-out text at the last step and
  what the experiment's `measure` has found,
  `best` those of the evaluation with the least loss on `eval_batches`, `train`
  the numbers of the last logged step.
  """
  lines = read_metrics(workdir)
  steps = [line for line in lines if "loss/main" in line]
  last = steps[-1] if steps else {}
  scores, final = _scores(lines, "heldout/"), _scores(lines, "heldout_final/")
  return {
    **_cost(run, last),
    "tokens_per_second": _median(steps, "tokens_per_second"),
    "final": {**(final[-1] if final else {}), **measure.read(workdir)},
    "best": _best(scores),
    "train": {k: _short(v) for k, v in last.items() if _is_number(v)},
    **_origin(workdir),
    "curve": curve(steps),
    "heldout": _heldout(scores),
  }


def _cost(run: Run, last: Mapping[str, Any]) -> dict[str, Any]:
  size, per_token = _size(run.values.model, run.values.data.seq_len)
  tokens = last.get("tokens", 0)
  return {
    "steps": last.get("step", 0),
    "tokens": tokens,
    "flops": tokens * per_token,
    "parameters": size.main + size.mtp,
    "active_parameters": size.active,
  }


@functools.cache
def _size(model: config.Model, seq_len: int) -> tuple[count.Parameters, float]:
  return count.parameters(model), count.flops_per_token(model, seq_len)


def _scores(lines: Sequence[Mapping], prefix: str) -> list[dict[str, Any]]:
  """The evaluations under a prefix, without it."""
  found = [line for line in lines if f"{prefix}loss" in line]
  return [
    {k.removeprefix(prefix): v for k, v in line.items()} for line in found
  ]


def _best(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  finite = [s for s in scores if s["loss"] is not None]
  return dict(min(finite, key=lambda s: s["loss"])) if finite else {}


def _heldout(scores: Sequence[Mapping[str, Any]]) -> dict[str, list]:
  names = ("step", "loss", "max_vio")
  return {name: [s[name] for s in scores] for name in names}


def _median(lines: Sequence[Mapping], name: str) -> float | None:
  found = [line[name] for line in lines if line.get(name)]
  return statistics.median(found) if found else None


def curve(steps: Sequence[Mapping[str, Any]]) -> dict[str, list]:
  """Steps and CURVES; of more than POINTS, means of as many equal runs of them.

  A mean of steps that holds one which is not finite is None.
  """
  size = max(1, math.ceil(len(steps) / POINTS))
  parts = [steps[i : i + size] for i in range(0, len(steps), size)]
  out: dict[str, list] = {"step": [part[-1]["step"] for part in parts]}
  for name, digits in CURVES.items():
    if steps and name in steps[0]:
      out[name] = [_mean([s.get(name) for s in p], digits) for p in parts]
  return out


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float))


def _short(value: float, digits: int = 6) -> float:
  """So many significant digits; whole numbers stay whole."""
  return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _mean(values: Sequence[float | None], digits: int) -> float | None:
  if None in values:
    return None
  return _short(statistics.fmean(values), digits)


def _origin(workdir: pathlib.Path) -> dict[str, Any]:
  """Code, packages and machine: of the last start, `dirty` if any was."""
  path = workdir / "starts.jsonl"
  if not path.exists():
    return {}
  starts = [json.loads(line) for line in path.read_text().splitlines()]
  last = starts[-1]
  kept = ("commit", "dirty", "python", "versions", "device")
  out = {name: last[name] for name in kept if name in last}
  if "device" in out:  # without the kernel's version
    device = out["device"]
    out["device"] = {k: device[k] for k in device if k != "machine"}
  commits = list(dict.fromkeys(s.get("commit") for s in starts))
  if len(commits) > 1:
    out["commits"] = commits
  if "dirty" in out:
    out["dirty"] = any(s.get("dirty") for s in starts)
  return out | {"starts": len(starts), "corpus": _corpus(workdir)}


def _corpus(workdir: pathlib.Path) -> list | None:
  """Source and digest of the text, from the newest checkpoint."""
  found = sorted(
    workdir.glob("checkpoints/*/meta/metadata"),
    key=lambda path: int(path.parts[-3]),
  )
  meta = json.loads(found[-1].read_text()) if found else {}
  return meta.get("corpus")
