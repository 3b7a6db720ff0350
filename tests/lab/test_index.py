"""The table of all experiments: words from their READMEs, counts from results."""

import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.lab import index, table
from tests.lab import trial

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
    "by far. | Neither. | 3 of 2 arms, n = 1 to 2 | abcdef0 |",
    "| [How fast?](z/README.md) |  | not run yet |  |  |",
  ]
  kept = text.replace("# Experiments", "# Ours") + "More.\n"
  (place.parent / "README.md").write_text(kept)
  (place / "README.md").write_text(README.format(verdict="Both."))
  assert cli.main(["compare", str(place.parent)]) == 0
  again = (place.parent / "README.md").read_text()
  assert again == kept.replace("Neither.", "Both.")


def test_a_readme_without_marks_is_left_as_it_is(tmp_path):
  place = trial.write(tmp_path)
  (place / "README.md").write_text("# Q\n")
  (place.parent / "README.md").write_text("# My own\n")
  with pytest.raises(ConfigError, match=f"found no line {table.BEGIN}"):
    index.write(place.parent)
  assert (place.parent / "README.md").read_text() == "# My own\n"
