"""A comparison: paired, honest about what is missing, and shown."""

import re
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.lab import compare, curves, page, plots, results, table
from tests.lab import trial

THREE = trial.SWEEP.replace("range(2)", "range(3)")
LOSSES = {"a": [2.0, 3.0, 4.0], "b": [2.1, 3.2, 4.3]}


@pytest.fixture
def place(tmp_path):
  return trial.write(tmp_path, THREE)


def test_differences_are_paired_by_seed(place):
  """Seeds differ by a nat, arms by 0.2: only pairs can tell them apart."""
  trial.record(place, LOSSES)
  base, row = compare.compare(trial.load(place)).rows
  assert (base.name, base.verdict, base.differences) == ("a", "baseline", {})
  assert base.mean == 3.0 and base.std == 1.0
  assert row.differences == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3})
  assert row.interval.mean == pytest.approx(0.2)
  assert row.verdict == "not separable"  # -0.07 to 0.47, by hand elsewhere
  closer = {"a": LOSSES["a"], "b": [2.1, 3.1, 4.11]}
  trial.record(place, closer)
  _, row = compare.compare(trial.load(place)).rows
  assert row.verdict == "worse"
  _, row = compare.compare(trial.load(place), baseline="b").rows[::-1]
  assert row.verdict == "better" and row.name == "a"


def test_seeds_that_one_arm_lacks_make_no_pair(place):
  trial.record(place, {"a": LOSSES["a"], "b": LOSSES["b"][:2]})
  _, row = compare.compare(trial.load(place)).rows
  assert list(row.differences) == [0, 1] and len(row.values) == 2


def test_failed_runs_are_counted_and_are_in_no_mean(place):
  trial.record(place, LOSSES)
  last = trial.load(place).runs[-1]
  results.append(
    place / "results.jsonl", trial.result(last, 99.0, error="diverged")
  )
  _, row = compare.compare(trial.load(place)).rows
  assert row.failed == 1 and sorted(row.values) == [0, 1]
  assert "2 (1 failed)" in table.plain([compare.compare(trial.load(place))])


def test_what_is_not_finite_is_left_out_and_told(place):
  trial.record(place, LOSSES)
  last = trial.load(place).runs[-1]
  line = trial.result(last, 9.0, final={"loss": None, "max_vio": 0.1})
  results.append(place / "results.jsonl", line)
  found = compare.compare(trial.load(place))
  assert sorted(found.rows[1].values) == [0, 1]
  assert found.notes[0] == "Without a finite loss, and left out: b-s2."
  assert len(compare.compare(trial.load(place), "max_vio").notes) == 1


def test_without_a_result_of_the_baseline_another_arm_is_it(place):
  trial.record(place, {"a": [], "b": LOSSES["b"]})
  found = compare.compare(trial.load(place))
  assert found.baseline == "b" and found.rows[0].verdict == "baseline"
  assert found.notes[0] == "Of a there is no result: minus b."
  with pytest.raises(ConfigError, match="--baseline=a: found no result of it"):
    compare.compare(trial.load(place), baseline="a")


def test_results_of_another_config_are_left_out_and_told(place):
  trial.record(place, LOSSES)
  trial.write(place.parents[1], THREE, train__steps=99)
  with pytest.raises(ConfigError, match="found no result, wanted: dsv3 sweep"):
    trial.record(place, {"a": [], "b": []})
    compare.compare(trial.load(place))
  trial.record(place, LOSSES)
  found = compare.compare(trial.load(place))
  assert len(found.rows[0].values) == 3
  assert any("6 results are of other configs" in note for note in found.notes)


@pytest.mark.parametrize("match, key", compare.MATCHES.items())
def test_an_arm_that_costs_more_gets_no_verdict_under_match(place, match, key):
  trial.record(place, {"a": [2.0] * 3, "b": [1.0] * 3}, b={key: 1.2e9})
  asked = trial.load(place)
  cost = 1.2e9 / trial.lines(place)[0][key]
  _, row = compare.compare(asked, match=match).rows
  assert row.verdict == f"not matched: {cost:.3g} x {match}"
  _, row = compare.compare(asked).rows
  assert row.verdict == "better"
  assert table.unequal(compare.compare(asked)) == [match]


def test_an_experiment_says_of_what_more_is_better(place):
  trial.record(place, {"a": [2.0, 3.0, 4.0], "b": [1.9, 2.88, 3.91]})
  row = compare.compare(trial.load(place)).rows[1]
  sweep = place / "sweep.py"
  sweep.write_text(sweep.read_text() + "\nHIGHER = ['loss']\n")
  other = compare.compare(trial.load(place)).rows[1]
  assert (row.verdict, other.verdict) == ("better", "worse")
  assert row.values == other.values


