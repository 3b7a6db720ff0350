"""`dsv3 train`: a run, and what to do with it next."""

import argparse
import pathlib
import signal

import jax

from dsv3 import config
from dsv3.commands.given import values_of
from dsv3.commands.text import write
from dsv3.data import batches
from dsv3.data.rival import compressed_bpb
from dsv3.infer import Sampling
from dsv3.parallel import processes
from dsv3.train import layout, loop, run
from dsv3.train.restore import restore


def train(arguments: argparse.Namespace) -> int:
  """Trains; 0 at the end, 128 + n after signal n."""
  tree = values_of(arguments)
  values = config.build(tree)
  given = (arguments.coordinator, arguments.process_id, arguments.num_processes)
  processes.start(*given)
  if arguments.print_config:
    print(tree)
    return 0
  if arguments.print_sharding:
    print(layout.describe(values, layout.of_run(values)))
    return 0
  workdir = pathlib.Path(arguments.workdir or f"runs/{values.name}")
  given = run.Given(arguments.config, arguments.overrides, run.command_line())
  outcome = loop.train(values, workdir, given)
  again = f"dsv3 train --workdir={workdir}"
  if outcome.signum:
    name = signal.Signals(outcome.signum).name
    saved = ""
    if outcome.saved != outcome.step:
      left = "nothing" if outcome.saved is None else f"step {outcome.saved}"
      saved = f" (its updates were being left out; saved is {left})"
    print(
      f"{name}: stopped after step {outcome.step}{saved}; go on with\n  {again}"
    )
    return 128 + outcome.signum
  if not processes.is_first():
    return 0
  _summary(outcome, values)
  if not arguments.no_sample and jax.process_count() == 1:
    _sample(outcome, values)
  print(f"""
The run is in {workdir}. Next:
  {again} --config.train.steps={2 * outcome.steps} --config.train.max_minutes=0
  dsv3 sample --workdir={workdir} --prompt='def '
  dsv3 eval --workdir={workdir}
  pip install tensorboard && tensorboard --logdir={workdir}""")
  return 0


def _summary(outcome: loop.Outcome, values: config.Config) -> None:
  print(f"\n{outcome.step} of {outcome.steps} steps done.")
  if outcome.step < outcome.steps:
    print(f"stopped by train.max_minutes = {values.train.max_minutes:g}")
  if outcome.score is None:
    return
  texts = batches.Batches(values, 0, "heldout").texts()
  print(
    f"held-out bits per byte  {outcome.score.bits_per_byte:.3f}  "
    f"on {outcome.score.bytes:,} bytes in rows of {values.data.seq_len} tokens\n"
    f"gzip -9                 {compressed_bpb(texts):.3f}  "
    "on all held-out documents whole"
  )
  if outcome.max_vio is not None:
    print(
      f"MaxVio, last batch      {outcome.max_vio:.3f}\n"
      f"MaxVio, held-out text   {outcome.score.max_vio:.3f}"
    )


def _sample(outcome: loop.Outcome, values: config.Config) -> None:
  if outcome.score is None:
    return
  if outcome.saved is None:
    print("no checkpoint: the last updates were left out, none is sampled")
    return
  if values.model.attention.kind != "mla":
    return  # the decoder is MLA's
  prompt = "def "
  trained = restore(outcome.workdir)
  print(f"\na sample, from {prompt!r}:\n")
  write(trained, prompt, n_tokens=200, sampling=Sampling(0.8, top_p=0.95))
