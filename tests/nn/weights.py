"""Our stacked NNX states under the oracle's names and back: the one place.

The oracle and the golden files keep a list of layers, we keep stacks with the
layer in front. Keys here are flat: "layers/2/attn/w_uk", "mtp/0/block/...".
"""

import json
import pathlib

import jax
import numpy as np

from dsv3 import config
from dsv3.nn import transformer
from dsv3.ops.placement import ONE_DEVICE
from dsv3.train import step
from tests import micro
from tests.oracle import mtp

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"

# Names inside a block that differ; all others are equal.
_THEIRS = {
  "attention_norm/gain": "attn_norm",
  "ffn_norm/gain": "ffn_norm",
  "attention/queries/norm/gain": "attn/q_norm",
  "attention/kv_norm/gain": "attn/kv_norm",
  "hnorm/gain": "hnorm",
  "enorm/gain": "enorm",
  "norm/gain": "norm",
}
_PREFIXES = (
  ("attention/queries/", "attn/"),
  ("attention/", "attn/"),
  ("ffn/router/", "ffn/"),
)


def _theirs(name: str) -> str:
  if name.startswith("block/"):
    return "block/" + _theirs(name.removeprefix("block/"))
  if name in _THEIRS:
    return _THEIRS[name]
  for ours, theirs in _PREFIXES:
    if name.startswith(ours):
      return theirs + name.removeprefix(ours)
  return name


def keys_of(path, size: int, model: config.Model) -> str | list[str]:
  """The oracle's key of a leaf, or its keys if the leaf is a stack of `size`."""
  names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
  names = names[:-1] if names[-1] == "value" else names
  stack, rest = names[0], _theirs("/".join(names[1:]))
  first = model.n_layers - model.n_moe_layers if stack == "moe" else 0
  group = {"dense": "layers", "moe": "layers", "mtp": "mtp"}.get(stack)
  if group is None:
    return _theirs("/".join(names))
  return [f"{group}/{first + i}/{rest}" for i in range(size)]


def to_oracle(tree, model: config.Model) -> dict[str, np.ndarray]:
  """Leaves of parameters, gradients or router biases, by the oracle's keys."""
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    keys = keys_of(path, len(leaf), model)
    if isinstance(keys, str):
      out[keys] = np.asarray(leaf)
    else:
      out |= dict(zip(keys, np.asarray(leaf)))
  for key in [key for key in out if key.endswith("w_gate_up")]:
    value, ffn = out.pop(key), key.removesuffix("w_gate_up")
    out[ffn + "w_gate"], out[ffn + "w_up"] = value[..., 0, :], value[..., 1, :]
  return out


def from_oracle(
  flat: dict[str, np.ndarray], model: config.Model, placement=ONE_DEVICE
):
  """Structure, parameters and router biases of a model with these weights."""
  make = lambda: transformer.make_model(model, jax.random.key(0), placement)
  graphdef, *trees = jax.eval_shape(lambda: transformer.split(make()))

  def get(key):
    if not key.endswith("w_gate_up"):
      return flat[key]
    ffn = key.removesuffix("w_gate_up")
    return np.stack([flat[ffn + "w_gate"], flat[ffn + "w_up"]], axis=-2)

  def find(path, leaf):
    keys = keys_of(path, len(leaf), model)
    found = get(keys) if isinstance(keys, str) else np.stack([*map(get, keys)])
    assert found.shape == leaf.shape, (path, found.shape, leaf.shape)
    return found.astype(np.float32)

  return graphdef, *(jax.tree_util.tree_map_with_path(find, t) for t in trees)


def nested(flat: dict[str, np.ndarray]) -> dict:
  """Flat keys as the nested dict, with lists of layers, the oracle takes."""
  out = {}
  for key, value in flat.items():
    *groups, name = key.split("/")
    group = out
    for part in groups:
      group = group.setdefault(part, {})
    group[name] = np.asarray(value, np.float64)
  for name in {"layers", "mtp"} & out.keys():
    out[name] = [out[name][str(i)] for i in range(len(out[name]))]
  return out


def golden(name: str, diff: dict | None = None):
  """A golden file: its config as ours, its weights, and all its arrays."""
  data = np.load(GOLDEN / f"{name}.npz")
  flat = {
    key.removeprefix("param/"): data[key]
    for key in data.files
    if key.startswith("param/")
  }
  values = golden_config(json.loads(str(data["config"])), diff)
  return values, flat, data


def golden_config(model: dict, diff: dict | None = None) -> config.Config:
  """A golden file's `model` group as a whole config, 24 positions."""
  fields = {}
  for key, value in model.items():
    group = value if isinstance(value, dict) else {None: value}
    for name, leaf in group.items():
      fields[f"model.{key}.{name}" if name else f"model.{key}"] = leaf
  return micro.config_of({**fields, "data.seq_len": 24, **(diff or {})})


def random(model: config.Model, std: float = 0.3) -> dict[str, np.ndarray]:
  """Weights of deviation `std`, gains near one, negative biases: flat keys."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    lambda: transformer.split(transformer.make_model(model, jax.random.key(0)))[
      1:
    ]
  )
  fake = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
  flat = {}
  for tree in fake:
    flat |= to_oracle(tree, model)
  draw = {}
  for key, value in sorted(flat.items()):
    noise = rng.normal(size=value.shape)
    if key.endswith("norm"):
      draw[key] = 1 + 0.3 * noise
    elif key.endswith("bias"):
      draw[key] = 0.3 * noise - 0.5  # negative ones, so that masks matter
    elif key == "embed":
      draw[key] = noise
    else:
      draw[key] = std * noise
    draw[key] = draw[key].astype(np.float32)
  return draw


def batch_of(rows, depth: int, segments=None) -> step.Batch:
  """Rows of L + 1 tokens as a batch, with the oracle's labels."""
  rows = np.asarray(rows)
  segments = np.ones_like(rows) if segments is None else np.asarray(segments)
  labels_BPL = np.full((len(rows), 1 + depth, rows.shape[1] - 1), -1, np.int32)
  for b, p, i in np.ndindex(labels_BPL.shape):
    wanted = mtp.label(rows[b], segments[b], i, p)
    if wanted is not None:
      labels_BPL[b, p, i] = wanted
  tokens_BL, segments_BL = rows[:, :-1], segments[:, :-1]
  return step.Batch(
    *(x.astype(np.int32) for x in (tokens_BL, labels_BPL, segments_BL))
  )
