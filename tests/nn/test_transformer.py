"""The whole model: against the oracle, and against Hugging Face's goldens."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3.ops import losses
from dsv3.train import schedule, step
from tests.nn import weights
from tests.oracle import model as oracle

CHEAP = {"model.attention.kernel": "naive", "model.moe.kernel": "ragged"}
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.7
NAMES = ("hf_q_rank", "hf_no_q_rank", "hf_yarn", "hf_no_groups", "hf_mtp")


def outputs(params, router, batch, *, graphdef, values):
  """Loss, loss terms, loads and logits of a batch."""
  hyper = schedule.Hyper(0.0, MTP_WEIGHT, BALANCE_WEIGHT, 0.0, 0.0, 0.0)
  count = losses.counts(batch.labels_BPL, batch.segments_BL)
  total, sums = step.loss_fn(
    params,
    router,
    batch,
    count,
    None,
    hyper,
    graphdef=graphdef,
    values=values,
  )
  model = nnx.merge(graphdef, params, router)
  out = model(batch.tokens_BL, batch.segments_BL, batch.labels_BPL[:, :-1])
  logits = [model.logits(hidden) for hidden in out.hidden]
  return total, (losses.means(sums.terms, count), sums.load_XE, logits)


def run(function, values, flat, batch):
  """`function` of a model with these weights and of the batch, compiled."""
  graphdef, params, router = weights.from_oracle(flat, values.model)
  function = functools.partial(function, graphdef=graphdef, values=values)
  return jax.jit(function)(params, router, batch)


def plain_gradients(params, router, batch, *, graphdef, values):
  """Losses by the definition, of whole logits, with gradients, and loads."""
  del values

  def loss(params):
    model = nnx.merge(graphdef, params, router)
    out = model(batch.tokens_BL, batch.segments_BL, batch.labels_BPL[:, :-1])
    logits = [model.logits(hidden) for hidden in out.hidden]
    terms = []
    for depth, logits_BLW in enumerate(logits):
      labels_BL = batch.labels_BPL[:, depth]
      one_BLW = jax.nn.one_hot(labels_BL, logits_BLW.shape[-1])  # -1: zeros
      terms.append(-(one_BLW * jax.nn.log_softmax(logits_BLW)).sum())
    terms = jnp.stack(terms) / (batch.labels_BPL[:, 0] >= 0).sum()
    total = terms[0] + MTP_WEIGHT * terms[1:].sum() / max(len(terms) - 1, 1)
    return total, (terms, out.traffic.load, logits)

  (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return *aux, grads


def close(found, wanted, relative=2e-5):
  """Norm of the difference below `relative` times the norm."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  return np.linalg.norm(found - wanted) <= relative * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_logits_losses_loads_and_gradients_are_hugging_faces(name):
  # Two on the kernels of every run, three on those that compile faster.
  kernels = {} if name in ("hf_q_rank", "hf_mtp") else CHEAP
  values, flat, data = weights.golden(name, kernels)
  depth = values.model.mtp.depth
  batch = weights.batch_of(data["rows"], depth)
  terms, load_XE, logits, grads = run(plain_gradients, values, flat, batch)
  for k in range(depth + 1):
    wanted = data[f"logits/{k}"]
    assert close(logits[k][:, : wanted.shape[1]], wanted), f"logits {k}"
  np.testing.assert_allclose(terms, data["losses"], rtol=2e-5)
  np.testing.assert_array_equal(load_XE, data["load"])
  grads = weights.to_oracle(grads, values.model)
  kept = [key.removeprefix("grad/") for key in data.files if "grad/" in key]
  assert len(kept) >= 10
  for key in kept:
    name, _, expert = key.rpartition("/")
    found = grads[name][int(expert)] if expert.isdigit() else grads[key]
    assert close(found, data[f"grad/{key}"]), key


BASE = json.loads(str(np.load(weights.GOLDEN / "hf_mtp.npz")["config"]))
# Two documents and padding; a document cut by the row's end; no padding.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 4, [1] * 3 + [2] * 10, [1] * 13])
VARIANTS = {
  "after_norm": {"model.mtp.depth": 2, "model.moe.n_shared": 2},
  "before_norm": {
    "model.mtp.depth": 2,
    "model.mtp.hidden": "before_norm",
    "model.mtp.concat": "embedding_hidden",
    "model.attention.q_rank": 0,
    "model.moe.n_shared": 0,
  },
}


def oracle_config(values) -> dict:
  """The `model` group as the nested dict the oracle reads."""
  model = values.model
  out = {name: getattr(model, name) for name in ("norm_eps", "vocab_size")}
  for name in ("attention", "rope", "moe", "mtp"):
    out[name] = vars(getattr(model, name))
  return out


@functools.cache
def both(variant):
  """Our outputs and the oracle's for the same weights and rows."""
  values = weights.golden_config(BASE, VARIANTS[variant])
  flat = weights.random(values.model)
  rows = np.random.default_rng(1).integers(0, 32, SEGMENTS.shape)
  batch = weights.batch_of(rows, values.model.mtp.depth, SEGMENTS)
  ours = run(outputs, values, flat, batch)
  if values.model.mtp.concat == "embedding_hidden":
    # The other order is the same matrix with its halves of rows exchanged.
    for key in [k for k in flat if k.endswith("proj")]:
      flat[key] = np.roll(flat[key], values.model.dim, axis=0)
  params, fields = weights.nested(flat), oracle_config(values)
  theirs = oracle.loss(
    params, rows, fields, MTP_WEIGHT, BALANCE_WEIGHT, SEGMENTS
  )
  logits, _, _ = oracle.forward(params, rows, fields, SEGMENTS)
  return ours, theirs, logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_eq21_eq22_eq23_logits_of_every_depth_are_the_oracles(variant):
  (_, (_, _, found)), _, wanted = both(variant)
  real_BL = SEGMENTS[:, :-1] > 0
  for depth, logits in enumerate(wanted):
    known_BL = real_BL.copy()
    for k in range(1, depth + 1):  # Eq. 21 has no t_(i+k) of the document
      known_BL[:, :-k] &= SEGMENTS[:, k:-1] == SEGMENTS[:, : -1 - k]
      known_BL[:, -k:] = False
    known_BL = known_BL[:, : logits.shape[1]]
    mine = np.asarray(found[depth])[:, : logits.shape[1]]
    assert known_BL.sum() > 10
    assert close(mine[known_BL], logits[known_BL], 3e-6), depth


@pytest.mark.parametrize("variant", VARIANTS)
def test_eq24_eq25_every_loss_term_is_the_oracles(variant):
  (total, (terms, _, _)), wanted, _ = both(variant)
  assert float(terms["main"]) == pytest.approx(wanted["main"], rel=2e-6)
  assert [float(terms["mtp_1"]), float(terms["mtp_2"])] == pytest.approx(
    wanted["mtp_depths"], rel=2e-6
  )
  sequence = BALANCE_WEIGHT * float(terms["sequence"])
  assert sequence == pytest.approx(wanted["balance"], rel=2e-6)
  assert float(total) == pytest.approx(wanted["total"], rel=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eq22_loads_are_the_oracles_without_padding_and_row_ends(variant):
  (_, (_, load_XE, _)), wanted, _ = both(variant)
  np.testing.assert_array_equal(load_XE, wanted["load"])
  assert load_XE.dtype == np.int32
