"""One process, eight CPU devices, cheap compilation: set before JAX starts.

The XLA flags trade speed of the compiled code for speed of compiling it: a
training step of the micro model compiles in about a second. A test of speed or
of the last bits of a float runs its own process without them.
"""

import importlib.metadata
import os
import pathlib

import pytest

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
_FLAGS = [
  "--xla_backend_optimization_level=0",
  "--xla_force_host_platform_device_count=8",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later ones abort on it

# Processes that tests start inherit all of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Linux lets a process map 65,530 regions, and every compiled program takes
  some: those of all tests together end it with a segmentation fault."""
  yield
  import jax

  jax.clear_caches()
