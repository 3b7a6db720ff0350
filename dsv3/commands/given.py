"""What a command line gives: a config, the tokenizer of a run."""

import argparse

from ml_collections import ConfigDict

from dsv3 import overlay
from dsv3.config import ConfigError
from dsv3.data import tokenizer
from dsv3.train import identity, run
from dsv3.train.restore import Trained


def values_of(arguments: argparse.Namespace) -> ConfigDict:
  """The config a command line asks for: --config, or that of the run."""
  if arguments.config:
    return overlay.load(arguments.config, arguments.overrides)
  workdir = getattr(arguments, "workdir", None)
  if not workdir:
    raise ConfigError("--config: missing; for example --config=tiny")
  values = run.as_tree(run.stored_config(workdir))
  return overlay.overlay(values, overlay.parse(values, arguments.overrides))


def tokenizer_of(trained: Trained) -> tokenizer.Tokenizer:
  values = trained.values
  found = tokenizer.load(values.data.tokenizer, values.model.vocab_size)
  identity.check_tokenizer(trained.meta, found)
  return found
