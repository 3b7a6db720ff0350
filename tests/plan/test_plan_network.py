"""Bytes and seconds of the expert exchange, and of serving, from the papers."""

import dataclasses

import numpy as np
import pytest

from dsv3 import config, overlay, plan
from dsv3.plan import chips, here, kernels, network, serve, step, unit

V3 = config.build(overlay.load("v3_671b"))
MODEL, H800 = V3.model, chips.chip("h800")
PAPER = plan.Mesh(data=2, expert=64, stage=16)


def test_sec212_group_limit_caps_the_nodes_of_a_token_at_four():
  far, near = network.reach(MODEL, PAPER, 8)
  assert far == 4 * 7 / 8  # seven of eight nodes are others
  free = dataclasses.replace(MODEL.moe, top_groups=8)
  free = dataclasses.replace(MODEL, moe=free)
  # Eight experts, drawn apart, on eight nodes: 8 (1 - (7/8)^8) of them.
  wanted = 8 * (1 - (7 / 8) ** 8) * 7 / 8
  assert network.reach(free, PAPER, 8).domains == pytest.approx(wanted)
  assert far < wanted < near


def test_exchange_of_a_token_is_dispatched_in_fp8_and_combined_in_bf16():
  """A layer, one direction: 4 nodes x 7168 x (1 + 2 bytes), less the own node."""
  far, _ = network.exchange_bytes(MODEL, PAPER, H800, "fp8")
  assert far == pytest.approx(4 * 7 / 8 * 7168 * (1 + 4 / 128 + 2))
  far, _ = network.exchange_bytes(MODEL, PAPER, H800, "bf16")
  assert far == pytest.approx(4 * 7 / 8 * 7168 * 4)
  inside, near = network.exchange_bytes(
    MODEL, PAPER, chips.chip("gb200"), "bf16"
  )
  assert inside == 0 and near > 4 * 7168


def test_exchange_is_as_slow_as_its_slowest_links():
  seconds = lambda chip: network.exchange_seconds(
    MODEL, PAPER, chip, "fp8", 4096
  )
  slower = dataclasses.replace(H800, network_rate=H800.network_rate / 2)
  assert seconds(slower) == pytest.approx(2 * seconds(H800))
  fast = dataclasses.replace(H800, network_rate=H800.network_rate * 100)
  faster = dataclasses.replace(fast, link_rate=2 * H800.link_rate)
  assert seconds(faster) == pytest.approx(seconds(fast) / 2)


def test_dualpipe_hides_the_exchange_and_others_wait():
  one = lambda schedule: step.of(
    V3, H800, step.Layout(PAPER, 15_360, 120, schedule, 1, "fp8")
  )
  waits = one("zb1p").seconds["expert exchange"]
  sent = {c.name: c.seconds for c in one("dualpipe").collectives}
  assert waits == pytest.approx(sent["expert exchange"])
  # While the pipeline fills and drains, 16 of 120 microbatches have no partner.
  alone = one("dualpipe").seconds["expert exchange"]
  assert alone == pytest.approx(waits * 16 / 120)
  # What a stage passes on is of every microbatch; all but one hide.
  assert sent["stage to stage"] == pytest.approx(
    120 * one("dualpipe").seconds["stage to stage"]
  )


