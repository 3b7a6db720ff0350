"""The weights that an imported run begins with.

They lie in RUN/hf as a folder of the release: its names, in the type that was
asked for, one file after the other, so that an import goes on where it was
killed and holds no more than a tensor. `source.json` keeps the `config.json`
they came with, `scales.npz` the scales of FP8 blocks that were expanded: with
both the way back is exact.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.hf import files, names, read, write
from dsv3.nn.transformer import make_model, split

COMPUTE = {"bfloat16": "bfloat16", "float32": "float32", "fp8": "bfloat16"}


def folder_of(workdir: str | pathlib.Path) -> pathlib.Path:
  """Where a run keeps the weights it was made of."""
  return pathlib.Path(workdir) / "hf"


def is_there(workdir: str | pathlib.Path) -> bool:
  """Whether a run was imported, and wholly."""
  return (folder_of(workdir) / "config.json").is_file()


def write_weights(
  workdir: pathlib.Path, source: read.Source, dtype: str
) -> None:
  """Writes a checked folder's weights into a run, in bfloat16, float32 or fp8.

  Raises ConfigError for values that are not finite, and where another import
  was begun.
  """
  folder, stored = folder_of(workdir), source.folder.index.values()
  origin = {
    "from": str(source.folder.folder.resolve()),
    "bytes": sum(s.end - s.begin for s in stored),
    "dtype": dtype,
  }
  if is_there(workdir) and _origin(workdir) == origin:
    return  # whole, and killed just after
  write.write_groups(
    folder,
    _groups(source, dtype),
    write.release_config(source.published, dtype, source.values.model),
    origin,
    beside=lambda: _write_beside(folder, source, origin),
  )


def _write_beside(folder, source, origin) -> None:
  scales = {} if origin["dtype"] == "fp8" else read.read_scales(source)
  if scales:
    # NumPy's format has no type for the eight bits of a power of two.
    kept = {
      n: x.view(np.uint8) if x.itemsize == 1 else x for n, x in scales.items()
    }
    np.savez(folder / "scales.npz", **kept)
  text = json.dumps({**origin, "config": source.published}, indent=2)
  (folder / "source.json").write_text(text)


def _origin(workdir) -> dict[str, Any]:
  values = json.loads((folder_of(workdir) / "source.json").read_text())
  return {key: values[key] for key in ("from", "bytes", "dtype")}


def _groups(source: read.Source, dtype: str) -> Iterator[list[files.ToWrite]]:
  stored = source.folder
  for tensor in source.tensors:
    for part in tensor.parts if tensor.is_copy else ():
      read.check_copy(stored, tensor, part)
    if dtype == "fp8" and tensor.scale_name in stored.index:
      yield _as_stored(stored, tensor)
    else:
      make = lambda t=tensor: read.read_tensor(stored, t)
      yield write.to_write(tensor, make, dtype)


def _as_stored(
  folder: files.Folder, tensor: names.Tensor
) -> list[files.ToWrite]:
  """FP8 blocks and their scales, byte for byte."""

  def make(name):
    if name == tensor.name:
      read.read_tensor(folder, tensor)  # finite, or an error
    return folder[name]

  found = [(n, folder.index[n]) for n in (tensor.name, tensor.scale_name)]
  return [
    files.ToWrite(n, stored.dtype, stored.shape, lambda n=n: make(n))
    for n, stored in found
  ]


def parameters(
  workdir: str | pathlib.Path,
  model: config.Model,
  *,
  as_stored: bool = False,
  shardings: Mapping[str, Any] | None = None,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """Structure, parameters and router biases of an imported run.

  Parameters are float32, or with `as_stored` in the type of the import, where
  FP8 blocks are expanded to bfloat16. `shardings` are trees of "params" and
  "router"; None: all on one device. Raises ConfigError if `model` has other
  ones.
  """
  source = read.open_source(folder_of(workdir))
  check_fits(model, source.values.model, str(workdir))
  dtype = _stored_type(source) if as_stored else "float32"
  named = read.by_path(*(shardings or {}).values())
  _, *trees = read.parameters(source, dtype=dtype, shardings=named)
  graphdef, *_ = _abstract(model)
  return graphdef, *trees


# What may change between weights and the network that goes on with them: how
# it is computed, how experts are balanced, and how far positions reach.
_FREE = (
  *("dtype", "layers", "remat", "attention.kernel", "moe.kernel"),
  *(
    "init_std",
    "moe.balancing",
    "moe.bias_step",
    "rope.yarn_factor",
    "rope.original_len",
  ),
  *("rope.beta_fast", "rope.beta_slow", "rope.mscale"),
)


def check_fits(model: config.Model, other: config.Model, where: str) -> None:
  """Raises ConfigError unless weights of `other`, in `where`, mean the same."""
  pairs = overlay.difference(
    dataclasses.asdict(other), dataclasses.asdict(model)
  )
  for key, (a, b) in pairs.items():
    free = key in _FREE or key.startswith("precision.")
    if not free or model.moe.has_bias != other.moe.has_bias:
      raise ConfigError(
        f"config.model.{key}: found {b!r}, wanted {a!r}, that of the weights "
        f"in {where}"
      )


def _abstract(model: config.Model):
  """Structure, parameters and router biases, without memory."""
  return jax.eval_shape(lambda: split(make_model(model, jax.random.key(0))))


def _stored_type(source: read.Source) -> str:
  kinds = {source.folder.index[t.name].dtype for t in source.tensors}
  return "float32" if kinds == {"F32"} else "bfloat16"


def way_back(
  workdir: str | pathlib.Path,
) -> tuple[Mapping[str, Any] | None, Mapping[str, np.ndarray] | None]:
  """The `config.json` and FP8 scales that a run's weights came with, or None."""
  folder = folder_of(workdir)
  if not is_there(workdir):
    return None, None
  published = json.loads((folder / "source.json").read_text())["config"]
  if (folder / "scales.npz").is_file():
    with np.load(folder / "scales.npz") as file:
      kept = {name: file[name] for name in file.files}
    bits = files.DTYPES["F8_E8M0"]
    return published, {
      n: x.view(bits) if x.itemsize == 1 else x for n, x in kept.items()
    }
  return published, read.read_scales(read.open_source(folder))
