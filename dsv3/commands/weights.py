"""`dsv3 convert`: released weights in and out."""

import argparse
import pathlib

from dsv3.config import ConfigError
from dsv3.hf import convert
from dsv3.train import run


def convert_weights(arguments: argparse.Namespace) -> None:
  """Released weights to a run, or a run to a folder of them."""
  source, out = arguments.source, arguments.out
  if not out and not arguments.dry_run:
    raise ConfigError("--out: missing; wanted a new folder")
  to_hf = arguments.direction == "to-hf"
  _check_options(arguments, to_hf)
  dtype = arguments.dtype or "bfloat16"
  if to_hf:
    step = convert.to_hf(
      source,
      out,
      step=arguments.step,
      ema=arguments.ema,
      fp8=arguments.fp8,
      dtype=dtype,
    )
    print(f"{out}: the weights of {source} after step {step}")
    return
  for name, value in convert.report(source, dtype).items():
    text = f"{value:,}" if isinstance(value, int) else value or "none"
    print(f"{name:<34}{text}")
  if arguments.dry_run:
    return
  given = run.Given(command=run.command_line())
  values = convert.from_hf(source, out, dtype, given)
  if not pathlib.Path(values.data.tokenizer).is_file():
    print(
      f"{source} has no tokenizer.json: to sample, set data.tokenizer in "
      f"{out}/config.json"
    )
  print(f"""{out} is a run of these weights. Next:
  dsv3 sample --workdir={out} --prompt='def '
  dsv3 train --workdir={out} --config.train.steps=100
  dsv3 convert to-hf {out} --out=FOLDER --fp8""")


def _check_options(arguments: argparse.Namespace, to_hf: bool) -> None:
  """Raises ConfigError for an option of the other direction."""
  a = arguments
  others = (
    {"--dry-run": a.dry_run}
    if to_hf
    else {"--fp8": a.fp8, "--ema": a.ema, "--step": a.step is not None}
  )
  for name, given in others.items():
    if given:
      raise ConfigError(f"{name}: no option of {a.direction}")
  if to_hf and a.dtype == "fp8":
    raise ConfigError("--dtype: found fp8, wanted --fp8 on the way to-hf")
