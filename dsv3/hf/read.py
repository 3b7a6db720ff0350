"""A folder of released weights into arrays of any sharding, tensor by tensor.

Nothing is read before the folder is known to be whole: every tensor of it has
its place, every parameter its tensors. Then each parameter's shards are filled
from the tensors that they need, one after the other, so a host holds what it
keeps and one or two tensors besides.
"""

import collections
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from flax import nnx

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.hf import blocks, configs, names
from dsv3.hf.files import Folder
from dsv3.nn.transformer import Transformer, make_model, split
from dsv3.parallel import mesh as meshes
from dsv3.parallel import placement, sizes
from dsv3.parallel import shardings as shardings_of

_DROPPED = ".rotary_emb.inv_freq"  # older exports hold what is computed


class Source(NamedTuple):
  """A folder that has been checked, and what it becomes."""

  folder: Folder
  values: config.Config
  published: Mapping[str, Any]  # its config.json
  tensors: tuple[names.Tensor, ...]
  notes: tuple[str, ...]  # what is worth telling a user


def open_source(folder: str | pathlib.Path, dtype: str = "float32") -> Source:
  """Checks a folder against its `config.json`, without reading weights.

  `dtype` is what the model will compute in: bfloat16 or float32.

  Raises ConfigError that names a field, a tensor or a file.
  """
  path = pathlib.Path(folder).expanduser() / "config.json"
  try:
    published = json.loads(path.read_text())
  except OSError as error:
    raise ConfigError(f"{path}: {error.strerror}") from error
  except ValueError as error:  # no JSON, or no UTF-8
    raise ConfigError(f"{path}: damaged: {error}") from error
  if not isinstance(published, dict):
    raise ConfigError(f"{path}: found no JSON object")
  files = Folder(folder)
  depth, notes = configs.mtp_layers(published), []
  first = f"model.layers.{published.get('num_hidden_layers')}."
  if depth and not any(name.startswith(first) for name in files.index):
    notes.append(f"config.json speaks of {depth} MTP layers; there are none")
    depth = 0
  try:
    tree = configs.from_hf(published, depth)
  except (TypeError, AttributeError) as error:
    raise ConfigError(f"{path}: a field of a wrong type: {error}") from error
  values = config.build(overlay.overlay(tree, {"model.dtype": dtype}))
  tensors = tuple(_present(files, values.model))
  _check_manifest(files, tensors)
  return Source(files, values, published, tensors, tuple(notes))


def _present(files: Folder, model: config.Model):
  """All tensors but the copies that an export may leave out."""
  for tensor in names.tensors(model):
    if tensor.name in files.index or not tensor.is_copy:
      yield tensor


def _check_manifest(files: Folder, tensors) -> None:
  """Every tensor of the folder has its place, and every place its tensor."""
  left = {n for n in files.index if not n.endswith(_DROPPED)}
  for t in tensors:
    if t.name not in left:
      raise ConfigError(f"{files.folder}: {t.name}: missing")
    left.remove(t.name)
    stored = files.index[t.name]
    where = f"{stored.path}: {t.name}"
    if stored.shape != t.shape:
      raise ConfigError(
        f"{where}: found shape {stored.shape}, wanted {t.shape}"
      )
    if stored.dtype == "F8_E4M3":
      if t.scale_name not in left:
        raise ConfigError(f"{files.folder}: {t.scale_name}: missing")
      left.remove(t.scale_name)
      scale = files.index[t.scale_name]
      found = scale.dtype, scale.shape
      if scale.shape != t.scale_shape or scale.dtype not in ("F32", "F8_E8M0"):
        raise ConfigError(
          f"{scale.path}: {t.scale_name}: found {found}, wanted F32 or F8_E8M0 "
          f"and {t.scale_shape}"
        )
    elif t.dtype == "F32" and stored.dtype != "F32":
      raise ConfigError(f"{where}: found {stored.dtype}, wanted F32")
  if left:
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    raise ConfigError(
      f"{files.folder}: {min(left)}{more}: no place for it in the network of "
      "config.json"
    )


def read_tensor(files: Folder, tensor: names.Tensor) -> np.ndarray:
  """A tensor, dequantised to float32 where it is FP8; finite, or ConfigError."""
  value = files[tensor.name]
  if tensor.scale_name in files.index:
    value = blocks.dequantize(value, files[tensor.scale_name])
  if not np.isfinite(value).all():
    raise ConfigError(
      f"{files.index[tensor.name].path}: {tensor.name}: holds values that are "
      "not finite"
    )
  return value


def read_scales(source: Source) -> dict[str, np.ndarray]:
  """The scales of all FP8 tensors: they give unchanged weights back exactly."""
  files = source.folder
  return {
    t.name: files[t.scale_name]
    for t in source.tensors
    if t.scale_name in files.index
  }


