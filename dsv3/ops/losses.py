"""The losses as sums and counts: one normaliser for all (Eq. 17, 24, 25).

A term is a sum; its count is that of the whole global batch, known before any
gradient. Sums of microbatches add up, so the gradient of each term is the same
however the batch is cut. A mean of means is not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3.ops import balance
from dsv3.ops.cross_entropy import TokenLoss


class Counts(NamedTuple):
  """The normalisers, of the whole global batch."""

  tokens: jax.Array  # labelled positions of the main model
  sequences: jax.Array  # sequences that are not all padding


class Weights(NamedTuple):
  """How much each term counts (Sec. 4.2)."""

  mtp: jax.Array | float  # lambda of Eq. 25
  balance: jax.Array | float  # alpha of Eq. 17
  z: jax.Array | float


def counts(labels_BPL: jax.Array, segments_BL: jax.Array) -> Counts:
  """The normalisers of a batch, at least 1 each.

  Every MTP depth is divided by the main model's count, though it has fewer
  labels: Eq. 24 divides T - k terms by T.
  """
  tokens = (labels_BPL[:, 0] >= 0).sum(dtype=jnp.int32)
  sequences = (segments_BL > 0).any(-1).sum(dtype=jnp.int32)
  return Counts(jnp.maximum(tokens, 1), jnp.maximum(sequences, 1))


def terms(
  token_losses: Sequence[TokenLoss],
  count_XBE: jax.Array,
  mass_XBE: jax.Array,
  total_XE: jax.Array,
  *,
  top_k: int,
  balancing: str,
) -> dict[str, jax.Array]:
  """The sums of a microbatch, by name.

  `token_losses` are the main model's and each MTP depth's. `total_XE` is the
  count of the whole global batch, for the batch-wise loss (Sec. 4.5.3).

  Departs: the report does not say how Eq. 17 of many layers is joined; we sum
  over layers, MTP's included, so that alpha means the same at any depth.
  """
  main, *ahead = token_losses
  sums = {"main": main.cross_entropy, "z": main.log_z_squared}
  for depth, loss in enumerate(ahead, 1):
    sums[f"mtp_{depth}"] = loss.cross_entropy
  if "sequence" in balancing:
    sums["sequence"] = balance.balance_loss(count_XBE, mass_XBE, top_k).sum()
  if "batch" in balancing:
    mass_XE = mass_XBE.sum(1)
    sums["batch"] = balance.balance_loss(total_XE, mass_XE, top_k).sum()
  return sums


def means(sums: dict[str, jax.Array], count: Counts) -> dict[str, jax.Array]:
  """Every term over its count: nats a token, or balance loss a sequence."""
  of = {"sequence": count.sequences, "batch": 1}
  return {name: x / of.get(name, count.tokens) for name, x in sums.items()}


def mtp_loss(mean_terms: dict[str, jax.Array]) -> jax.Array:
  """Mean over the depths of the MTP losses, without lambda (Eq. 25)."""
  ahead = [x for name, x in mean_terms.items() if name.startswith("mtp_")]
  return sum(ahead) / len(ahead) if ahead else jnp.float32(0)


def total(
  sums: dict[str, jax.Array], count: Counts, weights: Weights
) -> jax.Array:
  """The objective: main + lambda MTP + alpha balance + z (Eq. 17, 24, 25)."""
  mean = means(sums, count)
  balancing = mean.get("sequence", 0.0) + mean.get("batch", 0.0)
  return (
    mean["main"]
    + weights.mtp * mtp_loss(mean)
    + weights.balance * balancing
    + weights.z * mean["z"]
  )
