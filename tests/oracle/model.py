"""The whole model and its loss, a row at a time, in float64.

`config` is the `model` group of a config as a plain nested dict; parameters
are a nested dict of arrays (names and shapes in the README).
"""

import functools

import numpy as np

from tests.oracle import balance, mtp
from tests.oracle.layers import ffn, rms_norm
from tests.oracle.mla import mla
from tests.oracle.moe import moe


def block(config, weights, x_LD, segments_L):
  """Attention, then the FFN, each after a norm and added (Sec. 2.1).

  Returns the output and, of an MoE layer, affinities [L, E] and load [E];
  of a dense one None and None.
  """
  eps = config["norm_eps"]
  normed_LD = np.array([rms_norm(x, weights["attn_norm"], eps) for x in x_LD])
  x_LD = x_LD + mla(weights["attn"], normed_LD, segments_L, config)
  normed_LD = np.array([rms_norm(x, weights["ffn_norm"], eps) for x in x_LD])
  if "centroid" not in weights["ffn"]:
    y_LD = np.array([ffn(weights["ffn"], x) for x in normed_LD])
    return x_LD + y_LD, None, None
  y_LD, s_LE, load_E = moe(weights["ffn"], normed_LD, segments_L, config)
  return x_LD + y_LD, s_LE, load_E


def forward_row(params, row, segments, config):
  """Logits of every depth and the routing of every MoE layer, of one row.

  Args:
    params: nested dict of arrays.
    row: L + 1 token ids; the last one is only ever a label.
    segments: L + 1 ids of documents, 0 for padding.
    config: the `model` group.

  Returns:
    logits: a list over depths; entry k is [L - k, W].
    routing: a list over MoE layers, then MTP modules: the affinities of the
      tokens that count [T, E], and the load [E].
  """
  params = as_float64(params)
  eps, head_DW = config["norm_eps"], params["head"]
  run = functools.partial(block, config)
  x_LD = np.array([params["embed"][t] for t in row[:-1]])
  inputs, routing = segments[:-1], []
  for weights in params["layers"]:
    x_LD, s_LE, load_E = run(weights, x_LD, inputs)
    if s_LE is not None:
      routing.append((s_LE[np.array(inputs) != 0], load_E))
  normed_LD = np.array([rms_norm(x, params["norm"], eps) for x in x_LD])
  logits = [mtp.eq23_logits(normed_LD, head_DW)]
  for depth, weights in enumerate(params.get("mtp", []), start=1):
    # What a module takes from the depth below (Eq. 21) is unpublished.
    below_LD = normed_LD if config["mtp"]["hidden"] == "after_norm" else x_LD
    x_LD, s_LE, load_E = mtp.eq22_hidden(
      weights, run, below_LD, params["embed"], row, segments, depth, eps
    )
    inputs = mtp.module_segments(segments, depth)
    if s_LE is not None:
      routing.append((s_LE[np.array(inputs) != 0], load_E))
    normed_LD = np.array([rms_norm(x, weights["norm"], eps) for x in x_LD])
    logits.append(mtp.eq23_logits(normed_LD, head_DW))
  return logits, routing


def forward(params, rows, config, segments=None):
  """`forward_row` of every row: rows are [B, L + 1] token ids.

  Returns logits (a list over depths of [B, L - k, W]), the routing of every
  row, and the load of every MoE layer, then MTP module, over the batch.
  """
  if segments is None:
    segments = np.ones_like(rows)
  results = [
    forward_row(params, row, ids, config) for row, ids in zip(rows, segments)
  ]
  logits = [np.array(depth) for depth in zip(*(r[0] for r in results))]
  routing = [r[1] for r in results]
  load_XE = np.array(
    [sum(load_E for _, load_E in layer) for layer in zip(*routing)]
  )
  return logits, routing, load_XE


def loss(params, rows, config, mtp_weight, balance_weight, segments=None):
  """Main loss + MTP (Eq. 25) + balance (Eq. 17), and each apart.

  Balance: summed over MoE layers (MTP's included), averaged over the rows
  that hold a token.

  Returns:
    A dict: "main", "mtp" (weighted), "mtp_depths" (Eq. 24, a list),
    "balance" (weighted), "total", "count" (labels of the main model) and
    "load" [MoE layers and MTP modules, E].
  """
  if segments is None:
    segments = np.ones_like(rows)
  logits, routing, load_XE = forward(params, rows, config, segments)
  sums = [
    mtp.loss_sum(rows, segments, logits_k, depth)
    for depth, logits_k in enumerate(logits)
  ]
  main_sum, count = sums[0]
  depths = [mtp.eq24_loss(total, count) for total, _ in sums[1:]]
  n_rows = sum(any(ids[:-1] != 0) for ids in np.asarray(segments))
  terms = {
    "main": main_sum / count,
    "mtp": mtp.eq25_loss(depths, mtp_weight) if depths else 0.0,
    "balance": sum(
      balance.eq17_loss(s_TE, config["moe"]["top_k"], balance_weight)
      for row in routing
      for s_TE, _ in row
      if len(s_TE)
    )
    / n_rows,
  }
  total = sum(terms.values())
  extra = {"mtp_depths": depths, "count": count, "load": load_XE}
  return {**terms, "total": total, **extra}


def as_float64(params):
  """The nested dict with every array in float64."""
  if isinstance(params, dict):
    return {name: as_float64(value) for name, value in params.items()}
  if isinstance(params, list):
    return [as_float64(value) for value in params]
  return np.asarray(params, dtype=np.float64)
