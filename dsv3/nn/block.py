"""A Transformer block, and stacks of blocks under scan and recomputation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3 import config
from dsv3.nn import moe
from dsv3.nn.gqa import Gqa
from dsv3.nn.layers import Ffn, RmsNorm
from dsv3.nn.mla import Mla
from dsv3.ops.gemm import Gemm
from dsv3.ops.placement import ONE_DEVICE, Placement

# What the report keeps (Sec. 3.2.3): it recomputes norms, MLA up-projections
# and SwiGLU, so the latents, the attention's output and SwiGLU's inputs stay.
KEPT = "c_q c_kv k_r attention_out attention_lse middle ffn_gate_up".split()


def make_attention(model: config.Model, **how) -> nnx.Module:
  """The attention that `model.attention.kind` names."""
  a = model.attention
  if a.kind == "mla":
    return Mla(model, **how)
  n_kv_heads = a.n_heads if a.kind == "mha" else a.n_kv_heads
  return Gqa(model, n_kv_heads, **how)


class Block(nnx.Module):
  """Attention and FFN, each behind its norm and added to the stream (Sec. 2.1)."""

  def __init__(
    self,
    model: config.Model,
    ffn: str,
    *,
    gemm: Gemm,
    key: jax.Array,
    placement: Placement = ONE_DEVICE,
  ):
    key_attention, key_ffn = jax.random.split(key)
    self.attention_norm = RmsNorm(model.dim, model.norm_eps)
    self.attention = make_attention(
      model, gemm=gemm, key=key_attention, placement=placement
    )
    self.ffn_norm = RmsNorm(model.dim, model.norm_eps)
    if ffn == "moe":
      self.ffn = moe.Moe(model, gemm=gemm, key=key_ffn, placement=placement)
    else:
      self.ffn = Ffn(
        model.dim,
        model.dense_hidden,
        std=model.init_std,
        gemm=gemm,
        key=key_ffn,
      )
    self.placement = placement

  def __call__(
    self, x_BLD: jax.Array, segments_BL: jax.Array
  ) -> tuple[jax.Array, moe.Traffic | None]:
    """The stream after the block, and the traffic if it has a router."""
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), segments_BL)
    x_BLD = checkpoint_name(self.placement.place(x_BLD, "BLD"), "middle")
    u_BLD = self.ffn_norm(x_BLD)
    if isinstance(self.ffn, moe.Moe):
      y_BLD, traffic = self.ffn(u_BLD, segments_BL)
      return self.placement.place(x_BLD + y_BLD, "BLD"), traffic
    return self.placement.place(x_BLD + self.ffn(u_BLD), "BLD"), None


def stack(make, n: int, key: jax.Array) -> nnx.Module:
  """`n` modules of one kind as one, every array with a leading dim of n."""
  return jax.vmap(make)(jax.random.split(key, n))


def unstack(blocks) -> list[nnx.Module]:
  """The modules of a `stack`. Splits: their gradients are joined in one pass."""
  arrays, structure = jax.tree.flatten(blocks)
  layers = zip(*(jnp.split(a, len(a)) for a in arrays))
  return [
    jax.tree.unflatten(structure, [a[0] for a in parts]) for parts in layers
  ]


def run(block, x_BLD, segments_BL, remat: str):
  """A block under the remat policy of `model.remat`.

  Gathered weights are not kept for the backward pass, unless all is.
  """

  def call(block, x, segments):
    return block.placement.gather(block, x.dtype)(x, segments)

  if remat == "full":
    call = jax.checkpoint(call)
  elif remat == "paper":
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT)
    call = jax.checkpoint(call, policy=policy)
  return call(block, x_BLD, segments_BL)


def run_stack(blocks, x_BLD, segments_BL, model: config.Model):
  """All blocks of a stack in turn; traffics come back stacked, [X, ...]."""

  def body(x, block):
    return run(block, x, segments_BL, model.remat)

  if model.layers == "scan":
    return jax.lax.scan(body, x_BLD, blocks)
  traffics = []
  for block in unstack(blocks):
    x_BLD, traffic = body(x_BLD, block)
    traffics.append(traffic)
  return x_BLD, jax.tree.map(lambda *a: jnp.stack(a), *traffics)
