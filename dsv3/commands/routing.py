"""`dsv3 routing`: which experts the text of a run, or any text, uses."""

import argparse
import pathlib

import numpy as np

from dsv3.cache import use_compilation_cache
from dsv3.commands.given import tokenizer_of
from dsv3.config import ConfigError
from dsv3.data import batches
from dsv3.eval import heatmap
from dsv3.lab import routing
from dsv3.parallel import eplb
from dsv3.train.restore import Trained, restore


def look(arguments: argparse.Namespace) -> None:
  """A table by layer, a heat map, and the trace; or a loss under another's."""
  heatmap.figure_class()  # a missing package is told before the work
  use_compilation_cache()
  trained = restore(arguments.workdir, arguments.step, ema=arguments.ema)
  tokens_BL, segments_BL, domains = _text(trained, arguments)
  trace = routing.record(trained.model, tokens_BL, segments_BL)
  print(f"{arguments.workdir}, step {trained.step}, {tokens_BL.size:,} tokens:")
  print(routing.table(trace, domains))
  if arguments.frozen:
    _compare(trained, tokens_BL, trace, arguments.frozen)
  if arguments.devices:
    _place(trained, trace, arguments)
  out = pathlib.Path(arguments.out or f"{arguments.workdir}/routing")
  out.mkdir(parents=True, exist_ok=True)
  name = f"step_{trained.step}"
  trace.save(out / f"{name}.npz")
  routing.draw(trace, domains).savefig(out / f"{name}.png", dpi=150)
  print(f"\n{out}: {name}.npz, {name}.png")


def _compare(
  trained: Trained, tokens_BL, own: routing.Trace, path: str
) -> None:
  """The loss with the choices of a stored trace of the same text."""
  other = routing.load(path)
  free = routing.loss(trained.model, tokens_BL, own)
  frozen = routing.loss(trained.model, tokens_BL, other)
  shares = ", ".join(f"{s:.0%}" for s in routing.agreement(own, other))
  print(
    f"choices of {path}: loss {frozen:.4f}, with its own {free:.4f} nats a token;"
    f" in common, by layer: {shares}"
  )


def _place(trained: Trained, trace: routing.Trace, arguments) -> None:
  """Copies of busy experts for a unit that serves this text."""
  moe, devices = trained.values.model.moe, arguments.devices
  load_XE = routing.relative_load(trace)
  slots = arguments.slots or -(-(moe.n_routed + devices) // devices) * devices
  unit = dict(devices=devices, nodes=arguments.nodes, groups=moe.n_groups)
  try:
    found = eplb.place(load_XE, slots=slots, **unit)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  print(f"{slots} slots on {devices} devices, the busiest over the mean:")
  for layer, (row, over) in enumerate(
    zip(found.expert_XS.tolist(), found.imbalance(load_XE))
  ):
    size = slots // devices
    places = [row[i : i + size] for i in range(0, slots, size)]
    lying = " | ".join(" ".join(map(str, experts)) for experts in places)
    print(f"  layer {layer}: {over:.2f}; experts {lying}")


def _text(trained: Trained, arguments):
  """Tokens, segments, and which rows are of which domain."""
  rows, length = arguments.rows, trained.values.data.seq_len
  if not arguments.domains:
    return _heldout(trained, rows)
  tokenizer, found, domains = tokenizer_of(trained), [], {}
  for given in arguments.domains:
    name, equals, path = given.partition("=")
    if not equals or not pathlib.Path(path).is_file():
      raise ConfigError(f"--domains: found {given}, wanted NAME=FILE")
    ids = np.asarray(tokenizer.encode(pathlib.Path(path).read_text()), np.int32)
    n_rows = min(rows, len(ids) // length)
    if not n_rows:
      raise ConfigError(
        f"--domains: {path}: found {len(ids)} tokens, wanted {length} for a row"
      )
    domains[name] = range(len(found), len(found) + n_rows)
    found += list(ids[: n_rows * length].reshape(n_rows, length))
  tokens_BL = np.stack(found)
  return tokens_BL, np.ones_like(tokens_BL), domains


def _heldout(trained: Trained, rows: int):
  heldout = batches.Batches(trained.values, 0, "heldout")
  rows = min(rows, heldout.n_rows)
  batch, domains = heldout.rows(0, rows), {}
  for found in heldout.describe(0, rows):
    domains.setdefault(found.source, []).append(found.row)
  return batch.tokens_BL, batch.segments_BL, domains
