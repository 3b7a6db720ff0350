import gzip
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dsv3.config import ConfigError
from dsv3.data import bpe, tokenizer
from tests.data import conftest

# The second part would make tokens of four digits, of white space with a line
# end, and of "):" before a line end alone, if nothing prevented them.
TEXTS = [
  conftest.text(i, 300) + "你好，世界。\n" + "1234567  \na:\n b):\n" * 40
  for i in range(20)
]


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
  path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
  bpe.train_bpe(TEXTS, 320, path)
  return str(path)


@pytest.fixture(scope="module")
def trained(bpe_path):
  return tokenizer.load(bpe_path, 320)


@hypothesis.given(strategies.text())
def test_bytes_round_trip_and_count(text):
  bytes_ = tokenizer.Bytes()
  ids = bytes_.encode(text)
  assert bytes_.decode(ids) == text
  assert bytes_.token_bytes(ids) == len(ids) == len(text.encode())


def test_bytes_decode_shows_specials_and_broken_text():
  ids = [97, 259, 195, 256, 263]
  assert tokenizer.Bytes().decode(ids) == "a<|fim_hole|>\ufffd<|eos|><|263|>"


@hypothesis.given(strategies.text())
@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_bpe_round_trip_and_count(trained, text):
  ids = trained.encode(text)
  assert trained.decode(ids) == text
  assert trained.token_bytes(ids) == len(text.encode())
  assert np.array_equal(trained.encode_batch([text])[0], ids)


def test_bpe_compresses_and_is_the_same_again(trained, bpe_path, tmp_path):
  ids = trained.encode(TEXTS[0])
  assert len(ids) < len(TEXTS[0]) / 2
  bpe.train_bpe(TEXTS, 320, tmp_path / "again.json")
  assert (tmp_path / "again.json").read_text() == open(bpe_path).read()


def test_bpe_does_not_merge_what_the_patterns_part(trained):
  texts = [trained.decode([i]) for i in trained.encode("12345678好the")]
  assert all(len(t) <= 3 for t in texts if t.isdigit())
  assert not any("8" in t and len(t.strip("0123456789")) for t in texts)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_text_makes_no_special_tokens(name, bpe_path):
  made = tokenizer.load("bytes" if name == "bytes" else bpe_path, 320)
  special = {made.eos_id, made.bos_id, made.pad_id, *made.fim}
  assert len(special) == 6
  text = "a <|eos|> <|fim_hole|> b"
  ids = made.encode(text)
  assert not special & set(ids.tolist())
  assert made.token_bytes(ids) == len(text)
  assert made.token_bytes(np.array([*special, -1])) == 0


def test_marks_that_the_file_calls_ordinary_are_special(bpe_path, tmp_path):
  raw = json.loads(open(bpe_path).read())
  for token in raw["added_tokens"]:
    token["special"] = False
  raw = json.dumps(raw).replace("<|fim_hole|>", "<｜fim▁hole｜>")
  path = tmp_path / "tokenizer.json.gz"
  path.write_bytes(gzip.compress(raw.encode()))
  made = tokenizer.load(str(path), 320)
  assert made.fim.hole not in made.encode("<｜fim▁hole｜>")
  assert made.token_bytes(np.array([made.fim.hole, made.eos_id])) == 0


def test_sec41_splits_are_punctuation_then_line_ends(trained):
  first_W, second_W = trained.splits
  (merged,) = np.nonzero(first_W >= 0)
  assert len(merged) >= 3
  for i in merged:
    head, tail = trained.decode([first_W[i]]), trained.decode([second_W[i]])
    assert trained.decode([i]) == head + tail
    assert tail.strip("\r\n") == "" and head.strip()
    assert not any(c.isalnum() for c in head)
  assert np.array_equal(second_W >= 0, first_W >= 0)


def test_tokenizer_that_the_model_cannot_hold_names_both_keys(bpe_path):
  with pytest.raises(ConfigError) as caught:
    tokenizer.load(bpe_path, 319)
  message = str(caught.value)
  assert "config.model.vocab_size: found 319" in message
  assert "320 tokens of config.data.tokenizer" in message


def test_bad_tokenizer_files_are_named(bpe_path, tmp_path):
  raw = json.loads(open(bpe_path).read())
  no_eos = json.dumps(raw).replace("<|eos|>", "<|what|>")
  files = {
    "{}": "wanted the JSON",
    no_eos: "no end-of-sentence",
    json.dumps({**raw, "decoder": None}): "no ByteLevel decoder",
  }
  path = tmp_path / "tokenizer.json"
  for content, message in files.items():
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
      tokenizer.load(str(path), 320)
  for name in (str(tmp_path / "none.json"), bpe_path + ".gz"):
    with pytest.raises(ConfigError, match="config.data.tokenizer"):
      tokenizer.load(name, 320)
  path = tmp_path / "plain.json.gz"
  path.write_text("{}")
  with pytest.raises(ConfigError, match="config.data.tokenizer"):
    tokenizer.load(str(path), 320)


def test_names_of_specials_stand_for_them_in_a_rendered_template_alone(trained):
  for tokens in (tokenizer.Bytes(), trained):
    name = tokens.decode([tokens.eos_id])
    text = f"a{name}b"
    ids = tokens.encode_marked(text).tolist()
    plain = [tokens.encode(part).tolist() for part in "ab"]
    assert ids == [*plain[0], tokens.eos_id, *plain[1]]
    assert tokens.eos_id not in tokens.encode(text)
    assert tokens.first_mark(text) == name and tokens.first_mark("ab") is None
