"""A process restarts itself once for huge pages, and never against the user."""

import os
import pathlib
import subprocess
import sys

import pytest

from dsv3 import huge_pages

SCRIPT = """
import os, sys
from dsv3 import huge_pages
huge_pages._LINUX = __import__("pathlib").Path(sys.argv[1])
print("started", flush=True)
huge_pages.restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), "jax" in sys.modules)
"""


def said(tmp_path: pathlib.Path, setting: str, **environment) -> list[str]:
  """What the script prints, under a kernel with this setting."""
  (tmp_path / "enabled").write_text(setting)
  kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(tmp_path / "enabled")],
    env=kept | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_starts_again_once_where_pages_come_on_request(tmp_path):
  lines = said(tmp_path, "always [madvise] never")
  assert lines == ["started", "started", f"{huge_pages._WISH} False"]


@pytest.mark.parametrize("setting", ["[always] madvise never", "[never]"])
def test_does_not_where_that_changes_nothing(setting, tmp_path):
  assert said(tmp_path, setting) == ["started", "None False"]


def test_a_setting_of_the_user_s_stays(tmp_path):
  lines = said(tmp_path, "[madvise]", GLIBC_TUNABLES="")
  assert lines == ["started", " False"]