def parameters(
  source: Source,
  *,
  dtype: str = "float32",
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """The structure, parameters and router biases of a checked folder.

  Args:
    dtype: of the parameters; router biases are float32.
    shardings: of parameters by path (`moe/ffn/experts/w_down`); what is not
      named goes to the first device.
  """
  model = source.values.model
  graphdef, *trees = jax.eval_shape(
    lambda: split(make_model(model, jax.random.key(0)))
  )
  by_path = collections.defaultdict(list)
  for tensor in source.tensors:
    for part in tensor.parts:
      if tensor.is_copy:
        check_copy(source.folder, tensor, part)
      else:
        by_path[part.path].append((tensor, part))
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  total = sum(len(parts) for parts in by_path.values())
  bar = tqdm.tqdm(
    total=total, unit=" tensors", desc="read", delay=1, disable=None
  )

  def fill(path, leaf, dtype):
    name = path_text(path)
    parts = by_path.pop(name)
    _check_filled(name, leaf.shape, parts)
    sharding = (shardings or {}).get(name, first)
    return jax.make_array_from_callback(
      leaf.shape,
      sharding,
      lambda index: _shard(source.folder, parts, leaf.shape, index, dtype, bar),
    )

  with bar:
    params, router = (
      jax.tree_util.tree_map_with_path(lambda p, x, d=d: fill(p, x, d), tree)
      for tree, d in zip(trees, (dtype, "float32"))
    )
  assert not by_path, f"no parameter for {sorted(by_path)}"
  return graphdef, params, router


def by_path(*trees: Any) -> dict[str, Any]:
  """The leaves of trees by their paths, as `parameters` names them."""
  return {
    path_text(path): leaf
    for tree in trees
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def path_text(path) -> str:
  """A leaf's path as `Part.path` writes it."""
  keys = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
  return "/".join(keys[:-1] if keys[-1] == "value" else keys)


def check_copy(files: Folder, tensor: names.Tensor, part: names.Part) -> None:
  """The MTP layer's embedding and head are the main model's, or it is not V3."""
  main = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
  a, b = (files[n].view(np.uint8) for n in (tensor.name, main[part.path]))
  if a.shape != b.shape or any(
    not np.array_equal(a[i : i + 4096], b[i : i + 4096])
    for i in range(0, len(a), 4096)
  ):
    raise ConfigError(
      f"{files.folder}: {tensor.name}: differs from {main[part.path]}, with "
      "which it is shared"
    )


def _check_filled(name: str, shape: tuple[int, ...], parts) -> None:
  """Together the parts have as many elements as the parameter."""
  size = 0
  for tensor, part in parts:
    size += part.of(np.broadcast_to(np.int8(0), tensor.shape)).size
  assert size == math.prod(shape), (name, size, shape)


def _shard(files, parts, shape, index, dtype, bar) -> np.ndarray:
  """The slice `index` of a parameter, filled from its parts."""
  ranges = [slice(*s.indices(n)) for s, n in zip(index, shape)]
  out = _aligned([r.stop - r.start for r in ranges], np.dtype(dtype))
  for tensor, part in parts:
    at = list(part.at) + [slice(None)] * (len(shape) - len(part.at))
    inside = all(
      r.start <= a < r.stop for a, r in zip(at, ranges) if isinstance(a, int)
    )
    bar.update(1)
    if not inside:
      continue
    place = tuple(
      a - r.start if isinstance(a, int) else a for a, r in zip(at, ranges)
    )
    rest = [(r, n) for a, r, n in zip(at, ranges, shape) if a == slice(None)]
    value = part.of(read_tensor(files, tensor)).reshape([n for _, n in rest])
    out[place] = value[tuple(r for r, _ in rest)]
  return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """An empty array that a CPU device takes as its own, without a copy."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  first = -raw.ctypes.data % 64
  return raw[first : first + size].view(dtype).reshape(shape)


def load(
  folder: str | pathlib.Path,
  *,
  dtype: str = "float32",
  mesh: config.Mesh | None = None,
) -> Transformer:
  """The model of a folder of released weights, to be computed in `dtype`.

  On a `mesh` every device is given its own part of every tensor and no more, and a
  Decoder of the model decodes there; None is the first device. Raises ConfigError
  for a folder that is not whole, or a mesh that cannot be.

  >>> from dsv3 import config, hf
  >>> on_eight = config.Mesh(expert=8)
  >>> model = hf.load("/data/DeepSeek-V3", mesh=on_eight)  # doctest: +SKIP
  """
  source = open_source(folder, dtype)
  if mesh is None:
    return nnx.merge(*parameters(source, dtype=dtype))
  found = sizes.resolve(mesh, jax.device_count())
  sizes.check_model(found, source.values)
  made = meshes.make(found)
  build = functools.partial(
    make_model, source.values.model, placement=placement.make(found, made)
  )
  graphdef, params, router = jax.eval_shape(
    lambda: split(build(jax.random.key(0)))
  )
  where = by_path(
    shardings_of.weights(params, found, made),
    shardings_of.everywhere(router, made),
  )
  _, *weights = parameters(source, dtype=dtype, shardings=where)
  return nnx.merge(graphdef, *weights)
