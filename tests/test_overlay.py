"""Configs as diffs: command-line overrides, files, differences."""

import pytest

from dsv3 import overlay
from dsv3.config import ConfigError
from tests import micro


def error_of(function, *args) -> str:
  with pytest.raises(ConfigError) as error:
    function(*args)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("train.steps=20", 20),
    ("train.steps=2e1", 20),
    ("schedule.lr_peak=1e-3", 1e-3),
    ("schedule.lr_peak=1", 1.0),
    ("data.mask_documents=true", True),
    ("data.mask_documents=False", False),
    ("data.sources=a.txt,b.txt", ("a.txt", "b.txt")),
    ("data.weights=1,2.5", (1.0, 2.5)),
    ("data.weights=(1, 2)", (1.0, 2.0)),
    ("model.attention.kind=gqa", "gqa"),
    ("data.tokenizer=a=b", "a=b"),
    ("name=7", "7"),
  ],
)
def test_overrides_are_read_by_the_type_of_the_key(text, wanted):
  values = overlay.load("tiny", [text])
  found = overlay.flat(values)[text.partition("=")[0]]
  assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
  "text, wanted",
  [
    (
      "train.step=1",
      "config.train.step: no such key; did you mean train.steps?",
    ),
    ("dim=64", "config.dim: no such key; did you mean model.dim?"),
    (
      "model.moe.topk=2",
      "config.model.moe.topk: no such key; did you mean model.moe.top_k?",
    ),
    ("model.dim.x=2", "config.model.dim.x: no such key"),
    ("train.steps", "train.steps: found no '=', wanted key=value"),
    ("train.steps=many", "config.train.steps: found 'many', wanted int"),
    (
      "data.mask_documents=maybe",
      "config.data.mask_documents: found 'maybe', wanted bool",
    ),
    (
      "model.attention.kind=mqa",
      "config.model.attention.kind: found 'mqa', wanted one of mla, mha, gqa",
    ),
  ],
)
def test_a_bad_override_is_one_line_that_names_the_nearest(text, wanted):
  assert error_of(overlay.load, "tiny", [text]).startswith(wanted)


def test_a_group_is_no_value():
  assert "model.moe: is a group" in error_of(
    overlay.load, "tiny", ["model.moe=3"]
  )


def test_an_unknown_config_names_the_nearest_file():
  message = error_of(overlay.load, "v3_617b")
  assert message.startswith("--config=v3_617b: no such file; there are tiny, ")
  assert message.endswith("did you mean v3_671b?")


def write(folder, text):
  path = folder / "mine.py"
  path.write_text(text)
  return str(path)


def test_a_file_of_ones_own_is_a_diff(tmp_path):
  path = write(tmp_path, "BASE = 'tiny'\nDIFF = {'train.steps': 3}\n")
  assert overlay.load(path).train.steps == 3
  assert overlay.base_of(path).endswith("tiny.py")
  assert overlay.base_of("v3_671b") is None


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("BASE = 'tiny'\n", "found neither get_config nor BASE and DIFF"),
    ("BASE = 'mine'\nDIFF = {}\n", "BASE leads back to itself"),
    ("BASE = 'tiny'\nDIFF = {'model.dmi': 3}\n", "did you mean model.dim?"),
    ("x = 1 +\n", "SyntaxError"),
    ("raise OSError('no disk')\n", "OSError: no disk"),
  ],
)
def test_a_bad_file_is_one_line(tmp_path, text, wanted):
  assert wanted in error_of(overlay.load, write(tmp_path, text))


def test_difference_lists_every_departure_with_both_values():
  a, b = micro.values(), micro.values({"model.dim": 64, "train.seed": 1})
  wanted = {"model.dim": (32, 64), "train.seed": (0, 1)}
  assert overlay.difference(a, b) == wanted
  assert overlay.difference(a, a) == {}


def test_a_loaded_config_is_locked():
  values = overlay.load("tiny")
  with pytest.raises(AttributeError):
    values.model.dmi = 3
