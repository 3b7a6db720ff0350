"""Decoding with a cache is the forward pass: every position, every token."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3.config import ConfigError
from dsv3.infer import Decoder, Sampling, cache, few_rows, generate, stream
from dsv3.infer.decoder import _as_used, one_step, read_chunk
from dsv3.infer.network import Network
from dsv3.infer.sampling import choose, filtered
from dsv3.nn import transformer
from tests import micro
from tests.infer import reference

GREEDY = Sampling(temperature=0.0)
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.15, "float8_e4m3fn": 0.5}
YARN = {
  "model.rope.yarn_factor": 4.0,
  "model.rope.original_len": 16,
  "model.rope.theta": 100.0,
}
VARIANTS = {
  "float32": {},
  "no query rank": {"model.attention.q_rank": 0},
  "yarn": YARN,
  "unrolled": {"model.layers": "unrolled"},
  "dense": {"model.ffn": "dense"},
  "softmax": {"model.moe.gate": "softmax", "model.moe.balancing": "none"},
  "bfloat16": {"model.dtype": "bfloat16"},
  "by XLA": {},
  "bfloat16 by XLA": {"model.dtype": "bfloat16"},
}


def make(diff, std=0.3):
  """A model with weights large enough that tokens differ."""
  values = micro.config_of({"model.init_std": std, **diff}).model
  build = lambda key: transformer.make_model(values, key)
  return jax.jit(build)(jax.random.key(0))


@pytest.fixture(scope="module")
def model():
  return make({})


def prompts_of(*lengths):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, n).tolist() for n in lengths]


def full_logits(model, tokens):
  """Logits of a plain forward pass over one sequence, [L, W]."""
  run = jax.jit(lambda m, t: m.logits(m(t).hidden[0]))
  return np.asarray(run(model, jnp.asarray(tokens)[None])[0])


SLOW = (  # half a minute each
  "no query rank",
  "unrolled",
  "dense",
  "softmax",
  "bfloat16 by XLA",
)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in VARIANTS
  ],
)
def test_every_position_equals_the_full_forward_pass(name, monkeypatch):
  """Prefill of 1 to 70 tokens in chunks of 64, then absorbed steps to the end."""
  if "by XLA" in name:
    monkeypatch.setattr(few_rows, "available", lambda: False)
  made = make(VARIANTS[name])
  (tokens,) = prompts_of(80)
  wanted_LW = full_logits(made, tokens)
  scale = np.abs(wanted_LW).max()
  decoder = Decoder(made)
  limit = TOLERANCE[made.model.dtype] * scale
  for n in (1, 63, 65, 70):
    logits_BW, past = decoder.prefill([tokens[:n]], 80 - n, chunk=64)
    assert np.abs(logits_BW[0] - wanted_LW[n - 1]).max() < limit, n
  for i in range(70, 80):
    logits_BW, past = decoder.step(jnp.array(tokens[i : i + 1]), past)
    assert np.abs(logits_BW[0] - wanted_LW[i]).max() < limit, i
  assert past.length_B.tolist() == [80]


@pytest.mark.parametrize("drafts", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_several_sequences_in_bfloat16_are_near_those_alone(drafts):
  """A CPU lacks some products of bfloat16, by the number of sequences."""
  decoder = Decoder(make({"model.dtype": "bfloat16"}))
  prompts = prompts_of(3, 9, 70, 5)
  found = generate(
    decoder, prompts, max_tokens=5, sampling=GREEDY, drafts=drafts
  )
  for prompt, together in zip(prompts, found):
    (alone,) = generate(decoder, [prompt], max_tokens=1, sampling=GREEDY)
    np.testing.assert_allclose(
      together.log_probs[0], alone.log_probs[0], atol=0.2
    )


def test_weights_are_cast_once_but_for_norms_and_routers():
  made = make({"model.dtype": "bfloat16"})
  kept_twice = nnx.state(Network(made))
  weights = _as_used(kept_twice, "bfloat16")
  kinds = {
    jax.tree_util.keystr(path): x.dtype
    for path, x in jax.tree_util.tree_leaves_with_path(weights)
  }
  kept = {name for name, kind in kinds.items() if kind == jnp.float32}
  assert kept == {n for n in kinds if "norm" in n or "router" in n}
  # The same numbers as with a cast in every product.
  graphdef = nnx.graphdef(Network(made))
  past = Decoder(made).read([prompts_of(9)[0]], 4)
  past = past._replace(hidden_BD=past.hidden_BD.astype(jnp.bfloat16))
  token = jnp.array([7])
  a, b = (
    one_step(w, past.cache, token, graphdef=graphdef)[0]
    for w in (weights, kept_twice)
  )
  np.testing.assert_array_equal(a, b)


def test_a_cpu_keeps_experts_and_head_in_two_bytes_and_all_else_in_four():
  decoder = Decoder(make({"model.dtype": "bfloat16"}))
  kinds = {
    jax.tree_util.keystr(path): x.dtype.itemsize
    for path, x in jax.tree_util.tree_leaves_with_path(decoder.weights)
  }
  short = {name for name, size in kinds.items() if size == 2}
  assert short == {n for n in kinds if "experts" in n or "'head'" in n}
  assert set(kinds.values()) == {2, 4}
  past = decoder.read([[1, 2]], 4)
  assert past.hidden_BD.dtype == jnp.float32
  assert past.cache.layers[0].values().c_kv_BMC.dtype == jnp.bfloat16


def test_a_step_multiplies_by_the_kernels_where_they_are(model):
  """Every product of a step but the routers'."""
  decoder = Decoder(model)
  past = decoder.read([[1, 2, 3]], 4)
  step = decoder.compiled(one_step)
  text = step.lower(decoder.weights, past.cache, jnp.array([1])).as_text()
  n_layers = model.model.n_layers
  assert ("dsv3_scores" in text) == few_rows.available()
  if few_rows.available():
    assert text.count("dsv3_scores_float32") == 2 * n_layers
    assert text.count("dsv3_grouped_float32") >= 9 * n_layers
    n_routers = model.model.n_moe_layers
    assert text.count("stablehlo.dot_general") == n_routers


