"""`dsv3 data`, `diff-paper`, `params`, `tokenizer`: what a config means."""

import argparse
import textwrap

from dsv3 import config, overlay
from dsv3.commands.given import values_of
from dsv3.data import batches, bpe
from dsv3.plan import count
from dsv3.train import run, schedule


def data(arguments: argparse.Namespace) -> None:
  """The rows that a step reads: their documents and their text."""
  tree, ahead = values_of(arguments), 0
  if arguments.workdir:
    # The schedule that held at the step, which more steps may have moved.
    steps, position = run.position_of(arguments.workdir, arguments.step)
    overlay.overlay(tree, {"train.steps": steps})
    ahead = position.sequences_ahead
  values = config.build(tree)
  plan = schedule.make(values)
  first = plan.first_sequence(arguments.step - 1) + ahead
  size = plan.batch_size(arguments.step - 1)
  shown = min(size, arguments.rows)
  source = batches.Batches(values, values.train.seed)
  print(
    f"step {arguments.step}: rows {first:,} to {first + size - 1:,} of "
    f"{values.data.seq_len} tokens; {shown} of {size} rows are shown"
  )
  for row in source.describe(first, shown):
    print(f"\n=== row {row.row:,}: {row.source}, epoch {row.epoch}")
    for name, span in row.spans:
      fim = ", fill in the middle" if span.in_fim else ""
      print(f"--- {name}: tokens {span.begin:,} to {span.end:,}{fim}")
    print(textwrap.fill("ids: " + " ".join(map(str, row.tokens)), width=80))
    print(row.text)


def diff_paper(arguments: argparse.Namespace) -> None:
  """Table of all keys where a config departs from the report."""
  paper = overlay.load(str(overlay.CONFIGS / "v3_671b.py"))
  tree = values_of(arguments)
  config.build(tree)
  pairs = overlay.difference(paper, tree)
  rows = [("key", "paper", "this config")]
  rows += [(key, str(a), str(b)) for key, (a, b) in pairs.items()]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  for row in rows:
    print("  ".join(f"{x:<{w}}" for x, w in zip(row, widths)).rstrip())
  print(f"{len(pairs)} departures")


def params(arguments: argparse.Namespace) -> None:
  """Exact parameter counts, without memory, and FLOPs of training."""
  values = config.build(values_of(arguments))
  found = count.parameters(values.model)
  flops = count.flops_per_token(values.model, values.data.seq_len)
  lines = {f"  {part}": n for part, n in found.by_part.items()}
  lines |= {
    "main model": found.main,
    "MTP modules": found.mtp,
    "active": found.active,
    "active, no embedding": found.active_head,
    "active, no embedding or head": found.active_body,
  }
  for name, n in lines.items():
    print(f"{name:<30}{n:>20,}")
  print(f"training FLOPs a token, {values.data.seq_len} positions: {flops:.4g}")


def train_tokenizer(arguments: argparse.Namespace) -> None:
  """Trains a BPE tokenizer on the training split of a config's sources."""
  values = values_of(arguments)
  # The text is read as bytes, whatever tokenizer the config will use.
  reading = {"data.tokenizer": "bytes", "data.fim_rate": 0.0}
  overlay.overlay(values, reading)
  source = batches.Batches(config.build(values), values.train.seed)
  bpe.train_bpe(source.texts(), arguments.vocab_size, arguments.out)
  print(f"{arguments.out}: use it with --config.data.tokenizer={arguments.out}")
