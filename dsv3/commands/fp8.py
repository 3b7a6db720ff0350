"""`dsv3 fp8-report`: what quantisation costs every Linear of a run."""

import argparse
import dataclasses
import json
import pathlib

import jax

from dsv3.cache import use_compilation_cache
from dsv3.config import Config, ConfigError
from dsv3.data import batches
from dsv3.eval import fp8_map, heatmap
from dsv3.nn.transformer import gemm_of
from dsv3.train import run, schedule, watch
from dsv3.train.restore import restore, restore_memory
from dsv3.train.state import TrainState
from dsv3.train.step import Batch


def report(arguments: argparse.Namespace) -> None:
  """A table, its rows as JSON, and a heat map, of the step after a checkpoint."""
  heatmap.figure_class()  # a missing package is told before the work
  use_compilation_cache()
  trained = restore(arguments.workdir, arguments.step)
  values = _with_recipe(trained.values, arguments.recipe)
  memory = restore_memory(
    arguments.workdir, trained.step, trained.params, values.model
  )
  state = TrainState(
    step=jax.numpy.int32(trained.step),
    params=trained.params,
    opt_state=(),
    router=trained.router,
    ema=None,
    precision=memory,
    skipped=jax.numpy.int32(0),
    skipped_total=jax.numpy.int32(0),
  )
  plan = schedule.make(values)
  found = watch.make_report(watch.graphdef_of(values), values, plan)(
    state, _next_batch(arguments.workdir, values, plan, trained.step)
  )
  rows = watch.rows_of(found)
  out = pathlib.Path(arguments.out or f"{arguments.workdir}/fp8")
  out.mkdir(parents=True, exist_ok=True)
  name = f"step_{trained.step}_{values.model.precision.recipe}"
  about = {
    "run": str(arguments.workdir),
    "step": trained.step,
    "recipe": values.model.precision.recipe,
    "changes": values.model.precision.changes,
  }
  text = json.dumps(
    {"about": about, "rows": [watch.plain(row) for row in rows]}, indent=1
  )
  (out / f"{name}.json").write_text(text + "\n")
  title = (
    f"{pathlib.Path(arguments.workdir).resolve().name}, step {trained.step}: "
    f"{values.model.precision.recipe}"
  )
  fp8_map.draw(rows, out / f"{name}.png", title=title)
  print(f"{title}\n\n{fp8_map.table(rows)}")
  print(f"\n{out}: {name}.json, {name}.png")


def _with_recipe(values: Config, name: str | None) -> Config:
  """The run's config, with a recipe to look at."""
  p = values.model.precision
  if name is None and gemm_of(values.model).recipe is not None:
    return values
  name = name or "deepseek_v3"
  p = dataclasses.replace(p, recipe=name, changes=(), guard=0.0)
  model = dataclasses.replace(values.model, precision=p)
  if gemm_of(model).recipe is None:
    raise ConfigError(f"--recipe={name}: wanted one that quantises")
  return dataclasses.replace(values, model=model)


def _next_batch(workdir, values: Config, plan, step: int) -> Batch:
  """The rows that the run reads after `step`."""
  ahead = 0
  if (pathlib.Path(workdir) / "starts.jsonl").exists():
    ahead = run.position_of(workdir, step + 1)[1].sequences_ahead
  source = batches.Batches(values, values.train.seed)
  first = plan.first_sequence(step) + ahead
  return Batch(*source.rows(first, plan.batch_size(step)))
