"""The `dsv3` command.

Arguments are in `dsv3.arguments`, sub-commands in `dsv3.commands`, imported after
the arguments are read: `--help` does not wait for JAX. An error of the user's input
is one line and exit code 2, a run that failed is one line and exit code 1.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from dsv3 import arguments as known


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
  """Ordinary arguments, and the `key=value` of every `--config.key=value`."""
  rest, overrides = [], []
  words = iter(words)
  for word in words:
    if not word.startswith("--config."):
      rest.append(word)
      continue
    key = word.removeprefix("--config.")
    overrides.append(key if "=" in key else f"{key}={next(words, '')}")
  return rest, overrides


def main(words: Sequence[str] | None = None) -> int:
  """Runs a command line; returns its exit code."""
  rest, overrides = _split_overrides(sys.argv[1:] if words is None else words)
  arguments = known.parser().parse_args(rest)
  arguments.overrides = tuple(overrides)
  if overrides and not hasattr(arguments, "config"):
    return _fail(f"{arguments.command} takes no --config.{overrides[0]}", 2)
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells its steps

  from dsv3 import commands
  from dsv3.errors import TOLD, ConfigError

  try:
    return commands.command(arguments.command)(arguments) or 0
  except ConfigError as error:
    return _fail(error, 2)
  except BrokenPipeError:  # the reader, `head` for one, has had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  except TOLD as error:
    return _fail(error, 1)
  except KeyboardInterrupt:
    print("dsv3: stopped at once", file=sys.stderr)
    sys.stderr.flush()
    os._exit(130)  # not waiting for a save: what is half saved does not count


def _fail(error: object, code: int) -> int:
  print(f"dsv3: error: {error}", file=sys.stderr)
  return code
