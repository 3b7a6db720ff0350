"""What the sub-commands of `dsv3` do; their arguments are in `dsv3.cli`."""

import argparse
import pathlib
import signal
import sys
import textwrap
from collections.abc import Iterator

from ml_collections import ConfigDict

from dsv3 import config, overlay
from dsv3.cache import use_compilation_cache
from dsv3.config import ConfigError
from dsv3.data import batches, bpe, tokenizer
from dsv3.data.rival import compressed_bpb
from dsv3.eval import bpb
from dsv3.hf import convert
from dsv3.infer import Sampling, stream
from dsv3.plan import count
from dsv3.train import feed, identity, loop, run, schedule
from dsv3.train.restore import Trained, restore


def _values(arguments: argparse.Namespace) -> ConfigDict:
  """The config a command line asks for: --config, or that of the run."""
  if arguments.config:
    return overlay.load(arguments.config, arguments.overrides)
  workdir = getattr(arguments, "workdir", None)
  if not workdir:
    raise ConfigError("--config: missing; for example --config=tiny")
  values = run.as_tree(run.stored_config(workdir))
  return overlay.overlay(values, overlay.parse(values, arguments.overrides))


def _tokenizer(trained: Trained) -> tokenizer.Tokenizer:
  values = trained.values
  found = tokenizer.load(values.data.tokenizer, values.model.vocab_size)
  identity.check_tokenizer(trained.meta, found)
  return found


def train(arguments: argparse.Namespace) -> int:
  """Trains; 0 at the end, 128 + n after signal n."""
  tree = _values(arguments)
  values = config.build(tree)
  if arguments.print_config:
    print(tree)
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
  _summary(outcome, values)
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
  if outcome.saved is None:
    print("no checkpoint: the last updates were left out, none is sampled")
    return
  if values.model.attention.kind != "mla":
    return  # the decoder is MLA's
  prompt = "def "
  trained = restore(outcome.workdir)
  print(f"\na sample, from {prompt!r}:\n")
  _write(trained, prompt, n_tokens=200, sampling=Sampling(0.8, top_p=0.95))


def evaluate(arguments: argparse.Namespace) -> None:
  """Held-out score of a checkpoint."""
  use_compilation_cache()
  trained = restore(arguments.workdir, arguments.step, ema=arguments.ema)
  values = trained.values
  _tokenizer(trained)
  heldout = batches.Batches(values, 0, "heldout")
  training = batches.Batches(values, values.train.seed)
  if change := identity.other_text(trained.meta, training):
    print(f"{change}: not the text that the run has logged", file=sys.stderr)
  n_batches = arguments.batches or values.train.final_eval_batches
  score = bpb.score(
    trained.graphdef,
    trained.params,
    trained.router,
    feed.heldout(heldout, values.schedule.batch_size, n_batches),
    heldout.tokenizer,
  )
  print(f"{arguments.workdir}, step {trained.step}, held-out text:")
  print(f"  bits per byte        {score.bits_per_byte:.4f}")
  print(f"  loss, nats a token   {score.loss:.4f}")
  print(f"  tokens               {score.tokens:,} of {score.bytes:,} bytes")
  print(f"  MaxVio, all batches  {score.max_vio:.3f}")
  print(f"  MaxVio, a batch      {score.max_vio_batch:.3f}")


def sample(arguments: argparse.Namespace) -> None:
  """Text that goes on from a prompt, as it is drawn."""
  use_compilation_cache()
  trained = restore(
    arguments.workdir, arguments.step, ema=arguments.ema, as_stored=True
  )
  _write(
    trained,
    arguments.prompt,
    n_tokens=arguments.tokens,
    seed=arguments.seed,
    sampling=Sampling(
      arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p
    ),
  )


def _write(
  trained: Trained,
  prompt: str,
  *,
  n_tokens: int,
  sampling: Sampling,
  seed: int = 0,
) -> None:
  """Prints the prompt and what follows, up to the end of the document."""
  tokens = _tokenizer(trained)
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(
      f"--prompt: found bytes that are no UTF-8 at {error.start}, wanted text"
    ) from error
  # A document of the training data follows the end of the one before it.
  steps = stream(
    trained.model,
    [[tokens.eos_id, *tokens.encode(prompt)]],
    max_tokens=n_tokens,
    sampling=sampling,
    seed=seed,
    stop=[tokens.eos_id],
  )
  print(prompt, end="", flush=True)
  for text in _stream((int(step.tokens_B[0]) for step in steps), tokens):
    print(text, end="", flush=True)
  print()


def _stream(ids: Iterator[int], tokens) -> Iterator[str]:
  """Text of tokens as they come; a character in pieces waits for its end."""
  seen, shown = [], 0
  for token in ids:
    if token == tokens.eos_id:
      break
    seen.append(token)
    text = tokens.decode(seen)
    if not text.endswith("\N{REPLACEMENT CHARACTER}"):
      yield text[shown:]
      shown = len(text)
  yield tokens.decode(seen)[shown:]


def data(arguments: argparse.Namespace) -> None:
  """The rows that a step reads: their documents and their text."""
  tree, ahead = _values(arguments), 0
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
  tree = _values(arguments)
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
  values = config.build(_values(arguments))
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
  values = _values(arguments)
  # The text is read as bytes, whatever tokenizer the config will use.
  reading = {"data.tokenizer": "bytes", "data.fim_rate": 0.0}
  overlay.overlay(values, reading)
  source = batches.Batches(config.build(values), values.train.seed)
  bpe.train_bpe(source.texts(), arguments.vocab_size, arguments.out)
  print(f"{arguments.out}: use it with --config.data.tokenizer={arguments.out}")


def convert_weights(arguments: argparse.Namespace) -> None:
  """Released weights to a run, or a run to a folder of them."""
  source, out = arguments.source, arguments.out
  if not out and not arguments.dry_run:
    raise ConfigError("--out: missing; wanted a new folder")
  if arguments.direction == "to-hf":
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


COMMANDS = {
  "train": train,
  "eval": evaluate,
  "sample": sample,
  "data": data,
  "convert": convert_weights,
  "diff-paper": diff_paper,
  "params": params,
  "tokenizer": train_tokenizer,
}
