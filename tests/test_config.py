"""The schema: what every config must be, and what it says of one that is not."""

import ast
import dataclasses
import json
import re

import pytest

from dsv3 import config, overlay
from dsv3.config import ConfigError
from tests import micro

FILES = sorted(overlay.CONFIGS.glob("*.py"))
SOURCE = re.compile(
  r"Sec\. \d|Eq\. \d|Table|released config|unpublished|ours|not in the report"
  r"|of `gqa` alone|the report's"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_builds_and_names_itself(path):
  assert config.build(overlay.load(path.stem)).name == path.stem


def test_there_are_the_configs_of_the_design():
  wanted = {"v3_671b", "v3_230b", "v3_16b", "v3_1b", "v3_100m", "tiny"}
  wanted |= {"v3_671b_32k", "v3_671b_128k"}
  assert {path.stem for path in FILES} == wanted


def test_every_number_of_the_paper_s_config_has_a_source():
  path = overlay.CONFIGS / "v3_671b.py"
  lines, bare = path.read_text().splitlines(), []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Assign) and isinstance(
      node.targets[0], ast.Attribute
    ):
      line = lines[node.end_lineno - 1]
      group = "ConfigDict()" in line or node.targets[0].attr == "name"
      if not group and not SOURCE.search(line.partition("#")[2]):
        bare.append(line.strip())
  assert not bare


def test_sec42_the_paper_s_numbers():
  c = config.build(overlay.load("v3_671b"))
  a, m = c.model.attention, c.model.moe
  assert (c.model.n_layers, c.model.dim, c.model.n_dense_layers) == (
    61,
    7168,
    3,
  )
  assert (a.n_heads, a.nope_dim, a.rope_dim) == (128, 128, 64)
  assert (a.kv_rank, a.q_rank) == (512, 1536)
  assert (m.n_shared, m.n_routed, m.hidden, m.top_k) == (1, 256, 2048, 8)
  assert (m.n_groups, m.top_groups, m.routed_scale) == (8, 4, 2.5)
  assert (c.model.mtp.depth, c.model.init_std) == (1, 0.006)
  o = c.optimizer
  assert (o.b1, o.b2, o.weight_decay, o.clip_norm) == (0.9, 0.95, 0.1, 1.0)
  assert (c.data.seq_len, c.train.tokens) == (4096, 14.8e12)
  assert (c.data.fim_rate, c.data.mask_documents) == (0.1, False)


def test_a_config_survives_json():
  built = micro.config_of()
  again = json.loads(json.dumps(dataclasses.asdict(built)))
  assert config.build(again) == built


GROUPED = {"model.moe.n_routed": 16, "model.moe.top_k": 4}
BAD = {  # name: (diff of micro, what the one line must say)
  "odd rope dim": (
    {"model.attention.rope_dim": 7},
    "config.model.attention.rope_dim: found 7, wanted an even number",
  ),
  "heads": (
    {"model.attention.kind": "gqa", "model.attention.n_kv_heads": 3},
    "config.model.attention.n_kv_heads: found 3, wanted a divisor of n_heads = 2",
  ),
  "groups": (
    {**GROUPED, "model.moe.n_groups": 5},
    "config.model.moe.n_groups: found 5, wanted a divisor of n_routed = 16",
  ),
  "groups kept": (
    {**GROUPED, "model.moe.n_groups": 4, "model.moe.top_groups": 5},
    "config.model.moe.top_groups: found 5, wanted at most n_groups = 4",
  ),
  "top_k over experts": (
    {"model.moe.top_k": 5, "model.moe.top_groups": 2},
    "config.model.moe.top_k: found 5, wanted at most the 4 experts",
  ),
  "top_k over the groups": (
    {"model.moe.top_k": 3},
    "config.model.moe.top_k: found 3, wanted at most the 2 experts of 1 groups",
  ),
  "sequence too short for MTP": (
    {"data.seq_len": 3, "model.mtp.depth": 2},
    "config.data.seq_len: found 3, wanted at least 4: MTP depth 2 needs them",
  ),
  "all layers dense": (
    {"model.n_dense_layers": 3},
    "config.model.n_dense_layers: found 3, wanted fewer than n_layers = 3",
  ),
  "weights of sources": (
    {"data.weights": (1.0, 2.0)},
    "config.data.weights: found 2 weights, wanted one for each of the 1 sources",
  ),
  "no source": ({"data.sources": ()}, "config.data.sources: found none"),
  "microbatches": (
    {"train.microbatches": 3},
    "config.train.microbatches: found 3, wanted a divisor of every batch size",
  ),
  "stairs": (
    {"schedule.batch_size": 7, "schedule.batch_ramp_stages": 2},
    "config.schedule.batch_ramp_stages: found 2, wanted a divisor of",
  ),
  "negative": (
    {"model.dim": -8},
    "config.model.dim: found -8, wanted more than 0",
  ),
  "share": (
    {"data.fim_rate": 1.5},
    "config.data.fim_rate: found 1.5, wanted less than 1",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_line_with_key_found_and_wanted(name):
  diff, wanted = BAD[name]
  with pytest.raises(ConfigError) as error:
    micro.config_of(diff)
  assert str(error.value).startswith(wanted)
  assert "\n" not in str(error.value)


def changed(key, value):
  """The micro config as JSON would give it, with one value of any type."""
  values = micro.values().to_dict()
  group = values
  *path, leaf = key.split(".")
  for part in path:
    group = group[part]
  group[leaf] = value
  return values


@pytest.mark.parametrize(
  "key, value, wanted",
  [
    ("model.dim", "wide", "config.model.dim: found 'wide', wanted int"),
    ("model.dim", 32.5, "config.model.dim: found 32.5, wanted int"),
    ("model.dim", True, "config.model.dim: found True, wanted int"),
    (
      "schedule.lr_peak",
      None,
      "config.schedule.lr_peak: found None, wanted float",
    ),
    (
      "model.moe.normalize",
      1,
      "config.model.moe.normalize: found 1, wanted bool",
    ),
    (
      "data.sources",
      "python",
      "config.data.sources: found 'python', wanted a list",
    ),
    ("model.moe", 3, "config.model.moe: found 3, wanted a group of keys"),
    (
      "model.attention.kind",
      "mqa",
      "config.model.attention.kind: found 'mqa', wanted one of mla, mha, gqa",
    ),
    ("model.dims", 32, "config.model.dims: no such key; did you mean dim?"),
  ],
)
def test_wrong_types_and_keys_are_one_line(key, value, wanted):
  with pytest.raises(ConfigError) as error:
    config.build(changed(key, value))
  assert str(error.value).startswith(wanted)
  assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
  values = micro.values().to_dict()
  del values["model"]["moe"]["top_k"]
  with pytest.raises(
    ConfigError, match=r"^config\.model\.moe\.top_k: missing$"
  ):
    config.build(values)


def test_whole_floats_and_ints_are_taken_as_the_field_s_type():
  built = config.build(changed("model.dim", 32.0))
  assert type(built.model.dim) is int
  built = config.build(changed("schedule.lr_peak", 1))
  assert type(built.schedule.lr_peak) is float
