"""A checkpoint is the whole state, whole or not there, and outlives damage."""

import functools
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.parallel import processes
from dsv3.train import optimizer, state
from dsv3.train.checkpoint import CheckpointError, Checkpoints
from dsv3.train.trees import abstract, state_of, trees_of
from tests import micro

# Orbax's reads of a damaged file fail a second time when they are collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)
VALUES = micro.config_of({"optimizer.moment_dtype": "bfloat16"})


def create():
  return state.create(VALUES, optimizer.make(VALUES.optimizer))[1]


@pytest.fixture(scope="module")
def start():
  return jax.jit(create)()


@functools.cache
def shapes() -> state.TrainState:
  return jax.eval_shape(create)


def like():
  return abstract(trees_of(shapes()))


@functools.partial(jax.jit, donate_argnums=0)
def change(tree):
  """Something that writes over what it is given, as the step does."""
  return jax.tree.map(lambda x: (x + 1).astype(x.dtype), tree)


def copy_of(tree):
  return jax.tree.map(jnp.copy, tree)


def equal(a, b) -> bool:
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def save_three(folder: pathlib.Path, start, scores=(3.0, 2.0, 4.0)):
  """Checkpoints 1 to 3 whose step is their number."""
  checkpoints = Checkpoints(folder, kept=2)
  for step, score in enumerate(scores, 1):
    tree = start.replace(step=jnp.int32(step))
    meta = {"sequences": 4 * step}
    checkpoints.save(step, trees_of(tree), meta, bits_per_byte=score)
  checkpoints.wait()
  return checkpoints


