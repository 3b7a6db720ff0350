"""What sizes and values of a config cannot go together (`dsv3.config.build`)."""

import dataclasses
import importlib.util
from typing import Any

from dsv3.errors import ConfigError


def _require(ok: bool, where: str, found: Any, wanted: str) -> None:
  if not ok:
    raise ConfigError(f"config.{where}: found {found}, wanted {wanted}")


def check(config) -> None:
  """Raises ConfigError for sizes and values that cannot go together."""
  _check_model(config.model)
  _check_numbers(config)
  _check_mesh(config.mesh)
  data, train, schedule = config.data, config.train, config.schedule
  shortest = config.model.mtp.depth + 2
  _require(
    data.seq_len >= shortest,
    "data.seq_len",
    data.seq_len,
    f"at least {shortest}: MTP depth {config.model.mtp.depth} needs them",
  )
  _require(
    len(data.weights) in (0, len(data.sources)),
    "data.weights",
    f"{len(data.weights)} weights",
    f"one for each of the {len(data.sources)} sources, or none",
  )
  if config.model.moe.kernel == "tokamax":
    _require(
      importlib.util.find_spec("tokamax") is not None,
      "model.moe.kernel",
      "tokamax",
      "the package of that name: pip install tokamax",
    )
  _require(train.steps < 2**31, "train.steps", train.steps, "less than 2**31")
  _require(train.seed < 2**32, "train.seed", train.seed, "less than 2**32")
  _require(len(data.sources) > 0, "data.sources", "none", "at least one")
  stair = schedule.batch_size - schedule.batch_size_start
  _require(
    stair >= 0 and stair % schedule.batch_ramp_stages == 0,
    "schedule.batch_ramp_stages",
    schedule.batch_ramp_stages,
    f"a divisor of batch_size - batch_size_start = {stair}",
  )
  for size in (schedule.batch_size_start, stair // schedule.batch_ramp_stages):
    _require(
      size % train.microbatches == 0,
      "train.microbatches",
      train.microbatches,
      "a divisor of every batch size: batch_size_start and the ramp's stairs",
    )


def _check_model(model) -> None:
  moe, attention = model.moe, model.attention
  _require(
    model.precision.report_every > 0 or model.precision.guard <= 0,
    "model.precision.report_every",
    model.precision.report_every,
    f"1 or more: the guard (model.precision.guard = {model.precision.guard:g}) "
    "acts on reports",
  )
  _require(
    attention.rope_dim % 2 == 0,
    "model.attention.rope_dim",
    attention.rope_dim,
    "an even number",
  )
  _require(
    model.rope.yarn_factor >= 1,
    "model.rope.yarn_factor",
    model.rope.yarn_factor,
    "1 (plain) or more",
  )
  if attention.kind == "gqa":
    _require(
      attention.n_heads % attention.n_kv_heads == 0,
      "model.attention.n_kv_heads",
      attention.n_kv_heads,
      f"a divisor of n_heads = {attention.n_heads}",
    )
  _require(
    model.n_dense_layers < model.n_layers or model.ffn == "dense",
    "model.n_dense_layers",
    model.n_dense_layers,
    f"fewer than n_layers = {model.n_layers}, or model.ffn = dense",
  )
  if model.ffn == "dense":
    return
  _require(
    moe.n_routed % moe.n_groups == 0,
    "model.moe.n_groups",
    moe.n_groups,
    f"a divisor of n_routed = {moe.n_routed}",
  )
  _require(
    moe.top_groups <= moe.n_groups,
    "model.moe.top_groups",
    moe.top_groups,
    f"at most n_groups = {moe.n_groups}",
  )
  reach = moe.n_routed // moe.n_groups * moe.top_groups
  _require(
    moe.top_k <= reach,
    "model.moe.top_k",
    moe.top_k,
    f"at most the {reach} experts of {moe.top_groups} groups",
  )


def _check_mesh(mesh) -> None:
  sizes = dataclasses.asdict(mesh)
  nodes, rows = sizes.pop("expert_nodes"), sizes.pop("expert_rows")
  _require(nodes > 0, "mesh.expert_nodes", nodes, "1 or more")
  _require(rows >= 0, "mesh.expert_rows", rows, "0 or more")
  for axis, size in sizes.items():
    ok = size == -1 or size > 0
    _require(ok, f"mesh.{axis}", size, "1 or more, or -1: what is left")
  free = [axis for axis, size in sizes.items() if size == -1]
  _require(len(free) < 2, "mesh", f"-1 for {' and '.join(free)}", "it once")


# Keys that may be zero; every other number must be over zero.
_MAY_BE_ZERO = frozenset(
  "n_dense_layers q_rank n_shared depth fim_rate split_rate heldout "
  "weight_decay clip_norm warmup_steps mtp_weight mtp_weight_late "
  "mtp_weight_tokens bias_speed bias_speed_tokens bias_speed_late "
  "balance_weight z_weight batch_ramp_tokens lr_last_tokens lr_constant_tokens "
  "lr_cosine_tokens lr_end lr_last seed steps max_minutes ema_decay max_skipped "
  "eval_every eval_batches final_eval_batches checkpoint_every "
  "checkpoint_minutes b1 b2 report_every guard".split()
)
_SHARES = frozenset("fim_rate split_rate heldout ema_decay b1 b2".split())


def _check_numbers(group: Any, where: str = "") -> None:
  for field in dataclasses.fields(group):
    value, key = getattr(group, field.name), f"{where}{field.name}"
    if key == "mesh":
      continue  # -1 is a size of its own kind
    if dataclasses.is_dataclass(value):
      _check_numbers(value, f"{key}.")
    elif type(value) in (int, float):
      low = 0 if field.name in _MAY_BE_ZERO else None
      ok = value >= 0 if low == 0 else value > 0
      _require(ok, key, value, "0 or more" if low == 0 else "more than 0")
      if field.name in _SHARES:
        _require(value < 1, key, value, "less than 1")
