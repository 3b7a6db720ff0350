"""Needles of known prompts, and models whose score is known (Fig. 8)."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import ConfigError
from dsv3.data import bpe, tokenizer
from dsv3.eval import heatmap, needle
from dsv3.infer import Decoder, Sampling, generate
from dsv3.nn import transformer
from tests import micro

BYTES = tokenizer.Bytes()
LENGTHS, DEPTHS = (256, 1024), (0, 25, 40, 60, 75, 100)
CUE = r"\nThe magic number of (\w+) is "
LONGEST_SENTENCE = 60  # characters, of the texts below


@pytest.fixture(scope="module")
def texts():
  """Forty documents of sentences and lines, all different."""
  rng = np.random.default_rng(0)
  words = [f"word{i}" for i in range(40)]

  def sentence(n):
    return f"Sentence {n} has " + " ".join(rng.choice(words, 5)) + "."

  return [
    "\n".join(
      f"{sentence(n + i)} {sentence(n + i + 1)}" for i in range(0, 8, 2)
    )
    for n in range(0, 400, 10)
  ]


@pytest.fixture(scope="module")
def tokenizers(texts, tmp_path_factory):
  """Bytes, and a BPE with tokens of several digits."""
  path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
  numbers = [" ".join(map(str, range(n, n + 100))) for n in range(0, 999, 100)]
  bpe.train_bpe([*texts, *numbers * 20], 600, path)
  return {"bytes": BYTES, "bpe": tokenizer.load(str(path), 600)}


@pytest.fixture(scope="module")
def haystack(texts):
  return needle.Haystack(texts, BYTES)


def reader(first_seen):
  """A model that finds the needle in what it sees: the text from a share on."""

  def ask(prompts):
    out = []
    for prompt in prompts:
      seen = prompt.tokens[int(first_seen * len(prompt.tokens)) :]
      text = BYTES.decode(np.array(seen))
      name = re.search(CUE + "$", text)[1]
      known = re.search(rf"\nThe magic number of {name} is (\d+)\.\n", text)
      said = BYTES.encode(known[1] if known else "?????").tolist()
      out.append(needle.Reply(said, [0.0 if known else -3.0] * 5))
    return out

  return ask


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_prompt_and_answer_have_exactly_the_wanted_length(
  name, texts, tokenizers
):
  tokens = tokenizers[name]
  made = needle.Haystack(texts, tokens)
  for length in (120, 121, 777):
    for depth in DEPTHS:
      for trial in range(3):
        prompt = made.prompt(length, depth, trial)
        assert len(prompt.tokens) + len(prompt.answer) == length
        assert prompt.tokens[0] == tokens.eos_id
        assert tokens.eos_id not in prompt.tokens[1:]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_prompt_goes_on_as_the_needle_did(name, texts, tokenizers):
  """Text and tokens: the answer's ids are those that the needle has."""
  tokens = tokenizers[name]
  made = needle.Haystack(texts, tokens)
  sizes = set()
  for trial in range(20):
    prompt = made.prompt(300, 50, trial)
    whole = tokens.decode(np.array(prompt.tokens + prompt.answer))
    found = re.search(CUE + r"(\d{5})$", whole)
    assert whole.count(f"{found[0]}.\n") == 1
    hidden = prompt.tokens[prompt.begin : prompt.end]
    assert tokens.decode(np.array(hidden)) == f"{found[0]}.\n"
    assert ",".join(map(str, prompt.answer)) in ",".join(map(str, hidden))
    sizes.add(len(prompt.answer))
  assert sizes == {5} if name == "bytes" else min(sizes) < 5


def test_needle_is_once_at_its_depth_after_a_sentence(texts, haystack):
  for length in LENGTHS:
    for depth in DEPTHS:
      prompt = haystack.prompt(length, depth, trial=1)
      before = BYTES.decode(np.array(prompt.tokens[1 : prompt.begin]))
      after = BYTES.decode(np.array(prompt.tokens[prompt.end :]))
      after = after[: re.search(CUE + "$", after).start()]
      assert "magic" not in before + after
      n = len(before) + len(after)
      shift = abs(len(before) - depth / 100 * n)
      assert shift <= min(LONGEST_SENTENCE, n / 32 + 1)
      if length == 1024:  # 1/32 of it is a half of most sentences
        assert depth in (0, 100) or before[-1] in ".\n"
      if depth == 0:
        assert not before
      if depth == 100:
        assert not after


