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
    return self.sizes[self._stage(step)]

  def first_sequence(self, step: int) -> int:
    """Sequences of all steps before `step`, on the host, exactly."""
    j = self._stage(step)
    return self.sequences[j] + (step - self.starts[j]) * self.sizes[j]

  def tokens(self, step: int) -> int:
    """Tokens of all steps before `step`, on the host, exactly."""
    return self.first_sequence(step) * self.seq_len

  def _stage(self, step: int) -> int:
    return int(np.searchsorted(self.starts, step, side="right")) - 1

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
      bias_speed=jnp.where(at < v.bias_speed_tokens, v.bias_speed, 0.0),
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
  # Warm-up starts from zero; + 1 because an update of exactly zero is a waste.
  warm = jnp.minimum((step + 1) / max(v.warmup_steps, 1), 1.0)
  return (lr * warm).astype(jnp.float32)


def make(values: config.Config) -> Schedule:
  """The schedule of a run, its length in steps included."""
  v, seq_len = values.schedule, values.data.seq_len
  if v.time == "tokens" or not values.train.steps:
    starts, sequences, sizes = _ramp(v, seq_len, v.batch_ramp_tokens)
    left = v.horizon_tokens / seq_len - sequences[-1]
    steps = values.train.steps or starts[-1] + int(left / sizes[-1])
    return Schedule(v, seq_len, steps, 1.0, starts, sequences, sizes)
  steps = values.train.steps
  ramp_share = v.batch_ramp_tokens / v.horizon_tokens
  # Tokens of the run when every step had the full batch: an upper bound that
  # is exact without a ramp; one more round lands within a stair of it.
  total = steps * v.batch_size * seq_len
  for _ in range(2):
    starts, sequences, sizes = _ramp(v, seq_len, total * ramp_share)
    made = sequences[-1] + max(steps - starts[-1], 0) * sizes[-1]
    total = made * seq_len
  stretch = v.horizon_tokens / total
  return Schedule(v, seq_len, steps, stretch, starts, sequences, sizes)


def _ramp(v: config.Schedule, seq_len: int, ramp_tokens: float):
  """First step, sequences before and batch size of every stage."""
  if v.batch_size_start == v.batch_size or ramp_tokens <= 0:
    return (0,), (0,), (v.batch_size,)
  n = v.batch_ramp_stages
  climb = np.linspace(v.batch_size_start, v.batch_size, n + 1)[:-1]
  step = v.batch_size_start  # sizes stay multiples of a divisor of both ends
  unit = int(np.gcd(step, v.batch_size))
  starts, sequences, sizes = [0], [0], []
  for size in climb:
    size = max(unit, int(size) // unit * unit)
    steps = max(1, round(ramp_tokens / n / (size * seq_len)))
    sizes.append(size)
    starts.append(starts[-1] + steps)
    sequences.append(sequences[-1] + steps * size)
  return tuple(starts), tuple(sequences), (*sizes, v.batch_size)
