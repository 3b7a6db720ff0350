"""Experts on other devices give what experts here give, and so go the gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3.config import Mesh
from dsv3.ops import dispatch
from dsv3.ops.grouped import grouped_matmul
from dsv3.parallel import mesh as meshes
from dsv3.parallel.exchange import (
  Exchange,
  NodeExchange,
  distinct,
  kernel_of,
)
from dsv3.train import metrics
from tests import micro

T, D, K, E = 64, 8, 3, 16  # tokens, over all devices
AT = ("node", "expert")


def ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):  # fmt: skip
  """XLA's, which its CPU backend has not, from its documentation."""
  here = lax.axis_index(axis_name)
  rows = jnp.arange(len(operand))
  gathered = [
    lax.all_gather(x, axis_name)
    for x in (operand, input_offsets, send_sizes, output_offsets)
  ]
  received = 0
  for x_AD, begin_P, size_P, place_P in zip(*gathered):
    begin, size, place = begin_P[here], size_P[here], place_P[here]
    mine = (rows >= begin) & (rows < begin + size)
    target = jnp.where(mine, place + rows - begin, len(output))
    output = output.at[target].set(x_AD, mode="drop")
    received += size
  # A wrong size of what is received would be undefined there; here it shows.
  return jnp.where(received == recv_sizes.sum(), output, jnp.nan)


EXCHANGES = {
  "8 devices": Exchange("expert", 8, "blocks"),
  "8 devices, ragged": Exchange("expert", 8, "ragged"),
  "2 nodes of 4": NodeExchange(
    "node", 2, Exchange("expert", 4, "blocks"), "blocks"
  ),
  "2 nodes of 4, ragged": NodeExchange(
    "node", 2, Exchange("expert", 4, "ragged"), "ragged"
  ),
  "8 devices in rounds": Exchange("expert", 8, "blocks", 0.5, AT),
  "8 devices, ragged in rounds": Exchange("expert", 8, "ragged", 1.0, AT),
  "2 nodes of 4 in rounds": NodeExchange(
    "node", 2, Exchange("expert", 4, "blocks", 0.7, AT), "blocks"
  ),
  "8 nodes of 1": NodeExchange("node", 8, dispatch.through_experts, "blocks"),
}


def mesh_of(exchange) -> Mesh:
  nodes = exchange.size if isinstance(exchange, NodeExchange) else 1
  return Mesh(expert=8, expert_nodes=nodes)


def draw(kind: str):
  """Experts of every token, [T, K]; E is none."""
  rng = np.random.default_rng(0)
  if kind == "all to one device":
    return np.tile(np.array([[14, 15, E]]), (T, 1))
  if kind == "none":
    return np.full((T, K), E)
  experts_TK = np.stack([rng.choice(E, K, replace=False) for _ in range(T)])
  experts_TK[5:9] = E  # padding
  experts_TK[10, 1] = E
  return experts_TK


def inputs(kind: str):
  rng = np.random.default_rng(1)
  x_TD = rng.normal(size=(T, D)).astype(np.float32)
  gate_TK = rng.uniform(size=(T, K)).astype(np.float32)
  w_EDD = rng.normal(size=(E, D, D)).astype(np.float32)
  return x_TD, gate_TK, w_EDD, draw(kind).astype(np.int32)


def through(exchange, x_TD, gate_TK, w_EDD, experts_TK):
  def run(w_EDD, x_AD, gate_A, load_E):
    y_AD = grouped_matmul(x_AD, w_EDD, load_E, kernel="dense")
    return jnp.sin(y_AD) * gate_A[:, None]

  run = jax.tree_util.Partial(run, w_EDD)
  return exchange(run, x_TD, experts_TK, gate_TK, E)


def outcome(exchange, arguments):
  """Outputs, loads, what was moved, and the gradients of a sum of squares."""
  where = meshes.make(mesh_of(exchange))
  along = P(AT)

  def on_device(*arguments):
    y_TD, load_E, moved = through(exchange, *arguments)
    total = functools.partial(lax.psum, axis_name=AT)
    return y_TD, total(load_E), jax.tree.map(total, moved)

  spread = jax.shard_map(
    on_device,
    mesh=where,
    in_specs=(along, along, along, along),
    out_specs=(along, P(), P()),
    check_vma=False,
  )
  return differentiated(spread, arguments)