def test_text_without_ends_is_cut_at_the_wanted_token():
  made = needle.Haystack(["x" * 2000], BYTES)
  prompt = made.prompt(1000, 40, 0)
  n = 1000 - 1 - (prompt.end - prompt.begin) - len("\n") - 5
  n -= len("The magic number of abcdefgh is ")
  assert prompt.begin - 1 == round(0.4 * n)


def test_prompts_hang_on_seed_and_trial_alone(texts, haystack):
  again = needle.Haystack(texts, BYTES)
  again.prompt(1024, 0, 3)  # what was asked for before changes nothing
  for args in ((256, 25, 0, 0), (1024, 60, 2, 7)):
    assert haystack.prompt(*args) == again.prompt(*args)
  base = haystack.prompt(256, 25, 0, 0)
  for args in ((256, 25, 1, 0), (256, 25, 0, 1)):
    assert haystack.prompt(*args).answer != base.answer
    assert haystack.prompt(*args).tokens[:40] != base.tokens[:40]
  hay = lambda p: p.tokens[1 : p.begin] + p.tokens[p.end : -34]
  longer = haystack.prompt(1024, 75, 0, 0)
  assert longer.answer == base.answer
  assert hay(longer)[: len(hay(base))] == hay(base)


def test_one_that_sees_all_answers_all(haystack):
  rows = list(needle.score(reader(0.0), haystack, LENGTHS, DEPTHS, trials=3))
  assert [(r["length"], r["depth"]) for r in rows] == [
    (length, depth) for length in LENGTHS for depth in DEPTHS
  ]
  for row in rows:
    assert (row["recall"], row["log_prob"], row["n"]) == (1.0, 0.0, 3)


def test_one_that_sees_the_second_half_answers_the_second_half(haystack):
  lengths = 1024, 2048  # in shorter ones the question is much of the prompt
  for row in needle.score(reader(0.5), haystack, lengths, DEPTHS, trials=3):
    assert row["recall"] == (1.0 if row["depth"] > 50 else 0.0), row
    assert row["log_prob"] == (0.0 if row["depth"] > 50 else -3.0), row


def test_what_does_not_fit_is_an_error_before_the_model_is_asked(texts):
  made = needle.Haystack(texts[:3], BYTES)
  asked = []

  def run(lengths, depths):
    with pytest.raises(ConfigError) as caught:
      needle.score(asked.append, made, lengths, depths, trials=1)
    return str(caught.value)

  n = sum(len(text) + len("\n\n") for text in texts[:3])
  assert f"found {n:,} tokens of text" in (said := run((256, 4096), (50,)))
  assert "haystack of length 4,096" in said
  shortest = int(re.search(r"at least (\d+) tokens", run((60, 256), (50,)))[1])
  assert len(made.prompt(shortest, 50, 0).tokens) == shortest - 5
  assert f"found {shortest - 1}" in run((shortest - 1,), (50,))
  assert "found 101, wanted 0 to 100" in run((256,), (0, 101))
  assert not asked
  with pytest.raises(ConfigError, match="found 0 tokens"):
    needle.Haystack([], BYTES).prompt(256, 0, 0)


@pytest.fixture(scope="module")
def model():
  """Weights large enough that tokens differ."""
  values = micro.config_of({"model.init_std": 0.3}).model
  build = lambda key: transformer.make_model(values, key)
  return jax.jit(build)(jax.random.key(0))


def test_log_probs_are_those_of_the_full_forward_pass(model, haystack):
  """Answers of unequal length too, and in groups of any size."""
  whole = [haystack.prompt(100, 50, trial) for trial in range(3)]
  prompts = list(whole)
  prompts[1] = whole[1]._replace(answer=whole[1].answer[:2])
  ask = needle.asker(Decoder(model), batch=2, chunk=64)
  replies = ask(prompts)
  forward = jax.jit(lambda m, t: m.logits(m(t).hidden[0]))
  wanted = []
  for prompt in whole:
    tokens = jnp.array(prompt.tokens + prompt.answer)[None]
    log_p_LW = np.asarray(jax.nn.log_softmax(forward(model, tokens)[0]))[94:99]
    best = log_p_LW.argmax(1).tolist()
    wanted.append(
      needle.Reply(best, log_p_LW[np.arange(5), prompt.answer].tolist())
    )
  for prompt, reply, one in zip(prompts, replies, wanted, strict=True):
    n = len(prompt.answer)
    np.testing.assert_allclose(reply.log_probs, one.log_probs[:n], atol=1e-4)
    assert reply.tokens == one.tokens[:n]
  (row,) = needle.score(ask, haystack, [100], [50], trials=3)
  mean = np.mean([one.log_probs for one in wanted])
  assert row["log_prob"] == pytest.approx(mean, abs=1e-4)
  assert row["recall"] == 0.0


