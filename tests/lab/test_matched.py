"""Variants of equal cost, and the iso-FLOP ladder."""

import math
import pathlib

import pytest

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.lab import experiment, ladder, matched
from dsv3.plan import count

TINY = config.build(overlay.load("tiny"))


def built(diff) -> config.Config:
  return config.build(overlay.overlay(overlay.load("tiny"), diff))


@pytest.mark.parametrize(
  "diff, free, by",
  [
    ({"model.ffn": "dense"}, "model.dense_hidden", "flops"),
    ({"model.ffn": "dense"}, "model.dense_hidden", "active"),
    ({"model.attention.kind": "mha"}, "model.moe.hidden", "parameters"),
    (
      {"model.attention.kind": "gqa", "model.attention.n_kv_heads": 2},
      "model.moe.hidden",
      "parameters",
    ),
  ],
)
def test_a_matched_variant_costs_what_the_base_costs(diff, free, by):
  found = matched.matched("tiny", diff, free, by=by, multiple=4)
  one, base = built(found), TINY
  assert found.keys() == {*diff, free} and found[free] % 4 == 0
  if by == "flops":
    cost = lambda v: count.flops_per_token(v.model, v.data.seq_len)
  else:  # of the built model, not of a formula
    attribute = {"parameters": "main", "active": "active"}[by]
    cost = lambda v: getattr(count.parameters(v.model), attribute)
  assert cost(one) == pytest.approx(cost(base), rel=0.02)
  # The nearest: neither neighbour is nearer.
  for step in (-4, 4):
    other = built({**found, free: found[free] + step})
    assert abs(cost(other) - cost(base)) >= abs(cost(one) - cost(base))


@pytest.mark.parametrize(
  "kwargs, words",
  [
    ({"free": "model.dense_hidden", "by": "watts"}, "wanted one of flops"),
    ({"free": "model.ffn"}, "wanted it free"),
    ({"free": "model.moe.hidden"}, "do not grow"),
    ({"free": "model.dense_hidden", "multiple": 4096}, "nearest is 4096"),
  ],
)
def test_what_cannot_be_matched_is_said(kwargs, words):
  with pytest.raises(ConfigError, match=words):
    matched.matched("tiny", {"model.ffn": "dense"}, **kwargs)


SIZES = {
  f"d{dim}": {"model.dim": dim, "model.moe.hidden": dim} for dim in (64, 128)
}


def test_every_size_spends_the_budget():
  arms = ladder.ladder("tiny", [1e12, 4e12], SIZES)
  assert [name for name, _ in arms] == [
    "1e12-d64", "1e12-d128", "4e12-d64", "4e12-d128",
  ]  # fmt: skip
  for (name, diff), budget in zip(arms, (1e12, 1e12, 4e12, 4e12)):
    values = built(diff)
    tokens = values.train.steps * values.schedule.batch_size
    tokens *= values.data.seq_len
    spent = tokens * count.flops_per_token(values.model, values.data.seq_len)
    assert spent == pytest.approx(budget, rel=0.05), name
  with pytest.raises(ConfigError, match="buy 0 steps"):
    ladder.ladder("tiny", [1e6], SIZES)


def chinchilla(size: float, budget: float) -> float:
  """E + A / N^a + B / D^b: the best size goes with C^(b / (a + b))."""
  return 1.7 + 400 / (size / 6) ** 0.34 + 410 / (budget / size) ** 0.28


def test_the_law_of_known_losses_is_found():
  rungs = []
  for budget in (1e18, 1e19, 1e20):
    middle = 6 * 0.6 * (budget / 6) ** (0.28 / 0.62)
    sizes = [middle * 2.0**i for i in range(-2, 4)]
    rungs.append(
      ladder.rung(budget, sizes, [chinchilla(s, budget) for s in sizes])
    )
  law = ladder.fit(rungs)
  assert law.exponent == pytest.approx(0.28 / 0.62, abs=0.01)
  assert all(one.inside for one in rungs)
  assert law.best(1e19) == pytest.approx(rungs[1].best, rel=0.05)
  figure = ladder.draw(law)
  valleys, line = figure.axes
  assert len(valleys.lines) == 9 and len(line.lines) == 2


