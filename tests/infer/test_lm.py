"""The harness's three calls: what they return is what the model says."""

import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance

from dsv3 import cli, hf
from dsv3.config import ConfigError
from dsv3.data import bpe
from dsv3.data import tokenizer as tokenizing
from dsv3.infer import LM, Decoder, Sampling, generate, lm, scoring
from dsv3.nn import transformer
from tests import micro
from tests.infer.test_decoder import equations

BYTES = tokenizing.Bytes()
GREEDY = Sampling(temperature=0.0)
TEXT = "The router takes the top scores; the bias moves the choice. " * 3
PAIRS = [
  ("one two", " three"),
  (TEXT[:100], TEXT[100:110]),
  ("", "from nothing"),
  ("answer:", "A"),
  ("answer:", "B"),
  ("answer:", "Bee"),
  (TEXT[:63], "!"),
  ("x", TEXT[:70]),
]


@pytest.fixture(scope="module")
def model():
  """Weights large enough that tokens differ."""
  release = {"model.mtp.concat": "embedding_hidden"}  # the only one it has
  values = micro.config_of({"model.init_std": 0.3, **release}).model
  build = lambda key: transformer.make_model(values, key)
  return jax.jit(build)(jax.random.key(0))


def with_head(model, head_DW):
  """The same model with another output head."""
  made = nnx.clone(model)
  made.head[...] = jnp.asarray(head_DW)
  return made


@pytest.fixture(scope="module")
def writer(model):
  """A model that writes small letters, spaces and ends of lines."""
  letters = [*range(ord("a"), ord("z") + 1), ord(" "), ord("\n")]
  keep_W = np.isin(np.arange(model.head.shape[1]), letters)
  return with_head(model, model.head[...] * keep_W)


@pytest.fixture(scope="module")
def decoder(writer):
  return Decoder(writer)


@pytest.fixture(scope="module")
def free_text(decoder):
  """What the writer writes after a context, greedily: a context, a number."""

  def run(context, n):
    prompt = ids(context) or [BYTES.eos_id]
    (out,) = generate(decoder, [prompt], max_tokens=n, sampling=GREEDY)
    return BYTES.decode(out.tokens)

  return run


@pytest.fixture(scope="module")
def writing(writer, decoder):
  """An LM of the writer; all of them share what is compiled."""

  def make(**kwargs):
    made = LM(writer, BYTES, **kwargs)
    made._decoder = decoder
    return made

  return make


def instances(kind, *arguments):
  return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def score(made, *pairs):
  requests = instances("loglikelihood", *pairs)
  return made.loglikelihood(requests, disable_tqdm=True)


def roll(made, *texts):
  requests = instances("loglikelihood_rolling", *[(t,) for t in texts])
  return made.loglikelihood_rolling(requests, disable_tqdm=True)


def write(made, *pairs):
  requests = instances("generate_until", *pairs)
  return made.generate_until(requests, disable_tqdm=True)


_logits = jax.jit(lambda model, t_BL: model.logits(model(t_BL).hidden[0]))


def by_hand(model, context, continuation):
  """Log-probability and greedy of token ids, by one plain forward pass.

  Zeros to the right keep the shapes few; no position sees them.
  """
  tokens, n = [*context, *continuation], len(continuation)
  row = np.zeros((1, 256), np.int32)
  row[0, : len(tokens) - 1] = tokens[:-1]
  log_p_LW = np.asarray(jax.nn.log_softmax(_logits(model, row)))[0]
  log_p_LW = log_p_LW[len(context) - 1 : len(tokens) - 1]
  greedy = log_p_LW.argmax(-1).tolist() == list(continuation)
  return float(log_p_LW[np.arange(n), list(continuation)].sum()), greedy


def ids(text):
  return BYTES.encode(text).tolist()


def close(found, wanted):
  np.testing.assert_allclose(
    [f[0] for f in found], [w[0] for w in wanted], atol=1e-4, rtol=0
  )
  assert [f[1] for f in found] == [w[1] for w in wanted]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihood_is_the_log_softmax_of_a_plain_forward_pass(
  model, batch_size
):
  """In the order of the requests, whatever their lengths and the batch."""
  found = score(LM(model, BYTES, batch_size=batch_size), *PAIRS)
  close(
    found, [by_hand(model, ids(a) or [BYTES.eos_id], ids(b)) for a, b in PAIRS]
  )
  assert all(type(p) is float and type(g) is bool for p, g in found)


