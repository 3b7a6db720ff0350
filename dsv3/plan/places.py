"""Where in a training step something is, by the names that a program keeps.

A name is a path of scopes: `jit(train_step)/while/body/transpose(jvp(moe))/...`
is in the backward pass of a MoE layer.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from dsv3 import config

# The outermost scope, and what it is to people; in the order of a step.
PARTS = {
  "quantise": "weights quantised",  # of a recipe's, once a step
  "embedding": "embedding",
  "dense": "dense layer",
  "moe": "MoE layer",
  "mtp": "MTP module",
  "head": "head",
  "gradients": "gradients of several",  # that XLA has made one array of
  "optimizer": "optimizer",
  "other": "other",
}
_SCOPE = re.compile(
  r"[/(](quantise|embedding|dense|moe|mtp|head|optimizer)(?=[/)])"
)
_ONCE = ("quantise", "optimizer", "other")  # a step, without a backward pass


class Place(NamedTuple):
  """A part of the step, and whether it is there in the backward pass."""

  part: str
  backward: bool = False

  def __str__(self) -> str:
    if self.part in (*_ONCE, "gradients"):
      return PARTS[self.part]
    return f"{PARTS[self.part]}, {'backward' if self.backward else 'forward'}"


OTHER = Place("other")


def of_name(name: str) -> Place | None:
  """The place of an op_name, or None where it has no scope of ours.

  >>> str(of_name("jit(train_step)/transpose(jvp(moe))/while/body/eq12/psum"))
  'MoE layer, backward'
  """
  found = _SCOPE.search(name)
  return found and Place(found[1], "transpose(" in name[: found.start() + 1])


def of_names(names: Iterable[str]) -> Place | None:
  """The one place of all names that have any; None where none has."""
  found = {of_name(name) for name in names} - {None}
  if len(found) < 2:
    return next(iter(found), None)
  parts = {place.part for place in found}
  if len(parts) == 1:
    return Place(*parts, backward=True)  # what is recomputed has both names
  if "optimizer" in parts:  # it comes last
    return Place("optimizer")
  return Place("gradients") if all(p.backward for p in found) else OTHER


def split(name: str) -> list[str]:
  """The names that XLA has written as one, of operations that it has joined.

  >>> split("jit(f)/(jvp(moe)/psum:jvp()/add)")
  ['jit(f)/jvp(moe)/psum', 'jit(f)/jvp()/add']
  """
  start = re.search(r"(^|/)\((?=.*\)$)", name)
  if not start:
    return [name]
  before, inside = name[: start.end() - 1], name[start.end() : -1]
  parts, depth = [""], 0
  for letter in inside:
    depth += (letter == "(") - (letter == ")")
    if letter == ":" and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return [one for part in parts for one in split(before + part)]


def times(part: str, values: config.Config) -> tuple[int, int]:
  """How many layers a part is, and how often each runs in a step."""
  m, microbatches = values.model, values.train.microbatches
  layers = {
    "dense": m.n_layers - m.n_moe_layers,
    "moe": m.n_moe_layers,
    "mtp": m.mtp.depth,
  }
  return max(layers.get(part, 1), 1), 1 if part in _ONCE else microbatches


def rounded(number: float) -> str:
  """As a table has it: whole, or to three digits.

  >>> rounded(2.0), rounded(1 / 3)
  ('2', '0.333')
  """
  if number == round(number):
    return f"{number:,.0f}"
  return f"{number:,.{max(2 - math.floor(math.log10(number)), 0)}f}"
