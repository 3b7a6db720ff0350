"""The command line: what a user types, and what a user gets wrong."""

import io
import json
import re
import subprocess
import sys

import pytest

from dsv3 import cli
from tests import micro


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Config file and folder of a short run made by the command itself."""
  folder = tmp_path_factory.mktemp("cli")
  diff = {**micro.write_corpus(folder), "train.ema_decay": 0.9}
  config = micro.write_config(folder / "micro.py", diff)
  workdir = folder / "run"
  assert cli.main(["train", f"--config={config}", f"--workdir={workdir}"]) == 0
  return config, workdir


def failure(words, capsys) -> tuple[int, str]:
  """Exit code and the one line of a command that the user got wrong."""
  try:
    code = cli.main(words)
  except SystemExit as stop:
    code = stop.code
  said = capsys.readouterr()
  assert said.err.startswith("dsv3: error: ") and said.err.count("\n") == 1
  assert not said.out
  return code, said.err


def test_train_goes_on_from_its_folder_alone(trained, capsys):
  _, workdir = trained
  words = ["train", f"--workdir={workdir}", "--config.train.steps=10"]
  assert cli.main(words) == 0
  said = capsys.readouterr()
  assert "goes on after step 8" in said.err
  assert "train.steps: 8 -> 10" in said.err
  assert "10 of 10 steps done" in said.out
  for line in ("held-out bits per byte", "gzip -9", "MaxVio", "a sample"):
    assert line in said.out
  assert f"dsv3 sample --workdir={workdir}" in said.out


def test_eval_says_what_the_run_has_logged(trained, capsys):
  _, workdir = trained
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  scores = [x for x in map(json.loads, lines) if "heldout/loss" in x]
  assert cli.main(["eval", f"--workdir={workdir}"]) == 0
  assert f"{scores[-1]['heldout/bits_per_byte']:.4f}" in capsys.readouterr().out
  assert cli.main(["eval", f"--workdir={workdir}", "--ema"]) == 0
  assert (
    f"{scores[-1]['heldout/bits_per_byte']:.4f}" not in capsys.readouterr().out
  )


def test_sample_goes_on_from_the_prompt_and_repeats_itself(trained, capsys):
  _, workdir = trained
  words = ["sample", f"--workdir={workdir}", "--prompt=line 4", "--tokens=20"]
  said = []
  for _ in range(2):
    assert cli.main(words) == 0
    said.append(capsys.readouterr().out)
  assert said[0].startswith("line 4") and len(said[0]) > 10
  assert said[0] == said[1]


def test_sample_drafts_with_the_mtp_module_and_says_what_was_kept(
  trained, capsys
):
  _, workdir = trained
  words = ["sample", f"--workdir={workdir}", "--prompt=line 4", "--tokens=20"]
  texts = []
  for drafts in (0, 1, 3):
    more = [f"--drafts={drafts}", "--temperature=0"]
    assert cli.main([*words, *more]) == 0
    said = capsys.readouterr()
    texts.append(said.out)
    shares = said.err.partition(" of ")[0].count("%")
    assert said.err.startswith("drafts kept: ") == bool(drafts)
    assert shares == drafts
  assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow  # a run's decoder to compile; sampling shows it
def test_eval_says_how_many_drafts_are_kept(trained, capsys):
  _, workdir = trained
  assert cli.main(["eval", f"--workdir={workdir}", "--drafts=3"]) == 0
  lines = capsys.readouterr().out.splitlines()
  kept = [line for line in lines if "drafts kept" in line]
  assert ["greedy" in kept[0], "sampled" in kept[1]] == [True, True]
  for line in kept:
    shares = [float(x) for x in re.findall(r"(\d+)%", line)]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True)
  assert cli.main(["eval", f"--workdir={workdir}", "--drafts=0"]) == 0
  assert "drafts" not in capsys.readouterr().out


def test_chat_answers_line_by_line_to_the_end_of_the_input(
  trained, capsys, monkeypatch, tmp_path
):
  _, workdir = trained
  template = tmp_path / "template"
  template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
  words = ["chat", f"--workdir={workdir}", "--tokens=5"]
  lines = "line 1\nline <|eos|> 2\nline 3\n"
  monkeypatch.setattr("sys.stdin", io.StringIO(lines))
  assert cli.main([*words, f"--template={template}"]) == 0
  said = capsys.readouterr()
  assert said.out.count("\n") >= 2
  assert "found the special token <|eos|>" in said.err
  code, line = failure(words, capsys)
  assert code == 2 and "found none beside bytes" in line


def test_needle_writes_a_table_its_rows_and_a_map(trained, capsys, tmp_path):
  _, workdir = trained
  words = ["needle", f"--workdir={workdir}", "--lengths=100,150"]
  words += ["--depths=0,100", "--trials=2"]
  assert cli.main([*words, f"--out={tmp_path / 'out'}"]) == 0
  said = capsys.readouterr()
  assert "100, 150: the model is made for 32" in said.err
  rows = json.loads((tmp_path / "out" / "needle.json").read_text())["rows"]
  assert [(r["length"], r["depth"]) for r in rows] == [
    (100, 0),
    (100, 100),
    (150, 0),
    (150, 100),
  ]
  assert (tmp_path / "out" / "needle.png").stat().st_size > 5000
  code, line = failure([*words, "--config.model.dim=3"], capsys)
  assert code == 2 and "wanted keys of data" in line


def test_a_prompt_that_is_no_text_is_one_line(trained, capsys):
  _, workdir = trained
  words = ["sample", f"--workdir={workdir}", "--prompt=a\udcff"]
  code, line = failure(words, capsys)
  assert code == 2 and "--prompt: found bytes that are no UTF-8 at 1" in line


def test_data_shows_the_rows_of_a_step(trained, capsys):
  config, _ = trained
  words = ["data", f"--config={config}", "--step=2", "--rows=3"]
  assert cli.main(words) == 0
  said = capsys.readouterr().out
  assert said.startswith("step 2: rows 4 to 7 of 32 tokens")
  assert said.count("=== row") == 3 and "=== row 4:" in said
  assert ".txt: tokens" in said
  assert "; 3 of 4 rows are shown" in said
  assert "ids: " in said
  _, workdir = trained
  words = ["data", f"--workdir={workdir}", "--step=2", "--rows=3"]
  assert cli.main(words) == 0
  assert capsys.readouterr().out == said


def test_tokenizer_is_trained_on_the_training_text(trained, capsys, tmp_path):
  config, _ = trained
  out = tmp_path / "bpe.json"
  words = ["tokenizer", f"--config={config}", "--vocab_size=300"]
  assert cli.main([*words, f"--out={out}"]) == 0
  assert len(json.loads(out.read_text())["model"]["vocab"]) == 300


def test_print_config_diff_paper_and_params_need_no_run(capsys):
  assert (
    cli.main(
      ["train", "--config=tiny", "--print_config", "--config.train.steps=77"]
    )
    == 0
  )
  assert "steps: 77" in capsys.readouterr().out
  assert cli.main(["diff-paper", "--config=v3_671b"]) == 0
  assert "0 departures" in capsys.readouterr().out
  assert cli.main(["diff-paper", "--config=tiny", "--config.model.dim=96"]) == 0
  said = capsys.readouterr().out.splitlines()
  assert ["model.dim", "7168", "96"] in [line.split() for line in said]
  assert cli.main(["params", "--config=v3_671b"]) == 0
  assert "671,026,419,200" in capsys.readouterr().out


@pytest.mark.parametrize(
  "words, wanted",
  [
    (["fly"], "invalid choice: 'fly'"),
    (["train", "--config=tiny", "--workdri=x"], "--workdri=x"),
    (["train", "--config=tinny"], "did you mean tiny?"),
    (["train"], "--config: missing"),
    (["train", "--config=tiny", "--config.model.dimm=3"], "model.dim?"),
    (["train", "--config=tiny", "--config.model.dim=a"], "wanted int"),
    (["train", "--config=tiny", "--config.model.moe.top_k=17"], "at most the"),
    (["eval", "--workdir=/nowhere"], "found no run there"),
    (["eval", "--workdir=/nowhere", "--config.model.dim=3"], "takes no"),
    (["data", "--config=tiny", "--step=0"], "wanted 1 or more"),
    (["train", "--config=tiny", "--config.train.steps={[]:1}"], "wanted int"),
    (
      ["train", "--config=tiny", "--config.train.steps=1e12"],
      "less than 2**31",
    ),
    (
      ["train", "--config=tiny", "--config.model.moe.kernel=tokamax"],
      "pip install tokamax",
    ),
    (["sample", "--workdir=x", "--prompt=a", "--seed=-1"], "found -1"),
    (
      ["train", "--config=tiny", "--config.data.sources=/nowhere/a.txt"],
      "/nowhere/a.txt",
    ),
  ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(
  words, wanted, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  code, line = failure(words, capsys)
  assert code == 2
  assert wanted in line
  assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_run_of_another_config_is_left_as_it_was(trained, capsys):
  config, workdir = trained
  before = (workdir / "config.json").read_bytes()
  words = ["train", f"--config={config}", f"--workdir={workdir}"]
  code, line = failure([*words, "--config.model.dim=64"], capsys)
  assert code == 2
  assert "holds a run of another config, with model.dim = 32" in line
  assert (workdir / "config.json").read_bytes() == before


def test_a_missing_checkpoint_is_named_with_those_there_are(trained, capsys):
  _, workdir = trained
  code, line = failure(["eval", f"--workdir={workdir}", "--step=5"], capsys)
  assert code == 2 and "--step=5" in line and " 8" in line


def test_a_folder_that_cannot_be_written_is_found_before_compiling(
  trained, capsys, tmp_path
):
  config, _ = trained
  (tmp_path / "file").write_text("in the way")
  words = ["train", f"--config={config}", f"--workdir={tmp_path}/file/run"]
  code, line = failure(words, capsys)
  assert code == 1 and f"{tmp_path}/file/run" in line


def test_help_does_not_import_jax():
  script = "import sys; from dsv3 import cli\ntry: cli.main(['--help'])\n"
  script += "except SystemExit: print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  assert "train" in done.stdout and done.stdout.endswith("False\n")