def test_greedy_is_that_every_token_is_the_likeliest(writer, free_text):
  prompt, free = ids("one two three"), ids(free_text("one two three", 5))
  requests = [(None, prompt, free)]
  for i in range(5):
    other = list(free)
    other[i] += 1
    requests.append((None, prompt, other))
  made = LM(writer, BYTES)
  found = made._loglikelihood_tokens(requests, disable_tqdm=True)
  assert [greedy for _, greedy in found] == [True, *[False] * 5]
  close(found, [by_hand(writer, c, t) for _, c, t in requests])


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model):
  made = LM(model, BYTES)
  moved = score(made, ("one  ", "two"), (" ", "two"))
  close(moved, score(made, ("one", "  two"), ("", " two")))


def test_a_long_request_loses_its_beginning(model):
  made = LM(model, BYTES, max_length=20)
  found = score(made, (TEXT[:90], "right"), (TEXT[:30], TEXT[30:50]))
  tokens = ids(TEXT[:90] + "right")[-21:]
  close(
    found,
    [
      by_hand(model, tokens[:16], tokens[16:]),
      by_hand(model, ids(TEXT[29]), ids(TEXT[30:50])),
    ],
  )
  with pytest.raises(ConfigError, match="of 21 tokens, wanted 1 to max_length"):
    score(made, ("x", TEXT[:21]))
  with pytest.raises(ConfigError, match=r"'answer', ''.*of 0 tokens"):
    score(made, ("answer", ""))


def test_a_begin_token_stands_before_every_context_and_is_not_scored(model):
  made = LM(model, BYTES, bos_id=BYTES.bos_id)
  begin = [BYTES.bos_id]
  found = score(made, ("one", " two"), ("", "two"))
  wanted = [(begin + ids("one"), ids(" two")), (begin, ids("two"))]
  close(found, [by_hand(model, *pair) for pair in wanted])
  (found,) = roll(made, "two")
  assert found == pytest.approx(by_hand(model, *wanted[1])[0], abs=1e-4)


def test_rolling_is_the_sum_over_windows_with_all_the_context_they_hold(model):
  """A text of 50 tokens through windows of 20: 20, 20 and 10 with 10 before."""
  made = LM(model, BYTES, max_length=20, batch_size=2)
  text = TEXT[:50]
  t = [BYTES.eos_id, *ids(text)]
  wanted = [(t[:1], t[1:21]), (t[20:21], t[21:41]), (t[30:41], t[41:51])]
  nats = sum(by_hand(model, *pair)[0] for pair in wanted)
  short = by_hand(model, t[:1], ids("short"))[0]
  found = roll(made, "short", text, "")
  np.testing.assert_allclose(found, [short, nats, 0.0], atol=1e-4)


def test_rolling_counts_every_token_once(model):
  """Where all tokens are as likely, a text costs its tokens times log W."""
  even = with_head(model, np.zeros(model.head.shape))
  made = LM(even, BYTES, max_length=20, batch_size=4)
  sizes = (1, 19, 20, 21, 40, 41, 99)
  texts = [TEXT[i : i + n] for i, n in enumerate(sizes)]
  found = roll(made, *texts)
  wanted = [-len(text) * math.log(model.head.shape[1]) for text in texts]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_choices_of_one_token_share_a_row_and_shapes_are_few(
  model, monkeypatch
):
  shapes = []

  def spy(weights, batch, **kwargs):
    shapes.append((*batch.tokens_BL.shape, *batch.last_BJ.shape[1:]))
    return real(weights, batch, **kwargs)

  real = scoring.score
  monkeypatch.setattr(scoring, "score", spy)
  made = LM(model, BYTES, batch_size=4)
  found = score(made, *[("answer:", letter) for letter in "ABCDE"])
  assert shapes == [(1, 64, 8)]
  wanted = [by_hand(model, ids("answer:"), ids(x)) for x in "ABCDE"]
  close(found, wanted)
  shapes.clear()
  score(made, *[(TEXT[:n], "xy") for n in range(1, 128, 7)])
  assert set(shapes) == {(4, 128, 1), (4, 64, 1)}


