"""The products of few rows: sums, groups, and a machine without a compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.infer import few_rows


def has_compiler() -> bool:
  try:
    return bool(few_rows._compiler())
  except OSError:
    return False


needs_compiler = pytest.mark.skipif(
  not has_compiler(), reason="no C++ compiler here"
)
WEIGHTS = "float32", "uint16"


@pytest.fixture(autouse=True, scope="module")
def registered():
  few_rows.available()


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def kept(w, dtype):
  """A weight as the kernel reads it, and what it is."""
  if dtype == "float32":
    return w, np.asarray(w, np.float64)
  w = w.astype(jnp.bfloat16)
  return jax.lax.bitcast_convert_type(w, jnp.uint16), np.asarray(w, np.float64)


@needs_compiler
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize(
  "load, n_in, n_out",
  [
    ((3, 0, 4, 1), 24, 64),
    ((0, 0, 9, 0), 7, 83),  # a vector and single columns
    ((0, 2, 0), 1, 5),
    ((8,), 16, 1100),  # columns in blocks
    ((0, 0), 8, 16),
  ],
)
def test_every_row_meets_the_matrix_of_its_group(load, n_in, n_out, dtype):
  n_rows = sum(load) + 2
  x_AI = normal(n_rows, n_in)
  w_EIO, exact_EIO = kept(normal(len(load), n_in, n_out, seed=1), dtype)
  upto_E = jnp.cumsum(jnp.asarray(load, jnp.int32))
  found = np.asarray(jax.jit(few_rows.grouped)(x_AI, w_EIO, upto_E))
  group_A = np.repeat(np.arange(len(load)), load)
  x = np.asarray(x_AI, np.float64)
  for row, group in enumerate(group_A):
    wanted = x[row] @ exact_EIO[group]
    np.testing.assert_allclose(found[row], wanted, rtol=1e-5, atol=1e-5)
  assert not found[sum(load) :].any()


@needs_compiler
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize(
  "n_groups, n_rows, n_others, n_in",
  [(2, 8, 64, 32), (3, 5, 7, 19), (1, 1, 1, 1), (1, 4, 1030, 16)],
)
def test_every_row_of_a_group_meets_every_other(
  n_groups, n_rows, n_others, n_in, dtype
):
  x_GRI = normal(n_groups, n_rows, n_in)
  y_GMI, exact = kept(normal(n_groups, n_others, n_in, seed=1), dtype)
  found = jax.jit(few_rows.scores)(x_GRI, y_GMI)
  wanted = np.einsum("gri,gmi->grm", np.asarray(x_GRI, np.float64), exact)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_with_a_compiler_there_are_kernels():
  assert few_rows.available()


@needs_compiler
def test_it_returns_when_all_threads_have_written():
  """Of many calls, each on memory that held something else."""
  x_AI, w_EIO = normal(3, 512), normal(1, 512, 6144, seed=1)
  wanted = np.asarray(x_AI) @ np.asarray(w_EIO[0])
  product = jax.jit(few_rows.grouped)
  for _ in range(20):
    found = np.asarray(product(x_AI, w_EIO, jnp.array([3])))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    del found


@needs_compiler
def test_a_row_has_the_same_bits_alone_and_among_others():
  x_AI, w_EIO = normal(7, 40), normal(1, 40, 150, seed=1)
  together = few_rows.grouped(x_AI, w_EIO, jnp.array([7]))
  for row in range(7):
    alone = few_rows.grouped(x_AI[row : row + 1], w_EIO, jnp.array([1]))
    np.testing.assert_array_equal(alone[0], together[row])


@pytest.fixture
def nothing_compiled(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return tmp_path / "dsv3"


@needs_compiler
def test_it_is_compiled_once(nothing_compiled, monkeypatch):
  library = few_rows._compiled()
  assert list(nothing_compiled.iterdir()) == [library]
  monkeypatch.setattr(few_rows, "_compiler", lambda: pytest.fail("again"))
  assert few_rows._compiled() == library
  monkeypatch.setattr(few_rows, "_processor", lambda: "another")
  with pytest.raises(pytest.fail.Exception, match="again"):
    few_rows._compiled()


def test_without_a_home_xla_multiplies(monkeypatch, caplog):
  def no_home():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(few_rows, "_cache", no_home)
  assert not few_rows.available.__wrapped__()
  assert "home directory" in caplog.text


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_that_works_xla_multiplies(
  nothing_compiled, monkeypatch, caplog, compiler
):
  monkeypatch.setenv("CXX", compiler)
  if compiler != "false":
    monkeypatch.setenv("PATH", "")
  assert not few_rows.available.__wrapped__()
  assert "without kernels of our own" in caplog.text
  assert not list(nothing_compiled.iterdir())  # nothing half-made
