"""JAX's compilation cache on disk: the second start compiles nothing."""

import os
import pathlib

import jax


def user_cache() -> pathlib.Path:
  """The folder of dsv3 in the user's cache, by the XDG convention."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "dsv3"


def use_compilation_cache() -> None:
  """Turns the cache on, unless JAX_COMPILATION_CACHE_DIR says where or not."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  jax.config.update("jax_compilation_cache_dir", str(user_cache() / "jax"))
  # The default, one second, leaves out what adds up to seconds.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