def test_no_array_holds_the_logits_of_all_positions(model):
  """The largest array is smaller, and labels alone go through the head."""
  made = LM(model, BYTES)
  keys = [tuple(range(200))] * 4
  batch = scoring.lay_out(keys, [[scoring.Ask(0, 9, 1)]] * 4, 4)
  assert batch.tokens_BL.shape == (4, 256)
  jaxpr = jax.make_jaxpr(
    lambda weights, b: scoring.score(weights, b, graphdef=made._graphdef)
  )(made._weights, batch)
  sizes = [v.aval.size for e in equations(jaxpr.jaxpr) for v in e.outvars]
  n_vocab = model.head.shape[1]
  assert 4 * scoring.CHUNK * n_vocab in sizes
  assert max(sizes) < 4 * 256 * n_vocab
  assert any(
    e.primitive.name == "cond" and e.outvars[0].aval.shape == (4, scoring.CHUNK)
    for e in equations(jaxpr.jaxpr)
  )


def test_generate_until_is_generate_up_to_the_first_stop_string(
  writing, free_text
):
  """Requests of different options and lengths, answered in their order."""
  texts = {c: free_text(c, 24) for c in ("one", TEXT[:40], "two ")}
  whole = {"max_gen_toks": 24}
  stops = {c: [text[20:22], text[9:12]] for c, text in texts.items()}
  until = {c: {"until": s, "max_gen_toks": 24} for c, s in stops.items()}
  requests = [(c, o) for c in texts for o in (whole, until[c])]
  made = writing(batch_size=4, max_length=128)
  found = write(made, *requests, ("one", {"max_new_tokens": 5}))
  for i, (c, text) in enumerate(texts.items()):
    assert found[2 * i] == text
    ends = [text.find(s) + len(s) for s in stops[c]]
    at = min(zip(ends, map(text.find, stops[c])))[1]
    assert found[2 * i + 1] == text[:at]
  assert found[-1] == texts["one"][:5]


def test_generation_ends_when_all_texts_have(writing, free_text, monkeypatch):
  steps = []

  def spy(*args, **kwargs):
    for step in real(*args, **kwargs):
      steps.append(step)
      yield step

  real = lm.stream
  monkeypatch.setattr(lm, "stream", spy)
  text = free_text("one", 24)
  made = writing(max_length=256)
  (found,) = write(
    made, ("one", {"until": text[6:9], "max_gen_toks": 24})
  )  # a string, no list
  assert found == text[: text.find(text[6:9])]
  assert len(steps) == text.find(text[6:9]) + 3
  steps.clear()
  assert write(made, ("one", {"max_gen_toks": 24})) == [text]
  assert len(steps) == 24


def test_the_end_of_a_document_stops(writer, free_text):
  """It is made the likeliest token where a letter was, by the head."""
  text = free_text("one", 12)
  at = max(text.find(c) for c in text)  # where the last new letter stands
  head_DW = np.array(writer.head)
  head_DW[:, BYTES.eos_id] = 1.01 * head_DW[:, ord(text[at])]
  made = LM(with_head(writer, head_DW), BYTES)
  assert at and write(made, ("one", {"max_gen_toks": 24})) == [text[:at]]


@pytest.mark.parametrize("at_once", [1, 2, 20])
def test_a_stop_string_is_found_across_tokens_and_special_ones_are_left_out(
  at_once,
):
  until = ("é\n", "<|fim_end|>")
  for tokens, wanted, ended in (
    (ids("caé\nz"), "ca", True),
    (ids("ca\né z"), "ca\né z", False),
    ([*ids("ca"), BYTES.fim.end, *ids("z")], "ca", True),
    ([*ids("ca"), BYTES.eos_id, *ids("z")], "ca", True),
    ([*ids("c"), BYTES.pad_id, 263, *ids("a")], "ca", False),  # no text
  ):
    text = lm._Text(BYTES, until)
    for i in range(0, len(tokens), at_once):
      text.extend(tokens[i : i + at_once])
    assert (text.value(), text.ended) == (wanted, ended)


def test_ids_past_those_of_a_tokenizer_file_are_no_text(tmp_path):
  """A model may have more rows than the tokenizer has tokens."""
  bpe.train_bpe(["text " * 9], 265, tmp_path / "tokenizer.json")
  tokens = tokenizing.load(str(tmp_path / "tokenizer.json"), 300)
  text = lm._Text(tokens, ["t!"])
  words = tokens.encode("some text!").tolist()
  text.extend([tokens.vocab_size + 1, words[0], tokens.bos_id, *words[1:]])
  assert text.value() == "some tex" and text.ended


