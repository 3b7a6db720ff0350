"""What a step does to the state: skips, bias, EMA, metrics, baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import balance
from tests.nn import weights
from tests.train import steps


@pytest.fixture(scope="module")
def run():
  """The micro step, a batch, and what one step makes of it."""
  prepared = steps.prepared()
  batch = steps.random_batch(prepared.values)
  return prepared, batch, *prepared.step(prepared.start, batch)


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def poisoned(state, factor):
  """The state with the output head times `factor`."""
  multiply = lambda path, p: (
    p * factor if "head" in jax.tree_util.keystr(path) else p
  )
  params = jax.tree_util.tree_map_with_path(multiply, state.params)
  return state.replace(params=params)


@pytest.mark.parametrize("factor, loss", [(np.nan, np.nan), (1e17, None)])
def test_update_that_is_not_finite_changes_nothing_and_is_counted(
  run, factor, loss
):
  """With a head of 1e15 the loss is finite and the gradient's norm is not."""
  prepared, batch, good, _ = run
  bad = poisoned(good, factor)
  after, metrics = prepared.step(bad, batch)
  assert np.isfinite(metrics["loss"]) == (loss is None)
  assert not np.isfinite(metrics["grad_norm"])
  for part in ("params", "opt_state", "router"):
    assert_same(getattr(after, part), getattr(bad, part))
  assert [int(after.skipped), int(after.step)] == [1, int(good.step) + 1]
  assert int(good.skipped_total) == 0
  again, _ = prepared.step(after, batch)
  assert [int(again.skipped), int(again.skipped_total)] == [2, 2]
  # And the run goes on as if those steps' data had not been.
  healed, _ = prepared.step(after.replace(params=good.params), batch)
  wanted, _ = prepared.step(good.replace(step=after.step), batch)
  assert [int(healed.skipped), int(healed.skipped_total)] == [0, 1]
  assert_same(healed.params, wanted.params)
  assert_same(healed.opt_state, wanted.opt_state)
  assert_same(healed.router, wanted.router)


def test_bias_moves_once_a_step_by_the_load_it_reports(run):
  prepared, _, after, metrics = run
  moved = weights.to_oracle(after.router, prepared.values.model)
  assert len(moved) == len(metrics["load_XE"]) == 3
  for load_E, (_, bias_E) in zip(metrics["load_XE"], sorted(moved.items())):
    wanted_E = balance.update_bias(jnp.zeros(8), load_E, 0.001)
    np.testing.assert_array_equal(bias_E, wanted_E)
    assert np.abs(bias_E).max() == np.float32(0.001)


def test_the_config_says_how_the_bias_moves():
  changes = {
    "model.moe.bias_step": "proportional",
    "schedule.bias_speed": 0.5,
  }
  prepared = steps.prepared(changes)
  batch = steps.random_batch(prepared.values)
  after, metrics = prepared.step(prepared.start, batch)
  moved = weights.to_oracle(after.router, prepared.values.model)
  for load_E, (_, bias_E) in zip(metrics["load_XE"], sorted(moved.items())):
    np.testing.assert_allclose(bias_E, 0.5 - 0.5 * load_E / load_E.mean())


def test_bias_is_in_no_parameter_and_no_optimizer_state(run):
  prepared, _, after, _ = run
  paths = lambda tree: [
    jax.tree_util.keystr(p)
    for p, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]
  for tree in (after.params, after.opt_state, after.ema):
    assert paths(tree) and not any("bias" in path for path in paths(tree))
  assert all("bias" in path for path in paths(after.router))
  assert {leaf.dtype for leaf in jax.tree.leaves(after.router)} == {
    jnp.dtype("float32")
  }


def test_bias_is_not_decayed_and_stands_when_its_speed_is_0(run):
  """The last steps of the run have bias speed 0 (Sec. 4.2)."""
  prepared, batch, good, _ = run
  last = good.replace(step=jnp.int32(prepared.values.train.steps - 1))
  last = last.replace(router=jax.tree.map(lambda b: b + 0.5, good.router))
  n_steps = 1000  # far past the end every schedule is at its last stage
  after, metrics = prepared.step(last.replace(step=jnp.int32(n_steps)), batch)
  assert float(metrics["bias_speed"]) == 0
  assert_same(after.router, last.router)


