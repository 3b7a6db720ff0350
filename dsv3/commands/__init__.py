"""What the sub-commands of `dsv3` do; their arguments are in `dsv3.arguments`.

Imported one at a time: a plan does not wait for JAX.
"""

import importlib
from collections.abc import Callable

COMMANDS = {
  "train": "train:train",
  "eval": "evaluate:evaluate",
  "needle": "evaluate:find_needles",
  "sample": "text:sample",
  "chat": "text:chat",
  "convert": "weights:convert_weights",
  "data": "look:data",
  "diff-paper": "look:diff_paper",
  "params": "look:params",
  "plan": "plan:plan",
  "replay": "replay:replay",
  "routing": "routing:look",
  "sweep": "sweep:sweep",
  "compare": "compare:compare",
  "fp8-report": "fp8:report",
  "launch": "launch:write",
  "tokenizer": "look:train_tokenizer",
}


def command(name: str) -> Callable:
  """The function of a sub-command."""
  module, _, function = COMMANDS[name].partition(":")
  return getattr(importlib.import_module(f"dsv3.commands.{module}"), function)
