"""Types of command-line arguments: of a text a value, or what was wanted."""

import argparse
import math
from collections.abc import Callable


def count(text: str) -> int:
  if not text.isdigit() or int(text) == 0:
    raise argparse.ArgumentTypeError(f"found {text}, wanted 1 or more")
  return int(text)


def list_of(kind: Callable):
  """Reads values of a kind with commas between them, each once, in order."""

  def read(text: str) -> list:
    return sorted({kind(part) for part in text.split(",")})

  return read


def settings(text: str) -> dict[str, int | str]:
  """`key=value` with commas between them; whole numbers are numbers."""
  pairs = [part.partition("=") for part in text.split(",") if part]
  if bad := [key for key, equals, _ in pairs if not equals]:
    raise argparse.ArgumentTypeError(f"found {bad[0]}, wanted key=value")
  return {k: int(v) if v.isdigit() else v for k, _, v in pairs}


def pair(text: str) -> tuple[str, str]:
  key, equals, value = text.partition("=")
  if not equals:
    raise argparse.ArgumentTypeError(f"found {text}, wanted KEY=VALUE")
  return key, value


def whole(text: str) -> int:
  if not text.isdigit():
    raise argparse.ArgumentTypeError(f"found {text}, wanted 0 or more")
  return int(text)


def seed(text: str) -> int:
  if not text.isdigit() or int(text) >= 2**32:
    raise argparse.ArgumentTypeError(f"found {text}, wanted 0 to 2**32 - 1")
  return int(text)


def share(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value < math.inf:
    raise argparse.ArgumentTypeError(f"found {text}, wanted 0 or more")
  return value


def amount(text: str) -> float:
  if not (value := share(text)):
    raise argparse.ArgumentTypeError(f"found {text}, wanted more than 0")
  return value
