"""One training step, whole: gradients, weights, router bias.

Pure: arrays in, arrays out. The caller jits it, with shardings if it has any.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3 import config
from dsv3.nn import precision
from dsv3.nn.transformer import Output, Transformer
from dsv3.ops import balance, dispatch, losses
from dsv3.ops.placement import ONE_DEVICE, Placement
from dsv3.train import metrics
from dsv3.train.schedule import Hyper, Schedule
from dsv3.train.state import TrainState


class Batch(NamedTuple):
  """Rows of a step. Labels are shifted on the host; -1 is no label."""

  tokens_BL: jax.Array  # int32
  labels_BPL: jax.Array  # int32: [:, p, i] is token i + p + 1
  segments_BL: jax.Array  # int32: documents a row attends within; 0 is padding

  dims = "BL", "BPL", "BL"  # of the arrays, for a `Placement`

  def through(self, model: Transformer) -> Output:
    """The forward pass; a replay has rows with frozen choices (`lab/frozen`)."""
    return model(self.tokens_BL, self.segments_BL, self.labels_BPL[:, :-1])


class Sums(NamedTuple):
  """What a microbatch adds to its step."""

  terms: dict[str, jax.Array]  # loss sums, by term
  correct_P: jax.Array  # int32, labels that had the largest logit
  load_XE: jax.Array  # int32, tokens per expert of every router
  moved_X: dispatch.Moved  # rows that went to experts on other devices


def loss_fn(params, router, batch, count, total_XE, hyper, *, graphdef, values):
  """Objective of one microbatch (Eq. 17, 24, 25), its sums, and the loads.

  `count` are the normalisers of the global batch. `total_XE` is the balance
  count of the global batch, or None where the microbatch is all of it.
  """
  model = nnx.merge(graphdef, params, router)
  out = batch.through(model)
  token_losses = [
    model.loss(
      hidden, batch.labels_BPL[:, p], z_loss=values.schedule.z_weight > 0
    )
    for p, hidden in enumerate(out.hidden)
  ]
  if total_XE is None:
    total_XE = out.traffic.count.sum(1)
  terms = losses.terms(
    token_losses,
    out.traffic.count,
    out.traffic.mass,
    total_XE,
    top_k=values.model.moe.top_k,
    balancing=values.model.moe.balancing,
  )
  weights = losses.Weights(
    hyper.mtp_weight, hyper.balance_weight, hyper.z_weight
  )
  correct_P = jnp.stack([loss.correct for loss in token_losses])
  sums = Sums(terms, correct_P, out.traffic.load, out.traffic.moved)
  return losses.total(terms, count, weights), sums


def count_choices(params, router, batch, *, graphdef) -> jax.Array:
  """Balance counts of a microbatch, [X, E]: the batch-wise loss needs them all."""
  out = batch.through(nnx.merge(graphdef, params, router))
  return out.traffic.count.sum(1)


class Largest(NamedTuple):
  """Of microbatches, what does not add up: the largest counts. Not negative."""

  tree: Any


def add_up(
  function,
  batch: Batch,
  microbatches: int,
  placement: Placement = ONE_DEVICE,
):
  """Sum of `function(part, number)` over the microbatches of a batch.

  In place of the sum a `Largest` in what it returns has the largest. Every
  microbatch is dealt to all devices.
  """
  if microbatches == 1:
    return function(batch, jnp.int32(0))
  parts_G = jax.tree.map(
    lambda x, dims: placement.place(
      x.reshape(microbatches, -1, *x.shape[1:]), "G" + dims
    ),
    batch,
    type(batch)(*batch.dims),
  )
  number_G = jnp.arange(microbatches)
  first = jax.tree.map(lambda x: x[0], (parts_G, number_G))
  shapes = jax.eval_shape(function, *first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  is_largest = lambda x: isinstance(x, Largest)

  def join(total, new):
    how = jnp.maximum if is_largest(total) else jnp.add
    return jax.tree.map(how, total, new)

  def add(total, part):
    new = function(*part)
    return jax.tree.map(join, total, new, is_leaf=is_largest), None

  return jax.lax.scan(add, zeros, (parts_G, number_G))[0]


def objective(
  params,
  extras,
  state: TrainState,
  prepared,
  batch,
  number,
  count,
  total_XE,
  hyper,
  *,
  graphdef,
  values,
):
  """`loss_fn` with what a recipe has beside the weights, times a power of two.

  `extras` are inputs that are zero, for what comes out as their gradients. The
  factor is about the number of tokens: gradients of a mean over millions of
  them would lie below the least scale of FP8. Divide all by `loss_scale`.
  """
  key = jax.random.fold_in(jax.random.key(values.train.seed), state.step)
  key = jax.random.fold_in(key, number)
  seeds = precision.seeds(params, values.model, key)
  weights = precision.attach(
    params, values.model, prepared, seed=seeds, **extras
  )
  loss, sums = loss_fn(
    weights,
    state.router,
    batch,
    count,
    total_XE,
    hyper,
    graphdef=graphdef,
    values=values,
  )
  return loss * precision.loss_scale(values.model, count.tokens), sums


def accumulate(
  state: TrainState,
  batch: Batch,
  hyper: Hyper,
  *,
  graphdef,
  values,
  placement: Placement = ONE_DEVICE,
):
  """Loss, its sums and its gradients over the whole global batch, in float32.

  Last comes what a recipe is to remember of the step. Weights are quantised
  here, once a step, and not in each microbatch (Sec. 3.3).
  """
  count = losses.counts(batch.labels_BPL, batch.segments_BL)
  total_XE, microbatches = None, values.train.microbatches
  with jax.named_scope("quantise"):
    prepared = precision.prepare(state.params, values.model, state.precision)
  if microbatches > 1 and "batch" in values.model.moe.balancing:
    weights = precision.attach(state.params, values.model, prepared)
    counted = lambda part, _: count_choices(
      weights, state.router, part, graphdef=graphdef
    )
    total_XE = add_up(counted, batch, microbatches, placement)
  grad = jax.value_and_grad(
    functools.partial(objective, graphdef=graphdef, values=values),
    argnums=(0, 1),
    has_aux=True,
  )
  zeros = {"amax": precision.amax_zeros(state.params, values.model)}

  def of_part(part, number):
    (loss, sums), (grads, extras) = grad(
      state.params,
      zeros,
      state,
      prepared,
      part,
      number,
      count,
      total_XE,
      hyper,
    )
    return loss, sums, grads, Largest(extras["amax"])

  loss, sums, grads, amax = add_up(of_part, batch, microbatches, placement)
  scale = precision.loss_scale(values.model, count.tokens)
  loss, grads = jax.tree.map(lambda x: x / scale, (loss, grads))
  return loss, sums, count, grads, amax.tree


def update_router(
  router: nnx.State, load_XE: jax.Array, speed, bias_step: str = "sign"
) -> nnx.State:
  """Every router's bias moved by its own load (Sec. 2.1.2).

  Rows of `load_XE` are the MoE layers and then the MTP modules, the order in
  which the biases stand in the state.
  """
  biases, structure = jax.tree.flatten(router)
  if not biases:
    return router
  rows = [bias.shape[0] for bias in biases]
  assert sum(rows) == load_XE.shape[0], (rows, load_XE.shape)
  loads = jnp.split(load_XE, [sum(rows[: i + 1]) for i in range(len(rows) - 1)])
  moved = [
    balance.update_bias(bias, load, speed, bias_step)
    for bias, load in zip(biases, loads)
  ]
  return jax.tree.unflatten(structure, moved)


def update_ema(ema: nnx.State, params: nnx.State, decay: float) -> nnx.State:
  """Exponential moving average of the parameters (Sec. 3.2.3)."""
  return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  values: config.Config,
  placement: Placement = ONE_DEVICE,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The next state, and what to log of the step.

  A loss or gradient that is not finite leaves weights, moments, biases and
  scales as they were; the step still counts, so the data goes on.
  """
  hyper = schedule(state.step)
  loss, sums, count, grads, amax = accumulate(
    state,
    batch,
    hyper,
    graphdef=graphdef,
    values=values,
    placement=placement,
  )
  with jax.named_scope("optimizer"):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - hyper.lr * u, state.params, updates)
    grad_norm = optax.tree.norm(grads)
  router = update_router(
    state.router,
    sums.load_XE,
    hyper.bias_speed,
    values.model.moe.bias_step,
  )
  memory = precision.remember(state.precision, amax)

  ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  old = (state.params, state.opt_state, state.router, state.precision)
  params, opt_state, router, memory = jax.tree.map(
    lambda new, old: jnp.where(ok, new, old),
    (params, opt_state, router, memory),
    old,
  )
  ema = state.ema
  if ema is not None:
    ema = update_ema(ema, params, values.train.ema_decay)
  after = TrainState(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    router=router,
    ema=ema,
    precision=memory,
    skipped=jnp.where(ok, 0, state.skipped + 1),
    skipped_total=state.skipped_total + ~ok,
  )
  found = metrics.of_step(loss, sums, count, grad_norm, hyper, after)
  if values.mesh.expert != 1:
    found |= metrics.of_exchange(sums.moved_X, values.model)
  return after, found