def test_any_number_of_a_line_is_a_metric(place):
  trial.record(place, LOSSES)
  asked = trial.load(place)
  for metric, wanted in {
    "max_vio": 0.5,
    "best/loss": 3.1,
    "train/accuracy/main": 0.5,
    "flops": 1e9,
  }.items():
    assert compare.compare(asked, metric).rows[0].mean == pytest.approx(wanted)
  assert not compare.lower_is_better("train/accuracy/main")
  assert not compare.lower_is_better("accepted_1")
  assert compare.lower_is_better("max_vio")
  with pytest.raises(ConfigError, match="did you mean max_vio?"):
    compare.compare(asked, "maxvio")
  with pytest.raises(ConfigError, match="no such arm; there are a, b"):
    compare.compare(asked, baseline="z")


def test_runs_over_different_texts_are_told(place):
  other = {"corpus": [["text", "y", 3]], "dirty": True}
  trial.record(place, LOSSES, b=other)
  notes = " ".join(compare.compare(trial.load(place)).notes)
  assert "2 different texts" in notes
  assert "3 of 6 runs with uncommitted code" in notes


def test_the_note_names_the_processor_where_a_line_has_it(place):
  device = {"kind": "cpu", "model": "AMD EPYC 7B13", "cores": 2}
  trial.record(place, LOSSES)  # lines of a time when there was only `cpu`
  assert "; cpu; jax" in compare.compare(trial.load(place)).notes[-1]
  trial.record(place, LOSSES, b={"device": device})
  (note,) = compare.compare(trial.load(place)).notes
  assert "; AMD EPYC 7B13, 2 cores and cpu; jax 0." in note


def test_relative_error_is_of_smoothed_curves(place):
  """Of constant curves 2.0 and 2.1 the relative error is 5% at every step."""
  flat = lambda y: {"curve": {"step": [1, 2, 3], "loss/main": [y] * 3}}
  trial.record(place, LOSSES, a=flat(2.0), b=flat(2.1))
  lines, _ = compare.of_arms(trial.load(place))
  found = curves.difference(lines["b"], lines["a"], "loss/main", relative=True)
  assert found.mean == pytest.approx([0.05] * 3)
  (note,) = curves.relative_notes(lines, "a")
  assert "of b's training loss, smoothed (0.9): at most 5.00%" in note
  assert note.endswith("(step 1) and 5.00% in any, +5.00% at the end.")
  smooth = curves.ema([1.0, 2.0, 2.0, None, 2.0])
  assert smooth[:3] == pytest.approx([1.0, 1.1, 1.19])
  assert np.isnan(smooth[3:]).all()


def test_of_an_arm_that_diverged_the_relative_error_is_that_of_before(place):
  steps = list(range(1, 21))
  curve = lambda *losses: {"step": steps, "loss/main": list(losses)}
  flat = {"curve": curve(*[2.0] * 20)}
  trial.record(place, LOSSES, a=flat, b={"curve": curve(*[2.1] * 20)})
  asked = trial.load(place)
  diverged = [2.1] * 8 + [None] * 2 + [9.0] * 10  # a finite one later is noise
  for run, losses in ((asked.runs[3], diverged), (asked.runs[5], [None] * 20)):
    assert run.name == "b"
    line = trial.result(run, 2.0, curve=curve(*losses))
    results.append(place / "results.jsonl", line)
    lines, _ = compare.of_arms(asked)
    notes = [
      *curves.relative_notes(lines, "a"),
      *curves.relative_notes(lines, "b"),
    ]
    assert len(notes) == 2 and "nan" not in " ".join(notes)
    if losses is diverged:
      assert notes[0].endswith(
        "at most 5.00% on average over seeds (step 2) and 5.00% in any, +5.00% at "
        "step 8, the last to compare. b's loss is not finite at step 9 (seed 1)."
      )
  assert notes[0].endswith(
    "no step to compare after the first tenth. b's loss is not finite at step 1 "
    "(seed 2)."
  )
  assert notes[1].startswith("Relative error of a's") and "b's loss" in notes[1]