def test_sampling_is_as_asked_and_repeats_differ(writing, free_text):
  made = writing(max_length=128, batch_size=4)
  size = {"max_gen_toks": 12}
  greedy = free_text("one", 12)
  drawn = {"do_sample": True, **size}
  one = {"do_sample": True, "temperature": 0.7, "top_k": 1, **size}
  cold = {"do_sample": False, "temperature": 0.7, "num_beams": 1, **size}
  nucleus = {"temperature": 1.0, "top_p": 0.0, **size}
  assert write(made, ("one", one), ("one", cold)) == [greedy] * 2
  assert write(made, ("one", nucleus)) == [greedy]
  found = write(made, *[("one", drawn)] * 5)
  assert len({*found, greedy}) == 6
  assert write(made, *[("one", drawn)] * 5) == found


def test_a_context_keeps_what_leaves_room_for_the_new_tokens(
  writing, free_text
):
  made = writing(max_length=40, batch_size=1)
  options = {"max_gen_toks": 10}
  found = write(made, (TEXT[:90], options), ("", options))
  assert found == [free_text(TEXT[60:90], 10), free_text("", 10)]


@pytest.mark.parametrize(
  "options, wanted",
  [
    ({"max_gen_toks": 40}, "found 40, wanted 1 to 39"),
    ({}, "max_gen_toks: found 256"),
    ({"max_gen_toks": 4, "num_beams": 3}, "found {'num_beams': 3}"),
    ({"max_gen_toks": 4, "typical_p": 0.3}, "found {'typical_p': 0.3}"),
    ({"max_gen_toks": 4, "do_sample": True, "top_p": 2.0}, "top_p: found 2.0"),
  ],
)
def test_options_that_cannot_be_met_are_named_before_any_work(
  model, options, wanted, monkeypatch
):
  monkeypatch.setattr(lm, "stream", lambda *_, **__: pytest.fail("it began"))
  requests = ("one", {"max_gen_toks": 4}), ("one", options)
  with pytest.raises(ConfigError, match=wanted):
    write(LM(model, BYTES, max_length=40), *requests)


def test_arguments_out_of_range_are_named(model):
  for name in ("batch_size", "max_length", "max_new_tokens"):
    with pytest.raises(ConfigError, match=f"{name}: found 0"):
      LM(model, BYTES, **{name: 0})
  rope = model.model.rope
  assert LM(model, BYTES).max_length == rope.original_len * rope.yarn_factor


def test_a_run_and_a_released_folder_are_the_model_and_tokenizer_in_them(
  model, tmp_path, monkeypatch
):
  out, run = tmp_path / "release", tmp_path / "run"
  hf.save(model, out)
  bpe.train_bpe(["text"], 262, out / "tokenizer.json")
  words = ["convert", "from-hf", str(out), f"--out={run}", "--dtype=float32"]
  assert cli.main(words) == 0
  tokens = tokenizing.load(str(out / "tokenizer.json"), 264)
  loaded, pairs = hf.load(out), PAIRS[:4]
  wanted = score(LM(loaded, tokens, batch_size=4), *pairs)
  other = score(LM(loaded, BYTES, batch_size=4), *pairs)
  assert abs(wanted[0][0] - other[0][0]) > 0.1
  from_hf, from_run = LM.from_hf(out), LM.from_run(run, step=0, batch_size=4)
  close(score(from_hf, *pairs), wanted)
  close(score(from_run, *pairs), wanted)
  assert from_hf.max_length == from_run.max_length == 4096
  assert from_run.get_model_info()["step"] == 0
  assert from_hf.bos_id is None and from_run.bos_id is None
  path = out / "tokenizer_config.json"
  path.write_text('{"add_bos_token": false}')
  assert LM.from_hf(out).bos_id is None
  for folder in (out, run):
    (folder / path.name).write_text('{"add_bos_token": true}')
  for path, keys in (
    (out / "config.json", ["max_position_embeddings"]),
    (run / "config.json", ["resolved", "data", "seq_len"]),
  ):
    tree = json.loads(path.read_text())
    functools.reduce(dict.get, keys[:-1], tree)[keys[-1]] = 2048
    path.write_text(json.dumps(tree))
  begin = LM.from_hf(out)
  assert begin.max_length == LM.from_run(run).max_length == 2048
  assert begin.bos_id == tokens.bos_id != tokens.eos_id
  assert LM.from_run(run).bos_id == tokens.bos_id
  assert LM.from_run(run, bos_id=None).bos_id is None
  wanted = score(LM(loaded, tokens, bos_id=tokens.bos_id), *pairs)
  close(score(begin, *pairs), wanted)
  with pytest.raises(ConfigError, match="--step=7: no such checkpoint"):
    LM.from_run(run, step=7)
  asked = []
  monkeypatch.setattr(lm, "restore", lambda *a, **k: asked.append(k["ema"]))
  with pytest.raises(AttributeError):
    LM.from_run(run, ema=True)
  assert asked == [True]


