"""Parameters and FLOPs of the published models, exactly."""

import dataclasses
import functools

import jax
import pytest

from dsv3 import config, overlay
from dsv3.plan import chips, count
from dsv3.train import optimizer, schedule, state, step

V2 = {
  "model.vocab_size": 102_400,
  "model.dim": 5120,
  "model.n_layers": 60,
  "model.n_dense_layers": 1,
  "model.dense_hidden": 12_288,
  "model.moe.n_routed": 160,
  "model.moe.n_shared": 2,
  "model.moe.top_k": 6,
  "model.moe.hidden": 1536,
  "model.moe.top_groups": 3,
  "model.moe.gate": "softmax",
  "model.moe.group_score": "max",
  "model.moe.normalize": False,
  "model.moe.balancing": "sequence",
  "model.mtp.depth": 0,
}
V2_LITE = {"model.mtp.depth": 0, "model.moe.balancing": "sequence"}


@functools.cache
def model(name) -> config.Model:
  diffs = {"v2": ("v3_671b", V2), "v2_lite": ("v3_16b", V2_LITE)}
  base, diff = diffs.get(name, (name, {}))
  return config.build(overlay.overlay(overlay.load(base), diff)).model


@functools.cache
def parameters(name) -> count.Parameters:
  return count.parameters(model(name))


@pytest.mark.parametrize(
  "name, main, active, active_head, active_body",
  [
    (
      "v3_671b",
      671_026_419_200,
      37_552_297_472,
      36_625_618_432,
      35_698_939_392,
    ),
    ("v2", 235_741_434_880, 21_375_800_320, 20_851_512_320, None),
    ("v2_lite", 15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808),
    # Facts without router biases: 57 layers of 160.
    ("v3_230b", 228_748_416_000 + 9120, None, 20_987_499_520 + 9120, None),
  ],
)
def test_totals_of_the_published_models(
  name, main, active, active_head, active_body
):
  found = parameters(name)
  wanted = (main, active, active_head, active_body)
  for mine, theirs in zip((found.main, *found[2:5]), wanted):
    assert theirs in (None, mine)


VARIANTS = [
  {},
  {"model.ffn": "dense"},
  {"model.mtp.depth": 2},
  {"model.attention.q_rank": 0, "model.moe.n_shared": 0},
  {"model.attention.kind": "gqa", "model.attention.n_kv_heads": 2},
  {"model.attention.kind": "mha", "model.moe.balancing": "sequence"},
]


@pytest.mark.parametrize("diff", VARIANTS, ids=str)
def test_formula_counts_what_the_built_model_holds(diff):
  values = config.build(overlay.overlay(overlay.load("tiny"), diff))
  assert count.by_formula(values.model) == count.parameters(values.model)


@pytest.mark.parametrize("name", ["v3_671b", "v3_230b", "v2_lite"])
def test_formula_counts_the_published_models(name):
  assert count.by_formula(model(name)) == parameters(name)


def test_mtp_module_of_v3_has_its_own_11_6b():
  found = parameters("v3_671b")
  assert found.mtp == 11_610_068_224
  shared = 2 * 926_679_040  # embedding and head, which it has of the main model
  assert found.mtp + shared == 13_463_426_304
  assert found.main + found.mtp + shared == 684_489_845_504


def test_parts_of_v3_add_up():
  found = parameters("v3_671b")
  assert sum(found.by_part.values()) == found.main + found.mtp
  assert found.by_part["mtp"] == found.mtp
  assert found.by_part["attention"] == 61 * 187_107_328
  assert found.by_part["experts"] == 58 * 256 * 44_040_192
  assert found.by_part["shared"] == 58 * 44_040_192
  assert found.by_part["router"] == 58 * (256 * 7168 + 256)


@pytest.mark.parametrize("name, wanted", [("v3_671b", 250.45), ("v2", 155.30)])
def test_training_gflops_of_a_token_at_4096(name, wanted):
  found = count.flops_per_token(model(name), 4096, mtp=False)
  assert found / 1e9 == pytest.approx(wanted, abs=0.005)


def test_mtp_adds_ten_gflops():
  both = [
    count.flops_per_token(model("v3_671b"), 4096, mtp=m) for m in (True, False)
  ]
  assert (both[0] - both[1]) / 1e9 == pytest.approx(10.2, abs=0.1)


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA B200", 2250e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("cpu", None),
  ],
)
def test_peak_of_a_chip(kind, peak):
  assert chips.peak_flops(kind) == peak


def test_full_matrix_of_attention_without_mtp_is_281_gflops():
  found = count.flops_per_token(model("v3_671b"), 4096, mtp=False, causal=False)
  assert found / 1e9 == pytest.approx(281.15, abs=0.01)


def test_sec323_recomputation_makes_up_projections_again():
  plain, again = (
    count.flops_per_token(model("v3_671b"), 4096, recompute=r)
    for r in (False, True)
  )
  up = 1536 * 128 * 192 + 512 * 128 * 256  # W_UQ with W_QR, W_UK with W_UV
  assert again - plain == 2 * up * 62
  full = dataclasses.replace(model("v3_671b"), remat="full")
  more = count.flops_per_token(full, 4096, recompute=True) - plain
  head = 2 * 2 * 926_679_040 + 2 * 59 * 256 * 7168 + 2 * 2 * 7168**2
  assert more == pytest.approx(plain / 3 - head)


def test_cache_of_a_token_as_published():
  """arXiv 2505.09343, Table 1: DeepSeek-V3, Qwen2.5-72B, LLaMA-3.1 405B."""
  v3 = model("v3_671b")
  assert count.cache_bytes_per_token(v3)["mla"] == 70_272
  for layers, wanted in ((80, 327_680), (126, 516_096)):
    attention = dataclasses.replace(
      v3.attention,
      kind="gqa",
      n_kv_heads=8,
      nope_dim=64,
      rope_dim=64,
      v_dim=128,
    )
    other = dataclasses.replace(v3, n_layers=layers, attention=attention)
    assert count.cache_bytes_per_token(other)["gqa"] == wanted


@pytest.mark.parametrize(
  "ffn, remat", [("dense", "none"), ("dense", "full"), ("moe", "none")]
)
def test_flops_are_those_xla_counts_in_the_real_step(ffn, remat):
  """Within 5%: the rest is element-wise. All loops of one turn: XLA counts one."""
  diff = {
    "model.ffn": ffn,
    "model.remat": remat,
    "model.layers": "unrolled",
    "model.attention.kernel": "naive",  # the full matrix
    "model.moe.kernel": "dense",  # every row by every expert
    "data.seq_len": 128,  # one chunk of the cross-entropy
  }
  values = config.build(overlay.overlay(overlay.load("tiny"), diff))
  adam = optimizer.make(values.optimizer)
  graphdef, at = jax.eval_shape(lambda: state.create(values, adam))
  run = functools.partial(
    step.train_step,
    graphdef=graphdef,
    optimizer=adam,
    schedule=schedule.make(values),
    values=values,
  )
  shape = lambda *dims: jax.ShapeDtypeStruct((4, *dims, 128), "int32")
  batch = step.Batch(shape(), shape(2), shape())
  found = jax.jit(run).lower(at, batch).cost_analysis()["flops"]
  m, tokens = values.model, 4 * 128
  planned = count.flops_per_token(m, 128, causal=False, recompute=True)
  forward = count.forward_flops(m, 128)
  planned += 3 * forward.experts * (m.moe.n_routed - 1)
  element_wise = 40 * count.by_formula(m).main / tokens  # the optimizer
  assert found / tokens == pytest.approx(planned + element_wise, rel=0.05)