def test_compare_writes_table_pictures_page_and_readme(place, capsys):
  trial.record(place, LOSSES)
  readme = place / "README.md"
  readme.write_text(f"# Why\n{table.BEGIN}\nold\n{table.END}\nVerdict: none.\n")
  with open(place / "sweep.py", "a") as file:
    file.write('\nMETRICS = ["loss", "max_vio", "best/loss"]\n')
  assert cli.main(["compare", str(place)]) == 0
  said = capsys.readouterr().out
  assert "not separable" in said and "-0.0689 to +0.4689" in said
  text = readme.read_text()
  assert "| b | 3 | 3.2000 | 1.1000 | +0.2000 |" in text
  assert text.startswith("# Why") and text.endswith("Verdict: none.\n")
  assert "old" not in text and text.count("| arm |") == 3
  metrics = {
    "table": "loss",
    "table-max_vio": "max_vio",
    "table-best-loss": "best/loss",
  }
  for stem in ("curves", *metrics):
    for suffix in (".png", ".svg"):
      assert (place / (stem + suffix)).stat().st_size > 5000, stem
  for stem, metric in metrics.items():
    assert f">{metric}, mean</text>" in (place / f"{stem}.svg").read_text()
  before = (place / "compare.html").read_text()
  asked = trial.load(place)
  found = [compare.compare(asked, metric) for metric in metrics.values()]
  lines, _ = compare.of_arms(asked)
  assert page.page(asked, found, lines) == before  # no date, no chance
  assert cli.main(["compare", str(place), "--metric=los"]) == 2


def test_a_sweep_without_matplotlib_says_which_extra_it_wants(
  place, monkeypatch, capsys
):
  trial.record(place, LOSSES)
  monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if not installed
  assert cli.main(["sweep", str(place), f"--runs={place / 'runs'}"]) == 0
  said = capsys.readouterr().out
  assert "-0.0689 to +0.4689" in said and not (place / "compare.html").exists()
  (line,) = [line for line in said.splitlines() if "dsv3[" in line]
  assert line.endswith(
    'wanted the package matplotlib: pip install "dsv3[plot]"'
  )


def test_another_question_leaves_the_kept_answer_alone(place, capsys, tmp_path):
  trial.record(place, LOSSES)
  (place / "README.md").write_text(f"{table.BEGIN}\nold\n{table.END}\n")
  before = {
    path: path.read_bytes() for path in place.iterdir() if path.is_file()
  }
  for word in ("--metric=max_vio", "--baseline=b", "--match=flops"):
    assert cli.main(["compare", str(place), word]) == 0
    assert "stay; others: --out=DIR" in capsys.readouterr().out
  assert before == {
    path: path.read_bytes() for path in place.iterdir() if path.is_file()
  }
  words = ["compare", str(place), "--metric=max_vio"]
  assert cli.main([*words, f"--out={tmp_path / 'new' / 'folder'}"]) == 0
  assert (tmp_path / "new" / "folder" / "compare.html").exists()


def test_an_experiment_may_ask_for_the_relative_error(place, capsys):
  trial.record(place, LOSSES)
  words = ["compare", str(place), f"--out={place / 'out'}"]
  assert cli.main(words) == 0
  assert "Relative error of" not in capsys.readouterr().out
  plain = (place / "out" / "compare.html").read_text()
  sweep = place / "sweep.py"
  sweep.write_text(sweep.read_text() + "\nRELATIVE = True\n")
  assert cli.main(words) == 0
  assert "Relative error of b's" in capsys.readouterr().out
  relative = (place / "out" / "compare.html").read_text()
  assert "% of it" in relative and "% of it" not in plain


def test_a_page_asks_for_nothing_from_outside(place):
  trial.record(place, LOSSES)
  asked = trial.load(place)
  lines, _ = compare.of_arms(asked)
  found = [compare.compare(asked, metric) for metric in ("loss", "max_vio")]
  text = page.page(asked, found, lines)
  assert not re.findall(r'(?:src|href)="(?!#)', text)
  assert "<script" not in text and "@import" not in text
  ids = re.findall(r'\bid="([^"]+)"', text)
  assert len(ids) == len(set(ids))


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="wants Chromium")
def test_a_browser_shows_the_table_and_the_curves(place, tmp_path):
  """Chromium's own DOM has the cells; its pixels the colours of both arms."""
  trial.record(place, LOSSES)
  asked = trial.load(place)
  lines, _ = compare.of_arms(asked)
  path = tmp_path / "page.html"
  path.write_text(page.page(asked, [compare.compare(asked)], lines))
  words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
  words += ["--window-size=1200,1600", f"--user-data-dir={tmp_path / 'user'}"]
  dom = subprocess.run(
    [*words, "--dump-dom", path.as_uri()],
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  ).stdout
  assert "<td>-0.0689 to +0.4689</td>" in dom
  shot = tmp_path / "page.png"
  subprocess.run(
    [*words, f"--screenshot={shot}", path.as_uri()],
    capture_output=True,
    check=True,
    timeout=60,
  )
  pixels = matplotlib.image.imread(shot)[..., :3]
  for i in (0, 1):
    colour = matplotlib.colors.to_rgb(plots.style(i)["color"])
    near = np.abs(pixels - colour).max(-1) < 0.02
    assert near.sum() > 200
