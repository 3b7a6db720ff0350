"""The run folder says what ran, and is never another run's."""

import dataclasses
import json
import os
import subprocess

import pytest

from dsv3 import config, overlay
from dsv3.config import ConfigError
from dsv3.train import run
from tests import micro


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_folder_holds_config_as_given_resolved_and_its_departures(tmp_path):
  values = micro.config_of()
  given = run.Given("tiny", ("model.dim=32",), "dsv3 train --config=tiny")
  assert run.record(tmp_path / "a", values, given) == {}
  run.record_start(tmp_path / "a", given, 8, {}, run.Position(0, 0))
  found = json.loads((tmp_path / "a" / "config.json").read_text())
  assert found["given"]["config"] == "tiny"
  assert found["given"]["text"] == (overlay.CONFIGS / "tiny.py").read_text()
  assert found["given"]["overrides"] == ["model.dim=32"]
  assert found["departs_from"]["v3_671b"]["model.dim"] == [7168, 32]
  assert run.stored_config(tmp_path / "a") == values
  (start,) = lines(tmp_path / "a" / "starts.jsonl")
  assert start["command"] == "dsv3 train --config=tiny"
  assert start["versions"]["jax"] and start["device"]["platform"] == "cpu"
  assert 1 <= start["device"]["cores"] <= os.cpu_count()


def test_a_processor_is_what_the_system_calls_it(tmp_path, monkeypatch):
  cpuinfo = tmp_path / "cpuinfo"
  cpuinfo.write_text(
    "model\t\t: 207\nmodel name\t: AMD EPYC 7B13 \ncores : 2\n"
  )
  assert run._processor(cpuinfo) == "AMD EPYC 7B13"
  cpuinfo.write_text("Processor : 0\n")
  monkeypatch.setattr(run.platform, "processor", lambda: "arm")
  assert run._processor(cpuinfo) == run._processor(tmp_path / "none") == "arm"
  monkeypatch.setattr(run, "_processor", lambda _: "arm")
  assert run._device()["model"] == "arm"
  monkeypatch.setattr(run, "_processor", lambda _: "")
  assert "model" not in run._device() and run._device()["kind"] == "cpu"


def test_departures_from_the_base_stand_beside_those_from_the_paper(tmp_path):
  (tmp_path / "mine.py").write_text('BASE = "tiny"\nDIFF = {"model.dim": 64}')
  values = config.build(run.overlay.load(str(tmp_path / "mine.py")))
  given = run.Given(str(tmp_path / "mine.py"))
  run.record(tmp_path / "a", values, given)
  found = json.loads((tmp_path / "a" / "config.json").read_text())
  assert found["departs_from"]["tiny"] == {"model.dim": [128, 64]}
  assert "model.n_layers" in found["departs_from"]["v3_671b"]


def test_a_base_in_the_folder_of_its_diff_is_found_from_anywhere(tmp_path):
  (tmp_path / "a.py").write_text('BASE = "tiny"\nDIFF = {"model.dim": 64}')
  (tmp_path / "b.py").write_text('BASE = "a"\nDIFF = {"model.n_layers": 3}')
  name = str(tmp_path / "b.py")
  values = config.build(overlay.load(name))
  run.record(tmp_path / "run", values, run.Given(name))
  found = json.loads((tmp_path / "run" / "config.json").read_text())
  assert found["departs_from"]["a"] == {"model.n_layers": [4, 3]}


def test_a_run_that_goes_on_keeps_what_it_was_given_first(tmp_path):
  given = run.Given("tiny", ("model.dim=32",))
  run.record(tmp_path, micro.config_of(), given)
  first = json.loads((tmp_path / "config.json").read_text())
  run.record(tmp_path, micro.config_of({"train.steps": 9}), run.Given())
  found = json.loads((tmp_path / "config.json").read_text())
  assert found["given"] == first["given"]
  assert found["departs_from"] == first["departs_from"]
  assert found["resolved"]["train"]["steps"] == 9


def test_commit_is_that_of_the_clone(monkeypatch):
  found = run.commit()
  if not found:
    pytest.skip("not in a clone")
  assert len(found["commit"]) == 40 and isinstance(found["dirty"], bool)

  def no_git(*_, **__):
    raise FileNotFoundError

  monkeypatch.setattr(subprocess, "run", no_git)
  assert run.commit() == {}


def test_another_config_is_an_error_that_names_the_keys(tmp_path):
  run.record(tmp_path, micro.config_of(), run.Given())
  before = (tmp_path / "config.json").read_text()
  other = micro.config_of({"model.dim": 64, "train.steps": 9})
  with pytest.raises(ConfigError) as caught:
    run.record(tmp_path, other, run.Given())
  assert "model.dim = 32" in str(caught.value)
  assert "train.steps" not in str(caught.value)
  assert "\n" not in str(caught.value)
  assert (tmp_path / "config.json").read_text() == before


OTHER = {  # values of keys that are no numbers
  "data.cache": "elsewhere",
  "model.precision.recipe": "mxfp8",
  "model.precision.changes": ("rounding=stochastic",),
  "model.precision.high": ("*.w_o",),
  "model.precision.kernel": "reference",
  "model.precision.guard_action": "keep_high",
}


@pytest.mark.parametrize("key", sorted(run.MAY_CHANGE))
def test_what_is_no_other_run_may_change_and_is_kept(key, tmp_path):
  # A guard acts on reports, and is refused without them.
  values = micro.config_of({"model.precision.report_every": 5})
  run.record(tmp_path, values, run.Given())
  old = overlay.flat(dataclasses.asdict(values))[key]
  new = OTHER.get(key) or old + 1
  changed = config.build(overlay.overlay(run.as_tree(values), {key: new}))
  assert run.record(tmp_path, changed, run.Given()) == {key: (old, new)}
  assert run.stored_config(tmp_path) == changed


def test_a_folder_without_a_run_and_a_damaged_config_are_named(tmp_path):
  with pytest.raises(ConfigError, match="found no run"):
    run.stored_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ConfigError, match="config.json: damaged"):
    run.stored_config(tmp_path)


def test_a_step_is_found_in_the_start_that_made_it(tmp_path):
  with pytest.raises(ConfigError, match="found no starts.jsonl"):
    run.position_of(tmp_path, 1)  # of weights that were imported
  for done, ahead, steps in (
    (0, 0, 20),
    (10, -3, 60),
    (10, -3, 60),
    (8, 1, 90),
  ):
    position = run.Position(done, ahead)
    run.record_start(tmp_path, run.Given(), steps, {}, position)
  for step, wanted in ((1, (20, 0)), (8, (20, 0)), (9, (90, 1)), (11, (90, 1))):
    steps, position = run.position_of(tmp_path, step)
    assert (steps, position.sequences_ahead) == wanted


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
  with run.locked(tmp_path):
    with pytest.raises(ConfigError, match="another process is training there"):
      with run.locked(tmp_path):
        pass
  with run.locked(tmp_path):
    pass
