"""The `dsv3` command as a process: `python -m dsv3`."""

import sys

from dsv3.huge_pages import restart_with_huge_pages


def main() -> int:
  """Runs the command line of this process; returns its exit code."""
  restart_with_huge_pages()
  from dsv3 import cli  # now: what is imported before, a restart reads twice

  return cli.main()


if __name__ == "__main__":
  sys.exit(main())