def differentiated(function, arguments):
  *arrays, experts_TK = arguments

  @jax.jit
  def both(arrays):
    def objective(arrays):
      y_TD, *rest = function(*arrays, experts_TK)
      return jnp.sum(y_TD**2), (y_TD, *rest)

    return jax.value_and_grad(objective, has_aux=True)(arrays)

  (_, found), grads = both(tuple(arrays))
  return found, grads


@functools.cache
def alone(kind):
  function = functools.partial(through, dispatch.through_experts)
  return differentiated(function, inputs(kind))


CASES = [
  *((name, "random") for name in EXCHANGES),
  *((name, "all to one device") for name in EXCHANGES),
  *((name, "none") for name in ("8 devices", "2 nodes of 4 in rounds")),
]


@pytest.mark.parametrize("name, kind", CASES)
def test_sec322_experts_elsewhere_are_experts_here(name, kind, monkeypatch):
  monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
  (y_TD, load_E, moved), grads = outcome(EXCHANGES[name], inputs(kind))
  (wanted_TD, wanted_E, _), wanted_grads = alone(kind)
  np.testing.assert_array_equal(load_E, wanted_E)
  assert load_E.dtype == jnp.int32
  np.testing.assert_allclose(y_TD, wanted_TD, rtol=1e-5, atol=1e-5)
  assert not np.any(y_TD) == (kind == "none")
  for found, wanted in zip(grads, wanted_grads):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  assert [int(n) for n in moved[:3]] == counted(EXCHANGES[name], draw(kind))
  # Of 16 rows that each device has for one, there is room for half of 24 / 8.
  late = {"8 devices in rounds": 14, "8 devices, ragged in rounds": 13}
  if kind == "all to one device" and not name.startswith("2 nodes"):
    assert int(moved.late) == 8 * late.get(name, 0)


def counted(exchange, experts_TK) -> list[int]:
  """Rows between nodes, inside them, and saved: one by one."""
  nodes = mesh_of(exchange).expert_nodes
  each, between, inside, saved = 8 // nodes, 0, 0, 0
  for token, experts in enumerate(experts_TK):
    node, device = divmod(token // (T // 8), each)
    there = {(e // (E // nodes), e) for e in experts if e < E}
    others = {n for n, _ in there if n != node}
    between += len(others)
    saved += sum(n != node for n, _ in there) - len(others)
    inside += sum(e // 2 % each != device for _, e in there)
  return [between, inside, saved]


def test_a_token_goes_to_a_node_once():
  node_TM = distinct(jnp.array([[3, 1, 3], [4, 4, 4], [2, 2, 2]]), 4)
  assert node_TM.tolist() == [[1, 3, 4], [4, 4, 4], [2, 4, 4]]


@pytest.mark.parametrize(
  "platform, is_ragged", [("cuda", True), ("tpu", True), ("cpu", False)]
)
def test_ragged_is_what_gpus_and_tpus_get(platform, is_ragged):
  """By what is lowered for a platform that is not here, and without a branch."""
  exchange = Exchange("expert", 8, kernel_of(platform))
  traced = jax.jit(functools.partial(spread, exchange)).trace(*inputs("random"))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("ragged_all_to_all" in text) == is_ragged
  assert "stablehlo.case" not in text and "stablehlo.if" not in text


def spread(exchange, *arguments):
  along = P(AT)
  return jax.shard_map(
    lambda *a: through(exchange, *a)[0],
    mesh=meshes.make(mesh_of(exchange)),
    in_specs=(along,) * 4,
    out_specs=along,
    check_vma=False,
  )(*arguments)


@pytest.mark.parametrize("remat, ways", [("none", 4), ("paper", 5)])
def test_metrics_have_the_bytes_of_rows_and_what_nodes_saved(remat, ways):
  """x there, y back, and both gradients, in the model's type; x once more."""
  diff = {"model.dtype": "bfloat16", "model.remat": remat}
  model = micro.config_of(diff).model
  rows = [jnp.array([n, 1], jnp.int32) for n in (5, 7, 11, 3)]
  found = metrics.of_exchange(dispatch.Moved(*rows), model)
  gb = ways * 2 * model.dim / 1e9
  wanted = {"between_nodes": 6, "inside_nodes": 8, "saved": 12, "late": 4}
  assert found.keys() == {f"exchange_gb/{name}" for name in wanted}
  for name, n in wanted.items():
    assert float(found[f"exchange_gb/{name}"]) == pytest.approx(n * gb)
