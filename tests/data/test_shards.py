import numpy as np
import pytest

from dsv3.config import ConfigError
from dsv3.data import shards, sources
from dsv3.data.sources import Document
from dsv3.data.tokenizer import Bytes


def prepare(folder, tmp_path):
  return shards.prepare(str(folder), Bytes(), "text", str(tmp_path / "cache"))


def test_tokens_on_disk_are_the_documents(folder, tmp_path):
  corpus = prepare(folder, tmp_path)
  wanted = list(sources.documents(sources.find(str(folder)), "text"))
  assert corpus.names() == [d.name for d in wanted]
  assert corpus.tokens.dtype == np.uint16
  for i, document in enumerate(wanted):
    ids = corpus.tokens[corpus.start[i] : corpus.start[i + 1]]
    assert Bytes().decode(ids) == document.text
    assert corpus.n_bytes[i] == len(document.text.encode())
    assert corpus.chance[i] == document.chance


def test_second_start_reads_no_text(folder, tmp_path, monkeypatch):
  before = prepare(folder, tmp_path)
  monkeypatch.setattr(sources, "documents", None)
  after = prepare(folder, tmp_path)
  assert after.folder == before.folder
  assert np.array_equal(after.tokens, before.tokens)


def test_changed_file_is_tokenised_again(folder, tmp_path):
  before = prepare(folder, tmp_path)
  (folder / "00.txt").write_text("changed")
  after = prepare(folder, tmp_path)
  assert after.folder != before.folder
  assert Bytes().decode(after.tokens[:7]) == "changed"


def test_other_key_or_tokenizer_has_its_own_tokens(folder, tmp_path):
  class Other(Bytes):
    digest = "other"

  made = {
    shards.prepare(str(folder), tokens, key, str(tmp_path / "cache")).folder
    for tokens, key in ((Bytes(), "a"), (Bytes(), "b"), (Other(), "a"))
  }
  assert len(made) == 3


def test_failure_leaves_nothing_behind(tmp_path):
  def broken():
    yield Document("a", "text", 0.5)
    raise ConfigError("unreadable")

  with pytest.raises(ConfigError, match="unreadable"):
    shards.write(tmp_path / "cache" / "new", broken(), Bytes(), "x")
  assert not list((tmp_path / "cache").iterdir())


def test_two_writers_of_one_folder_agree(tmp_path):
  folder = tmp_path / "same"
  for _ in range(2):
    shards.write(folder, [Document("a", "text", 0.5)], Bytes(), "x")
  assert [p.name for p in tmp_path.iterdir()] == ["same"]
  assert len(shards.open_folder(folder, Bytes(), "x").tokens) == 4


def test_prepared_tokens_are_a_source(folder, tmp_path):
  made = prepare(folder, tmp_path)
  source = f"tokens:{made.folder}"
  corpus = shards.prepare(source, Bytes(), "text", "")
  assert np.array_equal(corpus.tokens, made.tokens)
  assert corpus.names() == made.names()


@pytest.mark.parametrize("name", ["meta.json", "index.npz", "tokens.bin"])
def test_damaged_tokens_are_named(folder, tmp_path, name):
  made = prepare(folder, tmp_path).folder
  for content in (b"", b"{}"):
    (made / name).write_bytes(content)
    with pytest.raises(ConfigError, match=str(made)):
      prepare(folder, tmp_path)
  (made / name).unlink()
  with pytest.raises(ConfigError, match=str(made)):
    prepare(folder, tmp_path)


def test_tokens_of_another_tokenizer_are_refused(folder, tmp_path):
  made = prepare(folder, tmp_path).folder

  class Other(Bytes):
    digest = "other"

  with pytest.raises(ConfigError, match="tokenizer: found bytes, wanted other"):
    shards.prepare(f"tokens:{made}", Other(), "text", "")


def test_source_without_text_and_unwritable_cache_are_named(tmp_path):
  (tmp_path / "corpus").mkdir()
  (tmp_path / "corpus" / "a.txt").write_text("")
  with pytest.raises(ConfigError, match="config.data.sources.*no text"):
    prepare(tmp_path / "corpus", tmp_path)
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(ConfigError, match="config.data.cache"):
    shards.write(
      tmp_path / "file" / "new", [Document("a", "b", 0)], Bytes(), "x"
    )


def test_cache_is_in_the_users_folder_unless_set(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert shards.cache_folder("") == tmp_path / "dsv3" / "tokens"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert shards.cache_folder("") == tmp_path / ".cache" / "dsv3" / "tokens"
  assert shards.cache_folder("there").name == "there"
