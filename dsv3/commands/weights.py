"""`dsv3 convert`: released weights in and out."""

import argparse

from dsv3.config import ConfigError
from dsv3.hf import convert
from dsv3.train import run


def convert_weights(arguments: argparse.Namespace) -> None:
  """Released weights to a run, or a run to a folder of them."""
  source, out = arguments.source, arguments.out
  if not out and not arguments.dry_run:
    raise ConfigError("--out: missing; wanted a new folder")
  if arguments.direction == "to-hf":
    if arguments.dtype == "fp8":
      raise ConfigError("--dtype: found fp8, wanted --fp8 on the way to-hf")
    step = convert.to_hf(
      source,
      out,
      step=arguments.step,
      ema=arguments.ema,
      fp8=arguments.fp8,
      dtype=arguments.dtype,
    )
    print(f"{out}: the weights of {source} after step {step}")
    return
  for name, value in convert.report(source, arguments.dtype).items():
    text = f"{value:,}" if isinstance(value, int) else value or "none"
    print(f"{name:<34}{text}")
  if arguments.dry_run:
    return
  given = run.Given(command=run.command_line())
  convert.from_hf(source, out, arguments.dtype, given)
  print(f"""{out} is a run of these weights. Next:
  dsv3 sample --workdir={out} --prompt='def '
  dsv3 train --workdir={out} --config.train.steps=100
  dsv3 convert to-hf {out} --out=FOLDER --fp8""")