@pytest.mark.parametrize("n, wanted", [(1, 64), (65, 128), (513, 640)])
def test_capacities_are_few(n, wanted):
  assert cache.round_up(n) == wanted
  sizes = {cache.round_up(i) for i in range(1, 4097)}
  assert len(sizes) < 25 and all(i <= cache.round_up(i) for i in range(1, 4097))


def test_a_model_of_an_fp8_recipe_decodes_in_high_precision(model):
  low = make({"model.precision.recipe": "deepseek_v3"})
  tokens = prompts_of(12)
  found, wanted = (Decoder(m).prefill(tokens, 4)[0] for m in (low, model))
  np.testing.assert_array_equal(found, wanted)
  assert not np.array_equal(full_logits(low, tokens[0]), wanted)


def test_a_cache_in_fp8_is_near_the_forward_pass(model):
  (tokens,) = prompts_of(40)
  wanted_LW = full_logits(model, tokens)
  decoder = Decoder(model, cache_dtype="float8_e4m3fn")
  logits_BW, past = decoder.prefill([tokens[:30]], 10)
  assert past.layers[0].values().c_kv_BMC.dtype == jnp.float8_e4m3fn
  for i in range(30, 40):
    logits_BW, past = decoder.step(jnp.array(tokens[i : i + 1]), past)
    error = np.abs(logits_BW[0] - wanted_LW[i]).max()
    assert 0 < error < TOLERANCE["float8_e4m3fn"] * np.abs(wanted_LW).max()


def test_prompts_of_unequal_length_do_not_see_each_other(model):
  prompts = prompts_of(3, 70, 64, 1)
  together = generate(model, prompts, max_tokens=12, sampling=GREEDY, chunk=64)
  for prompt, found in zip(prompts, together):
    (alone,) = generate(model, [prompt], max_tokens=12, sampling=GREEDY)
    assert alone.tokens == found.tokens
    np.testing.assert_allclose(alone.log_probs, found.log_probs, atol=1e-4)


