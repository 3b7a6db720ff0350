"""What a run is made of: frozen dataclasses, checked once, read everywhere.

The values stand in `configs/`; here stand the names, the types and the choices,
and in `config_check.py` what cannot be combined. `build` turns a config into a
`Config` or raises `ConfigError` with the key, what was found and what was wanted.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from dsv3 import config_check
from dsv3.errors import ConfigError

Balancing = Literal[
  "bias+sequence", "bias+batch", "bias", "sequence", "batch", "none"
]

# Axes of a Mesh, by how much the devices along them have to say to each other.
INNER_FIRST = ("tensor", "context", "expert", "fsdp", "stage", "data")


@dataclasses.dataclass(frozen=True)
class Attention:
  """Attention of a block (Sec. 2.1.1), or a baseline for ablations."""

  kind: Literal["mla", "mha", "gqa"]
  n_heads: int
  n_kv_heads: int  # key and value heads; read by `gqa` alone
  q_rank: int  # query latent; 0: queries straight from the hidden state
  kv_rank: int  # key-value latent; read by `mla` alone
  nope_dim: int  # content part of a head
  rope_dim: int  # rotated part of a head
  v_dim: int
  kernel: Literal["auto", "flash", "naive"]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding, and YaRN where yarn_factor is over 1 (Sec. 4.3)."""

  theta: float
  yarn_factor: float
  original_len: int
  beta_fast: float
  beta_slow: float
  mscale: float


@dataclasses.dataclass(frozen=True)
class Moe:
  """DeepSeekMoE (Sec. 2.1.2)."""

  n_routed: int
  n_shared: int
  top_k: int
  hidden: int  # of one expert
  n_groups: int
  top_groups: int  # groups a token may go to (M)
  group_score: Literal["top2", "max"]  # V3 and V2
  gate: Literal["sigmoid", "softmax"]  # V3 and V2
  normalize: bool  # the chosen gates sum to routed_scale
  routed_scale: float
  balancing: Balancing
  kernel: Literal["auto", "tiles", "ragged", "tokamax", "dense"]
  # Of a run that was begun before there were others: V3's.
  bias_step: Literal["sign", "proportional"] = "sign"
  bias_form: Literal["additive", "multiplicative"] = "additive"

  @property
  def has_bias(self) -> bool:
    return self.balancing.startswith("bias")


@dataclasses.dataclass(frozen=True)
class Mtp:
  """Multi-token prediction (Sec. 2.2)."""

  depth: int
  hidden: Literal["after_norm", "before_norm"]  # the main model's final norm
  concat: Literal["hidden_embedding", "embedding_hidden"]  # order in Eq. 21


@dataclasses.dataclass(frozen=True)
class Precision:
  """How Linears are quantised (Sec. 3.3); a run may change it as it goes on."""

  recipe: Literal[
    "bf16", "deepseek_v3", "per_tensor", "delayed", "blockwise_128", "mxfp8"
  ]
  changes: tuple[str, ...]  # FIELD=VALUE, of `dsv3.ops.recipes.Recipe`
  high: tuple[str, ...]  # patterns of Linears that are never quantised
  kernel: Literal["auto", "reference", "hopper"]
  report_every: int  # steps between two reports of every Linear; 0: none
  guard: float  # relative error of a matmul that is too much; 0: no guard
  guard_action: Literal["tell", "keep_high"]


@dataclasses.dataclass(frozen=True)
class Model:
  """The network (Sec. 2)."""

  vocab_size: int
  dim: int
  n_layers: int  # without the MTP modules
  ffn: Literal["moe", "dense"]
  n_dense_layers: int  # the first ones
  dense_hidden: int
  norm_eps: float
  init_std: float
  dtype: Literal["bfloat16", "float32"]  # of activations
  layers: Literal["scan", "unrolled"]
  remat: Literal["none", "paper", "full"]
  precision: Precision
  attention: Attention
  rope: Rope
  moe: Moe
  mtp: Mtp

  @property
  def n_moe_layers(self) -> int:
    return self.n_layers - self.n_dense_layers if self.ffn == "moe" else 0

  @property
  def n_routers(self) -> int:
    """Rows of every routing statistic: the MoE layers, then MTP's."""
    return self.n_moe_layers + self.mtp.depth * (self.ffn == "moe")


@dataclasses.dataclass(frozen=True)
class Data:
  """Where tokens come from (Sec. 4.1)."""

  sources: tuple[
    str, ...
  ]  # python | folder | *.txt | *.jsonl | *.parquet | ...
  weights: tuple[float, ...]  # one a source; empty: in proportion to size
  text_key: str  # the field of jsonl and Parquet rows
  tokenizer: str  # bytes | the path of a tokenizer.json
  seq_len: int
  mask_documents: bool  # True: a document neither sees nor predicts another
  fim_rate: float  # share of documents in fill-in-the-middle order
  split_rate: float  # share of merged punctuation-newline tokens that is split
  heldout: float  # share of the files (or rows) kept for evaluation
  cache: str


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW (Sec. 4.2)."""

  b1: float
  b2: float
  eps: float
  weight_decay: float
  decayed: Literal["matrices", "all"]
  clip_norm: float  # global norm; 0: no clipping
  moment_dtype: Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What changes while training goes on (Sec. 4.2).

  All `*_tokens` are boundaries in a run of `horizon_tokens`. With time "tokens"
  they hold as they stand; with "share" they shrink or stretch to the length of
  the run at hand, so that a short run goes through the whole of it.
  """

  time: Literal["tokens", "share"]
  horizon_tokens: float
  warmup_steps: int
  lr_peak: float
  lr_constant_tokens: float
  lr_cosine_tokens: float
  lr_end: float
  lr_last_tokens: float
  lr_last: float
  mtp_weight: float
  mtp_weight_late: float
  mtp_weight_tokens: float
  bias_speed: float
  bias_speed_tokens: float
  balance_weight: float
  z_weight: float
  batch_size: int
  batch_size_start: int
  batch_ramp_tokens: float
  batch_ramp_stages: int
  bias_speed_late: float = 0.0  # after bias_speed_tokens