def test_sec323_ema_follows_the_parameters(run):
  prepared, batch, *_ = run
  state = prepared.start
  wanted = jax.tree.leaves(state.params)
  for _ in range(4):
    state, _ = prepared.step(state, batch)
    now = jax.tree.leaves(state.params)
    wanted = [0.9 * np.asarray(e, float) + 0.1 * p for e, p in zip(wanted, now)]
  for found, want in zip(jax.tree.leaves(state.ema), wanted, strict=True):
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_learning_rate_multiplies_the_update_and_step_0_has_none(run):
  prepared, batch, after, metrics = run
  assert float(metrics["lr"]) == 0
  assert_same(after.params, prepared.start.params)
  moved, metrics = prepared.step(after, batch)
  assert float(metrics["lr"]) == pytest.approx(1.5e-3)
  old, new = after.params["head"][...], moved.params["head"][...]
  # Adam's second update with equal gradients is its sign; decay is small.
  assert np.abs(new - old).max() == pytest.approx(1.5e-3, rel=0.05)


def test_metrics_tell_loss_terms_and_balance(run):
  prepared, batch, after, metrics = run
  v = prepared.values
  terms = {name for name in metrics if name.startswith("loss/")}
  assert terms == {"loss/main", "loss/mtp_1", "loss/sequence", "loss/z"}
  total = (
    metrics["loss/main"]
    + metrics["mtp_weight"] * metrics["loss/mtp_1"]
    + v.schedule.balance_weight * metrics["loss/sequence"]
    + v.schedule.z_weight * metrics["loss/z"]
  )
  assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-6)
  tokens = v.schedule.batch_size * v.data.seq_len
  assert int(metrics["batch_tokens"]) == tokens
  load_XE = np.asarray(metrics["load_XE"])
  # Eq. 22: the MTP module has a position less in every row.
  fewer = v.schedule.batch_size
  wanted = np.array([tokens, tokens, tokens - fewer]) * v.model.moe.top_k
  np.testing.assert_array_equal(load_XE.sum(-1), wanted)
  vio_X = load_XE.max(-1) / load_XE.mean(-1) - 1
  np.testing.assert_allclose(metrics["max_vio_X"], vio_X, rtol=1e-6)
  assert float(metrics["max_vio"]) == pytest.approx(vio_X.mean())
  assert int(metrics["dead_experts"]) == (load_XE == 0).sum()
  biases = [np.asarray(b) for b in jax.tree.leaves(after.router)]
  assert float(metrics["bias_max"]) == max(b.max() for b in biases)
  assert float(metrics["bias_min"]) == min(b.min() for b in biases)


SMALL = {  # and cheap to compile
  "model.n_layers": 1,
  "model.moe.kernel": "ragged",
  "model.attention.kernel": "naive",
}
BASELINES = {
  "mha, dense FFN": {
    "model.n_dense_layers": 1,
    "model.attention.kind": "mha",
    "model.ffn": "dense",
  },
  "gqa, V2's softmax gate, no MTP, bfloat16": {
    "model.n_dense_layers": 0,
    "model.attention.kind": "gqa",
    "model.attention.n_kv_heads": 1,
    "model.moe.gate": "softmax",
    "model.moe.group_score": "max",
    "model.moe.normalize": False,
    "model.moe.balancing": "none",
    "model.mtp.depth": 0,
    "model.dtype": "bfloat16",
    "model.remat": "paper",
    "optimizer.moment_dtype": "bfloat16",
  },
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_learn_a_batch_by_heart(name):
  prepared = steps.prepared({**SMALL, **BASELINES[name]})
  batch, state, found = steps.random_batch(prepared.values), prepared.start, []
  for _ in range(8):
    state, metrics = prepared.step(state, batch)
    found.append(float(metrics["loss/main"]))
  assert int(state.skipped) == 0
  assert found[0] == pytest.approx(np.log(264), abs=0.05)
  assert found[-1] < found[0] - 0.3
