"""Who is gone, and who is told: processes played by locks of one."""

import subprocess
import sys
import time

import jax
import pytest

from dsv3.parallel import locks, presence, processes

N = 4


@pytest.fixture
def of(monkeypatch, tmp_path):
  """The Presence of a process of four, in place of whose end stands an error."""
  made, me, ended = {}, [0], {}

  class Ended(BaseException):
    pass

  def end(self, text):
    ended.setdefault(me[0], text)
    raise Ended

  def use(i):
    me[0] = i
    return made[i]

  monkeypatch.setattr(jax, "process_count", lambda: N)
  monkeypatch.setattr(jax, "process_index", lambda: me[0])
  monkeypatch.setattr(processes, "wait_for_all", lambda name: None)
  monkeypatch.setattr(presence.threading.Thread, "start", lambda self: None)
  monkeypatch.setattr(presence.Presence, "_end", end)
  monkeypatch.setattr(locks, "Teller", lambda first: None)
  monkeypatch.setattr(presence, "_LOOK_SECONDS", 0)
  monkeypatch.setattr(presence, "GRACE_SECONDS", 0.2)
  for i in range(N):
    me[0] = i
    made[i] = presence.Presence(tmp_path)
  use.ended, use.error = ended, Ended
  yield use
  for i in made:
    made[i]._mine.close()


def kill(present):
  """The system frees the lock, and the file says what it said."""
  present._mine.close()


def look(present):
  """Until it ends: the thread that looks."""
  with pytest.raises(BaseException) as found:
    present._look()
  return found.type.__name__


def test_all_are_there_and_then_one_is_not(of):
  assert of(1).gone() == []
  kill(of(2))
  (name,) = of(1).gone()
  assert name.startswith("process 2 (") and "pid" in name


def test_one_that_has_ended_with_the_others_is_not_gone(of):
  of(2).close()
  assert of(1).gone() == []


def test_the_first_sees_it_and_the_others_hear_of_it(of):
  kill(of(2))
  name = of(0).gone()[0]
  began = time.monotonic()
  assert look(of(0)) == "Ended"
  assert time.monotonic() - began > presence.GRACE_SECONDS
  kill(of(0))
  began = time.monotonic()
  assert look(of(3)) == "Ended"
  assert time.monotonic() - began < presence.GRACE_SECONDS  # heard, not seen
  assert of(3).gone() == [name]
  assert all(name in of.ended[i] for i in (0, 3))


def test_the_first_is_seen_by_all(of):
  kill(of(0))
  for i in (1, 2, 3):
    assert look(of(i)) == "Ended"
    assert "process 0 (" in of.ended[i]


@pytest.mark.parametrize("i", [0, 3])
def test_looks_are_as_many_as_processes_and_not_their_square(
  of, i, monkeypatch
):
  present, looked = of(i), []

  def last_words(other):
    looked.append(other)
    if len(looked) == 6:
      present._closed.set()

  monkeypatch.setattr(present, "_last_words", last_words)
  present._look()
  assert set(looked) == ({0} if i else {1, 2, 3})


def test_an_error_after_another_names_that_one(of):
  kill(of(2))
  with pytest.raises(of.error):
    of(1).leave(RuntimeError("Connection closed by peer\nand more"))
  assert "process 2 (" in of.ended[1]
  assert "(Connection closed by peer)" in of.ended[1]


def test_an_error_of_its_own_is_told_and_the_others_name_it(of, capsys):
  with pytest.raises(of.error):
    of(1).leave(ValueError("wrong"))
  assert of.ended[1] == "wrong"
  assert "ValueError: wrong" in capsys.readouterr().err
  kill(of(1))
  assert look(of(0)) == "Ended" and "process 1 (" in of.ended[0]


def test_though_it_cannot_be_written_down_it_ends(of, monkeypatch):
  """A full disk."""
  kill(of(2))
  present = of(0)

  def full(file, text):
    raise OSError("No space left on device")

  monkeypatch.setattr(locks, "write", full)
  assert look(present) == "Ended" and "process 2 (" in of.ended[0]


def test_where_locks_reach_no_other_host_nobody_is_taken_for_gone(
  of, monkeypatch, capsys, tmp_path
):
  """As on file systems whose locks are local: all can be taken, by all."""
  monkeypatch.setattr(
    presence.Presence, "_last_words", lambda self, i: "host, pid 7"
  )
  of(1)
  present = presence.Presence(tmp_path / "local")
  said = capsys.readouterr().err
  assert "cannot be seen in the run folder (the lock of process 0 (host" in said
  assert present.gone() == []


def test_one_that_goes_while_they_meet_is_named(of, monkeypatch, tmp_path):
  kill(of(2))

  def wait(name):
    raise RuntimeError("Connection reset by peer")

  monkeypatch.setattr(processes, "wait_for_all", wait)
  of(1)._mine.close()
  with pytest.raises(of.error):
    presence.Presence(tmp_path)
  assert "process 2 (" in of.ended[1] and "Connection reset" in of.ended[1]


def test_a_folder_that_another_run_has_is_told_soon(of, monkeypatch, tmp_path):
  monkeypatch.setattr(presence, "LOCK_SECONDS", 0.1)
  of(1)
  with pytest.raises(of.error):
    presence.Presence(tmp_path)
  assert "another run is in" in of.ended[1] and "pid" in of.ended[1]


def test_a_write_that_has_failed_ends_it(of):
  present = of(1)
  present.trouble = lambda: OSError("No space left on device")
  assert look(present) == "Ended"
  assert "could not be written (No space left" in of.ended[1]


ABORTED = """
import os, pathlib, sys
from dsv3.parallel import locks
teller = locks.Teller(pathlib.Path(sys.argv[1]))
if sys.argv[2] == "told":
  teller.dismiss()
os.abort()
"""


@pytest.mark.parametrize(
  "words, how, wanted",
  [
    ("host, pid 7", "untold", "process 0 (host, pid 7) of the run ended"),
    (
      locks.after(["process 2 (host, pid 9)"]),
      "untold",
      "error: process 2 (host, pid 9) of the run ended",
    ),
    ("host, pid 7", "told", ""),
    (locks.CLOSED, "untold", ""),
  ],
)
def test_who_is_gone_is_told_of_a_process_that_is_ended(
  tmp_path, words, how, wanted
):
  """By abort, as JAX ends those without the first."""
  first = tmp_path / "0"
  first.write_text(words)
  command = [sys.executable, "-c", ABORTED, str(first), how]
  ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
  assert ended.returncode < 0
  said = [x for x in ended.stderr.splitlines() if x.startswith("dsv3:")]
  assert len(said) == bool(wanted) and wanted in "".join(said)


def test_the_lock_of_one_that_goes_is_waited_for(tmp_path):
  first = tmp_path / "0"
  with open(first, "w+") as file:
    assert locks.hold(file)
    locks.write(file, "host, pid 7")
    command = [sys.executable, "-c", ABORTED, str(first), "untold"]
    ended = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert ended.wait() < 0  # the teller is there, and looks
  assert "process 0 (host, pid 7)" in ended.communicate()[1]
