"""Multi-token prediction: one module per further token (Sec. 2.2, Fig. 3)."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3 import config
from dsv3.nn import block
from dsv3.nn.layers import RmsNorm, weight
from dsv3.ops.gemm import Gemm
from dsv3.ops.placement import ONE_DEVICE, Placement


class MtpModule(nnx.Module):
  """MTP module k: two norms, a projection, a block of its own (Eq. 21, 22).

  Embedding and output head are the main model's (Sec. 2.2) and not held here.
  `norm` is the module's own final norm, before that head.

  Departs: Eq. 23 has no norm before the head; the released weights have one. The
  projection stays in high precision, as in the release, which has no FP8 scales
  for it; Sec. 3.3.1 has all Linears in FP8.
  """

  def __init__(
    self,
    model: config.Model,
    *,
    gemm: Gemm,
    key: jax.Array,
    placement: Placement = ONE_DEVICE,
  ):
    key_proj, key_block = jax.random.split(key)
    self.hnorm = RmsNorm(model.dim, model.norm_eps)
    self.enorm = RmsNorm(model.dim, model.norm_eps)
    self.proj = weight(
      key_proj, "I D", (2 * model.dim, model.dim), model.init_std
    )
    self.block = block.Block(
      model, model.ffn, gemm=gemm, key=key_block, placement=placement
    )
    self.norm = RmsNorm(model.dim, model.norm_eps)
    self.model = model
    self.placement = placement

  def join(self, h_BLD, e_BLD) -> jax.Array:
    """The block's input, from h^(k-1) and Emb(t_(i+k)) (Eq. 21)."""
    with jax.named_scope("eq21"):
      parts = [self.hnorm(h_BLD), self.enorm(e_BLD)]
      if self.model.mtp.concat == "embedding_hidden":
        parts.reverse()
      pair = jnp.concatenate(parts, axis=-1)
      return jnp.einsum(
        "BLI,ID->BLD",
        pair,
        self.placement.gather(self.proj, pair.dtype)[...].astype(pair.dtype),
        precision="highest" if pair.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
      ).astype(pair.dtype)

  def __call__(self, h_BLD, e_BLD, segments_BL):
    """h^k before its norm from h^(k-1) and Emb(t_(i+k)), and the traffic."""
    x_BLD = self.placement.place(self.join(h_BLD, e_BLD), "BLD")
    with jax.named_scope("eq22"):
      return block.run(self.block, x_BLD, segments_BL, self.model.remat)
