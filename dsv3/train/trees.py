"""A state as the items of a checkpoint, and an item as arrays by name."""

from collections.abc import Mapping
from typing import Any

import jax

from dsv3.train.state import TrainState

Trees = dict[str, Any]  # name of an item -> pytree
COUNTERS = ("step", "skipped", "skipped_total")


def trees_of(state: TrainState, host_ema: Any = None) -> Trees:
  """The items of a checkpoint; an item without arrays is left out."""
  trees = {
    "params": state.params,
    "router": state.router,
    "optimizer": state.opt_state,
    "ema": state.ema if host_ema is None else host_ema,
    "amax": state.precision.history,
    "guarded": state.precision.high,
    "counters": {name: getattr(state, name) for name in COUNTERS},
  }
  return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def state_of(trees: Mapping[str, Any], like: TrainState) -> TrainState:
  """The TrainState in `trees`; what has no arrays comes from `like`.

  A part of `precision` is None where the checkpoint has it not, or of another
  recipe.
  """
  memory = like.precision
  remembered = lambda item, part: trees.get(item, None if part else part)
  return TrainState(
    **{name: trees["counters"][name] for name in COUNTERS},
    params=trees["params"],
    opt_state=trees.get("optimizer", like.opt_state),
    router=trees.get("router", like.router),
    ema=None if like.ema is None else trees["ema"],
    precision=memory._replace(
      history=remembered("amax", memory.history),
      high=remembered("guarded", memory.high),
    ),
  )


def abstract(trees: Trees, shardings: Mapping[str, Any] | None = None) -> Trees:
  """What `restore` needs to give arrays of these shapes: where each is to lie.

  That is as `shardings` say, whatever mesh a checkpoint was saved on, or on the
  first device.
  """
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def of_item(item, tree):
    where = jax.tree.map(lambda _: device, tree)
    where = where if shardings is None else shardings[item]
    leaf = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    return jax.tree.map(leaf, tree, where)

  return {item: of_item(item, tree) for item, tree in trees.items()}


def _names(path) -> list[str]:
  """Keys of a leaf's path; a Variable's own `.value` is no level of its own."""
  keys = [
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))))
    for k in path
  ]
  return keys[:-1] if keys[-1] == "value" else keys


def by_name(tree: Any) -> dict[str, Any]:
  """A pytree as nested dicts of its leaves."""
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    group, names = out, _names(path)
    for name in names[:-1]:
      group = group.setdefault(name, {})
    group[names[-1]] = leaf
  return out


def from_names(like: Any, named: Mapping[str, Any]) -> Any:
  """Inverse of `by_name`: the leaves of `named` in the structure of `like`."""

  def find(path, _):
    value = named
    for name in _names(path):
      value = value[name]
    return value

  return jax.tree_util.tree_map_with_path(find, like)


def dtypes(named: Mapping[str, Any]) -> dict[str, str]:
  return {
    "/".join(_names(path)): str(leaf.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(named)
  }


def shapes(named: Mapping[str, Any]) -> dict[str, list[int]]:
  return {
    "/".join(_names(path)): list(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(named)
  }


def is_there(item: str, tree: Any, meta: Mapping[str, Any]) -> bool:
  """Has a checkpoint the arrays of an item, and no others?"""
  wanted = shapes({item: by_name(tree)})
  stored = meta.get("shapes", {})
  return wanted == {
    name: shape for name, shape in stored.items() if name.startswith(f"{item}/")
  }
