"""The Transformer of Figure 2: embedding, blocks, final norm, output head."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3 import config
from dsv3.nn import moe
from dsv3.nn.block import Block, run_stack, stack
from dsv3.nn.layers import RmsNorm, weight
from dsv3.nn.mtp import MtpModule
from dsv3.ops import gemm as gemms
from dsv3.ops import hopper_products, recipes
from dsv3.ops.cross_entropy import TokenLoss, cross_entropy
from dsv3.ops.gemm import Gemm
from dsv3.ops.placement import ONE_DEVICE, Placement


class Output(NamedTuple):
  """What a forward pass returns; the head is applied by the loss."""

  # [B, L, D] for the main model and every MTP, positions as placement.dealt has
  # them: in their order where no devices share a row.
  hidden: tuple[jax.Array, ...]
  traffic: moe.Traffic  # of all routers, [X, ...], MTP's last


class Transformer(nnx.Module):
  """DeepSeek-V3 (Fig. 2), with its MTP modules (Fig. 3)."""

  def __init__(
    self,
    model: config.Model,
    *,
    gemm: Gemm,
    key: jax.Array,
    placement: Placement = ONE_DEVICE,
  ):
    keys = jax.random.split(key, 5)
    shape = (model.vocab_size, model.dim)
    self.embed = weight(keys[0], "W D", shape, model.init_std)
    block = lambda ffn: (
      lambda key: Block(model, ffn, gemm=gemm, key=key, placement=placement)
    )
    n_dense = model.n_layers - model.n_moe_layers
    if n_dense:
      self.dense = stack(block("dense"), n_dense, keys[1])
    if model.n_moe_layers:
      self.moe = stack(block("moe"), model.n_moe_layers, keys[2])
    self.norm = RmsNorm(model.dim, model.norm_eps)
    self.head = weight(keys[3], "D W", shape[::-1], model.init_std)
    if model.mtp.depth:
      make = functools.partial(MtpModule, model, gemm=gemm, placement=placement)
      self.mtp = stack(lambda key: make(key=key), model.mtp.depth, keys[4])
    self.model = model
    self.placement = placement

  def embedding(self, tokens_BL: jax.Array) -> jax.Array:
    """Emb(.): float32 rows of the table, in the type of activations."""
    with jax.named_scope("embedding"):
      dtype = self.model.dtype
      table_WD = self.placement.gather(self.embed, dtype)[...]
      x_BLD = table_WD[tokens_BL].astype(dtype)
      return self.placement.place(x_BLD, "BLD")

  def logits(self, hidden_BLD: jax.Array) -> jax.Array:
    """OutHead(.), float32 (Eq. 23 before its softmax)."""
    return jnp.einsum(
      "BLD,DW->BLW",
      hidden_BLD,
      self.head[...].astype(hidden_BLD.dtype),
      precision="highest" if hidden_BLD.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )

  def loss(
    self, hidden_BLD: jax.Array, labels_BL: jax.Array, *, z_loss: bool = False
  ) -> TokenLoss:
    """Cross-entropy of the output head, summed over the labels (Eq. 24).

    Labels are in their order, hidden states as `__call__` returns them.
    """

    labels_BL = self.placement.dealt(labels_BL)

    def of_part(peers, head, hidden_BLD, labels_BL):
      part = cross_entropy(hidden_BLD, head[...], labels_BL, z_loss=z_loss)
      return peers.total(part, "BL")

    with jax.named_scope("head"):
      run = self.placement.spread(of_part, ("", "BLD", "BL"), "")
      return run(self.head, hidden_BLD, labels_BL)

  def __call__(
    self,
    tokens_BL: jax.Array,
    segments_BL: jax.Array | None = None,
    ahead_BPL: jax.Array | None = None,
  ) -> Output:
    """Final hidden states of the main model and of every MTP module.

    `segments_BL`: attention stays within equal ids; 0 is padding, which is in
    no load. None: one segment. `ahead_BPL` are the tokens that follow, the
    inputs of the MTP modules: [:, k - 1, i] is token i + k, or -1 where it is
    unknown. None: the MTP modules are left out.
    """
    if segments_BL is None:
      segments_BL = jnp.ones(tokens_BL.shape, jnp.int32)
    dealt = self.placement.dealt
    tokens_BL, segments_BL = dealt(tokens_BL), dealt(segments_BL)
    x_BLD = self.embedding(tokens_BL)
    traffics = [moe.no_traffic(len(tokens_BL), self.model.moe.n_routed)]
    for name in ("dense", "moe"):
      if hasattr(self, name):
        blocks = getattr(self, name)
        with jax.named_scope(name):
          x_BLD, traffic = run_stack(blocks, x_BLD, segments_BL, self.model)
        traffics += [traffic] if traffic is not None else []
    with jax.named_scope("head"):
      hidden = [self.norm(x_BLD)]
    if ahead_BPL is not None and self.model.mtp.depth:
      before = self.model.mtp.hidden == "before_norm"
      more, traffic = self.predict_ahead(
        x_BLD if before else hidden[0], segments_BL, dealt(ahead_BPL)
      )
      hidden += more
      traffics += [traffic] if traffic is not None else []
    traffic = jax.tree.map(lambda *a: jnp.concatenate(a), *traffics)
    return Output(tuple(hidden), traffic)

  def predict_ahead(self, h_BLD, segments_BL, ahead_BPL):
    """Runs the MTP modules one after the other (Eq. 21-23).

    Departs: what module k takes from depth k - 1 is unpublished. By default it
    is the state after that depth's final norm, as inference engines feed it.
    """
    hidden, traffics = [], []
    positions_L = self.placement.dealt(jnp.arange(h_BLD.shape[1]))
    for k in range(self.model.mtp.depth):
      next_BL = ahead_BPL[:, k]
      # Module k + 1 has the first T - k - 1 positions (Eq. 22). The others, and
      # those whose next token is unknown, are padding to it: in no load.
      inside_L = positions_L < len(positions_L) - k - 1
      known_BL = jnp.where(inside_L & (next_BL >= 0), segments_BL, 0)
      with jax.named_scope("mtp"):
        module = jax.tree.map(lambda a, k=k: a[k], self.mtp)
        e_BLD = self.embedding(jnp.maximum(next_BL, 0))
        x_BLD, traffic = module(h_BLD, e_BLD, known_BL)
        hidden.append(module.norm(x_BLD))
      h_BLD = x_BLD if self.model.mtp.hidden == "before_norm" else hidden[-1]
      traffics.append(traffic)
    return hidden, jax.tree.map(lambda *a: jnp.stack(a), *traffics)


def make_model(
  model: config.Model, key: jax.Array, placement: Placement = ONE_DEVICE
) -> Transformer:
  """A Transformer with weights drawn from `key`."""
  gemm = gemms.deal(gemm_of(model), placement)
  return Transformer(model, gemm=gemm, key=key, placement=placement)


def gemm_of(model: config.Model) -> Gemm:
  """The products of every Linear, by `model.precision`."""
  p = model.precision
  kernel, products = model.moe.kernel, None
  try:
    recipe = recipes.recipe(p.recipe, p.changes)
    if recipe.quantises:
      products = hopper_products.choose(kernel, p.kernel, model.dtype, recipe)
  except ValueError as error:
    raise config.ConfigError(f"config.model.{error}") from error
  return gemms.make(recipe, model.dtype, kernel, products)


def split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """A model's structure, parameters and router biases."""
  return nnx.split(model, nnx.Param, moe.RouterBias)
