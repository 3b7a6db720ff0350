"""Copies of busy experts change which device works, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import ConfigError
from dsv3.infer import Decoder, Sampling, generate
from dsv3.nn import transformer
from dsv3.ops import copies
from dsv3.parallel import eplb
from dsv3.train import layout
from tests import micro

BUSY = {"model.init_std": 0.3, "model.moe.n_routed": 8, "model.mtp.depth": 1}
MESH = {"mesh.data": 1, "mesh.expert": 4}


def model_of(diff):
  values = micro.config_of({**BUSY, **diff})
  where = layout.of_run(values)
  build = lambda key: transformer.make_model(values.model, key, where.placement)
  return jax.jit(build)(jax.random.key(0))


NODES = {**MESH, "mesh.expert_nodes": 2}


def placed(model, slots, devices, seed=0, **how):
  """For a load in which few experts do the most, another in every layer."""
  layers = model.model.n_moe_layers + model.model.mtp.depth
  load_XE = np.random.default_rng(seed).pareto(1.0, (layers, 8)) + 0.1
  return load_XE, eplb.place(load_XE, slots=slots, devices=devices, **how)


def completions(model, drafts=0, **how):
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, 256, n).tolist() for n in (9, 3, 30, 17)]
  greedy = Sampling(temperature=0.0)
  decoder = Decoder(model, **how)
  found = generate(
    decoder, prompts, max_tokens=8, sampling=greedy, drafts=drafts
  )
  return [c.tokens for c in found], np.concatenate([c.log_probs for c in found])


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, drafts, where",
  [
    (MESH, 1, {}),
    (MESH, 0, {}),
    ({}, 1, {}),
    (NODES, 1, {"nodes": 2, "groups": 2}),  # copies stay in a group's node
  ],
)
def test_a_decode_with_copies_is_the_decode_without(mesh, drafts, where):
  model = model_of(mesh)
  alone = {k: v for k, v in mesh.items() if not k.startswith("mesh.")}
  wanted = completions(model_of(alone), drafts)
  _, found = placed(model, slots=12, devices=4, **where)
  assert found.copies_XE.max() > 1
  tokens, log_probs = completions(model, drafts, copies=found)
  assert tokens == wanted[0]
  np.testing.assert_allclose(log_probs, wanted[1], atol=2e-4)


@pytest.mark.parametrize(
  "mesh",
  [
    MESH,
    pytest.param(
      {"mesh.data": 2, "mesh.context": 2}, marks=pytest.mark.slow
    ),  # a step has one position, of two devices
  ],
)
def test_a_mesh_decodes_a_batch_that_it_does_not_divide(mesh):
  small = {"model.n_layers": 2, "model.mtp.depth": 0}
  prompts = [[5, 6, 7, 8, 9], [3, 4], [200, 100, 50]]

  def logits(diff):
    decoder = Decoder(model_of({**small, **diff}))
    first, cache = decoder.prefill(prompts, room=4)
    return np.stack([first, decoder.step(jnp.array([1, 2, 3]), cache)[0]])

  np.testing.assert_allclose(logits(mesh), logits({}), atol=2e-4)


def test_copies_share_the_load_as_the_placement_says():
  load_XE, found = placed(model_of({}), slots=16, devices=4)
  rng = np.random.default_rng(2)
  for load_E, expert_S, ratio in zip(
    load_XE, found.expert_XS, found.imbalance(load_XE)
  ):
    slot_EC = copies.table(expert_S, 8)
    experts_TK = rng.choice(8, (20_000, 1), p=load_E / load_E.sum())
    slot_TK = copies.choose(slot_EC, experts_TK, 16)
    load_S = np.bincount(np.ravel(slot_TK), minlength=16)
    of_device = load_S.reshape(4, -1).sum(1)
    assert of_device.max() / of_device.mean() == pytest.approx(ratio, rel=0.06)
    np.testing.assert_array_equal(
      copies.load_of_experts(slot_EC, load_S), np.bincount(experts_TK[:, 0])
    )


def test_copies_of_another_model_are_said():
  model = model_of({})
  load_XE, found = placed(model, slots=12, devices=4)
  fewer = dataclasses.replace(found, copies_XE=found.copies_XE[:, :4])
  with pytest.raises(ConfigError, match="4 experts in .* wanted 8"):
    Decoder(model, copies=fewer)