def tasks():
  """Three tasks whose documents are in memory, one for each call."""
  from datasets import Dataset

  docs = [
    {"question": f"{n} + 1 =", "choices": ["3", "4"], "answer": n - 2}
    for n in (2, 3)
  ]
  shared = {
    "custom_dataset": lambda **kwargs: {"test": Dataset.from_list(docs)},
    "test_split": "test",
    "doc_to_text": "{{question}}",
  }
  return [
    shared
    | {
      "task": "choose",
      "output_type": "multiple_choice",
      "doc_to_target": "answer",
      "doc_to_choice": "choices",
      "metric_list": [{"metric": "acc"}],
    },
    shared
    | {
      "task": "bits",
      "output_type": "loglikelihood_rolling",
      "doc_to_text": "",
      "doc_to_target": "{{question}}",
      "metric_list": [{"metric": "bits_per_byte"}],
    },
    shared
    | {
      "task": "write",
      "output_type": "generate_until",
      "doc_to_target": "{{choices[answer]}}",
      "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
      "metric_list": [{"metric": "exact_match"}],
    },
  ], docs


def test_the_harness_runs_tasks_of_all_three_calls(
  writer, writing, free_text, tmp_path, monkeypatch
):
  """Without a network; its figures are those computed by hand."""
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  from lm_eval.tasks import TaskManager

  configs, docs = tasks()
  found = lm_eval.simple_evaluate(
    model=writing(max_length=64),
    tasks=configs,
    task_manager=TaskManager(include_defaults=False),
    bootstrap_iters=0,
  )
  results, right, nats, n_bytes = found["results"], 0, 0.0, 0
  for doc in docs:
    said = [
      by_hand(writer, ids(doc["question"]), ids(f" {c}"))[0]
      for c in doc["choices"]
    ]
    right += int(np.argmax(said)) == doc["answer"]
    nats += by_hand(writer, [BYTES.eos_id], ids(doc["question"]))[0]
    n_bytes += len(doc["question"])
  assert results["choose"]["acc,none"] == right / 2
  assert results["bits"]["bits_per_byte,none"] == pytest.approx(
    -nats / math.log(2) / n_bytes, abs=1e-4
  )
  texts = [s["resps"][0][0] for s in found["samples"]["write"]]
  assert texts == [free_text(doc["question"], 8).split("\n")[0] for doc in docs]
  assert found["config"]["model_num_parameters"] > 10_000


def test_the_harness_is_imported_when_asked_for_and_named_when_missing():
  program = """
import sys
import dsv3.infer
assert not [m for m in sys.modules if m.startswith(("lm_eval", "datasets"))]
sys.modules["lm_eval"] = None
try:
  dsv3.infer.LM
except ImportError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert 'pip install "dsv3[harness]"' in done.stdout


def test_answers_are_cached_by_the_text_of_the_request(writing, tmp_path):
  """A run of the harness with use_cache goes on where it was killed."""
  from lm_eval.api.model import CachingLM

  made = CachingLM(writing(max_length=64), str(tmp_path / "answers.db"))
  for kind, ask, arguments in (
    ("loglikelihood", score, PAIRS[:3]),
    ("loglikelihood_rolling", roll, [TEXT[:70]]),
    ("generate_until", write, [("one", {"max_gen_toks": 4})]),
  ):
    wanted = ask(made.lm, *arguments)
    setattr(made.lm, kind, lambda _: pytest.fail("it was not cached"))
    arguments = [a if isinstance(a, tuple) else (a,) for a in arguments]
    assert getattr(made, kind)(instances(kind, *arguments)) == wanted
