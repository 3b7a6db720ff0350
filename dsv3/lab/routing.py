"""Which experts a text uses: recorded, drawn, stored, and run again.

A trace holds the choices of every router for every token. Run again, a model
takes its experts from a trace instead of choosing: of its own choices the
output is the same, of another step's or another model's it tells what the
router alone changes.

>>> from dsv3.train.restore import restore            # doctest: +SKIP
>>> trace = record(restore("runs/tiny").model, tokens_BL)  # doctest: +SKIP
>>> loss(model, tokens_BL, trace)                     # doctest: +SKIP
"""

import functools
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3.config import ConfigError
from dsv3.nn import moe
from dsv3.nn.block import unstack
from dsv3.nn.transformer import Transformer
from dsv3.ops import routing
from dsv3.ops.cross_entropy import cross_entropy


class Trace(NamedTuple):
  """What the routers of the main model did, layer by layer; MTP's are not in it."""

  experts_XBLK: np.ndarray  # int32, the chosen experts, best first
  gate_XBLK: np.ndarray  # float32, their weights
  segments_BL: np.ndarray  # int32, 0 for padding, which counts nowhere
  n_routed: int

  def save(self, path: str | pathlib.Path) -> None:
    """Writes all of it as a NumPy archive (.npz)."""
    np.savez_compressed(path, **self._asdict())


def load(path: str | pathlib.Path) -> Trace:
  """A trace that `Trace.save` wrote; ConfigError for anything else."""
  try:
    with np.load(path) as found:
      arrays = {name: found[name] for name in Trace._fields}
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ConfigError(f"{path}: found no routing trace: {error}") from error
  return Trace(**arrays | {"n_routed": int(arrays["n_routed"])})


class Recorder(nnx.Module):
  """A router that hands on what it decides, to `keep`: not in a scan or remat."""

  def __init__(self, router: nnx.Module, keep: Callable):
    self.router, self.moe, self.keep = router, router.moe, keep

  def __call__(self, u_TD):
    routed = self.router(u_TD)
    self.keep(routed)
    return routed


class Frozen(nnx.Module):
  """A router whose choice is made; the gates are of its own affinities.

  Of a stack of routers both, `router` and `experts_TK`, have X in front.
  """

  def __init__(self, router: moe.Router, experts_TK):
    self.router, self.moe = router, router.moe
    self.experts_TK = nnx.data(experts_TK)

  def __call__(self, u_TD):
    m = self.moe
    affinity_TE = routing.affinity(u_TD, self.router.centroid[...], m.gate)
    gate_TK = routing.gates(
      affinity_TE, self.experts_TK, m.normalize, m.routed_scale
    )
    return routing.Routing(self.experts_TK, gate_TK, affinity_TE)


def record(
  model: Transformer, tokens_BL, segments_BL=None, *, experts_XBLK=None
) -> Trace:
  """The choices for a text, of the model's own routers or of given ones.

  Raises ConfigError for a model without routers.
  """
  return _run(model, tokens_BL, segments_BL, experts_XBLK)[1]


def loss(
  model: Transformer, tokens_BL, trace: Trace | None = None, segments_BL=None
) -> float:
  """Nats a token of the main model, with the choices of a trace or its own."""
  if trace is not None:
    _check(trace, model, tokens_BL)
    segments_BL = trace.segments_BL if segments_BL is None else segments_BL
  experts = None if trace is None else trace.experts_XBLK
  return float(_run(model, tokens_BL, segments_BL, experts)[0])


def _check(trace: Trace, model: Transformer, tokens_BL) -> None:
  m = model.model
  wanted = m.n_moe_layers, *np.shape(tokens_BL), m.moe.top_k
  found = trace.experts_XBLK.shape
  if found != wanted or trace.n_routed != m.moe.n_routed:
    raise ConfigError(
      f"trace: found {found} choices among {trace.n_routed} experts, wanted "
      f"{wanted} among {m.moe.n_routed} (layers, sequences, positions, top_k)"
    )


