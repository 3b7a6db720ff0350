"""Configs as diffs: load, overlay, compare.

A config file holds either `get_config()`, which returns a ConfigDict, or
`BASE` (the file it differs from) and `DIFF` (dotted keys and their values). An
overlay never adds a key: a misspelt one is an error that names the nearest.
"""

import ast
import functools
import importlib.util
import pathlib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dsv3 import config as schema
from dsv3.config import ConfigError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def load(name: str, overrides: Iterable[str] = ()) -> ConfigDict:
  """The config `name` with `key=value` overrides, locked.

  `name` is a path, or the bare name of a file in `configs/`.
  """
  values = _load(_find(name, pathlib.Path.cwd()), ())
  overlay(values, parse(values, overrides))
  return values


def base_of(name: str) -> str | None:
  """The path of the config that `name` is a diff of; None for a root."""
  path = _find(name, pathlib.Path.cwd())
  base = getattr(module_of(path), "BASE", None)
  return str(_find(base, path.parent)) if base else None


def text_of(name: str) -> str:
  """The text of the config file `name`, to be kept with what it made."""
  return _find(name, pathlib.Path.cwd()).read_text()


def overlay(values: ConfigDict, diff: Mapping[str, Any]) -> ConfigDict:
  """Sets dotted keys of `values` in place; each must exist and fit its type."""
  with values.ignore_type(), values.unlocked():
    for key, value in diff.items():
      group, leaf = _resolve(values, key)
      if isinstance(group[leaf], ConfigDict):
        raise ConfigError(f"config.{key}: is a group; name a key inside it")
      group[leaf] = schema.coerce(value, _type_of(key), f"config.{key}")
  return values.lock()


def parse(values: ConfigDict, overrides: Iterable[str]) -> dict[str, Any]:
  """`key=value` strings as a diff; values are read by the key's type."""
  diff = {}
  for text in overrides:
    key, equals, value = text.partition("=")
    if not equals:
      raise ConfigError(f"{text}: found no '=', wanted key=value")
    _resolve(values, key)
    diff[key] = _read(value, _type_of(key))
  return diff


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Dotted keys and values of all leaves."""
  out = {}
  for key, value in values.items():
    if isinstance(value, (Mapping, ConfigDict)):
      out |= flat(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = tuple(value) if isinstance(value, list) else value
  return out


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """Dotted keys where `b` departs from `a`, with the pair of values."""
  a, b = flat(a), flat(b)
  return {
    key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)
  }


def _find(name: str, folder: pathlib.Path) -> pathlib.Path:
  file = name if name.endswith(".py") else f"{name}.py"
  for path in (folder / file, CONFIGS / file):
    if path.is_file():
      return path.resolve()
  known = sorted(p.stem for p in CONFIGS.glob("*.py"))
  raise ConfigError(
    f"--config={name}: no such file; there are {', '.join(known)}"
    + schema.nearest(pathlib.Path(name).stem, known)
  )


def module_of(path: pathlib.Path):
  """The module in a file of names and diffs; ConfigError if it cannot run."""
  spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
  return module


def _load(path: pathlib.Path, seen: tuple[pathlib.Path, ...]) -> ConfigDict:
  if path in seen:
    raise ConfigError(f"{path}: BASE leads back to itself")
  module = module_of(path)
  if hasattr(module, "get_config"):
    try:
      return module.get_config().lock()
    except Exception as error:
      raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
  if not hasattr(module, "BASE") or not hasattr(module, "DIFF"):
    raise ConfigError(f"{path}: found neither get_config nor BASE and DIFF")
  diff, base = module.DIFF, module.BASE
  if not isinstance(diff, Mapping) or not all(isinstance(k, str) for k in diff):
    raise ConfigError(f"{path}: DIFF: found {diff!r}, wanted a dict of names")
  if not isinstance(base, str):
    raise ConfigError(f"{path}: BASE: found {base!r}, wanted a config's name")
  values = _load(_find(base, path.parent), (*seen, path))
  try:
    return overlay(values, diff)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error


def _resolve(values: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  group, parts = values, key.split(".")
  for depth, part in enumerate(parts):
    if not isinstance(group, ConfigDict) or part not in group:
      raise ConfigError(f"config.{key}: no such key{_suggest(values, key)}")
    if depth < len(parts) - 1:
      group = group[part]
  return group, parts[-1]


def _suggest(values: ConfigDict, key: str) -> str:
  known = list(flat(values))
  same = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
  if same:
    return f"; did you mean {same[0]}?"
  return schema.nearest(key, known)


@functools.cache
def _type_of(key: str) -> Any:
  kind = schema.Config
  for part in key.split("."):
    kind = typing.get_type_hints(kind)[part]
  return kind


def _read(text: str, kind: Any) -> Any:
  """A command line's text as a value of `kind`; `coerce` judges the result."""
  if kind is str or typing.get_origin(kind) is typing.Literal:
    return text
  if typing.get_origin(kind) is tuple and not text.lstrip().startswith("("):
    inner = kind.__args__[0]
    return tuple(_read(part, inner) for part in text.split(",") if part)
  if kind is bool:
    return {"true": True, "false": False}.get(text.lower(), text)
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError, TypeError):
    return text
