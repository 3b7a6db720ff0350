"""The sampler draws what it says, and padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.infer.sample import choose, generate
from dsv3.train import state
from tests import micro


@pytest.fixture(scope="module")
def model():
  make = lambda: state.make_model(micro.config_of().model, jax.random.key(0))
  return jax.jit(make)()


def test_greedy_sampling_takes_the_largest_logit_of_a_plain_forward(model):
  length = 16
  prompt = [3, 1, 4, 1, 5]
  found = list(generate(model, prompt, 14, length=length, temperature=0.0))
  logits = jax.jit(lambda m, t: m.logits(m(t).hidden[0]))
  tokens = prompt + found
  # Without padding every length is another compilation: a few of them.
  for n in (5, 6, 16, 17, 18):
    seen = np.array(tokens[:n][-length:], np.int32)
    assert tokens[n] == int(logits(model, seen[None])[0, -1].argmax())


def test_a_seed_gives_one_text_and_another_seed_another(model):
  draw = lambda seed: list(generate(model, [7], 12, length=16, seed=seed))
  assert draw(1) == draw(1)
  assert draw(1) != draw(2)


def draws(logits_W, n=4000, **kwargs):
  keys = jax.random.split(jax.random.key(0), n)
  one = lambda key: choose(logits_W, key, **kwargs)
  return np.bincount(jax.jit(jax.vmap(one))(keys), minlength=4) / n


def test_tokens_are_drawn_as_often_as_the_softmax_says():
  p_W = jnp.array([0.1, 0.4, 0.2, 0.3])
  found = draws(jnp.log(p_W), temperature=1.0, top_p=1.0)
  np.testing.assert_allclose(found, p_W, atol=0.03)
  cold = p_W**2 / (p_W**2).sum()
  found = draws(jnp.log(p_W), temperature=0.5, top_p=1.0)
  np.testing.assert_allclose(found, cold, atol=0.03)


def test_top_p_draws_from_the_smallest_set_that_reaches_it():
  logits_W = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
  found = draws(logits_W, temperature=1.0, top_p=0.65)
  np.testing.assert_allclose(found, [0, 4 / 7, 0, 3 / 7], atol=0.03)
  assert draws(logits_W, temperature=1.0, top_p=0.0)[1] == 1.0