def test_greedy_decoding_is_argmax_of_forward_token_for_token(model):
  (prompt,) = prompts_of(5)
  (found,) = generate(model, [prompt], max_tokens=20, sampling=GREEDY)
  tokens = prompt + found.tokens
  log_p_LW = jax.nn.log_softmax(full_logits(model, tokens))
  for i, (token, log_p) in enumerate(zip(found.tokens, found.log_probs)):
    row = log_p_LW[len(prompt) - 1 + i]
    assert token == int(row.argmax())
    assert log_p == pytest.approx(float(row[token]), abs=1e-4)
  slow = reference.generate(model, prompt, 20, length=32, temperature=0.0)
  assert found.tokens == list(slow)


def test_the_absorbed_form_makes_no_key_or_value_of_the_past(model):
  """Of all arrays of the step, none has the past's length and the heads' width."""
  decoder, a = Decoder(model), model.model.attention
  past = decoder.read([[1, 2, 3]], 197)
  one = jnp.array([1])

  def sizes(run, past, *args):
    made = jax.make_jaxpr(run)(decoder.weights, past, *args)
    return {
      math.prod(v.aval.shape)
      for eqn in equations(made.jaxpr)
      for v in eqn.outvars
    }

  keys = past.cache.capacity * a.n_heads * (a.nope_dim + a.rope_dim)
  chunk = jnp.ones((1, 65), jnp.int32)
  read = decoder.compiled(read_chunk, "past")
  assert keys in sizes(read, past, chunk, one, 0)
  step = decoder.compiled(one_step, "cache")
  assert max(sizes(step, past.cache, one)) < keys


