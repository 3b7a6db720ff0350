"""Ctrl-C and SIGTERM as a wish to stop, which the loop meets after its step."""

import os
import signal
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
  """While entered, `signum` is the first signal that came, or None.

  The second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread
  Python delivers no signals and this does nothing.
  """

  signum: int | None = None

  def __enter__(self) -> "Interrupts":
    self._before = {}
    if threading.current_thread() is threading.main_thread():
      self._before = {s: signal.signal(s, self._catch) for s in _SIGNALS}
    return self

  def __exit__(self, *error) -> None:
    for signum, handler in self._before.items():
      signal.signal(signum, handler)

  def _catch(self, signum: int, frame) -> None:
    if self.signum is not None and signum == signal.SIGINT:
      raise KeyboardInterrupt
    self.signum = signum
    name = signal.Signals(signum).name
    # Not print: a handler may run inside another write to the same stream.
    text = f"\n{name}: saving after this step; Ctrl-C again stops at once\n"
    os.write(2, text.encode())