@dataclasses.dataclass(frozen=True)
class Train:
  """The run."""

  seed: int
  start_from: str  # another run, whose weights this one begins with; "": none
  tokens: float  # of the whole run
  steps: int  # optimiser steps of the whole run; 0: as many as `tokens` takes
  max_minutes: float  # of this process; 0: no limit
  microbatches: int
  ema_decay: float  # 0: none
  ema_place: Literal["device", "host"]
  max_skipped: int
  log_every: int
  eval_every: int
  eval_batches: int  # held-out batches while training goes on
  final_eval_batches: int  # at the end and of `dsv3 eval`
  checkpoint_every: int  # steps
  checkpoints_kept: int
  checkpoint_minutes: float = 30.0  # since the newest one; 0: by steps alone


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How devices are arranged (Sec. 3.2): sizes of the axes.

  Their product is the number of devices. Of a config one may be -1, which takes
  the devices that the others leave. Inner axes come first in a domain of fast
  links: tensor, context, expert, fsdp, then stage and data, which talk least.
  """

  data: int = 1  # replicas; the optimizer's state is sharded over them (ZeRO-1)
  fsdp: int = 1  # sequences, and weights, gathered where they are used (ZeRO-3)
  expert: int = 1  # sequences, and the routed experts (EP)
  context: int = 1  # positions of a sequence (CP)
  tensor: int = 1  # heads and hidden widths (TP)
  stage: int = 1  # layers (PP)
  expert_nodes: int = 1  # of `expert`: a token goes to a node once, then inside
  # Rows from a device to the experts of another at a time, over the mean; more of
  # them go in further rounds. 0: buffers for all that there may be.
  expert_rows: float = 0.0

  @property
  def size(self) -> int:
    return math.prod(getattr(self, axis) for axis in INNER_FIRST)

  @property
  def ranks(self) -> int:
    """Over how many the sequences of a batch are dealt."""
    return self.data * self.fsdp * self.expert

  def domains(self, axis: str, domain: int) -> int:
    """Domains of fast links that a group of this axis is spread over."""
    before = INNER_FIRST[: INNER_FIRST.index(axis)]
    stride = math.prod(getattr(self, a) for a in before)
    return min(-(-stride * getattr(self, axis) // domain), getattr(self, axis))

  def along(self, axis: str) -> int:
    """Devices along an axis of the arrays' mesh, where `expert` is two."""
    if axis == "node":
      return self.expert_nodes
    if axis == "expert":
      return self.expert // self.expert_nodes
    return getattr(self, axis)

  def __str__(self) -> str:
    fields = dataclasses.fields(self)
    sizes = [(f.name, getattr(self, f.name), f.default) for f in fields]
    return ",".join(f"{a}={n}" for a, n, one in sizes if n != one) or "data=1"


@dataclasses.dataclass(frozen=True)
class Config:
  """All of it."""

  name: str
  model: Model
  data: Data
  optimizer: Optimizer
  schedule: Schedule
  train: Train
  mesh: Mesh = Mesh()  # of a run that was begun before there were meshes


def build(values: ConfigDict | Mapping[str, Any]) -> Config:
  """A checked `Config` from a ConfigDict, or from the JSON of a run."""
  if isinstance(values, ConfigDict):
    values = values.to_dict()
  config = _build(Config, values, "config")
  config_check.check(config)
  return config


def _build(cls, values: Mapping[str, Any], where: str):
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise ConfigError(f"{where}.{key}: no such key{nearest(key, fields)}")
  for key, field in fields.items():
    if key not in values and field.default is dataclasses.MISSING:
      raise ConfigError(f"{where}.{key}: missing")
  return cls(
    **{k: coerce(v, fields[k].type, f"{where}.{k}") for k, v in values.items()}
  )


def nearest(key: str, known) -> str:
  """Hint at the known key closest to a misspelt one; "" if none is close."""
  close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]}?" if close else ""


def coerce(value: Any, kind: Any, where: str) -> Any:
  """`value` as the annotated type `kind`, or a ConfigError that names both."""
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, Mapping):
      raise ConfigError(f"{where}: found {value!r}, wanted a group of keys")
    return _build(kind, value, where)
  if typing.get_origin(kind) is Literal:
    choices = typing.get_args(kind)
    if value not in choices:
      raise ConfigError(
        f"{where}: found {value!r}, wanted one of {', '.join(choices)}"
        + (nearest(value, choices) if isinstance(value, str) else "")
      )
    return value
  if isinstance(kind, types.GenericAlias):
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f"{where}: found {value!r}, wanted a list")
    return tuple(coerce(v, kind.__args__[0], where) for v in value)
  whole = isinstance(value, float) and value.is_integer()
  if kind is int and whole:
    return int(value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind or (kind is float and not math.isfinite(value)):
    raise ConfigError(f"{where}: found {value!r}, wanted {kind.__name__}")
  return value