def damage(step_folder: pathlib.Path) -> None:
  """Cuts the largest file of the parameters in half."""
  files = [f for f in (step_folder / "params").rglob("*") if f.is_file()]
  largest = max(files, key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_restored_state_is_bit_equal_though_arrays_were_donated(
  tmp_path, start
):
  checkpoints = Checkpoints(tmp_path, kept=1)
  tree = copy_of(start)
  checkpoints.save(1, trees_of(tree), {"sequences": 4, "seed": 0})
  for _ in range(3):  # while the save is still going on
    tree = change(tree)
  checkpoints.wait()
  step, found, meta = checkpoints.restore_newest(like(), pytest.fail)
  assert (step, meta["sequences"], meta["seed"]) == (1, 4, 0)
  restored = state_of(found, shapes())
  assert jax.tree.structure(restored) == jax.tree.structure(start)
  assert equal(restored, start)
  assert meta["dtypes"]["router/moe/ffn/router/bias"] == "float32"
  assert meta["dtypes"]["optimizer/1/first/head"] == "bfloat16"


def test_names_in_a_checkpoint_are_those_of_the_model(tmp_path, start):
  save_three(tmp_path, start).close()
  names = Checkpoints(tmp_path, read_only=True).restore(3, {})[1]["dtypes"]
  assert "params/moe/attention/w_uk" in names
  assert "params/embed" in names
  assert "router/mtp/block/ffn/router/bias" in names
  assert not [n for n in names if "value" in n]


def test_the_newest_and_the_best_are_kept(tmp_path, start):
  checkpoints = save_three(tmp_path, start, scores=(2.0, 4.0, 3.0))
  assert checkpoints.steps == [1, 2, 3]
  checkpoints.save(4, trees_of(start), {}, bits_per_byte=5.0)
  checkpoints.wait()
  assert checkpoints.steps == [1, 3, 4]
  checkpoints.close()
  again = Checkpoints(tmp_path, kept=2)
  again.save(5, trees_of(start), {})  # without an evaluation
  again.wait()
  assert again.steps == [1, 4, 5]


def test_a_damaged_newest_falls_back_says_so_and_is_not_lost(tmp_path, start):
  folder = tmp_path / "checkpoints"
  checkpoints = save_three(folder, start)
  damage(folder / "3")
  said = []
  step, found, meta = checkpoints.restore_newest(
    like(), said.append, set_aside=True
  )
  assert (step, int(found["counters"]["step"])) == (2, 2)
  assert meta["sequences"] == 8
  assert len(said) == 1 and str(folder / "3") in said[0]
  assert "\n" not in said[0]
  assert (tmp_path / "damaged" / "3" / "params").is_dir()
  checkpoints.save(3, trees_of(start), {})  # the step comes again
  checkpoints.wait()
  assert checkpoints.restore_newest(like(), pytest.fail)[0] == 3


def test_what_another_process_finds_damaged_nobody_takes(
  tmp_path, start, monkeypatch
):
  checkpoints, said, found = save_three(tmp_path, start), [], []

  def largest(mine):
    found.append(mine)
    return max(mine, len(found) == 1)  # the other could not read the newest

  monkeypatch.setattr(processes, "largest", largest)
  assert checkpoints.restore_newest(like(), said.append)[0] == 2
  assert found == [0, 0]
  assert "3 (as another process finds)" in said[0]


def test_a_missing_item_counts_as_damage(tmp_path, start):
  checkpoints = save_three(tmp_path, start)
  (tmp_path / "3" / "optimizer" / "manifest.ocdbt").unlink()
  said = []
  assert checkpoints.restore_newest(like(), said.append)[0] == 2
  assert len(said) == 1


def test_no_readable_checkpoint_is_an_error_not_a_new_run(tmp_path, start):
  checkpoints = save_three(tmp_path, start, scores=(1.0,))
  damage(tmp_path / "1")
  for _ in range(2):  # a second start does not find an empty folder
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
      checkpoints.restore_newest(like(), lambda text: None, set_aside=True)
  assert Checkpoints(tmp_path / "none").restore_newest(like(), print) is None


def test_another_dtype_is_an_error_not_a_cast(tmp_path, start):
  """Orbax would cast in silence, and a bias in bfloat16 stops moving."""
  checkpoints = Checkpoints(tmp_path)
  half = jax.tree.map(lambda b: b.astype(jnp.bfloat16), start.router)
  checkpoints.save(1, trees_of(start.replace(router=half)), {})
  checkpoints.wait()
  with pytest.raises(CheckpointError, match="found bfloat16, wanted float32"):
    checkpoints.restore_newest(like(), pytest.fail)


def test_an_unfinished_save_is_no_checkpoint(tmp_path, start):
  save_three(tmp_path, start).close()
  (tmp_path / "3").rename(tmp_path / "3.orbax-checkpoint-tmp")
  again = Checkpoints(tmp_path, kept=2)
  assert again.restore_newest(like(), pytest.fail)[0] == 2
  again.save(3, trees_of(start), {})
  again.wait()
  assert again.restore_newest(like(), pytest.fail)[0] == 3
  assert {f.name for f in tmp_path.iterdir()} == {"2", "3"}


def test_a_full_disk_is_said_before_anything_is_written(
  tmp_path, start, monkeypatch
):
  save_three(tmp_path, start)
  checkpoints = Checkpoints(tmp_path)
  before = checkpoints.steps
  size = sum(x.nbytes for x in jax.tree.leaves(trees_of(start)))
  usage = lambda free: lambda _: types.SimpleNamespace(free=free)
  monkeypatch.setattr(shutil, "disk_usage", usage(size - 1))
  with pytest.raises(CheckpointError, match=f"step 9; .* is: {before[-1]}"):
    checkpoints.save(9, trees_of(start), {})
  assert checkpoints.steps == before and not list(tmp_path.glob("9*"))
  monkeypatch.setattr(shutil, "disk_usage", usage(size))
  checkpoints.save(9, trees_of(start), {})
  checkpoints.close()
  assert Checkpoints(tmp_path, read_only=True).steps[-1] == 9


def test_a_write_that_fails_is_one_line_with_the_newest_that_is_left(
  tmp_path, start, monkeypatch
):
  checkpoints = save_three(tmp_path, start)

  def fail(*args, **kwargs):
    raise ValueError('OUT_OF_RANGE: Error writing "a/0"\nand a page of this')

  monkeypatch.setattr(checkpoints._manager, "save", fail)
  with pytest.raises(CheckpointError, match="step 4 .*; the newest .*: 3$"):
    checkpoints.save(4, trees_of(start), {})
  monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
  with pytest.raises(
    CheckpointError, match="OUT_OF_RANGE.*; the newest .*: 3$"
  ):
    checkpoints.wait()
