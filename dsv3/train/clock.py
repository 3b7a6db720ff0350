"""How fast a run goes, and how long it still has."""

import contextlib
import time


class Clock:
  """Speed of training, without pauses; what is left of steps or minutes."""

  def __init__(self, started: float, limit: float, steps: int):
    self.started, self._deadline, self._steps = started, started + limit, steps
    self._marks: list[tuple[float, int, int]] = []  # time, step, tokens
    self._pause = 0.0
    self._saved = started

  def _now(self) -> float:
    return time.monotonic() - self._pause

  def is_over(self) -> bool:
    return time.monotonic() >= self._deadline

  def has_saved(self) -> None:
    """The newest checkpoint is of now."""
    self._saved = time.monotonic()

  def unsaved_minutes(self) -> float:
    return (time.monotonic() - self._saved) / 60

  def tick(self, step: int, tokens: int) -> None:
    """Step `step` with `tokens` is done; the last 50 steps give the speed."""
    total = self._marks[-1][2] + tokens if self._marks else 0
    self._marks = [*self._marks[-50:], (self._now(), step, total)]

  def _rates(self) -> tuple[float, float]:
    """Tokens and steps a second, without the first step, which compiles."""
    if len(self._marks) < 2:
      return 0.0, 0.0
    (t0, step0, tokens0), (t1, step1, tokens1) = self._marks[0], self._marks[-1]
    seconds = max(t1 - t0, 1e-9)
    return (tokens1 - tokens0) / seconds, (step1 - step0) / seconds

  def tokens_per_second(self) -> float:
    return self._rates()[0]

  def left(self, step: int) -> float:
    """Seconds to the last step or to the limit, whichever comes first."""
    rate = self._rates()[1]
    by_steps = (self._steps - step) / rate if rate else 0.0
    return min(by_steps, self._deadline - time.monotonic())

  @contextlib.contextmanager
  def paused(self):
    """Time spent in here is not training."""
    start = time.monotonic()
    yield
    self._pause += time.monotonic() - start
