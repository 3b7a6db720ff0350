"""An experiment's runs: known by what they compute."""

import pytest

from dsv3.config import ConfigError
from dsv3.lab import experiment
from tests.lab import trial

HEAD = "from dsv3.lab.sweep import *\nBASE = 'base'\n"


def test_every_arm_comes_under_every_seed(tmp_path):
  asked = trial.load(trial.write(tmp_path))
  assert [str(run) for run in asked.runs] == ["a-s0", "b-s0", "a-s1", "b-s1"]
  assert asked.arms == ["a", "b"] and asked.name == "q"
  assert [run.values.train.seed for run in asked.runs] == [0, 0, 1, 1]
  assert asked.runs[0].diff == asked.runs[2].diff == {}
  assert asked.runs[1].diff == {"schedule.lr_peak": 0.002}
  assert len({run.id for run in asked.runs}) == 2
  more = experiment.load(tmp_path / "experiments/q", 5)
  assert len(more.runs) == 10
  assert [run.key for run in more.runs[:4]] == [run.key for run in asked.runs]


def test_more_seeds_are_those_after_the_ones_that_are_named(tmp_path):
  """SEEDS may leave out those by which a rule was chosen."""
  named = trial.SWEEP.replace("range(2)", "[6, 9]")
  place = trial.write(tmp_path, named)
  of_arm = lambda n: [
    r.seed for r in experiment.load(place, n).runs if r.name == "a"
  ]
  assert of_arm(None) == of_arm(2) == [6, 9]
  assert of_arm(1) == [6] and of_arm(4) == [6, 9, 10, 11]


def test_a_diff_is_computed_so_what_the_base_says_is_no_diff(tmp_path):
  same = HEAD + "def runs(): yield 'c', {'schedule.lr_peak': 0.003}"
  run = trial.load(trial.write(tmp_path, same)).runs[0]
  assert run.diff == {}


def test_a_run_is_known_by_what_it_computes_and_not_by_its_name(tmp_path):
  first = trial.load(trial.write(tmp_path)).runs[0]
  renamed = trial.SWEEP.replace('"a"', '"z"')
  assert trial.load(trial.write(tmp_path, renamed)).runs[0].key == first.key
  seen = trial.write(tmp_path, train__log_every=7, data__cache="x", name="n")
  assert trial.load(seen).runs[0].key == first.key
  for key, value in {
    "train__steps": 99,
    "data__seq_len": 48,
    "train__final_eval_batches": 3,
  }.items():
    assert (
      trial.load(trial.write(tmp_path, **{key: value})).runs[0].id != first.id
    )
  asked = trial.load(trial.write(tmp_path), "train.steps=99")
  assert asked.runs[0].id != first.id
  assert asked.runs[0].diff == {"train.steps": 99}


def test_the_time_of_a_machine_ends_no_run_of_a_sweep(tmp_path):
  asked = trial.load(trial.write(tmp_path, train__max_minutes=4.0))
  assert asked.runs[0].values.train.max_minutes == 0
  limited = HEAD + "def runs(): yield 'c', {'train.max_minutes': 2.0}"
  run = trial.load(trial.write(tmp_path, limited)).runs[0]
  assert run.diff == {"train.max_minutes": 2.0}


def test_an_arm_with_its_own_seed_comes_once(tmp_path):
  own = HEAD + "def runs(): return seeds(arms({'c': {}}), [4, 9])"
  runs = trial.load(trial.write(tmp_path, own)).runs
  assert [str(run) for run in runs] == ["c-s4", "c-s9"]
  assert runs[0].diff == {}


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("", "found no BASE and runs"),
    (HEAD + "def runs(): yield 'c', {'model.moe.gat': 1}", "model.moe.gate?"),
    (HEAD + "def runs(): yield 'c', {'model.moe.gate': 1}", "wanted one of"),
    (HEAD + "def runs(): yield 'c', {'model.moe.top_k': 9}", "c: config.model"),
    (HEAD + "def runs(): yield 'a/b', {}", "found the name 'a/b'"),
    (HEAD + "def runs(): yield 'a', 3", "wanted a dict of dotted keys"),
    (HEAD + "def runs(): yield 'a'", "wanted a name and a diff"),
    (HEAD + "def runs(): return []", "found no arm"),
    (HEAD + "def runs(): return 1 / 0", "ZeroDivisionError"),
    (HEAD + "def runs(): return [('a', {}), ('b', {})]", "one run twice"),
    (
      HEAD + "def runs(): return [('a', {}), ('a', {'model.dim': 64})]",
      "one name or one run twice",
    ),
    (trial.SWEEP + "SEEDS = []", "SEEDS: found [], wanted a list of seeds"),
    (trial.SWEEP + "SEEDS = 3", "SEEDS: found 3"),
    (trial.SWEEP + "METRICS = 'loss'", "METRICS: found 'loss', wanted a list"),
    (HEAD.replace("base", "bse") + "def runs(): yield 'a', {}", "bse"),
  ],
)
def test_what_is_wrong_in_a_sweep_is_one_line(text, wanted, tmp_path):
  with pytest.raises(ConfigError) as error:
    trial.load(trial.write(tmp_path, text))
  assert wanted in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_an_arm_sets_cannot_be_overridden(tmp_path):
  with pytest.raises(ConfigError, match="is set by the arm b itself"):
    trial.load(trial.write(tmp_path), "schedule.lr_peak=1.0")
  with pytest.raises(ConfigError, match="found no experiment there"):
    experiment.load(tmp_path / "nothing")
