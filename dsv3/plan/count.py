"""Parameters and FLOPs of a model, from the model itself and from formulas."""

import math
from typing import NamedTuple

import jax

from dsv3 import config
from dsv3.nn.transformer import make_model, split


class Parameters(NamedTuple):
  """How many numbers a model holds; router biases are counted, as released."""

  main: int  # all of the main model
  mtp: int  # the MTP modules' own: embedding and head are the main model's
  active: int  # used by a token, embedding and head included
  active_head: int  # without the embedding, which is a look-up
  active_body: int  # without both
  by_part: dict[str, int]


def parameters(model: config.Model) -> Parameters:
  """Counts of a model by abstract evaluation: exact at any size, no memory."""
  built = jax.eval_shape(lambda: make_model(model, jax.random.key(0)))
  _, params, router = split(built)
  by_part, main, mtp, idle = {}, 0, 0, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path((params, router)):
    names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
    size = math.prod(leaf.shape)
    part = _part(names)
    by_part[part] = by_part.get(part, 0) + size
    if "mtp" in names:
      mtp += size
      continue
    main += size
    if "experts" in names:
      idle += (
        size // model.moe.n_routed * (model.moe.n_routed - model.moe.top_k)
      )
  active = main - idle
  table = model.vocab_size * model.dim
  return Parameters(
    main, mtp, active, active - table, active - 2 * table, by_part
  )


def _part(names: list[str]) -> str:
  if "mtp" in names:
    return "mtp"
  for part in ("attention", "experts", "shared", "router", "dense"):
    if part in names:
      return part
  return "norms" if "gain" in names else names[1] if len(names) > 1 else "other"


def flops_per_token(
  model: config.Model, seq_len: int, *, mtp: bool = True
) -> float:
  """Training FLOPs of a token: 6 a matrix element, 3 forward passes of attention.

  Causal: a position reads half of the sequence on average. No recomputation,
  no embedding look-up, no element-wise work. `mtp` adds the MTP modules and
  their passes through the output head. V3 at 4096 without MTP: 250.45e9, the
  figure of arXiv 2505.09343, Table 2.
  """
  count, a = parameters(model), model.attention
  gains = _gains(model)
  matrices = count.active_head - gains
  if model.ffn == "moe" and model.moe.has_bias:
    matrices -= model.n_moe_layers * model.moe.n_routed
  # q.k and p.v: 2 FLOPs a multiply-add, half the keys are in the past.
  scores = a.n_heads * (a.nope_dim + a.rope_dim + a.v_dim) * seq_len
  layers = model.n_layers
  if mtp and model.mtp.depth:
    m = model.moe
    idle = 0
    if model.ffn == "moe":
      idle = (m.n_routed - m.top_k) * 3 * model.dim * m.hidden
      idle += m.n_routed * m.has_bias
    head = model.vocab_size * model.dim
    per_module = count.mtp // model.mtp.depth - idle + head
    matrices += model.mtp.depth * per_module
    layers += model.mtp.depth
  return 6.0 * matrices + 3.0 * scores * layers


def _gains(model: config.Model) -> int:
  """Gains of the main model's norms, which multiply no matrix."""
  a = model.attention
  latents = a.q_rank + (a.kv_rank if a.kind == "mla" else 0)
  return model.n_layers * (2 * model.dim + latents) + model.dim


# Dense BF16 peak of a chip in FLOP/s, from the makers' data sheets, by a part
# of JAX's device kind. Longer names first: the first that fits counts.
_PEAK_BF16 = {
  "GB300": 2500e12,
  "GB200": 2500e12,
  "B200": 2250e12,
  "H200": 989e12,
  "H100": 989e12,
  "H800": 989e12,
  "A100": 312e12,
  "TPU7x": 2307e12,
  "TPU v6": 918e12,
  "TPU v5p": 459e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
  """BF16 dense peak of a device in FLOP/s; None where it is not known (a CPU)."""
  for name, peak in _PEAK_BF16.items():
    if name.lower() in device_kind.lower():
      return peak
  return None
