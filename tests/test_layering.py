"""Who may import whom: the table of the design, over every file of the tree."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = {  # layer: packages from outside that it may import, if limited
  "errors": set(),
  "config_check": set(),
  "config": {"ml_collections"},
  "overlay": {"ml_collections"},
  "ops": {"jax", "numpy", "chex"},
  "nn": {"jax", "numpy", "flax"},
  "configs": {"ml_collections"},
  "oracle": {"numpy"},
}
LOWER = {"errors", "config", "overlay", "cache", "huge_pages"}
MODEL = LOWER | {"ops", "nn", "parallel", "data"}
USERS = {"train", "infer", "eval", "hf", "plan"}
INSIDE = {  # layer: layers of ours that it may import
  "errors": set(),
  "config_check": {"errors"},
  "config": {"config_check", "errors"},
  "overlay": {"config"},
  "cache": set(),
  "huge_pages": set(),
  "ops": set(),
  "nn": {"ops", "config"},
  "parallel": {"ops", "config", "errors"},
  "data": LOWER,
  **{layer: MODEL | USERS for layer in USERS},
  "configs": set(),
  "oracle": set(),
}
TOP = {
  "__main__",
  "cli",
  "arguments",
  "argument_types",
  "commands",
  "lab",
  "bench",
}  # these import everything
FORBIDDEN = {"data": {"jax", "flax", "optax"}}
# tokamax is optional and imported where it is asked for, with absl, which it needs.
LAZY = {"dsv3/ops/grouped.py": {"tokamax", "absl"}}


def layer_of(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  if parts[0] == "configs":
    return "configs"
  if parts[:2] == ("tests", "oracle"):
    return "oracle"
  return parts[1]


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports, at any depth of its code."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def violations(path: pathlib.Path) -> list[str]:
  layer, out = layer_of(path), []
  lazy = LAZY.get(str(path.relative_to(ROOT)), set())
  for name in imports(path):
    package, *rest = name.split(".")
    if package == "experiments":
      out.append(name)
    elif package == "dsv3":
      target = rest[0]
      if layer in INSIDE and target not in INSIDE[layer] | {
        layer,
        "__version__",
      }:
        out.append(name)
    elif package == "tests":
      if layer != "oracle" or rest[0] != "oracle":
        out.append(name)
    elif package not in sys.stdlib_module_names:
      limited = OUTSIDE.get(layer)
      if limited is not None and package not in limited | lazy:
        out.append(name)
      if package in FORBIDDEN.get(layer, ()):
        out.append(name)
  return sorted(out)


FILES = sorted(
  p
  for d in ("dsv3", "configs", "tests/oracle")
  for p in (ROOT / d).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
  assert violations(path) == []


def test_every_folder_of_dsv3_has_its_place():
  layers = {layer_of(p) for p in FILES}
  assert layers - INSIDE.keys() - TOP == {"__init__"}


def test_nn_names_no_mesh():
  """Sharding is handed to the modules as a value (parallel alone has meshes)."""
  for path in (ROOT / "dsv3" / "nn").glob("*.py"):
    assert not any("sharding" in name for name in imports(path)), path
