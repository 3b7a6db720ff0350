"""`dsv3 eval` and `dsv3 needle`: how good a trained model is."""

import argparse
import pathlib
import sys

import tqdm
from ml_collections import ConfigDict

from dsv3 import config, overlay
from dsv3.cache import use_compilation_cache
from dsv3.commands.given import tokenizer_of, values_of
from dsv3.commands.text import kept
from dsv3.config import ConfigError
from dsv3.data import batches
from dsv3.eval import bpb, drafting, heatmap, needle
from dsv3.infer import Decoder
from dsv3.train import feed, identity
from dsv3.train.restore import restore, restore_memory


def evaluate(arguments: argparse.Namespace) -> None:
  """Held-out score of a checkpoint."""
  use_compilation_cache()
  trained = restore(arguments.workdir, arguments.step, ema=arguments.ema)
  values = trained.values
  tokenizer_of(trained)
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
    restore_memory(
      arguments.workdir, trained.step, trained.params, values.model
    ),
    values.train.microbatches,
  )
  print(f"{arguments.workdir}, step {trained.step}, held-out text:")
  print(f"  bits per byte        {score.bits_per_byte:.4f}")
  print(f"  loss, nats a token   {score.loss:.4f}")
  print(f"  tokens               {score.tokens:,} of {score.bytes:,} bytes")
  print(f"  MaxVio, all batches  {score.max_vio:.3f}")
  print(f"  MaxVio, a batch      {score.max_vio_batch:.3f}")
  drafts = arguments.drafts if arguments.drafts is not None else 2
  if drafts and values.model.mtp.depth and values.model.attention.kind == "mla":
    model, n_tokens = Decoder(trained.model), min(64, values.data.seq_len // 2)
    for name, sampling in drafting.SAMPLINGS.items():
      accepted = drafting.accepted(
        model, heldout, n_drafts=drafts, sampling=sampling, n_tokens=n_tokens
      )
      print(f"  drafts kept, {name:<8}{kept(accepted, drafts)}")


def find_needles(arguments: argparse.Namespace) -> None:
  """Needle-in-a-haystack of a checkpoint: a table, its rows, a heat map."""
  heatmap.figure_class()  # a missing package is told before the work
  use_compilation_cache()
  text = config.build(_text_values(arguments))
  trained = restore(
    arguments.workdir, arguments.step, ema=arguments.ema, as_stored=True
  )
  limit = needle.trained_length(trained.values)
  if beyond := [n for n in arguments.lengths if n > limit]:
    print(
      f"--lengths: {', '.join(map(str, beyond))}: the model is made for "
      f"{limit} (data.seq_len, or what YaRN makes of it)",
      file=sys.stderr,
    )
  split = "heldout" if text.data.heldout else "train"
  source = batches.Batches(text, 0, split)
  identity.check_tokenizer(trained.meta, source.tokenizer)
  rows = needle.score(
    needle.asker(Decoder(trained.model), batch=arguments.batch),
    needle.Haystack(source.texts(), source.tokenizer),
    arguments.lengths,
    arguments.depths,
    arguments.trials,
    arguments.seed,
  )
  n_cells = len(arguments.lengths) * len(arguments.depths)
  rows = list(tqdm.tqdm(rows, total=n_cells, unit="cell", leave=False))
  name = (
    f"{pathlib.Path(arguments.workdir).resolve().name}, step {trained.step}"
  )
  about = {"run": name, "ema": arguments.ema, "seed": arguments.seed}
  about |= {"sources": text.data.sources, "split": split}
  out = pathlib.Path(arguments.out or f"{arguments.workdir}/needle")
  out.mkdir(parents=True, exist_ok=True)
  needle.write(rows, out / "needle.json", about)
  title = f"{name}: needle in a haystack, {arguments.trials} prompts a cell"
  heatmap.draw(rows, out / "needle.png", title=title)
  print(f"{title}\nrecall, and log-probability of an answer's token:\n")
  print(needle.table(rows))
  print(f"\n{out}: needle.json, needle.png")


def _text_values(arguments: argparse.Namespace) -> ConfigDict:
  """The run's config, with other text if asked for: then with all of that."""
  given = {override.partition("=")[0] for override in arguments.overrides}
  if strange := sorted(key for key in given if not key.startswith("data.")):
    raise ConfigError(
      f"--config.{strange[0]}: the model is the run's, wanted keys of data"
    )
  tree = values_of(arguments)
  whole = {"data.heldout": 0.0, "data.weights": ()}
  if "data.sources" in given:
    overlay.overlay(tree, {k: v for k, v in whole.items() if k not in given})
  return tree
