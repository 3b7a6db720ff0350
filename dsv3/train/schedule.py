"""What changes while training goes on, as functions of the step (Sec. 4.2).

The report states its schedules in tokens, and 14.8T tokens overflow int32. So
the step is counted, and tokens follow from it: in closed form, stage by stage
of the batch-size ramp, exactly on the host and in float32 inside the step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3 import config


class Hyper(NamedTuple):
  """The values of one step."""

  lr: jax.Array
  mtp_weight: jax.Array  # lambda
  balance_weight: jax.Array  # alpha
  z_weight: jax.Array
  bias_speed: jax.Array  # gamma
  tokens: jax.Array  # seen before this step


@dataclasses.dataclass(frozen=True)
class Schedule:
  """All schedules of a run; call it with a step for its `Hyper`.

  The batch size climbs in stairs: stage j starts at step `starts[j]`, when
  `sequences[j]` sequences have been seen, and takes `sizes[j]` a step.
  """

  values: config.Schedule
  seq_len: int
  steps: int  # of the whole run
  stretch: float  # tokens of the horizon for a token of this run
  starts: tuple[int, ...]
  sequences: tuple[int, ...]
  sizes: tuple[int, ...]

  def batch_size(self, step: int) -> int:
    """Sequences of step `step`, on the host."""
    return self.sizes[int(np.searchsorted(self.starts, step, side="right")) - 1]

  def first_sequence(self, step: int) -> int:
    """Sequences of all steps before `step`, on the host, exactly."""
    return _sequences((self.starts, self.sequences, self.sizes), step)

  def tokens(self, step: int) -> int:
    """Tokens of all steps before `step`, on the host, exactly."""
    return self.first_sequence(step) * self.seq_len

  def __call__(self, step: jax.Array) -> Hyper:
    v = self.values
    starts = jnp.array(self.starts, jnp.int32)
    j = jnp.searchsorted(starts, step, side="right") - 1
    per_step = jnp.array(self.sizes, jnp.float32) * self.seq_len
    before = jnp.array(self.sequences, jnp.float32) * self.seq_len
    tokens = before[j] + (step - starts[j]).astype(jnp.float32) * per_step[j]
    at = tokens * jnp.float32(self.stretch)
    return Hyper(
      lr=learning_rate(v, step, at),
      mtp_weight=jnp.where(
        at < v.mtp_weight_tokens, v.mtp_weight, v.mtp_weight_late
      ),
      balance_weight=jnp.float32(v.balance_weight),
      z_weight=jnp.float32(v.z_weight),
      bias_speed=jnp.where(
        at < v.bias_speed_tokens, v.bias_speed, v.bias_speed_late
      ),
      tokens=tokens,
    )


def learning_rate(
  v: config.Schedule, step: jax.Array, tokens: jax.Array
) -> jax.Array:
  """Warm-up in steps, then constant, cosine, constant, constant in tokens.

  `tokens` on the scale of `v.horizon_tokens`. The last `lr_last_tokens` of the
  horizon run at lr_last, what lies between the cosine and them at lr_end.
  """
  into_cosine = (tokens - v.lr_constant_tokens) / max(v.lr_cosine_tokens, 1.0)
  fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(into_cosine, 0.0, 1.0)))
  lr = v.lr_end + (v.lr_peak - v.lr_end) * fall
  lr = jnp.where(tokens >= v.horizon_tokens - v.lr_last_tokens, v.lr_last, lr)
  warm = jnp.minimum(step / v.warmup_steps, 1.0) if v.warmup_steps else 1.0
  return (lr * warm).astype(jnp.float32)


def make(values: config.Config) -> Schedule:
  """The schedule of a run, its length in steps included."""
  v, train, seq_len = values.schedule, values.train, values.data.seq_len
  if train.steps and v.time == "share":
    # The ramp is a share of the run's tokens, which depend on the ramp. From
    # an upper bound, a few rounds land within a stair.
    total = train.steps * v.batch_size * seq_len
    for _ in range(8):
      ramp = _ramp(v, seq_len, total / v.horizon_tokens)
      total = _sequences(ramp, train.steps) * seq_len
    stretch = v.horizon_tokens / total
    return Schedule(v, seq_len, train.steps, stretch, *ramp)
  shrink = 1.0 if v.time == "tokens" else train.tokens / v.horizon_tokens
  starts, sequences, sizes = ramp = _ramp(v, seq_len, shrink)
  left = train.tokens / seq_len - sequences[-1]
  steps = train.steps or max(starts[-1] + int(left / sizes[-1]), 1)
  return Schedule(v, seq_len, steps, 1 / shrink, *ramp)


def _sequences(ramp, step: int) -> int:
  """Sequences before `step`."""
  starts, sequences, sizes = ramp
  j = int(np.searchsorted(starts, step, side="right")) - 1
  return sequences[j] + (step - starts[j]) * sizes[j]


def _ramp(v: config.Schedule, seq_len: int, shrink: float):
  """First step, sequences before and batch size of every stage.

  `shrink` is what the horizon's tokens are multiplied with.
  """
  ramp_tokens = v.batch_ramp_tokens * shrink
  if v.batch_size_start == v.batch_size or ramp_tokens <= 0:
    return (0,), (0,), (v.batch_size,)
  sizes = np.linspace(
    v.batch_size_start, v.batch_size, v.batch_ramp_stages, endpoint=False
  ).astype(int)
  starts, sequences = [0], [0]
  for size in sizes:
    stage_tokens = ramp_tokens / v.batch_ramp_stages
    steps = max(1, round(stage_tokens / (size * seq_len)))
    starts.append(starts[-1] + steps)
    sequences.append(sequences[-1] + steps * int(size))
  sizes = (*(int(size) for size in sizes), v.batch_size)
  return tuple(starts), tuple(sequences), sizes
