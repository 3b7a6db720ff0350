"""A run from its first step to its last, or from where it stopped.

Everything around the jitted step: data ahead of it, numbers out of it, held-out
text, checkpoints, and every way to stop. What can be wrong with a config, the
data or the folder is found before anything is compiled.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax

from dsv3 import config
from dsv3.cache import use_compilation_cache
from dsv3.config import ConfigError
from dsv3.data.batches import Batches
from dsv3.data.prefetch import prefetch
from dsv3.errors import RunError
from dsv3.eval import bpb
from dsv3.parallel import processes
from dsv3.parallel.presence import Presence
from dsv3.plan import chips, count, here
from dsv3.train import (
  begin,
  feed,
  identity,
  layout,
  opening,
  program,
  run,
  schedule,
)
from dsv3.train.checkpoint import Checkpoints
from dsv3.train.clock import Clock
from dsv3.train.ema import HostEma
from dsv3.train.interrupt import Interrupts
from dsv3.train.logs import MetricsLog, Progress, Silence, keep_until
from dsv3.train.trees import trees_of
from dsv3.train.watch import Watch


class RunFailed(RunError):
  """A run that cannot go on: one line, with what is left of it."""


@dataclasses.dataclass
class Outcome:
  """How a call of `train` ended."""

  workdir: pathlib.Path
  step: int  # steps done in all
  steps: int  # steps wanted
  saved: int | None  # step of the newest checkpoint
  signum: int | None  # the signal that stopped it
  score: bpb.Score | None  # on `final_eval_batches` of held-out text, at `step`
  max_vio: float | None  # of the last batch


def train(
  values: config.Config,
  workdir: str | pathlib.Path,
  given: run.Given = run.Given(),
) -> Outcome:
  """Trains until `train.steps`, `train.max_minutes` or a signal.

  A `workdir` that holds a run of this config goes on from its newest
  checkpoint, as if it had never stopped. Raises ConfigError for what is wrong
  with the config, the data or the folder; RunFailed for a run that diverged.
  """
  started = time.monotonic()
  workdir = pathlib.Path(workdir)
  run.changes(workdir, values)  # another run's folder: before anything else
  presence, trainer = Presence(workdir), None
  try:
    trainer = _Trainer(values, workdir, given, presence)
    return trainer.run(started)
  except (Exception, KeyboardInterrupt) as error:
    presence.leave(error)
    raise
  finally:
    if trainer:
      trainer.close()
    presence.close()


class _Trainer:
  """The parts of a run, and what is done with them after a step."""

  def __init__(
    self,
    values: config.Config,
    workdir: pathlib.Path,
    given: run.Given,
    presence: Presence,
  ):
    use_compilation_cache()
    self.values, self.workdir = values, workdir
    self.presence = presence
    self.layout = layout.of_run(values)
    self.schedule = schedule.make(values)
    self.data = Batches(values, values.train.seed)
    self.tokenizer = self.data.tokenizer
    self.heldout = self._heldout()
    self.program = program.make(values, self.layout, self.schedule)
    self.step = processes.together(self.program.step)
    graphdef = self.program.graphdef
    self.watch = Watch(graphdef, values, self.schedule, workdir)
    self.folder = contextlib.ExitStack()
    try:
      self._open(given)
    except BaseException:
      self.folder.close()
      raise
    self.skipped = 0
    self._first_step_at: int | None = None
    self.max_vio: float | None = None

  def _open(self, given: run.Given) -> None:
    """Takes the run folder, restores, and only then writes down this start."""
    values, workdir = self.values, self.workdir
    first = processes.is_first()
    if first:
      self.folder.enter_context(run.locked(workdir))
    self.checkpoints = Checkpoints(
      workdir / "checkpoints", kept=values.train.checkpoints_kept
    )
    if jax.process_count() == 1:  # of several, none may wait for others now
      self.folder.callback(self.checkpoints.close)
    if self.checkpoints.steps and not (workdir / "config.json").exists():
      raise ConfigError(
        f"--workdir={workdir}: found checkpoints without their config.json"
      )
    begun = begin.begin(
      values, workdir, self.checkpoints, self.program, self.data
    )
    self.done, self.state, average = begun.done, begun.state, begun.average
    # A run may go on with more steps, which moves the stairs of a batch ramp; the
    # data still goes on from the first sequence not yet seen.
    planned = self.schedule.first_sequence(self.done)
    self.sequences_ahead = begun.sequences - planned
    decay = values.train.ema_decay
    self.host_ema = HostEma(average, decay) if begin.on_host(values) else None
    if self.done > self.schedule.steps:
      raise ConfigError(
        f"config.train.steps: found {self.schedule.steps}, wanted at least "
        f"{self.done}: so many are done in {workdir}"
      )
    changed = run.changes(workdir, values)
    self.presence.trouble = self.checkpoints.trouble
    processes.wait_for_all("run folder read")
    self.log = self.progress = Silence()
    if first:
      run.record(workdir, values, given)
      position = run.Position(self.done, self.sequences_ahead)
      run.record_start(workdir, given, values.train.steps, changed, position)
      self.log = MetricsLog(workdir, self.done)
      keep_until(workdir / "fp8.jsonl", self.done)
      self.progress = Progress(self.done, self.schedule.steps)
    self._greet(changed)

  def _heldout(self) -> Batches | None:
    train_values = self.values.train
    if not max(train_values.eval_batches, train_values.final_eval_batches):
      return None
    return Batches(self.values, 0, "heldout")

  def _greet(self, changed: dict[str, tuple[Any, Any]]) -> None:
    said = opening.of_run(
      self.values,
      self.workdir,
      self.layout.sizes,
      self.schedule,
      self.done,
      changed,
    )
    for line in said:
      self.progress.tell(line)
    self.plan = here.forecast(self.values, self.layout.sizes)
    if self.plan:
      self.progress.tell(self.plan.forecast())
    shares = self.data.report(self._sequences(self.schedule.steps))
    for line in opening.of_data(shares):
      self.progress.tell(line)

  def _sequences(self, done: int) -> int:
    """Sequences read when `done` steps are done: the data position."""
    return self.schedule.first_sequence(done) + self.sequences_ahead

  def run(self, started: float) -> Outcome:
    """The loop. Numbers of a step are fetched while the next one runs."""
    limit = self.values.train.max_minutes * 60 or math.inf
    clock = Clock(started, limit, self.schedule.steps)
    rows = prefetch(
      feed.training(
        self.data,
        self.schedule,
        self.done,
        self.sequences_ahead,
        lambda size: self.layout.share(size).runs,
      )
    )
    waiting = None  # step, its metrics and labels, not yet fetched
    signum = None  # that all processes know of
    with Interrupts() as interrupts, contextlib.closing(rows):
      for batch in rows:
        self._tell_batch_size()
        n_rows = self.schedule.batch_size(self.done)
        whole = self.layout.put_rows(batch, n_rows)
        self.state, metrics = self.step(self.state, whole)
        processes.let_end(self.state)
        self.done += 1
        if waiting:
          self._settle(*waiting, clock)
        if self.watch.is_due(self.done):
          self._watch(batch)
        counts = self.layout.share(n_rows).counts  # its rows, for all with them
        labels_BPL = batch.labels_BPL if counts else batch.labels_BPL[:0]
        waiting = (self.done, metrics, labels_BPL)
        if self.host_ema:
          self.host_ema.update(self.state.params)
        # All stop after the same step, whichever of them is told to. A signal that
        # comes while they agree is met after the next one.
        signum, is_over, is_old = self._agreed(interrupts, clock)
        stop = signum or is_over
        last = stop or self.done == self.schedule.steps
        due = last or self._is_due("checkpoint_every")
        scored = due or self._is_due("eval_every")
        if scored or is_old:
          self._settle(*waiting, clock, last=last)
          waiting = None
          with clock.paused():
            score = self._heldout_score() if scored and not signum else None
            if due or is_old:
              self._save(score)
          if (due or is_old) and not self.skipped:
            clock.has_saved()
        if stop:
          break
      self._tell_measured(clock.tokens_per_second())
      signum = signum or self._agreed(interrupts, clock)[0]
      score = None if signum else self._evaluate_at_the_end()
      self.checkpoints.wait()  # a signal now must not cut the last save short
    saved = self.checkpoints.steps
    return Outcome(
      self.workdir,
      self.done,
      self.schedule.steps,
      saved[-1] if saved else None,
      signum,
      score,
      self.max_vio,
    )

  def _agreed(
    self, interrupts: Interrupts, clock: Clock
  ) -> tuple[int | None, bool, bool]:
    """A signal that any of the processes has had, or that its time is over, or else
    that its newest checkpoint is old.

    All ask, once for all three: the answer waits for the step that is running. What
    comes first makes the others not matter.
    """
    minutes = self.values.train.checkpoint_minutes
    is_old = 0 < minutes < clock.unsaved_minutes()
    mine = 4 * (interrupts.signum or 0) + 2 * clock.is_over() + is_old
    found = processes.largest(mine)
    return found // 4 or None, bool(found & 2), bool(found & 1)

  def _watch(self, batch) -> None:
    found = self.watch.look(self.done, self.state, batch, self.progress.tell)
    self.state, metrics = found
    self.log.write(self.done, metrics)

  def _is_due(self, key: str) -> bool:
    every = getattr(self.values.train, key)
    return every > 0 and self.done % every == 0

  def _tell_batch_size(self) -> None:
    size = self.schedule.batch_size(self.done)
    before = self.schedule.batch_size(max(self.done - 1, 0))
    if size != before:
      self.progress.tell(
        f"step {self.done + 1}: batch size {before} -> {size}; compiles again"
      )

  def _settle(
    self, step: int, metrics, labels_BPL, clock: Clock, *, last: bool = False
  ) -> None:
    """Waits for a step; logs it, and stops a run that diverges."""
    metrics = jax.device_get(metrics)
    tokens = int(metrics["batch_tokens"])
    clock.tick(step, tokens)
    self.skipped = int(metrics["skipped"])
    if self.skipped:
      self._tell_skipped(step)
    if self._first_step_at is None:
      self._first_step_at = step
      seconds = time.monotonic() - clock.started
      self.progress.tell(f"step {step} done {seconds:.1f} s after the start")
    if step % self.values.train.log_every and not last:
      return
    labels = labels_BPL[:, 0]
    n_bytes = processes.total(self.tokenizer.token_bytes(labels[labels >= 0]))
    nats = float(metrics["loss/main"]) * tokens
    metrics["bits_per_byte"] = nats / math.log(2) / max(n_bytes, 1)
    metrics["tokens"] = self._sequences(step) * self.values.data.seq_len
    metrics |= self._speed(clock.tokens_per_second())
    self.max_vio = metrics.get("max_vio")
    self.log.write(step, metrics)
    self.progress.show(step, metrics, clock.left(step))

  def _tell_skipped(self, step: int) -> None:
    limit = self.values.train.max_skipped
    what = f"step {step}: loss or gradient not finite, update left out"
    self.progress.tell(f"{what} ({self.skipped} in a row, {limit} allowed)")
    if self.skipped > limit:
      self.checkpoints.wait()
      saved = self.checkpoints.steps
      left = f"the last is of step {saved[-1]}" if saved else "there is none"
      raise RunFailed(
        f"{what}, {self.skipped} in a row; train.max_skipped = {limit}. "
        f"Checkpoints in {self.checkpoints.folder}: {left}"
      )

  def _speed(self, tokens_per_second: float) -> dict[str, float]:
    """Tokens and model FLOPs a second; MFU where the peak is known."""
    flops = tokens_per_second * self._flops_per_token
    speed = {"tokens_per_second": tokens_per_second, "model_flops": flops}
    if peak := chips.peak_flops(jax.devices()[0].device_kind):
      speed["mfu"] = flops / peak / self.layout.sizes.size
    return speed

  @functools.cached_property
  def _flops_per_token(self) -> float:
    return count.flops_per_token(self.values.model, self.values.data.seq_len)

  def _tell_measured(self, tokens_per_second: float) -> None:
    """What the run came to, beside what was planned."""
    if not self.plan or not tokens_per_second:
      return
    planned = self.plan.step.tokens_chip * self.plan.n_chips
    self.progress.tell(
      f"measured: {tokens_per_second:,.0f} tokens/s, "
      f"{tokens_per_second / planned:.2f} of the plan's {planned:,.0f}"
    )

  def _heldout_score(self) -> bpb.Score | None:
    """Of what is saved at its step, or the best checkpoint would not be the best.

    A signal gets none, nor what is saved by the clock: which scores a run has must
    not depend on how fast it goes.
    """
    return self._evaluate("heldout", self.values.train.eval_batches)

  def _evaluate_at_the_end(self) -> bpb.Score | None:
    """On more text than in between; a signal is not heeded any more."""
    n_batches = self.values.train.final_eval_batches
    return self._evaluate("heldout_final", n_batches)

  def _evaluate(self, name: str, n_batches: int) -> bpb.Score | None:
    if not n_batches:
      return None
    size = self.values.schedule.batch_size
    score = bpb.score(
      self.program.graphdef,
      self.state.params,
      self.state.router,
      feed.heldout(self.heldout, size, n_batches, self.layout),
      self.tokenizer,
      self.state.precision,
      self.values.train.microbatches,
    )
    named = {f"{name}/{k}": v for k, v in score._asdict().items()}
    self.log.write(self.done, named)
    self.progress.tell(
      f"step {self.done}: held-out {score.bits_per_byte:.3f} bits/byte on "
      f"{score.bytes:,} bytes, loss {score.loss:.3f}, MaxVio {score.max_vio:.2f}"
    )
    return score

  def _save(self, score: bpb.Score | None) -> None:
    """A checkpoint, unless the last updates were left out.

    Then the weights may be on their way to divergence: the run has still to
    show that it recovers, and the checkpoints there are stay the newest.
    """
    if self.skipped or self.done in self.checkpoints.steps:
      return
    average = self.host_ema.wait() if self.host_ema else None
    self.checkpoints.save(
      self.done,
      trees_of(self.state, average),
      {
        "sequences": self._sequences(self.done),
        "seed": self.values.train.seed,
        **identity.describe(self.data),
      },
      bits_per_byte=score.bits_per_byte if score else None,
    )

  def close(self) -> None:
    self.progress.close()
    self.log.close()
    self.checkpoints.close()
    self.folder.close()
