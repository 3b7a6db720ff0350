"""The oracle against Hugging Face, published numbers, and hand arithmetic."""

import json
import math
import pathlib

import numpy as np
import pytest

from tests.oracle import adamw, balance, model, moe, mtp, rope, schedule

FILES = sorted(pathlib.Path(__file__).parent.glob("hf_*.npz"))
V3_ROPE = {
  "theta": 10000.0,
  "yarn_factor": 40.0,
  "original_len": 4096,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "mscale": 1.0,
}


def read(path):
  """Config, parameters as the oracle takes them, and the arrays of a file."""
  data = np.load(path)
  params = {}
  for key in data.files:
    if key.startswith("param/"):
      *groups, name = key.removeprefix("param/").split("/")
      group = params
      for part in groups:
        group = group.setdefault(part, {})
      group[name] = data[key]
  for name in {"layers", "mtp"} & params.keys():
    params[name] = [params[name][str(i)] for i in range(len(params[name]))]
  return json.loads(str(data["config"])), model.as_float64(params), data


def total_loss(config, params, data):
  return model.loss(params, data["rows"], config, 0.3, 0.0)["total"]


def test_goldens_are_there():
  assert len(FILES) == 5


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_logits_losses_and_loads_are_hugging_faces(path):
  config, params, data = read(path)
  logits, _, load_XE = model.forward(params, data["rows"], config)
  terms = model.loss(params, data["rows"], config, 0.3, 0.0)
  for k, logits_k in enumerate(logits):
    wanted = data[f"logits/{k}"]
    assert np.linalg.norm(logits_k - wanted) < 2e-6 * np.linalg.norm(wanted)
  losses = [terms["main"], *terms["mtp_depths"]]
  np.testing.assert_allclose(losses, data["losses"], rtol=1e-6)
  np.testing.assert_array_equal(load_XE, data["load"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_slopes_along_hugging_faces_gradients(path):
  """The oracle's slope along a gradient is the gradient's norm."""
  config, params, data = read(path)
  for key in (k for k in data.files if k.startswith("grad/")):
    grad = data[key].astype(np.float64)
    weight = params
    for part in key.split("/")[1:]:
      weight = weight[int(part) if part.isdigit() else part]
    kept = weight.copy()
    direction = grad / np.linalg.norm(grad)
    weight[...] = kept + 1e-5 * direction
    up = total_loss(config, params, data)
    weight[...] = kept - 1e-5 * direction
    down = total_loss(config, params, data)
    weight[...] = kept
    slope = (up - down) / 2e-5
    assert slope == pytest.approx(np.linalg.norm(grad), rel=1e-4), key


def test_yarn_frequencies_and_scale_of_v3():
  plain = rope.frequencies(64, {**V3_ROPE, "yarn_factor": 1.0})
  slowed = rope.frequencies(64, V3_ROPE)
  at = [0, 10, 11, 12, 16, 20, 22, 23, 31]
  ratio = [1, 1, 0.925, 0.85, 0.55, 0.25, 0.1, 0.025, 0.025]
  np.testing.assert_allclose((slowed / plain)[at], ratio, rtol=1e-12)
  assert slowed[31] == pytest.approx(3.33380358e-6, rel=1e-8)
  assert rope.yarn_range(64, V3_ROPE) == (10, 23)
  assert rope.softmax_scale(192, V3_ROPE) == pytest.approx(0.1352337789)


def test_rotation_keeps_the_distance_alone():
  rng = np.random.default_rng(0)
  q_R, k_R = rng.normal(size=(2, 8))
  turns = rope.frequencies(8, V3_ROPE)

  def score(i, j):
    return rope.rotate(q_R, i, turns) @ rope.rotate(k_R, j, turns)

  assert score(9, 5) == pytest.approx(score(4, 0))
  assert score(9, 5) != pytest.approx(score(9, 6))


def test_eq16_bias_moves_choice_not_weight():
  s_E = np.array([0.9, 0.8, 0.3, 0.2])
  gate_E = moe.eq16_gate(s_E, np.array([0, -1, 0, 0.5]), top_k=2)
  np.testing.assert_array_equal(gate_E, [0.9, 0, 0, 0.2])
  np.testing.assert_array_equal(moe.eq14_gate(s_E, 2), [0.9, 0.8, 0, 0])
  assert sum(moe.eq13_normalize(gate_E, 2.5)) == pytest.approx(2.5)


def test_node_limit_takes_the_best_pair_not_the_best_expert():
  s_E = np.array([0.9, 0.1, 0.6, 0.5, 0.2, 0.3])
  limited_E = moe.limit_to_nodes(s_E, n_groups=3, top_groups=1)
  np.testing.assert_array_equal(
    limited_E, [-np.inf, -np.inf, 0.6, 0.5, -np.inf, -np.inf]
  )


def test_eq17_of_two_tokens_by_hand():
  s_TE = np.array([[0.8, 0.2, 0.0, 0.0], [0.6, 0.0, 0.2, 0.2]])
  # f = 4/(1*2) * [2, 0, 0, 0]; P = [(0.8 + 0.6) / 2, ...]
  assert balance.eq17_loss(s_TE, 1, 0.1) == pytest.approx(0.1 * 4 * 0.7)


def test_eq17_is_alpha_at_perfect_balance():
  assert balance.eq17_loss(np.eye(4) + 0.1, 1, 0.1) == pytest.approx(0.1)


def test_algorithm1_lowers_the_overloaded():
  bias_E = balance.algorithm1_bias(np.zeros(3), np.array([5, 3, 1]), 0.001)
  np.testing.assert_array_equal(bias_E, [-0.001, 0, 0.001])


def test_mtp_labels_stop_at_documents_padding_and_the_row():
  row, segments = [10, 11, 12, 13, 14, 15], [1, 1, 1, 2, 2, 0]

  def labels(depth):
    return [mtp.label(row, segments, i, depth) for i in range(5)]

  assert labels(0) == [11, 12, None, 14, None]
  assert labels(1) == [12, None, None, None, None]
  assert mtp.module_segments(segments, 1) == [1, 1, 0, 2]


def test_eq24_divides_by_the_count_of_the_main_model():
  rows = np.array([[0, 1, 2, 3, 4]])
  uniform = [np.zeros((1, 4 - depth, 5)) for depth in range(3)]
  sums = [
    mtp.loss_sum(rows, np.ones_like(rows), logits, depth)
    for depth, logits in enumerate(uniform)
  ]
  assert [count for _, count in sums] == [4, 3, 2]
  depths = [mtp.eq24_loss(total, 4) for total, _ in sums[1:]]
  assert depths == pytest.approx([3 / 4 * math.log(5), 2 / 4 * math.log(5)])
  assert mtp.eq25_loss(depths, 0.3) == pytest.approx(0.1875 * math.log(5))


def test_eq21_hidden_state_comes_first():
  weights = {
    "hnorm": np.ones(2),
    "enorm": np.ones(2),
    "proj": np.array([[1.0, 0], [0, 1], [0, 0], [0, 0]]),
  }
  h_D, embedding_D = np.array([3.0, -3.0]), np.array([1.0, 1.0])
  joined = mtp.eq21_join(weights, h_D, embedding_D, 0.0)
  np.testing.assert_allclose(joined, [1, -1])


def test_learning_rate_at_the_points_of_section_4_2():
  points = {
    9.99e12: 2.2e-4,
    11.075e12: 1.91004e-4,
    12.15e12: 1.21e-4,
    13.225e12: 5.0996e-5,
    14.31e12: 2.2e-5,
    14.632e12: 2.2e-5,
    14.634e12: 7.3e-6,
  }
  for tokens, wanted in points.items():
    found = schedule.learning_rate(10**5, tokens)
    assert found == pytest.approx(wanted, rel=2e-5)
  assert schedule.learning_rate(1000, 0) == pytest.approx(1.1e-4)
  assert schedule.batch_size(0, 8) == 3072
  assert schedule.batch_size(468.9e9, 8) == 13824
  assert schedule.batch_size(470e9, 8) == 15360
  assert [schedule.mtp_weight(t) for t in (9.9e12, 10e12)] == [0.3, 0.1]
  assert [schedule.bias_speed(t) for t in (14.2e12, 14.3e12)] == [0.001, 0]


def test_adamw_first_step_by_hand():
  params = {"w": np.array([1.0, -2.0]), "norm": np.array([1.0])}
  grads = adamw.clip({"w": np.array([3.0, 0.0]), "norm": np.array([4.0])}, 1.0)
  np.testing.assert_allclose(grads["w"], [0.6, 0])
  zeros = {name: 0 * value for name, value in params.items()}
  after, m, v = adamw.adamw(
    params, grads, zeros, zeros, step=1, lr=0.1, decayed={"w"}
  )
  # The first step is lr x sign(grad), and lr x 0.1 x w of decay.
  np.testing.assert_allclose(after["w"], [1 - 0.1 - 0.01, -2 + 0.02])
  np.testing.assert_allclose(after["norm"], [0.9])
  np.testing.assert_allclose(m["w"], [0.06, 0])
  np.testing.assert_allclose(v["w"], [0.05 * 0.36, 0])


def test_packed_documents_are_as_if_alone():
  """Segments cut attention, MTP, labels and loads; padding is nowhere."""
  config, params, data = read(FILES[0])
  assert config["mtp"]["depth"] == 2
  row = data["rows"][0]
  documents = [row[:11], row[11:21]]
  alone = [model.forward(params, [d], config) for d in documents]
  segments = np.array([[1] * 11 + [2] * 10 + [0] * 4])
  logits, _, load_XE = model.forward(params, [row], config, segments)
  for k in range(3):
    first, second = (a[0][k][0] for a in alone)
    np.testing.assert_allclose(logits[k][0, : 10 - k], first, rtol=1e-8)
    np.testing.assert_allclose(
      logits[k][0, 11 : 20 - k], second, rtol=1e-8, atol=1e-10
    )
  # A document of n tokens gives the main model n inputs here, n - 1 alone.
  assert load_XE.sum(axis=1).tolist() == [2 * 21, 2 * 19, 2 * 17]
  terms = model.loss(params, [row], config, 0.3, 1.0, segments)
  parts = [model.loss(params, [d], config, 0.3, 1.0) for d in documents]
  assert terms["count"] == 19
  assert terms["main"] == pytest.approx(
    sum(p["main"] * p["count"] for p in parts) / 19
  )
  for k in range(2):
    assert terms["mtp_depths"][k] == pytest.approx(
      sum(p["mtp_depths"][k] * p["count"] for p in parts) / 19
    )


def test_balance_loss_averages_rows_and_sums_layers():
  config, params, data = read(FILES[0])
  rows = data["rows"]
  both = model.loss(params, rows, config, 0.0, 1.0)["balance"]
  each = [model.loss(params, [r], config, 0.0, 1.0)["balance"] for r in rows]
  assert both == pytest.approx(sum(each) / 2)
  _, routing, _ = model.forward(params, rows[:1], config)
  by_layer = [
    balance.eq17_loss(s_TE, config["moe"]["top_k"], 1.0)
    for s_TE, _ in routing[0]
  ]
  assert len(by_layer) == 3
  assert each[0] == pytest.approx(sum(by_layer))


def test_padding_is_in_no_load_and_no_balance_loss():
  config, params, data = read(FILES[0])
  row = data["rows"][0]
  segments = np.array([[1] * 11 + [0] * 14])
  padded = model.loss(params, [row], config, 0.0, 1.0, segments)
  alone = model.loss(params, [row[:12]], config, 0.0, 1.0)  # 11 inputs
  np.testing.assert_array_equal(padded["load"], alone["load"])
  assert padded["balance"] == pytest.approx(alone["balance"])
