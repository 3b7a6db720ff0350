"""AdamW of Sec. 4.2 against the oracle, and what is kept between steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.nn import transformer
from dsv3.train import optimizer
from tests import micro
from tests.oracle import adamw as oracle

LR = 0.01


def make(**changes):
  values = micro.config_of({f"optimizer.{k}": v for k, v in changes.items()})
  return optimizer.make(values.optimizer)


def gradients(step):
  """Norms of 0.1 to 100: some are clipped, some are not."""
  rng = np.random.default_rng(step)
  scale = 10.0 ** (step % 4 - 2)
  return {
    "w": scale * rng.normal(size=(3, 4)),
    "gain": scale * rng.normal(size=4),
  }


def run(made, n_steps):
  params = {"w": jnp.ones((3, 4)), "gain": jnp.ones(4)}
  opt_state = made.init(params)
  for step in range(n_steps):
    grads = jax.tree.map(jnp.float32, gradients(step))
    updates, opt_state = made.update(grads, opt_state, params)
    params = jax.tree.map(lambda p, u: p - LR * u, params, updates)
  return params, opt_state


@pytest.mark.parametrize("decayed", ["matrices", "all"])
@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_sec42_adamw_is_the_oracles_over_steps(decayed, clip_norm):
  names = {"matrices": {"w"}, "all": {"w", "gain"}}[decayed]
  params = {"w": np.ones((3, 4)), "gain": np.ones(4)}
  m = v = {name: 0 * p for name, p in params.items()}
  clipped = 0
  for step in range(7):
    grads = gradients(step)
    if clip_norm:
      clipped += oracle.global_norm(grads) > clip_norm
      grads = oracle.clip(grads, clip_norm)
    params, m, v = oracle.adamw(params, grads, m, v, step + 1, LR, names)
  assert clip_norm == 0 or 0 < clipped < 7
  found, _ = run(make(decayed=decayed, clip_norm=clip_norm), 7)
  for name, wanted in params.items():
    np.testing.assert_allclose(found[name], wanted, rtol=2e-6)


def test_sec333_both_moments_are_stored_in_bfloat16():
  rounded = run(make(moment_dtype="bfloat16"), 1)[1]
  exact = run(make(moment_dtype="float32"), 1)[1]
  moments = lambda s: [
    leaf for leaf in jax.tree.leaves(s) if leaf.dtype != jnp.int32
  ]
  assert len(moments(rounded)) == 4
  for low, high in zip(moments(rounded), moments(exact)):
    assert (low.dtype, high.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


def test_sec333_arithmetic_on_bfloat16_moments_is_float32():
  """The first update comes from moments before they are rounded."""
  low = run(make(moment_dtype="bfloat16"), 1)[0]
  high = run(make(moment_dtype="float32"), 1)[0]
  for name in low:
    np.testing.assert_array_equal(low[name], high[name])


def test_decay_spares_gains_and_nothing_else():
  model = micro.config_of().model
  params = jax.eval_shape(
    lambda: transformer.split(transformer.make_model(model, jax.random.key(0)))[
      1
    ]
  )
  mask = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
  spared = [jax.tree_util.keystr(path) for path, decays in mask if not decays]
  decayed = [jax.tree_util.keystr(path) for path, decays in mask if decays]
  assert all("norm" in name and "gain" in name for name in spared)
  assert not any("norm" in name for name in decayed)
  assert len(spared) == 16 and len(decayed) > 30
