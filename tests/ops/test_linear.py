"""A Linear under a recipe: its three matmuls are the oracle's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.ops import gemm, recipes
from dsv3.ops.hopper_products import HopperProducts
from dsv3.ops.linear import Weight, unread, weight_copies
from dsv3.ops.products import Products
from dsv3.ops.swiglu import swiglu
from tests.oracle import fp8_linear as oracle

NAMES = [name for name in recipes.RECIPES if name not in ("bf16", "delayed")]
MIXED = ["fprop_x=bf16", "dgrad_w=bf16", "wgrad_g=bf16"]
# Sizes that are no multiples of a tile, and one that is.
SIZES = [(300, 160, 1, 200), (40, 96, 2, 72), (256, 128, 1, 128)]


def as_oracle(recipe, role="", swiglu=False):
  """The recipe of one role as the oracle has it."""
  passes = gemm.passes_of(recipe, role, "float32", Products(), swiglu=swiglu)
  names = "fprop_x fprop_w dgrad_g dgrad_w wgrad_x wgrad_g kept".split()
  values = {name: getattr(passes, name) for name in names}
  rules = {k: v and dataclasses.astuple(v) for k, v in values.items()}
  return rules | {"sent": passes.sent}


def arrays(m, i, p, o, seed=0):
  rng = np.random.default_rng(seed)
  spread = lambda *shape: np.float32(
    rng.normal(size=shape) * 2.0 ** rng.integers(-6, 1, (*shape[:-1], 1))
  )
  return spread(m, i), spread(i, p, o), spread(m, p, o)


def close(found, wanted, factor=2e-6):
  """To the rounding of float32 sums, relative to the whole array."""
  error = np.linalg.norm(np.asarray(found, np.float64) - wanted)
  assert error <= factor * np.linalg.norm(wanted)


def run(make, x, w, dy):
  """y, and the gradients of x and w, jitted."""

  def both(x, w, dy):
    y, pull = jax.vjp(make, x, w)
    return y, *pull(dy)

  return jax.jit(both)(x, w, dy)


def named(name):
  """The recipe, and what multiplies its operands."""
  if name == "mixed":
    return recipes.recipe("deepseek_v3", MIXED), None
  if name == "hopper":  # the layouts of its kernels, with plain products
    return recipes.recipe("deepseek_v3"), HopperProducts(plain=True)
  return recipes.recipe(name), None


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "mixed", "hopper"])
def test_sec33_the_three_matmuls_are_the_oracles(name, size):
  recipe, products = named(name)
  x, w, dy = arrays(*size)
  dot = gemm.make(recipe, "float32", products=products).dot
  found = run(dot, x, w, dy)
  wanted = oracle.linear(as_oracle(recipe), x, w, dy)
  for a, b in zip(found, wanted, strict=True):
    close(a, b)


def test_sec333_input_after_attention_is_kept_in_e5m6():
  recipe = recipes.recipe("deepseek_v3")
  x, w, dy = arrays(200, 160, 1, 72)
  dot = gemm.make(recipe, "float32").dot
  found = run(lambda x, w: dot(x, w, role="attention_out"), x, w, dy)
  rules = as_oracle(recipe, "attention_out")
  assert rules["kept"] == ("e5m6", (1, 128), "power2")
  for a, b in zip(found, oracle.linear(rules, x, w, dy), strict=True):
    close(a, b)


def test_sec333_experts_have_the_gradient_that_was_sent_and_no_other():
  """Of a row whose small columns underflow on the way, Wgrad sees none either."""
  recipe = recipes.recipe("deepseek_v3")
  x, w, _ = arrays(128, 2 * 80, 1, 128)
  dy = np.full((128, 1, 128), 1e-9, np.float32)
  dy[..., 0] = 1.0
  load_E = jnp.array([128], jnp.int32)
  dot = gemm.make(recipe, "float32").grouped_swiglu_dot
  make = lambda inputs, w: dot(inputs, w, load_E, role="expert_out")
  inputs = x.reshape(128, 2, 80), np.ones(128, np.float32)
  _, _, dw = run(make, inputs, w[None, :80], dy)
  assert np.any(dw[..., 0]) and not np.any(dw[..., 1:])


def test_sec333_turning_adds_next_to_nothing_where_scales_are_powers_of_two():
  for role in ("attention_out", "expert_in"):
    rules = as_oracle(recipes.recipe("deepseek_v3"), role)
    assert rules["kept"][2] == rules["wgrad_x"][2] == "power2"
  rules = as_oracle(recipes.recipe("deepseek_v3"), "expert_out")
  assert rules["wgrad_g"] == ("e4m3", (128, 1), "power2")
  assert as_oracle(recipes.recipe("deepseek_v3"))["wgrad_x"][2] == "float32"


@pytest.mark.parametrize("name", NAMES)
def test_sec333_swiglu_keeps_its_inputs_quantised(name):
  recipe = recipes.recipe(name)
  x, w, dy = arrays(300, 160, 1, 200)
  gate_up = x.reshape(300, 2, 80)
  found = run(gemm.make(recipe, "float32").swiglu_dot, gate_up, w[:80], dy)
  rules = as_oracle(recipe, swiglu=True)
  y, dgate_up, _, dw = oracle.ffn_out(rules, gate_up, np.ones(300), w[:80], dy)
  for a, b in zip(found, (y, dgate_up, dw), strict=True):
    # A number half-way between two of FP8 may fall either way after a sigmoid.
    close(a, b, 2e-4)


LOADS = [[100, 0, 130, 30], [0, 0, 300, 0], [128, 128, 0, 44], [0, 0, 0, 0]]


def per_expert(function, load, *rows):
  """function(expert, rows of it ...) of every expert, with rows joined."""
  ends = np.cumsum(load)
  return [
    function(e, *(r[end - n : end] for r in rows))
    for e, (n, end) in enumerate(zip(load, ends))
  ]


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize(
  "name", ["deepseek_v3", "blockwise_128", "mxfp8", "hopper"]
)
def test_sec33_grouped_is_each_expert_alone(name, load):
  """Tiles along rows begin anew with each expert; rows past them are zeros."""
  recipe, products = named(name)
  x, w, dy = arrays(320, 160, 2, 72)
  w = np.stack([w * (e + 1) for e in range(4)])
  load_E, n = jnp.array(load, jnp.int32), sum(load)
  dot = gemm.make(recipe, "float32", products=products).grouped_dot
  found = run(lambda x, w: dot(x, w, load_E, role="expert_in"), x, w, dy)
  rules = as_oracle(recipe, "expert_in")
  wanted = per_expert(
    lambda e, x, dy: oracle.linear(rules, x, w[e], dy) if len(x) else None,
    load,
    x,
    dy,
  )
  y, dx, dw = (np.asarray(a) for a in found)
  assert not y[n:].any() and not dx[n:].any()
  first = 0
  for e, rows in enumerate(load):
    if not rows:
      assert not dw[e].any()
      continue
    for a, b in zip((y, dx), wanted[e]):
      close(a[first : first + rows], b)
    close(dw[e], wanted[e][2])
    first += rows


def test_sec333_grouped_swiglu_is_each_expert_alone():
  recipe, load = recipes.recipe("deepseek_v3"), [100, 0, 130, 30]
  x, w, dy = arrays(320, 160, 1, 72)
  gate_up, w = x.reshape(320, 2, 80), np.stack([w[:80]] * 4)
  gate = np.float32(np.random.default_rng(1).uniform(0.1, 1, 320))
  dot = gemm.make(recipe, "float32").grouped_swiglu_dot
  make = lambda inputs, w: dot(
    inputs, w, jnp.array(load, jnp.int32), role="expert_out"
  )
  y, (dgate_up, dgate), dw = run(make, (gate_up, gate), w, dy)
  rules = as_oracle(recipe, "expert_out", swiglu=True)
  first = 0
  for e, n in enumerate(load):
    if not n:
      continue
    mine = slice(first, first + n)
    wanted = oracle.ffn_out(rules, gate_up[mine], gate[mine], w[e], dy[mine])
    found = y[mine], dgate_up[mine], dgate[mine], dw[e]
    for a, b in zip(found, wanted, strict=True):
      close(a, b, 2e-4)
    first += n


def test_bf16_is_no_recipe():
  assert gemm.make(recipes.recipe("bf16"), "bfloat16").recipe is None


def test_copies_of_a_step_are_what_a_microbatch_would_make():
  recipe = recipes.recipe("mxfp8")  # two copies
  x, w, dy = arrays(64, 160, 1, 72)
  passes = gemm.passes_of(recipe, "", "float32", Products(), swiglu=False)
  copies = weight_copies(passes, jnp.asarray(w))
  dot = gemm.make(recipe, "float32").dot
  plain = run(dot, x, w, dy)
  found = run(lambda x, w: dot(x, Weight(w, *copies)), x, w, dy)
  for a, b in zip(found, plain):
    np.testing.assert_array_equal(a, b)
  # The weight itself is not read, and has its gradient all the same.
  alone = run(lambda x, w: dot(x, Weight(unread(w), *copies)), x, w, dy)
  for a, b in zip(alone, plain):
    np.testing.assert_array_equal(a, b)
  # And they are what is read: with other copies there is another result.
  other = [dataclasses.replace(c, scale=2 * c.scale) for c in copies]
  y, dx, _ = run(lambda x, w: dot(x, Weight(w, *other)), x, w, dy)
  np.testing.assert_array_equal(y, 2 * plain[0])
  np.testing.assert_array_equal(dx, 2 * plain[1])


@pytest.mark.parametrize("name", ["deepseek_v3", "per_tensor", "mxfp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_not_finite_is_nan_where_bf16_is_not_finite(name, bad, where):
  x, w, dy = arrays(40, 160, 1, 72)
  {"x": x, "w": w, "dy": dy}[where][3, ..., 5] = bad
  low = run(gemm.make(recipes.recipe(name), "float32").dot, x, w, dy)
  high = run(gemm.plain("float32").dot, x, w, dy)
  for a, b in zip(low, high):
    np.testing.assert_array_equal(np.isnan(a), ~np.isfinite(b))


@pytest.mark.parametrize("high", [True, False])
def test_a_linear_that_stays_high_is_the_plain_one(high):
  x, w, dy = arrays(40, 160, 1, 72)
  flag = jnp.asarray(high)
  dot = gemm.make(recipes.recipe("deepseek_v3"), "float32").dot
  found = run(lambda x, w: dot(x, Weight(w, high=flag)), x, w, dy)
  other = gemm.plain("float32").dot if high else dot
  for a, b in zip(found, run(other, x, w, dy)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_delayed_scales_are_of_earlier_steps_and_amaxes_come_out():
  recipe = recipes.recipe("delayed")
  x, w, dy = arrays(40, 160, 1, 72)
  dot = gemm.make(recipe, "float32").dot
  past, zeros = jnp.float32([8.0, 4.0, 2.0]), jnp.zeros(3)

  def both(x, w, amax):
    weight = Weight(w, past=past, amax=amax)
    return jax.vjp(
      lambda x, w, a: dot(x, dataclasses.replace(weight, master=w, amax=a)),
      x,
      w,
      amax,
    )

  y, pull = jax.jit(lambda x, w: both(x, w, zeros))(x, w)
  amax = pull(dy)[2]
  wanted = [np.abs(a).max() for a in (x, w, dy)]
  np.testing.assert_array_equal(amax, np.float32(wanted))
  scaled = lambda a, largest, top: np.clip(
    a * (1 / (np.float32(largest) * np.float32(1 / top))), -top, top
  ).astype("float32")
  q = lambda a, largest, top, dtype: (
    np.asarray(jnp.asarray(scaled(a, largest, top)).astype(dtype), np.float64)
    * (np.float32(largest) * np.float32(1 / top))
  )
  wanted = q(x, 8, 448, "float8_e4m3fn") @ q(w[:, 0], 4, 448, "float8_e4m3fn")
  close(y[:, 0], wanted)


def test_delayed_scales_are_not_those_of_swiglus_inputs():
  """What is remembered is the amax of x, which SwiGLU has made of them."""
  x, w, dy = arrays(64, 128, 1, 64)
  gate_up, w = 8 * x.reshape(64, 2, 64), w[:64]
  recipe = recipes.recipe("delayed", ["swiglu_kept=e4m3 *x*"])
  dot = gemm.make(recipe, "float32").swiglu_dot
  exact = run(gemm.plain("float32").swiglu_dot, gate_up, w, dy)

  def errors(past):
    call = lambda x, w: dot(x, Weight(w, past=past))
    found = run(call, gate_up, w, dy)
    norm = np.linalg.norm
    return np.array([norm(a - b) / norm(b) for a, b in zip(found, exact)])

  amax = jnp.abs(swiglu(jnp.asarray(gate_up))).max()
  past = jnp.stack([amax, jnp.abs(w).max(), jnp.abs(dy).max()])
  assert (errors(past) < 1.1 * errors(None) + 1e-3).all()


def test_delayed_without_a_past_takes_its_own_amax():
  x, w, dy = arrays(40, 160, 1, 72)
  dot = gemm.make(recipes.recipe("delayed"), "float32").dot
  own = run(dot, x, w, dy)
  found = run(lambda x, w: dot(x, Weight(w, past=jnp.zeros(3))), x, w, dy)
  for a, b in zip(found, own):
    np.testing.assert_array_equal(a, b)


def test_stochastic_rounding_is_of_gradients_alone_and_unbiased():
  recipe = recipes.recipe("deepseek_v3", ["rounding=stochastic"])
  x, w, dy = arrays(8, 128, 1, 8)
  dot = gemm.make(recipe, "float32").dot

  def of_seed(seed):
    return run(lambda x, w: dot(x, Weight(w, seed=seed)), x, w, dy)

  y, dx, dw = jax.vmap(of_seed)(jnp.arange(400, dtype=jnp.uint32))
  nearest = run(
    gemm.make(recipes.recipe("deepseek_v3"), "float32").dot, x, w, dy
  )
  assert (y == nearest[0]).all()
  rules = as_oracle(recipe) | {"dgrad_g": None, "wgrad_g": None}
  _, exact_dx, exact_dw = oracle.linear(rules, x, w, dy)
  for found, exact in ((dx, exact_dx), (dw, exact_dw)):
    assert found.std(0).max() > 0
    deviation = found.std(0) / 20 + 1e-6
    assert np.mean(np.abs(found.mean(0) - exact) < 4 * deviation) > 0.995
