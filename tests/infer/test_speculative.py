"""Drafts change how fast text comes, never which text."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import ConfigError
from dsv3.infer import (
  Decoder,
  Sampling,
  acceptance,
  generate,
  speculative,
  stream,
)
from tests.infer.test_decoder import GREEDY, YARN, make, prompts_of

# Four tokens: a draft is kept often, and rejected often.
FEW = {"model.vocab_size": 4}
VARIANTS = {
  "depth 1": {},
  "depth 2": {"model.mtp.depth": 2},
  "depth 3": {"model.mtp.depth": 3},
  "before norm": {"model.mtp.depth": 2, "model.mtp.hidden": "before_norm"},
  "yarn": YARN,
  "dense": {"model.ffn": "dense"},
  "256 tokens": {"model.vocab_size": 264},
}


SLOW = pytest.mark.slow  # as the others, of another depth


@functools.cache
def decoder_of(name):
  return Decoder(make(FEW | VARIANTS[name]))


def few_tokens(*lengths):
  return [[t % 4 for t in prompt] for prompt in prompts_of(*lengths)]


@pytest.mark.parametrize(
  "name, drafts",
  [
    ("depth 1", 1),
    ("depth 1", 4),
    ("depth 2", 1),
    ("depth 2", 2),
    # As the others, longer.
    *(
      pytest.param(name, n, marks=pytest.mark.slow)
      for name, n in (("depth 3", 4), ("before norm", 3), ("yarn", 2))
    ),
    ("dense", 2),
    ("256 tokens", 2),
  ],
)
def test_greedy_text_is_that_of_plain_decoding(name, drafts):
  prompts = few_tokens(1, 2, 7, 70)
  wanted = {"max_tokens": 33, "sampling": GREEDY, "chunk": 64}
  plain = generate(decoder_of(name), prompts, **wanted)
  found = generate(decoder_of(name), prompts, drafts=drafts, **wanted)
  for one, other in zip(plain, found):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
  if name != "256 tokens":  # with these, random weights never agree
    kept = sum((completion.accepted for completion in found), [])
    assert len(set(kept)) > 1, "all rounds kept equally many"


LENGTH = 48


@functools.partial(jax.jit, static_argnames="depth")
def trained_modules(model, text_L, depth):
  """Log-probabilities of all modules, as training runs them, [P, L, W]."""
  ahead_PL = [jnp.roll(text_L, -j - 1) for j in range(depth)]
  out = model(text_L[None], None, jnp.stack(ahead_PL)[None])
  hidden_PLD = jnp.concatenate(out.hidden[1:])
  return jax.nn.log_softmax(model.logits(hidden_PLD))


@jax.jit
def applied_again(model, text_L, n):
  """Of module 1, by itself: after n - 1 hidden states of the main model come
  those it makes. Log-probabilities of the drafts after token n - 1, [N, W]."""
  h_LD = model(text_L[None]).hidden[0][0]
  module = jax.tree.map(lambda a: a[0], model.mtp)
  e_BLD = model.embedding(jnp.roll(text_L, -1)[None])
  found = []
  for k in range(3):
    place = n - 2 + k
    inside_L = (jnp.arange(len(text_L)) <= place).astype(jnp.int32)
    x_BLD, _ = module(h_LD[None], e_BLD, inside_L[None])
    made_BLD = module.norm(x_BLD)
    h_LD = h_LD.at[place + 1].set(made_BLD[0, place])
    found.append(model.logits(made_BLD)[0, place])
  return jax.nn.log_softmax(jnp.stack(found))


@pytest.mark.parametrize(
  "name",
  ["depth 2", *(pytest.param(f"depth {n}", marks=SLOW) for n in (1, 3))],
)
def test_drafts_come_from_the_modules_as_they_were_trained(name):
  """After any number of rounds, through kept and rejected drafts."""
  model, decoder = make(FEW | VARIANTS[name]), decoder_of(name)
  depth = model.model.mtp.depth
  n_drafts = 3
  keys_B = jax.random.split(jax.random.key(0), 1)
  (prompt,) = few_tokens(5)
  past = decoder.read([prompt], LENGTH, 512, min(n_drafts, depth))
  found, state = speculative.start(decoder, past, keys_B, n_drafts, Sampling())
  text, seen = list(prompt), set()
  for i in range(1, 9):
    n_new = int(found.n_B[0])
    seen.add(n_new)
    text += found.tokens_BN[0, :n_new].tolist()
    assert int(state.cache.length_B[0]) == len(text) - 1
    all_tokens = text + state.drafts_BN[0].tolist()
    text_L = jnp.array(all_tokens + [0] * (LENGTH - len(all_tokens)))
    if depth == 1:
      wanted_NW = applied_again(model, text_L, len(text))
    else:
      wanted_NW = trained_modules(model, text_L, depth)[:, len(text) - 2]
    log_q_NW = state.log_q_BNW[0, : len(wanted_NW)]
    np.testing.assert_allclose(log_q_NW, wanted_NW, atol=2e-4)
    found, state = speculative.advance(decoder, state, keys_B, i, Sampling())
  assert len(seen) > 1, "all rounds kept equally many"


@pytest.mark.parametrize(
  "sampling",
  [
    pytest.param(Sampling(), marks=SLOW),
    Sampling(temperature=0.7, top_k=3),
  ],
)
@pytest.mark.parametrize(
  "name", ["depth 2", pytest.param("depth 1", marks=SLOW)]
)
def test_sampled_text_has_the_distribution_of_plain_sampling(name, sampling):
  """All texts of three tokens, as often as the model says; Pearson's test."""
  model, decoder = make(FEW | VARIANTS[name]), decoder_of(name)
  (prompt,) = few_tokens(6)
  texts = list(itertools.product(range(4), repeat=3))
  run = jax.jit(lambda tokens_BL: model.logits(model(tokens_BL).hidden[0]))
  logits_BLW = run(jnp.array([[*prompt, *text] for text in texts]))
  log_p_BLW = jax.vmap(jax.vmap(lambda x: speculative.filtered(x, sampling)))(
    logits_BLW[:, len(prompt) - 1 : -1]
  )
  wanted_B = np.array(
    [
      float(jnp.exp(sum(log_p_LW[i, t] for i, t in enumerate(text))))
      for text, log_p_LW in zip(texts, log_p_BLW)
    ]
  )
  assert wanted_B.sum() == pytest.approx(1, abs=1e-5)
  n = 2048
  found = generate(
    decoder, [prompt] * n, max_tokens=3, sampling=sampling, drafts=2
  )
  counts = dict.fromkeys(texts, 0)
  for completion in found:
    counts[tuple(completion.tokens)] += 1
  counts_B = np.array(list(counts.values()))
  assert not counts_B[wanted_B == 0].any()
  possible_B = wanted_B * n > 5
  expected_B = np.append(wanted_B[possible_B], wanted_B[~possible_B].sum()) * n
  observed_B = np.append(counts_B[possible_B], counts_B[~possible_B].sum())
  expected_B = np.maximum(expected_B, 1e-9)
  statistic = ((observed_B - expected_B) ** 2 / expected_B).sum()
  freedom = len(expected_B) - 1
  assert statistic < freedom + 4 * np.sqrt(2 * freedom)
  kept = sum((completion.accepted for completion in found), [])
  assert 0.1 < np.mean(np.array(kept) > 0) < 0.98