def test_runs_of_a_ladder_answer_with_a_law(tmp_path):
  loss = {1: 3.1, 2: 3.0, 4: 3.1}
  line = lambda size, bonus: {
    "flops": 1e6 * size,
    "tokens": 1,
    "final": {"loss": loss[size] - bonus},
  }
  lines = {}
  for budget, shift in ((1e12, 1), (4e12, 2)):
    for size in loss:
      of = {**line(size, shift), "flops": 1e6 * size * shift}
      of = [{**of, "seed": seed} for seed in (0, 1)]
      lines[f"{budget:.3g}-d{size}".replace("+", "")] = of
  notes = ladder.answer(lines, (1e12, 4e12), tmp_path)
  assert "1e+12 FLOPs: best at 2e+06 FLOPs a token, loss 2.000." in notes
  law = "x FLOPs^0.50"  # twice the size, four the budget
  assert notes[-1].endswith(
    f"{law}; 2 of 2 seeds alone: 0.50, 0.50, of whose mean the 95% interval is "
    "0.50 to 0.50."
  )
  lines["4e12-d4"][1]["final"] = {"loss": 1.05}  # one seed likes it larger
  assert (
    "2 of 2 seeds alone: 0.50, 0.58, of"
    in (ladder.answer(lines, (1e12, 4e12), tmp_path)[-1])
  )
  alone = {name: v[:1] for name, v in lines.items()}
  assert ladder.answer(alone, (1e12, 4e12), tmp_path)[-1].endswith(f"{law}.")
  assert (tmp_path / "law.png").is_file()
  few = {name: v for name, v in lines.items() if "d4" not in name}
  assert all("wanted" in note for note in ladder.answer(few, (1e12,), tmp_path))


def test_a_best_size_beyond_the_sizes_is_in_no_law(tmp_path):
  line = lambda size, loss: {
    "flops": 1e6 * size,
    "tokens": 1,
    "seed": 0,
    "final": {"loss": loss},
  }
  found = zip((1, 2, 4), (2.0, 2.3, 3.0))
  lines = {f"1e12-d{size}": [line(size, loss)] for size, loss in found}
  notes = ladder.answer(lines, (1e12,), tmp_path)
  assert notes[0] == "1e+12 FLOPs: best smaller than all sizes here."
  assert "found 0 budgets" in notes[1]
  assert not (tmp_path / "law.png").exists()


def test_a_ladder_without_a_valley_or_a_law_is_said():
  with pytest.raises(ConfigError, match="no least between"):
    ladder.rung(1e18, [1, 2, 4], [3.0, 3.1, 3.0])
  with pytest.raises(ConfigError, match="found 2 sizes"):
    ladder.rung(1e18, [1, 2, 2], [3.0, 3.1, 3.0])
  one = ladder.rung(1e18, [1, 2, 4], [3.0, 2.9, 3.1])
  with pytest.raises(ConfigError, match="found 1 budgets"):
    ladder.fit([one])
  beyond = ladder.rung(1e18, [1, 2, 4], [3.0, 2.5, 2.1])
  assert not beyond.inside and math.isclose(beyond.budget, 1e18)


def test_attention_says_the_cache_of_every_arm():
  """Four layers of float32: MLA 64 + 16 numbers, a head 32 + 16 and 32."""
  folder = pathlib.Path(__file__).parents[2] / "experiments/attention"
  (note,) = experiment.load(folder).answer({}, folder)
  assert note.endswith(
    f"mla {16 * 80:,} (1 x), mha {16 * 4 * 80:,} (4 x), "
    f"gqa {16 * 2 * 80:,} (2 x), mqa {16 * 80:,} (1 x)."
  )
