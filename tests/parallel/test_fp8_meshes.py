"""FP8 on a mesh is that of one device, where tiles are of the same rows.

A mesh, or an ablation on one, joins with a line of LINES. Activations are quantised
along a token, so losses and loads are those of one device but for a sum in another
order, which may round an operand to its neighbour. Wgrad quantises along tokens:
where a device has 128 neighbours, or a multiple, its tiles are those of one device,
else others that round as much. How far FP8 itself moves the gradient of an array is
the measure of both.
"""

import numpy as np
import pytest

from dsv3.train import loop
from dsv3.train.logs import read_metrics
from tests import micro
from tests.parallel.test_meshes import diff_of, named, outcome

FP8 = {"model.precision.recipe": "deepseek_v3"}
# One layer of each kind: programs with FP8 take long to compile.
SMALL = {"model.n_layers": 2, "model.mtp.depth": 0, **FP8}
MTP = {"model.mtp.depth": 1}
GQA = {"model.attention.kind": "gqa", "model.attention.n_kv_heads": 2}
HIGH = {"model.precision.high": ("*.attention.w_o", "moe.*.ffn.experts.*")}
# Arrays whose tiles are of other rows, by a part of their names.
NONE, EXPERTS, LINEARS, ALL = (), ("/experts/",), ("/w_",), ("",)
LINES = [  # of 512 tokens, 128 a device where there are 4
  ({"expert": 4}, {}, NONE),
  ({"expert": 4, "expert_nodes": 2}, {}, EXPERTS),  # sorted by node first
  ({"expert": 4, "expert_rows": 0.5}, {}, EXPERTS),  # cut into rounds
  ({"expert": 4, "expert_rows": 0.5}, HIGH, NONE),
  ({"expert": 4}, GQA, NONE),
  ({"data": 4}, {}, EXPERTS),
  ({"fsdp": 4}, HIGH, NONE),
  ({"fsdp": 4}, {**GQA, **HIGH}, NONE),
  ({"data": 2, "expert": 2, "fsdp": 2}, {}, LINEARS),
  ({"expert": 2, "context": 2}, GQA, LINEARS),
  ({"context": 2}, {}, ALL),  # see `dsv3.nn.mla.attend_to_all`
  ({"context": 4, "data": 2}, MTP, ALL),
  ({"expert": 2, "context": 2, "fsdp": 2}, {**MTP, **HIGH}, ALL),
]
SAME, OTHER = 0.15, 1.2  # of what FP8 itself moves
AS_GOOD = 1.75  # of one device's distance to what is not quantised; 1.5 found
CHOICES = 4  # that one rounding may turn


def name_of(part) -> str:
  return named(part) if isinstance(part, dict) else ""


def distances(found, wanted):
  return {
    key: np.linalg.norm(found[key] - wanted[key]) / np.linalg.norm(wanted[key])
    for key in wanted
    if np.any(wanted[key])
  }


def outcomes(line, more):
  """On the mesh, on one device, and there with nothing quantised."""
  here = {**SMALL, **more}
  plain = {**here, "model.precision.recipe": "bf16", "model.precision.high": ()}
  for diff in ({**here, **diff_of(line)}, here, plain):
    yield outcome(tuple(sorted(diff.items())), "main")


@pytest.mark.slow
@pytest.mark.parametrize("line, more, other", LINES, ids=name_of)
def test_fp8_is_that_of_one_device(line, more, other):
  found, wanted, plain = outcomes(line, more)
  # The loss of weights like these hardly knows of attention, so it is held close.
  assert float(found[0]) == pytest.approx(float(wanted[0]), rel=2e-6)
  turned = np.asarray(found[2]) - np.asarray(wanted[2])
  assert np.abs(turned).sum() <= CHOICES
  own = distances(wanted[4], plain[4])
  moved, far = (distances(found[4], to[4]) for to in (wanted, plain))
  for key, size in own.items():
    is_other = any(part in key for part in other)
    assert moved[key] < (OTHER if is_other else SAME) * size, key
    assert far[key] < AS_GOOD * size, key


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, relative",
  [({"expert": 4}, 1e-4), ({"data": 2, "context": 2}, 1e-3)],
  ids=str,
)
def test_a_run_under_fp8_is_that_of_one_device(mesh, relative, tmp_path):
  """Its steps, optimizer and evaluation; Adam makes more of what rounds apart."""
  diff = micro.write_corpus(tmp_path / "corpus") | {**SMALL, **MTP, **HIGH}
  diff |= {"train.steps": 3, "train.checkpoint_every": 0}
  diff |= {"schedule.batch_size": 16, "schedule.batch_size_start": 16}
  found, wanted = [], []
  for lines, line in ((found, mesh), (wanted, {})):
    workdir = tmp_path / f"run{len(line)}"
    score = loop.train(
      micro.config_of({**diff, **diff_of(line)}), workdir
    ).score
    lines += [x["loss"] for x in read_metrics(workdir) if "loss" in x]
    lines += [score.loss, score.bits_per_byte]
  assert len(wanted) == 5
  assert found == pytest.approx(wanted, rel=relative)
