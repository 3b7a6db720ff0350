"""The table of all experiments: words from their READMEs, counts from results."""

import pathlib
import re

import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.lab import index, table
from tests.lab import trial

NAMED = list(enumerate("cdefg", 4))
README = """# Bias or loss

**Question.** Which balances |better|?

**Paper (Table 5).** The bias,
by far.

**Verdict.** {verdict}

**Remains.** All.
"""


def test_a_row_has_question_answers_runs_and_commit(tmp_path, capsys):
  place = trial.write(tmp_path)
  (place / "README.md").write_text(README.format(verdict="Neither."))
  trial.record(place, {"a": [2.0, 3.0], "b": [2.1]})
  other = place.parent / "z"
  other.mkdir()
  (other / "README.md").write_text("# How fast?\n")
  assert cli.main(["compare", str(place.parent)]) == 0
  text = (place.parent / "README.md").read_text()
  assert text.splitlines()[5:7] == [
    "| [Bias or loss](q/README.md): Which balances \\|better\\|? | The bias, "
    "by far. | loss: a 2.500, b +0.100 to a at n = 1 (n = 2, unless said) | "
    "Neither. | abcdef0 |",
    "| [How fast?](z/README.md) |  |  | not run yet |  |",
  ]
  kept = text.replace("# Experiments", "# Ours") + "More.\n"
  (place.parent / "README.md").write_text(kept)
  (place / "README.md").write_text(README.format(verdict="Both."))
  assert cli.main(["compare", str(place.parent)]) == 0
  again = (place.parent / "README.md").read_text()
  assert again == kept.replace("Neither.", "Both.")


def _ours(place):
  return index.index(place.parent).splitlines()[2].split(" | ")[2]


def test_ours_are_two_metrics_of_six_arms_the_baseline_first(tmp_path):
  many = [f'"{name}": {{"schedule.lr_peak": 1e-{i}}}' for i, name in NAMED]
  sweep = trial.SWEEP.replace("arms({", f"arms({{{', '.join(many)},")
  sweep += 'BASELINE = "b"\nMETRICS = ["loss", "max_vio", "bits_per_byte"]\n'
  place = trial.write(tmp_path, sweep)
  (place / "README.md").write_text("# Q\n")
  losses = {name: [2.0, 2.5] for _, name in NAMED}
  trial.record(place, losses | {"a": [3.0, 3.25], "b": [1.0, 1.5]})
  wanted = (
    "{}: b {}, c {other}, d {other}, e {other}, f {other}, g {other}, ..."
  )
  loss = wanted.format("loss", "1.250", other="2.250")
  max_vio = wanted.format("max_vio", "0.500", other="0.500")
  assert _ours(place) == f"{loss}; {max_vio} (n = 2; 7 arms)"
  (place / "results.jsonl").unlink()
  trial.record(place, {**dict.fromkeys(losses, []), "a": [], "b": [1.0]})
  assert _ours(place) == "loss: b 1.000; max_vio: b 0.500 (n = 1; 1 of 7 arms)"
  (place / "results.jsonl").unlink()  # of the baseline there is nothing yet
  trial.record(place, {**dict.fromkeys(losses, []), "a": [3.0], "b": []})
  assert _ours(place) == "loss: a 3.000; max_vio: a 0.500 (n = 1; 1 of 7 arms)"


def test_of_a_question_without_a_sweep_the_readme_says_what_was_found(tmp_path):
  place = tmp_path / "q"
  place.mkdir()
  runs = "# Q\n\n**Runs.** Four, at abcdef0.\n"
  (place / "README.md").write_text(runs)
  found = index.index(tmp_path).splitlines()[2]
  assert found == "| [Q](q/README.md) |  | Four | not run yet | abcdef0 |"
  (place / "README.md").write_text(f"{runs}\n**Ours.** 30 a second\n(n = 4).\n")
  assert _ours(place) == "30 a second (n = 4)"


def test_a_readme_without_marks_is_left_as_it_is(tmp_path):
  place = trial.write(tmp_path)
  (place / "README.md").write_text("# Q\n")
  (place.parent / "README.md").write_text("# My own\n")
  with pytest.raises(ConfigError, match=f"found no line {table.BEGIN}"):
    index.write(place.parent)
  assert (place.parent / "README.md").read_text() == "# My own\n"


def test_uncommitted_code_is_marked(tmp_path):
  place = trial.write(tmp_path)
  (place / "README.md").write_text(README.format(verdict="Neither."))
  trial.record(place, {"a": [2.0, 3.0], "b": [2.1]})
  kept = place / "results.jsonl"
  kept.write_text(
    kept.read_text().replace('"dirty": false', '"dirty": true', 1)
  )
  assert index.index(place.parent).endswith("| abcdef0, abcdef0+ |")


def test_links_of_a_readme_lead_from_the_table_to_the_same_file(tmp_path):
  place = tmp_path / "q"
  place.mkdir()
  links = "[a](../r/README.md) [b](b.png) [c](https://c.org) [d](#d)"
  (place / "README.md").write_text(f"# Q\n\n**Verdict.** {links}\n")
  found = index.index(tmp_path).splitlines()[2].split(" | ")[3]
  assert found == "[a](r/README.md) [b](q/b.png) [c](https://c.org) [d](#d)"


ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  "path",
  [*ROOT.glob("*.md"), *(ROOT / "experiments").glob("**/*.md")],
  ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_link_between_files_leads_somewhere(path):
  text = path.read_text()
  for target in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", text):
    assert (path.parent / target).exists(), target


def test_the_kept_table_is_that_of_the_experiments():
  folder = ROOT / "experiments"
  wanted = index.index(folder)
  assert wanted in (folder / "README.md").read_text(), (
    "dsv3 compare experiments"
  )