def judge_often(p_LW, q_NW, n=20_000):
  """Frequencies of (drafts kept, next token), drafts drawn from q."""
  log_p_LW, log_q_NW = jnp.log(p_LW), jnp.log(q_NW)

  def one(key):
    key, key_drafts = jax.random.split(key)
    drafts_N = jax.random.categorical(key_drafts, log_q_NW)
    kept, token = speculative.judge(log_p_LW, drafts_N, log_q_NW, key)
    return kept, jnp.where(kept > 0, drafts_N[0], token)

  return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), n))


def test_rejection_rule_keeps_the_share_that_p_and_q_have_in_common():
  p_LW = np.array([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [1 / 3] * 3])
  q_NW = np.array([[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
  kept, first = judge_often(p_LW, q_NW)
  common = np.minimum(p_LW[0], q_NW[0]).sum()
  assert (kept > 0).mean() == pytest.approx(common, abs=0.02)
  assert (kept > 1).mean() == pytest.approx(common, abs=0.02)  # q = p there
  shares = np.bincount(first, minlength=3) / len(first)
  np.testing.assert_allclose(shares, p_LW[0], atol=0.02)


@SLOW
def test_a_stop_token_within_a_round_ends_the_text_there():
  decoder = decoder_of("depth 1")
  prompts = few_tokens(4, 6)
  wanted = {"max_tokens": 30, "sampling": GREEDY}
  free = generate(decoder, prompts, **wanted)
  for stop in range(4):
    plain = generate(decoder, prompts, stop=[stop], **wanted)
    found = generate(decoder, prompts, stop=[stop], drafts=3, **wanted)
    for one, other in zip(plain, found):
      assert (one.tokens, one.stopped) == (other.tokens, other.stopped)
  assert any(0 < len(set(c.tokens)) for c in free)


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_no_more_tokens_than_were_asked_for(max_tokens):
  found = generate(
    decoder_of("depth 1"), few_tokens(4, 6), max_tokens=max_tokens, drafts=4
  )
  assert [len(c.tokens) for c in found] == [max_tokens] * 2


@pytest.mark.slow
def test_a_row_is_drawn_as_without_the_others():
  decoder = decoder_of("depth 2")
  prompts = few_tokens(4, 9, 2)
  draw = functools.partial(generate, decoder, max_tokens=12, drafts=2, seed=3)
  alone, together = draw(prompts[:1]), draw(prompts)
  assert alone[0].tokens == together[0].tokens
  assert draw(prompts) == together


def test_acceptance_counts_rounds_by_draft():
  assert acceptance([], 2) == [0.0, 0.0]
  assert acceptance([2, 2, 0, 1], 3) == [0.75, 0.5, 0.0]
  steps = list(
    stream(decoder_of("depth 1"), [[1]], max_tokens=9, drafts=2, seed=1)
  )
  assert steps[0].accepted == [None]
  kept = [step.accepted[0] for step in steps[1:]]
  assert sum(k + 1 for k in kept[:-1]) + 1 < 9 <= sum(k + 1 for k in kept) + 1


def test_drafts_without_modules_are_refused():
  with pytest.raises(ConfigError, match="the model has no MTP module"):
    generate(make({"model.mtp.depth": 0}), [[1]], max_tokens=2, drafts=1)
  with pytest.raises(ConfigError, match="drafts: found -1"):
    generate(decoder_of("depth 1"), [[1]], max_tokens=2, drafts=-1)