def test_an_answer_is_right_where_greedy_decoding_gives_it(model, haystack):
  decoder = Decoder(model)
  prompt = haystack.prompt(100, 50, 0)
  (greedy,) = generate(
    decoder,
    [prompt.tokens],
    max_tokens=5,
    sampling=Sampling(temperature=0.0),
  )
  ask = needle.asker(decoder)
  (reply,) = ask([prompt._replace(answer=greedy.tokens)])
  assert reply.tokens == greedy.tokens
  np.testing.assert_allclose(reply.log_probs, greedy.log_probs, atol=1e-4)
  other = greedy.tokens[:2] + [(greedy.tokens[2] + 1) % 256]
  (reply,) = ask([prompt._replace(answer=other)])
  assert reply.tokens == greedy.tokens[:3]


@pytest.mark.parametrize(
  "diff, wanted",
  [
    ({}, 32),
    ({"model.rope.yarn_factor": 4.0, "model.rope.original_len": 32}, 128),
    ({"model.rope.yarn_factor": 4.0, "model.rope.original_len": 4}, 32),
  ],
)
def test_trained_length_is_that_of_the_rows_or_of_yarn(diff, wanted):
  assert needle.trained_length(micro.config_of(diff)) == wanted


ROWS = [
  {
    "length": length,
    "depth": depth,
    "recall": float(depth == 0),
    "log_prob": -2.5,
    "n": 2,
  }
  for length in (1024, 2048)
  for depth in (0, 50, 100)
]


def test_table_leaves_out_what_was_not_measured():
  lines = needle.table(ROWS[:-1]).splitlines()
  assert lines[0].split() == ["depth", "%", "1,024", "2,048"]
  assert lines[1].split() == ["0", "1.00", "-2.50", "1.00", "-2.50"]
  assert lines[3].split() == ["100", "0.00", "-2.50"]


def _share(pixels, rgb):
  return (np.abs(pixels - rgb).max(-1) < 0.01).mean()


@pytest.mark.parametrize(
  "panels, rows, shown",
  [
    (("recall",), ROWS, (0.0, 1.0)),
    (("log_prob",), ROWS, (1 / 6,)),  # -2.5 on a scale from -3 to 0
    (("recall", "log_prob"), ROWS[:-1], (0.0, 1.0, 1 / 6)),
  ],
)
def test_heat_map_has_the_colours_of_its_values(panels, rows, shown, tmp_path):
  matplotlib = pytest.importorskip("matplotlib")
  heatmap.draw(rows, tmp_path / "map.png", title="micro", panels=panels)
  pixels = matplotlib.image.imread(tmp_path / "map.png")[..., :3]
  colours = matplotlib.colormaps["viridis"]
  for value in (0.0, 1 / 6, 0.5, 1.0):
    # The scale at the side has a line of every colour.
    assert (_share(pixels, colours(value)[:3]) > 0.03) == (value in shown)
  grey = matplotlib.colors.to_rgb("lightgrey")
  assert (_share(pixels, grey) > 0.03) == (len(rows) < len(ROWS))


def test_rows_are_written_one_on_a_line(tmp_path):
  path = tmp_path / "needle.json"
  needle.write(ROWS, path, {"run": "micro"})
  assert json.loads(path.read_text()) == {
    "about": {"run": "micro"},
    "rows": ROWS,
  }
  assert len(path.read_text().splitlines()) == len(ROWS) + 3


def test_heat_map_as_svg_says_its_title_and_axes(tmp_path):
  pytest.importorskip("matplotlib")
  path = tmp_path / "map.svg"
  heatmap.draw(ROWS, path, title="the micro run")
  said = path.read_text()
  for text in (
    "the micro run",
    "context length, tokens",
    "1K",
    "1.00",
    "-2.50",
  ):
    assert f"<!-- {text} -->" in said, text


def test_without_matplotlib_the_error_says_what_to_install(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ConfigError, match=r'pip install "dsv3\[plot\]"'):
    heatmap.draw(ROWS, tmp_path / "map.png", title="micro")
