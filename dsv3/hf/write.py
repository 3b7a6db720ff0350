"""Arrays as a folder of released weights, file by file.

The inverse of `read`. A file is renamed into place when it is whole, the index
and `config.json` come last, and a second call goes on after the last whole file.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from dsv3 import config
from dsv3.config import ConfigError
from dsv3.hf import blocks, configs, files, names, read
from dsv3.hf.files import INDEX, ToWrite, read_header, write_file
from dsv3.hf.read import path_text
from dsv3.nn.transformer import Transformer, split

FILE_BYTES = 5 << 30
STATE = "conversion.json"  # while a folder is not whole
_SHORT = {"bfloat16": "BF16", "float32": "F32", "fp8": "BF16"}


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
  file_bytes: int | None = None,
) -> None:
  """Writes weights under the names of the release.

  Args:
    trees: parameters and router biases.
    fp8: Linears in FP8 blocks, as the release; else in `dtype`.
    scales: of the blocks as they were read: unchanged ones keep theirs.
    published: the `config.json` that the weights came with; None: made from
      the model.
    identity: what is converted; a folder begun with another is left alone.
    file_bytes: of a file, 5 GiB if not given; a tensor that is larger gets one
      of its own.

  Raises:
    ConfigError: the release has no such network, or the folder holds another
      conversion.
  """
  leaves = {
    path_text(path): leaf
    for tree in trees
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  kept, kind = scales or {}, "fp8" if fp8 else dtype
  values = release_config(published or configs.to_hf(model), kind, model)
  groups = (
    to_write(t, lambda t=t: _gather(t, leaves), kind, kept.get(t.name))
    for t in names.tensors(model)
  )
  state = {"identity": identity, "dtype": kind}
  write_groups(folder, groups, values, state, file_bytes)


def write_groups(
  folder: str | pathlib.Path,
  groups: Iterable[list[ToWrite]],
  published: Mapping[str, Any],
  state: Mapping[str, Any],
  file_bytes: int | None = None,
  beside: Callable[[], None] = lambda: None,
) -> None:
  """Writes groups of tensors, each to one file, and goes on where it was killed.

  `published` becomes `config.json`, `beside` writes what else belongs there.
  `state` says what is converted: a folder that was begun with another raises
  ConfigError.
  """
  folder = pathlib.Path(folder).expanduser()
  parts = list(_files(groups, file_bytes or FILE_BYTES))
  _begin(folder, state)
  weight_map, total = {}, 0
  bar = tqdm.tqdm(
    total=sum(t.n_bytes for part in parts for t in part),
    unit="B",
    unit_scale=True,
    desc="write",
    delay=1,
    disable=None,
  )
  with bar:
    for i, tensors in enumerate(parts):
      path = folder / f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
      if not _is_whole(path, tensors):
        write_file(path, tensors, bar.update)
      else:
        bar.update(sum(t.n_bytes for t in tensors))
      total += sum(t.n_bytes for t in tensors)
      weight_map |= {t.name: path.name for t in tensors}
  beside()
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  for name, content in ((INDEX, index), ("config.json", published)):
    draft = folder / f"{name}.tmp"
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(folder / name)
  (folder / STATE).unlink()


def release_config(
  published: Mapping[str, Any], kind: str, model: config.Model
) -> dict[str, Any]:
  """A `config.json` for the weights of a model, kept as `kind`."""
  values = dict(published)
  block_format = values.pop("quantization_config", None) or {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [blocks.BLOCK, blocks.BLOCK],
  }
  if not model.mtp.depth and "num_nextn_predict_layers" in values:
    values["num_nextn_predict_layers"] = 0
  if kind == "fp8":
    values["quantization_config"] = block_format
  else:
    values["torch_dtype"] = kind
  return values


def _begin(folder: pathlib.Path, state: Mapping[str, Any]) -> None:
  """Refuses a folder that is not empty, unless this conversion has begun it."""
  path, text = folder / STATE, json.dumps(state, sort_keys=True)
  if path.is_file() and path.read_text() == text:
    return
  if path.is_file():
    raise ConfigError(
      f"{folder}: holds an unfinished conversion of something else; delete it "
      "to begin anew"
    )
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
  groups: Iterable[list[ToWrite]], limit: int
) -> Iterator[list[ToWrite]]:
  file, size = [], 0
  for group in groups:
    more = sum(t.n_bytes for t in group)
    if file and size + more > limit:
      yield file
      file, size = [], 0
    file += group
    size += more
  yield file


def to_write(
  tensor: names.Tensor,
  make: Callable[[], np.ndarray],
  kind: str,
  scale: np.ndarray | None = None,
) -> list[ToWrite]:
  """A tensor in bfloat16 or float32, or in fp8 with its scales.

  `make` gives it when it is due; `scale` is what it was scaled with before.
  What the release never quantises is bfloat16 where `kind` is fp8.
  """
  if not (kind == "fp8" and tensor.dtype == "F8_E4M3"):
    short = "F32" if "F32" in (tensor.dtype, _SHORT[kind]) else "BF16"
    cast = lambda: make().astype(files.DTYPES[short])
    return [ToWrite(tensor.name, short, tensor.shape, cast)]
  pairs, kept = [], None if scale is None else scale.astype(np.float32)
  # A tensor whose scales are all powers of two goes on with such (V3.1).
  power = kept is not None and bool((np.frexp(kept)[0] == 0.5).all())
  short = scale is not None and scale.dtype == files.DTYPES["F8_E8M0"]

  def quantized(i):
    if not pairs:
      pairs.extend(blocks.quantize(make(), kept, power_of_two=power))
    value = pairs[i].astype(scale.dtype) if i and short else pairs[i]
    if i == 1:
      pairs.clear()
    return value

  return [
    ToWrite(tensor.name, "F8_E4M3", tensor.shape, lambda: quantized(0)),
    ToWrite(
      tensor.scale_name,
      "F8_E8M0" if short else "F32",
      tensor.scale_shape,
      lambda: quantized(1),
    ),
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
  model: Transformer,
  folder: str | pathlib.Path,
  *,
  fp8: bool = False,
  dtype: str | None = None,
  like: str | pathlib.Path | None = None,
  **kwargs,
) -> None:
  """Writes a model under the names of the release, as `write_folder` says.

  Args:
    dtype: bfloat16 or float32, of what is not FP8; None: that of the model's
      parameters.
    like: the folder that the model was loaded from: its config.json is kept,
      and FP8 blocks that have not changed come out byte for byte.

  >>> from dsv3 import hf
  >>> model = hf.load("/data/DeepSeek-V3")  # doctest: +SKIP
  >>> hf.save(model, "out", fp8=True, like="/data/DeepSeek-V3")  # doctest: +SKIP
  """
  _, params, router = split(model)
  dtype = dtype or str(jax.tree.leaves(params)[0].dtype)
  if dtype not in ("bfloat16", "float32"):
    raise ConfigError(f"dtype: found {dtype}, wanted bfloat16 or float32")
  if like is not None:
    source = read.open_source(like)
    kwargs = {
      "scales": read.read_scales(source),
      "published": source.published,
      **kwargs,
    }
  write_folder(
    folder, model.model, (params, router), fp8=fp8, dtype=dtype, **kwargs
  )