def test_nodes_that_a_token_reaches_are_those_of_random_scores():
  """Group-limited top-k on uniform affinities, 20,000 tokens of V3's router."""
  rng = np.random.default_rng(0)
  score = rng.random((20_000, 8, 32))
  group = np.sort(score, axis=2)[..., -2:].sum(2)  # the two best (Sec. 2.1.2)
  best = np.argsort(group, axis=1)[:, -4:]
  masked = np.full_like(score, -1.0)
  np.put_along_axis(
    masked, best[..., None], np.take_along_axis(score, best[..., None], 1), 1
  )
  chosen = np.argsort(masked.reshape(-1, 256), axis=1)[:, -8:]
  for nodes in (4, 8, 16):
    reached = [len(set(row)) for row in chosen // (256 // nodes)]
    mesh = plan.Mesh(expert=nodes * 8)
    found = network.reach(MODEL, mesh, 8).domains * nodes / (nodes - 1)
    assert found == pytest.approx(np.mean(reached), rel=0.03)


def test_terms_add_up_and_mfu_is_tokens_times_flops_over_the_peak():
  found = step.of(
    V3, H800, step.Layout(PAPER, 15_360, 120, "dualpipe", 1, "fp8")
  )
  assert found.tokens == 15_360 * 4096
  assert found.step_seconds == pytest.approx(sum(found.seconds.values()))
  rate = 15_360 * 4096 / found.step_seconds / 2048
  assert found.tokens_chip == pytest.approx(rate)
  assert found.mfu == pytest.approx(rate * 260.642e9 / 989e12, rel=1e-5)


def test_absorbed_attention_does_242_flops_a_byte_of_cache():
  one = serve.decode(MODEL, H800, unit.Unit(144), 4096, 32)
  assert one.intensity == pytest.approx(278_528 / 1152)
  two = serve.decode(MODEL, H800, unit.Unit(144), 4096, 32, queries=2)
  assert two.intensity == pytest.approx(2 * 278_528 / 1152)


def test_bound_of_the_exchange_is_the_published_one():
  """arXiv 2505.09343, Sec. 2.3.2, where 7168 is 7K: 14.76 and 0.82 ms."""
  model = dataclasses.replace(MODEL, dim=7000)
  ib, nvl = (serve.bound_of_exchange(model, 32, r) for r in (50e9, 900e9))
  assert ib * 1e3 == pytest.approx(14.76, abs=0.005)
  assert nvl * 1e3 == pytest.approx(0.82, abs=0.005)


@pytest.mark.parametrize("batch, experts", [(1, 8), (32, 163), (128, 252)])
def test_decode_reads_the_experts_it_wakes(batch, experts):
  """On one chip, whatever memory: their bytes at the rate that HBM reaches."""
  found = serve.decode(
    MODEL, H800, unit.Unit(1, overlap=False), 16, batch, served=1, layer=0
  )
  n_bytes = experts * 58 * 44_040_192  # one byte a number
  wanted = n_bytes / (3.35e12 * kernels.MEMORY)
  assert found.seconds["experts"] == pytest.approx(wanted, rel=0.005)


def test_long_contexts_are_bound_by_the_cache_and_halve_what_fits():
  one = unit.Unit(144, redundant=32)
  a, b = (serve.decode(MODEL, H800, one, n, 3) for n in (65_536, 131_072))
  assert b.seconds["attention"] == pytest.approx(2 * a.seconds["attention"])
  assert b.fitting == pytest.approx(a.fitting / 2, rel=0.01)
  assert b.binds == "attention"
  # Heads share the latent: TP leaves its bytes on every chip.
  assert unit.cache_bytes(MODEL, unit.Unit(320, 4), 1000) == 4 * 70_272_000


def test_mtp_speed_up_is_what_acceptance_and_cost_make_of_it():
  one = unit.Unit(144, redundant=32)
  gain, cost = serve.speculation(MODEL, H800, one, 4096, 4, accepted=0.85)
  assert gain == pytest.approx(1.85 / (1 + cost)) and 0 < cost < 0.2
  assert 1.5 < gain < 1.85  # Sec. 5.4.3: 1.8 times the tokens a second
  full, _ = serve.speculation(MODEL, H800, one, 4096, 64, accepted=0.85)
  assert full < gain  # two queries a sequence cost most where compute binds


def test_sec34_units_of_the_report():
  for name, n_chips, slots in (("prefill32", 32, 9), ("decode320", 320, 1)):
    one = plan.PRESETS[name].unit
    assert one.chips == n_chips and one.tensor == 4
    assert unit.slots(MODEL, one) == slots
    found = plan.of(V3, preset=name)
    assert [row.context for row in found.serving][::5] == [4096, 131_072]
    assert all(row.decode for row in found.serving)


def test_prompts_pay_for_what_tensor_parallelism_sends_and_for_memory():
  one, four = (
    serve.prefill(MODEL, H800, unit.Unit(32, n, overlap=False), 4096)
    for n in (1, 4)
  )
  # 4 x 7168 values of two bytes a token and layer, three quarters of them sent.
  sent = 61 * 4 * 7168 * 2 * 3 / 4 / (H800.link_rate * network.REACHED)
  slower = 1 / four.tokens_chip - 1 / one.tokens_chip
  assert slower > 0.9 * sent
  (row, *_) = plan.of(V3, chip="v5e", n_chips=1).serving
  assert row.prefill is None and row.decode is None


def test_chips_without_fp8_units_train_at_one_speed():
  found = [
    plan.of(V3, chip="v5p", n_chips=2048, precision=precision)
    for precision in ("fp8", "bf16")
  ]
  fp8, bf16 = (one.step.tokens_chip for one in found)
  assert fp8 == bf16
  assert "v5p has no FP8 units" in found[0].warnings[0]


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA GH200 120GB", 989e12),
    ("NVIDIA GB200", 2500e12),
    ("TPU7x", 2307e12 / 2),  # a chip is two devices
    ("TPU v6 lite", 918e12),
    ("cpu", None),
  ],
)
def test_peak_of_a_device_is_known_by_its_kind(kind, peak):
  assert chips.peak_flops(kind) == peak
  assert chips.of_device("NVIDIA GH200 120GB") is None


def test_hbm_of_tpus_is_in_gib():
  assert chips.chip("v5p").hbm == 95 * 2**30
  half = here.of_one_device(chips.chip("tpu7x"))
  assert (half.hbm, half.devices) == (96 * 2**30, 1)