def equations(jaxpr):
  """All equations of a program, those of its inner programs too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def test_cache_holds_the_latent_and_the_rotated_key_alone():
  values = micro.config_of().model
  for dtype, size in (("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1)):
    made = cache.empty(values, 2, 64, dtype)
    held = sum(x.nbytes for x in jax.tree.leaves(made.layers))
    a = values.attention
    wanted = (a.kv_rank + a.rope_dim) * values.n_layers * size
    assert cache.bytes_per_token(values, dtype) == wanted == held / (2 * 64)


def test_a_stop_token_ends_its_sequence_and_not_the_others(model):
  prompts = prompts_of(4, 6)
  free = generate(model, prompts, max_tokens=10, sampling=GREEDY)
  stop = free[0].tokens[3]
  found = generate(model, prompts, max_tokens=10, sampling=GREEDY, stop=[stop])
  n = free[0].tokens.index(stop)
  assert found[0].tokens == free[0].tokens[:n] and found[0].stopped
  if stop not in free[1].tokens:
    assert found[1] == free[1] and not found[1].stopped
  steps = list(
    stream(model, prompts, max_tokens=10, sampling=GREEDY, stop=[stop])
  )
  assert steps[n].tokens[0] == [stop]
  assert all(step.tokens[0] == [] for step in steps[n + 1 :])


def test_a_seed_and_a_place_give_one_text(model):
  draw = lambda prompts, seed: generate(
    model, prompts, max_tokens=12, seed=seed
  )
  prompts = prompts_of(4, 4)
  assert draw(prompts, 1) == draw(prompts, 1)
  assert draw(prompts, 1) != draw(prompts, 2)
  alone, first = draw(prompts[:1], 1)[0], draw(prompts, 1)[0]
  assert alone.tokens == first.tokens
  same = draw([prompts[0], prompts[0]], 1)
  assert same[0].tokens != same[1].tokens


def draws(p_W, n=8000, **kwargs):
  keys = jax.random.split(jax.random.key(0), n)
  one = lambda key: choose(jnp.log(p_W), key, Sampling(**kwargs))[0]
  return np.bincount(jax.jit(jax.vmap(one))(keys), minlength=4) / n


@pytest.mark.parametrize(
  "kwargs, wanted",
  [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ({"temperature": 0.0}, [0, 1, 0, 0]),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_k": 1}, [0, 1, 0, 0]),
    ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.0}, [0, 1, 0, 0]),
    ({"min_p": 0.45}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({"min_p": 0.5, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
  ],
)
def test_tokens_are_drawn_as_often_as_they_should(kwargs, wanted):
  found = draws(jnp.array([0.1, 0.4, 0.2, 0.3]), **kwargs)
  np.testing.assert_allclose(found, wanted, atol=0.02)
  assert (found[np.array(wanted) == 0] == 0).all()


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 300])
def test_filters_keep_what_a_sort_keeps(top_p, top_k):
  logits_W = 4 * np.random.default_rng(0).normal(size=257).astype(np.float32)
  logits_W[5] = logits_W[9]  # as likely as another
  kept_W = np.isfinite(filtered(logits_W, Sampling(0.7, top_k, top_p)))
  p_W = np.asarray(jax.nn.softmax(logits_W / np.float32(0.7)), np.float64)
  before_W = np.array([p_W[p_W > p].sum() for p in p_W])
  fewer_W = np.array([(p_W > p).sum() for p in p_W])
  wanted_W = (before_W < top_p) & (fewer_W < (top_k or 257))
  wanted_W[p_W.argmax()] = True
  # Within rounding of the sum, a token may go either way.
  clear_W = np.abs(before_W - top_p) > 1e-6
  assert (kept_W == wanted_W)[clear_W].all()
  assert kept_W[5] == kept_W[9]


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(min_p=0.05),
    Sampling(min_p=1e-6),
    Sampling(top_k=264),
    Sampling(top_k=1000, top_p=0.99999),
    Sampling(1e-4, top_k=3),
  ],
)
def test_filters_that_leave_out_little_leave_a_distribution(sampling):
  logits_BW = 3 * jax.random.normal(jax.random.key(0), (256, 264))
  log_p_BW = jax.vmap(filtered, (0, None))(logits_BW, sampling)
  assert not np.isnan(log_p_BW).any()
  np.testing.assert_allclose(np.exp(log_p_BW).sum(-1), 1, atol=1e-5)
  p_BW = jax.nn.softmax(logits_BW / sampling.temperature)
  n_kept_B = np.isfinite(log_p_BW).sum(-1)
  if sampling.min_p:
    least_B1 = sampling.min_p * p_BW.max(-1, keepdims=True)
    assert (n_kept_B == (p_BW >= least_B1).sum(-1)).all()
  if sampling.top_k == 264:
    assert (n_kept_B == 264).all()


def test_greedy_takes_the_first_of_equal_logits():
  token, _ = choose(jnp.array([0.0, 2.0, 2.0, 1.0]), jax.random.key(0), GREEDY)
  assert int(token) == 1


@pytest.mark.parametrize(
  "kwargs, wanted",
  [
    ({"sampling": Sampling(top_p=1.5)}, "top_p: found 1.5"),
    ({"sampling": Sampling(temperature=-1)}, "temperature: found -1"),
    ({"sampling": Sampling(temperature=1e-39)}, "temperature: found 1e-39"),
    ({"prompts": [[1], [264]]}, "found token 264, wanted 0 to 263"),
    ({"prompts": [[-1]]}, "found token -1"),
    ({"max_tokens": 0}, "max_tokens: found 0"),
    ({"prompts": [[1], []]}, "prompts: found an empty one"),
  ],
)
def test_what_cannot_be_is_named(kwargs, wanted, model):
  arguments = {"prompts": [[1]], "max_tokens": 3} | kwargs
  with pytest.raises(ConfigError, match=wanted):
    generate(model, **arguments)


def test_attention_without_a_latent_and_unknown_caches_are_refused(model):
  with pytest.raises(ConfigError, match="wanted mla"):
    Decoder(make({"model.attention.kind": "gqa"}))
  with pytest.raises(ConfigError, match="found int4"):
    Decoder(model, cache_dtype="int4")