def _run(model, tokens_BL, segments_BL, experts_XBLK):
  if not model.model.n_moe_layers:
    raise ConfigError("routing: found a dense model, wanted routers")
  tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
  if segments_BL is None:
    segments_BL = jnp.ones(tokens_BL.shape, jnp.int32)
  if experts_XBLK is not None:
    experts_XBLK = jnp.asarray(experts_XBLK, jnp.int32)
  graphdef, weights = nnx.split(model)
  nats, experts, gates = _forward(
    weights,
    tokens_BL,
    jnp.asarray(segments_BL),
    experts_XBLK,
    graphdef=graphdef,
  )
  trace = Trace(
    np.asarray(experts),
    np.asarray(gates),
    np.asarray(segments_BL),
    model.model.moe.n_routed,
  )
  return nats, trace


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(weights, tokens_BL, segments_BL, experts_XBLK, *, graphdef):
  """Blocks one by one, with other routers in them."""
  model = nnx.merge(graphdef, weights)
  x_BLD = model.embedding(tokens_BL)
  stacks = [getattr(model, n) for n in ("dense", "moe") if hasattr(model, n)]
  found = []
  for block in [b for stack in stacks for b in unstack(stack)]:
    if isinstance(block.ffn, moe.Moe):
      router = block.ffn.router
      if experts_XBLK is not None:
        experts_TK = experts_XBLK[len(found)].reshape(tokens_BL.size, -1)
        router = Frozen(router, experts_TK)
      block.ffn.router = Recorder(router, found.append)
    x_BLD, _ = block(x_BLD, segments_BL)
  same = segments_BL[:, 1:] == segments_BL[:, :-1]
  known_BL = same & (segments_BL[:, 1:] > 0)
  label_BL = jnp.where(known_BL, tokens_BL[:, 1:], -1)
  found_loss = cross_entropy(
    model.norm(x_BLD)[:, :-1], model.head[...], label_BL
  )
  in_rows = lambda x_TK: x_TK.reshape(*tokens_BL.shape, -1)
  return (
    found_loss.cross_entropy / jnp.maximum(known_BL.sum(), 1),
    jnp.stack([in_rows(r.experts_TK) for r in found]),
    jnp.stack([in_rows(r.gate_TK) for r in found]),
  )


def relative_load(
  trace: Trace, rows: Sequence[int] | None = None
) -> np.ndarray:
  """Load of every expert over the balanced one, [X, E] (Fig. 9).

  `rows` are the sequences that count; None: all.
  """
  rows = slice(None) if rows is None else list(rows)
  inside = trace.segments_BL[rows] > 0
  chosen_XAK = trace.experts_XBLK[:, rows][:, inside]
  count = functools.partial(np.bincount, minlength=trace.n_routed)
  load_XE = np.stack([count(x.ravel()) for x in chosen_XAK])
  return load_XE * trace.n_routed / np.maximum(load_XE.sum(1, keepdims=True), 1)


def agreement(a: Trace, b: Trace) -> np.ndarray:
  """Share of the choices that two traces of one text have in common, [X]."""
  if a.experts_XBLK.shape != b.experts_XBLK.shape:
    raise ConfigError("traces: found two of different texts or models")
  same = a.experts_XBLK[..., :, None] == b.experts_XBLK[..., None, :]
  inside = (a.segments_BL > 0) & (b.segments_BL > 0)
  return same.any(-1)[:, inside].mean((1, 2))


def table(trace: Trace, domains: Mapping[str, Sequence[int]]) -> str:
  """Per layer: MaxVio, unused experts, and the experts a domain takes most."""
  whole_XE = relative_load(trace)
  by_domain = {
    name: relative_load(trace, rows) for name, rows in domains.items()
  }
  lines = []
  for layer, load_E in enumerate(whole_XE):
    unused = np.flatnonzero(load_E == 0).tolist()
    lines.append(
      f"layer {layer}: MaxVio {load_E.max() - 1:.2f}, "
      f"{len(unused)} of {trace.n_routed} unused"
      + (f" ({', '.join(map(str, unused[:12]))})" if unused else "")
    )
    for name, load_XE in by_domain.items():
      best = np.argsort(-load_XE[layer])[:4]
      tops = ", ".join(f"{e} at {load_XE[layer, e]:.1f}" for e in best)
      lines.append(f"  {name}: most to experts {tops} of the balanced load")
  return "\n".join(lines)


def draw(trace: Trace, domains: Mapping[str, Sequence[int]]):
  """Figure: a panel a layer, a row a domain, a column an expert (Fig. 9)."""
  from dsv3.eval.heatmap import figure_class

  loads = {name: relative_load(trace, rows) for name, rows in domains.items()}
  n_layers, names = len(trace.experts_XBLK), list(loads)
  height = n_layers * (0.6 + 0.24 * len(names)) + 1.2
  width = min(14.0, 4 + 0.16 * trace.n_routed)
  figure = figure_class()(figsize=(width, height), layout="constrained")
  axes = figure.subplots(n_layers, 1, squeeze=False)[:, 0]
  most = max(2.0, *(load.max() for load in loads.values()))
  for layer, axis in enumerate(axes):
    grid = np.stack([loads[name][layer] for name in names])
    image = axis.imshow(grid, vmin=0, vmax=most, aspect="auto", cmap="viridis")
    short = [name[-24:] for name in names]  # a source may be a long path
    axis.set_yticks(range(len(names)), short, fontsize=8)
    axis.set_title(f"MoE layer {layer}", fontsize=9, loc="left")
  axes[-1].set_xlabel("expert")
  figure.colorbar(image, ax=list(axes), label="load over the balanced one")
  return figure
