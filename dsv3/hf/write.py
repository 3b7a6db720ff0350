"""Arrays as a folder of released weights, file by file.

The inverse of `read`. A file is renamed into place when it is whole, the index
and `config.json` come last, and a second call goes on after the last whole file.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tqdm

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.hf import blocks, configs, names
from dsv3.hf.files import INDEX, ToWrite, read_header, write_file
from dsv3.hf.read import path_text
from dsv3.nn.transformer import Transformer, split

FILE_BYTES = 5 << 30
_STATE = "conversion.json"


def write_folder(
  folder: str | pathlib.Path,
  model: config.Model,
  trees: tuple[Any, ...],
  *,
  fp8: bool = False,
  dtype: str = "bfloat16",
  scales: Mapping[str, np.ndarray] | None = None,
  published: Mapping[str, Any] | None = None,
  identity: Mapping[str, Any] | None = None,
  file_bytes: int = FILE_BYTES,
) -> None:
  """Writes weights under the names of the release.

  Args:
    trees: parameters and router biases.
    fp8: Linears in FP8 blocks, as the release; else in `dtype`.
    scales: of the blocks as they were read: unchanged ones keep theirs.
    published: the `config.json` that the weights came with; None: made from
      the model.
    identity: what is converted; a folder begun with another is left alone.
    file_bytes: of a file; a tensor that is larger gets one of its own.

  Raises:
    ConfigError: the release has no such network, or the folder holds another
      conversion.
  """
  folder = pathlib.Path(folder).expanduser()
  values = _config(model, fp8, dtype, scales, published)
  leaves = {
    path_text(path): leaf
    for tree in trees
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  files = list(
    _files(names.tensors(model), leaves, fp8, dtype, scales, file_bytes)
  )
  _begin(folder, {"identity": identity, "fp8": fp8, "dtype": dtype})
  weight_map, total = {}, 0
  bar = tqdm.tqdm(
    total=sum(t.n_bytes for file in files for t in file),
    unit="B",
    unit_scale=True,
    desc="write",
    delay=1,
    disable=None,
  )
  with bar:
    for i, tensors in enumerate(files):
      path = folder / f"model-{i + 1:05}-of-{len(files):05}.safetensors"
      if not _is_whole(path, tensors):
        write_file(path, tensors)
      size = sum(t.n_bytes for t in tensors)
      bar.update(size)
      total += size
      weight_map |= {t.name: path.name for t in tensors}
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  for name, content in ((INDEX, index), ("config.json", values)):
    draft = folder / f"{name}.tmp"
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(folder / name)
  (folder / _STATE).unlink()


def _config(model, fp8, dtype, scales, published) -> dict[str, Any]:
  values = dict(published) if published else configs.to_hf(model)
  values.pop("quantization_config", None)
  if not model.mtp.depth and "num_nextn_predict_layers" in values:
    values["num_nextn_predict_layers"] = 0
  if fp8:
    values["quantization_config"] = (published or {}).get(
      "quantization_config"
    ) or {
      "activation_scheme": "dynamic",
      "fmt": "e4m3",
      "quant_method": "fp8",
      "weight_block_size": [blocks.BLOCK, blocks.BLOCK],
    }
  else:
    values["torch_dtype"] = dtype
  return values


def _begin(folder: pathlib.Path, state: Mapping[str, Any]) -> None:
  """Refuses a folder that is not empty, unless this conversion has begun it."""
  path, text = folder / _STATE, json.dumps(state, sort_keys=True)
  if path.is_file() and path.read_text() == text:
    return
  if folder.exists() and any(folder.iterdir()):
    raise ConfigError(f"--out={folder}: found files in it, wanted a new folder")
  folder.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def _is_whole(path: pathlib.Path, tensors: list[ToWrite]) -> bool:
  if not path.is_file():
    return False
  found = {n: (s.dtype, s.shape) for n, s in read_header(path).items()}
  return found == {t.name: (t.dtype, tuple(t.shape)) for t in tensors}


def _files(
  tensors, leaves, fp8, dtype, scales, limit
) -> Iterator[list[ToWrite]]:
  file, size = [], 0
  for tensor in tensors:
    made = _to_write(tensor, leaves, fp8, dtype, scales or {})
    more = sum(t.n_bytes for t in made)
    if file and size + more > limit:
      yield file
      file, size = [], 0
    file += made
    size += more
  yield file


def _to_write(tensor, leaves, fp8, dtype, scales) -> list[ToWrite]:
  """A tensor, with its scales if it is FP8."""
  if not (fp8 and tensor.dtype == "F8_E4M3"):
    short = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    kind = "F32" if tensor.dtype == "F32" else short
    make = lambda: _gather(tensor, leaves).astype(
      np.float32 if kind == "F32" else ml_dtypes.bfloat16
    )
    return [ToWrite(tensor.name, kind, tensor.shape, make)]
  scale, pairs = scales.get(tensor.name), []
  # A tensor whose scales are all powers of two goes on with such (V3.1).
  power = scale is not None and bool((np.frexp(scale)[0] == 0.5).all())

  def quantized(i):
    if not pairs:
      weight = _gather(tensor, leaves)
      pairs.extend(blocks.quantize(weight, scale, power_of_two=power))
    value = pairs[i]
    if i == 1:
      pairs.clear()
    return value

  return [
    ToWrite(tensor.name, "F8_E4M3", tensor.shape, lambda: quantized(0)),
    ToWrite(tensor.scale_name, "F32", tensor.scale_shape, lambda: quantized(1)),
  ]


def _gather(tensor: names.Tensor, leaves: Mapping[str, Any]) -> np.ndarray:
  """A tensor from its parts, in the type of the parameters."""
  first = leaves[tensor.parts[0].path]
  out = np.empty(tensor.shape, first.dtype)
  for part in tensor.parts:
    leaf = leaves[part.path]
    part.put(out, np.asarray(leaf[part.at] if part.at else leaf))
  return out


def save(
  model: Transformer, folder: str | pathlib.Path, *, fp8: bool = False, **kwargs
) -> None:
  """Writes a model as `write_folder` says."""
  _, params, router = split(model)
  write_folder(folder, model.model, (params, router), fp8=fp8, **kwargs)
