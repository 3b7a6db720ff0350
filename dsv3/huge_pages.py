"""Huge pages for XLA's buffers on a CPU: a training step 1.2 to 1.5 times as fast.

XLA asks for its temporary memory anew at every step, and Linux hands it out in
pages of 4 KiB, each at the price of a fault. glibc can ask for pages of 2 MiB,
but only a process that starts with the wish in its environment.
"""

import os
import pathlib
import sys

_LINUX = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_WISH = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
  """Starts this process again with huge pages, where that can help.

  That is on Linux with transparent huge pages on request. It happens before
  anything heavy is imported, and once: a GLIBC_TUNABLES of the user's own, even
  an empty one, stays as it is.
  """
  if "GLIBC_TUNABLES" in os.environ or not sys.platform.startswith("linux"):
    return
  try:
    on_request = "[madvise]" in _LINUX.read_text()
  except OSError:
    return
  if on_request:
    os.environ["GLIBC_TUNABLES"] = _WISH
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
