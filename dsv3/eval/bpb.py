"""Held-out text: bits per byte, and how evenly the experts share it.

Bits per byte compare models of any tokenizer, and a compressor such as gzip:
the cross-entropy of all label tokens over the UTF-8 bytes of their text.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from dsv3.data.tokenizer import Tokenizer
from dsv3.nn import precision
from dsv3.ops import balance
from dsv3.parallel import processes
from dsv3.train.feed import Heldout
from dsv3.train.step import add_up


class Score(NamedTuple):
  """Of the main model on held-out text; MTP modules are not asked."""

  bits_per_byte: float
  loss: float  # nats a token
  tokens: int
  bytes: int
  max_vio: float  # mean over layers, of the load of all batches together
  max_vio_batch: float  # mean over layers and batches


@processes.together
@functools.partial(jax.jit, static_argnames=("graphdef", "microbatches"))
def _sums(params, router, memory, batch, *, graphdef, microbatches):
  """Cross-entropy, labels and load of every MoE layer in a batch."""
  values = nnx.merge(graphdef, params, router).model
  prepared = precision.prepare(params, values, memory)
  weights = precision.attach(params, values, prepared)
  model = nnx.merge(graphdef, weights, router)

  def of_part(part, _):
    out = model(part.tokens_BL, part.segments_BL)
    labels_BL = part.labels_BPL[:, 0]
    loss = model.loss(out.hidden[0], labels_BL)
    return loss.cross_entropy, (labels_BL >= 0).sum(), out.traffic.load

  return add_up(of_part, batch, microbatches, model.placement)


def score(
  graphdef: nnx.GraphDef,
  params: nnx.State,
  router: nnx.State,
  batches: Iterable[Heldout],
  tokens: Tokenizer,
  memory: precision.Memory | None = None,
  microbatches: int = 1,
) -> Score:
  """The model's Score on `batches`; of several processes all ask for it.

  `memory` is what its recipe remembers: earlier amaxes, Linears kept high. A batch
  goes through in `microbatches`, as in training: what bounds memory.
  """
  static = {"graphdef": graphdef, "microbatches": microbatches}
  nats, n_labels, n_bytes, loads = 0.0, 0, 0, []
  for batch, labels_BPL in batches:
    sums = _sums(params, router, memory, batch, **static)
    labels_BL = labels_BPL[:, 0]
    n_bytes += tokens.token_bytes(labels_BL[labels_BL >= 0])
    batch_nats, batch_labels, load_XE = jax.device_get(sums)
    nats += float(batch_nats)
    n_labels += int(batch_labels)
    loads.append(load_XE.astype(np.int64))
  n_bytes = processes.total(n_bytes)
  return Score(
    bits_per_byte=nats / math.log(2) / max(n_bytes, 1),
    loss=nats / max(n_labels, 1),
    tokens=n_labels,
    bytes=n_bytes,
    max_vio=_max_vio(sum(loads)),
    max_vio_batch=float(np.mean([_max_vio(load) for load in loads])),
  )


def _max_vio(load_XE: np.ndarray) -> float:
  """Mean over layers; 0 for a model without experts."""
  if not load_XE.shape[0]:
    return 0.0
  return float(balance.max_violation(load_XE).mean())
