"""Compiling for devices that are not there: what is read in the program."""

import math
import time
import types

import jax
import jax.numpy as jnp
import pytest

from dsv3 import config, overlay
from dsv3.config import ConfigError, Mesh
from dsv3.errors import RunError
from dsv3.nn.transformer import make_model, split
from dsv3.parallel import table
from dsv3.parallel.placement import dims_of, is_variable
from dsv3.plan import count, hlo, lower, places
from dsv3.plan.places import Place
from tests import micro

TEXT = """HloModule jit_step

%body.1 (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %a = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %r = f32[4,8]{1,0} all-reduce(%a), to_apply=%add.1
  %g = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%a), dimensions={0}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%p, %r)
}

%branch.3 (y: f32[4,8]) -> f32[4,8] {
  %y = f32[4,8]{1,0} parameter(0)
  ROOT %c = f32[4,8]{1,0} all-reduce(%y), to_apply=%add.1
}

%branch.4 (y: f32[4,8]) -> f32[4,8] {
  ROOT %y = f32[4,8]{1,0} parameter(0)
}

ENTRY %main.2 (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = (s32[], f32[4,8]{1,0}) while(%x), condition=%c.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %i = f32[4,8]{1,0} conditional(%k, %x, %x), branch_computations={%branch.3, %branch.4}
  %all-to-all-start.1 = ((f32[4,8]), f32[4,8]) async-start(%x), calls=%async.1
  %d.1 = f32[4,4]{1,0} dot(%x, %x), metadata={op_name="jit(step)/jvp()/shared/dot_general"}
  %f.1 = f32[4,4]{1,0} bitcast(%d.1), metadata={op_name="jit(step)/jvp()/shared/dot_general"}
  %k.1 = f32[4,4]{1,0} custom-call(%x, %x), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/jvp()/shared/fp8_product/mpmd_map"}
  %k.2 = f32[4,4]{1,0} custom-call(%x), custom_call_target="other", metadata={op_name="jit(step)/jvp()/shared/sort"}
  %all-to-all-done.1 = f32[4,8]{1,0} async-done(%all-to-all-start.1)
  %d.2 = f32[4,4]{1,0} dot(%x, %x), metadata={op_name="jit(step)/jvp()/shared/dot_general"}
  %s = f32[2,8]{1,0} reduce-scatter(%x), dimensions={0}, to_apply=%add.1
  ROOT %o = f32[4,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collectives_are_counted_over_loops():
  found = {c.kind: c for c in hlo.collectives_of(TEXT) if c.sure}
  assert found.keys() == {"all-reduce", "all-gather", "reduce-scatter"}
  assert (found["all-reduce"].count, found["all-reduce"].bytes) == (5, 128)
  assert (found["all-gather"].count, found["all-gather"].bytes) == (5, 256)
  assert (found["reduce-scatter"].count, found["reduce-scatter"].bytes) == (
    1,
    64,
  )


# As XLA writes it for a TPU.
CONDITION = """
%c.1 (q: (s32[], f32[4,8])) -> pred[] {
  %end.1 = s32[]{:T(128)} constant(7)
  %q = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end.1), direction=LT
}
"""


@pytest.mark.parametrize("end, n", [("%end.1", 7), ("%carried.1", 1)])
def test_a_loop_whose_length_is_in_its_condition_alone(end, n):
  text = TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
  condition = CONDITION.replace("(%i.1, %end.1)", f"(%i.1, {end})")
  found = hlo.collectives_of(
    text.replace("\n%branch.3", condition + "\n%branch.3", 1)
  )
  assert {c.kind: c.count for c in found if c.sure} == {
    "all-reduce": n, "all-gather": n, "reduce-scatter": 1,
  }  # fmt: skip


def test_a_branch_is_not_surely_taken():
  (maybe,) = [c for c in hlo.collectives_of(TEXT) if not c.sure]
  assert (maybe.kind, maybe.count) == ("all-reduce", 1)


def test_products_while_rows_are_on_their_way():
  assert hlo.meanwhile(TEXT, "shared") == (2, 3)  # XLA's and a kernel; XLA's
  assert hlo.meanwhile(TEXT, "routed") == (0, 0)


def test_a_started_collective_has_its_operands_before_its_result():
  of = lambda shape, kind: hlo._results(shape, kind)
  one = "(bf16[2,8]{1,0:T(8,128)}, bf16[16,8]{1,0})"
  assert of(one, "all-gather-start") == ["bf16[16,8]"]
  two = "((f32[2], f32[3]), (f32[4], /*index=1*/f32[6]))"
  assert of(two, "all-gather-start") == ["f32[4]", "f32[6]"]
  rows = "((f32[8,4]{1,0}, f32[16,4]{1,0}, s64[2], s64[2]), f32[16,4]{1,0})"
  assert of(rows, "ragged-all-to-all-start") == ["f32[16,4]"]
  marked = "(f32[8]{0}, f32[8]{0}, u32[], u32[])"
  assert of(marked, "collective-permute-start") == ["f32[8]"]
  assert of("(f32[4], f32[6])", "all-reduce-start") == ["f32[4]", "f32[6]"]


# As XLA writes for a TPU what runs beside other work.
FUSED = """HloModule jit_step

%starts (p: f32[2]) -> (f32[2], f32[8]) {
  %p = f32[2]{0} parameter(0)
  %g.1 = f32[8]{0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %c.1 = (f32[2], f32[8]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: f32[2]) -> (f32[2], f32[8]) {
  %p = f32[2]{0} parameter(0)
  %g.2 = f32[8]{0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %c.2 = (f32[2], f32[8]) tuple(%p, %g.2)
}

%ends (p: f32[2]) -> f32[8] {
  %p = f32[2]{0} parameter(0)
  %g.3 = f32[8]{0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %c.3 = f32[8]{0} custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  %f.1 = (f32[2], f32[8]) fusion(%x), kind=kCustom, calls=%starts
  %f.2 = (f32[2], f32[8]) fusion(%x), kind=kCustom, calls=%beside
  ROOT %f.3 = f32[8]{0} fusion(%x), kind=kCustom, calls=%ends
}
"""


def test_a_collective_in_several_fusions_is_one():
  (one,) = hlo.collectives_of(FUSED)
  assert (one.kind, one.count, one.bytes) == ("all-gather", 1, 32)


# One name of two, a loop without a name inside, one joined of two parts without
# a name, what comes of the optimizer, and one that nothing is known of.
NAMED = """HloModule jit_step

%body.1 (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%p), to_apply=%add.1
}

%async.1 (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %r = f32[5]{0} all-to-all(%p), dimensions={0}
}

ENTRY %main (x: f32[4], y: f32[8]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %g = (f32[8], f32[16]) all-gather(%x, %y), metadata={op_name="jit(step)/(jvp(embedding)/a:jvp(dense)/b)"}
  %w = f32[4]{0} while(%x), condition=%c.1, body=%body.1, metadata={op_name="jit(step)/transpose(jvp(moe))/while"}
  %m = f32[4]{0} negate(%x), metadata={op_name="jit(step)/transpose(jvp(mtp))/neg"}
  %h = f32[8]{0} negate(%y), metadata={op_name="jit(step)/transpose(jvp(head))/neg"}
  %s = ((f32[4], f32[8]), (f32[2], f32[4])) reduce-scatter-start(%m, %h), to_apply=%add.1
  %e = (f32[2], f32[4]) reduce-scatter-done(%s)
  %e.1 = f32[4]{0} get-tuple-element(%e), index=1
  %t = f32[1]{0} reduce-scatter(%e.1), to_apply=%add.1
  %a = ((f32[4]), f32[4], u32[]) async-start(%m), calls=%async.1
  %j = f32[12]{0} concatenate(%m, %h)
  %k = f32[12]{0} all-reduce(%j), to_apply=%add.1
  %o = f32[4]{0} add(%m, %x), metadata={op_name="jit(step)/optimizer/add"}
  %u = f32[32]{0} all-gather(%o), dimensions={0}
  %i = u32[] partition-id(), metadata={op_name="jit(step)/optimizer/mul"}
  %l = f32[4]{0} fusion(%x, %i), kind=kLoop, calls=%add.1
  ROOT %v = f32[4]{0} collective-permute(%l)
}
"""


def test_where_a_collective_is():
  found = {(c.kind, c.result): c.place for c in hlo.collectives_of(NAMED)}
  back = lambda part: Place(part, backward=True)
  assert found == {
    ("all-gather", "f32[8]"): Place("embedding"),
    ("all-gather", "f32[16]"): Place("dense"),
    ("all-reduce", "f32[4]"): back("moe"),
    ("reduce-scatter", "f32[2]"): back("mtp"),
    ("reduce-scatter", "f32[4]"): back("head"),
    ("reduce-scatter", "f32[1]"): back("head"),
    ("all-to-all", "f32[5]"): back("mtp"),
    ("all-reduce", "f32[12]"): Place("gradients"),
    ("all-gather", "f32[32]"): Place("optimizer"),
    ("collective-permute", "f32[4]"): places.OTHER,
  }


@pytest.fixture(scope="module")
def lowered():
  """A step of two MoE layers and two microbatches on four devices."""
  values = micro.config_of(
    {
      "mesh.fsdp": 2,
      "mesh.expert": 2,
      "model.mtp.depth": 0,
      "data.seq_len": 40,  # 32 x 32 is also a matrix of the experts
      "train.microbatches": 2,
      "schedule.batch_size": 8,
      "schedule.batch_size_start": 8,
    }
  )
  return values, lower.lower(values, "cpu:4")


def of(found, place, kind):
  (row,) = [r for r in found.sent() if (r.place, r.kind) == (place, kind)]
  return row


def test_a_moe_layer_sends_its_rows_there_and_back(lowered):
  values, found = lowered
  m, devices = values.model, 4
  tokens = values.schedule.batch_size * values.data.seq_len // devices // 2
  rows = 2 * tokens * m.moe.top_k  # as many as may come from either of two
  for place in ("MoE layer, forward", "MoE layer, backward"):
    row = of(found, place, "all-to-all")
    assert (row.layers, row.microbatches) == (m.n_moe_layers, 2)
    assert row.number == 3 * row.runs  # a row, its gate, what comes of it
    assert row.bytes == row.runs * rows * 4 * (m.dim + 1 + m.dim)


def test_fsdp_gathers_a_layers_weights_once(lowered):
  values, found = lowered
  make = lambda: split(make_model(values.model, jax.random.key(0)))[1]
  stack, expected = jax.eval_shape(make)["moe"], 0
  for w in jax.tree.leaves(stack, is_leaf=is_variable):
    dims, shape = dims_of(w), w.get_value().shape
    mesh = Mesh(fsdp=2, expert=2)
    if "fsdp" in str(table.stored(dims, shape, mesh)):
      share = 2 if "E" in dims else 1
      expected += 4 * math.prod(shape[1:]) // share
  row = of(found, "MoE layer, forward", "all-gather")
  loads = 4 * 2 * values.model.moe.n_routed  # of either, to all
  assert row.bytes == row.runs * (expected + loads)


def test_all_that_is_sent_is_somewhere(lowered):
  values, found = lowered
  rows = found.sent()
  assert sum(r.bytes for r in rows) == sum(
    c.count * c.bytes for c in found.collectives
  )
  other = sum(r.bytes for r in rows if r.place == "other")
  batch = values.schedule.batch_size * values.data.seq_len * 4 * 4
  # The batch is dealt out to microbatches. JAX 0.12's XLA also gathers the head
  # before the loop over those, and does not name it.
  head = values.model.vocab_size * values.model.dim * 4
  assert other <= batch or 0 < other - head <= batch
  assert (
    found.as_dict()["sent"][0]["bytes_each"] == rows[0].bytes / rows[0].runs
  )


def test_a_step_on_devices_that_are_there_for_the_test(lowered):
  values, found = lowered
  assert found.mesh == Mesh(fsdp=2, expert=2)
  size = count.parameters(values.model)
  # Weights, two moments, over four; some of them whole.
  assert 2 < found.arguments / (size.main + size.mtp) < 12
  assert found.temporary > 0 and found.surprises == []
  assert found.as_dict()["bytes"]["total"] == found.total
  assert "all-to-all: " in found.text()
  assert "MoE layer, backward" in found.text()


def test_the_compiler_is_not_waited_for_longer_than_was_said():
  begin = time.monotonic()
  with pytest.raises(RunError, match=r"0.001 minutes \(--max_minutes\)"):
    lower._within(0.001, lambda: time.sleep(5))
  assert time.monotonic() - begin < 3
  assert lower._within(1, lambda: 7) == 7
  with pytest.raises(KeyError):
    lower._within(1, {}.popitem)


def test_nor_is_the_tracer(monkeypatch):
  monkeypatch.setattr(lower.program, "make", lambda *_: time.sleep(5))
  begin = time.monotonic()
  with pytest.raises(RunError, match=r"0.001 minutes \(--max_minutes\)"):
    lower.lower(micro.config_of({}), "cpu:1", minutes=0.001)
  assert time.monotonic() - begin < 3


def test_an_all_gather_of_all_experts_is_a_surprise():
  values = micro.config_of({"mesh.expert": 2})
  m = values.model
  whole = f"f32[{m.moe.n_routed},{m.dim},2,{m.moe.hidden}]"
  share = f"f32[{m.moe.n_routed // 2},{m.dim},2,{m.moe.hidden}]"
  of = lambda result: [hlo.Collective("all-gather", result, 1, 1)]
  mesh = Mesh(expert=2)
  merged = f"f32[1,{m.moe.n_routed},{m.dim},{2 * m.moe.hidden}]"
  for all_of_it in (whole, merged):  # as stored, and as products read it
    assert "all experts" in lower._gathered(of(all_of_it), values, mesh)[0]
  assert lower._gathered(of(share), values, mesh) == []
  assert lower._gathered(of(whole), values, Mesh(fsdp=2)) == []


@pytest.mark.parametrize(
  "dims, n",
  [
    ("256,7168,2,2048", 1),
    ("64,4,7168,2,2048", 1),  # a part of each device, side by side
    ("8,32,7168,2,2048", 1),
    ("58,256,2048,7168", 1),  # of all layers
    ("256,1792,2,2048", 1),  # a part of dim, before it is gathered over fsdp
    ("256,7168,1024", 1),  # a part of hidden
    ("4,7168,2,2048", 0),  # a device's experts, gathered over fsdp
    ("4,2048,7168", 0),
    ("7168,256", 0),  # the router
    ("129280,7168", 0),
    ("60,1,1,2,4096", 0),
  ],
)
def test_what_is_all_experts_of_671b(dims, n):
  values = config.build(overlay.load("v3_671b"))
  one = hlo.Collective("all-gather", f"bf16[{dims}]", 1, 1)
  mesh = Mesh(fsdp=4, expert=64)
  assert len(lower._gathered([one], values, mesh)) == n


def test_what_does_not_fit_is_a_surprise():
  device = types.SimpleNamespace(device_kind="NVIDIA H200")
  assert lower._too_large(146 * 10**9, device) == []
  (told,) = lower._too_large(829 * 10**9, device)
  assert "829.0 GB" in told and "151 of h200" in told
  assert lower._too_large(10**15, jax.devices("cpu")[0]) == []


@pytest.mark.parametrize("dtype, n", [("float32", 1), ("bfloat16", 0)])
def test_experts_that_multiply_in_float32_are_a_surprise(dtype, n):
  values = micro.config_of({"model.dtype": "bfloat16"})
  x, w = jnp.zeros((8, 4), dtype), jnp.zeros((2, 4, 3), dtype)

  def experts(x, w):
    with jax.named_scope("eq12"):
      return jax.jit(lambda x, w: jnp.einsum("ad,edf->aef", x, w))(x, w)

  jaxpr = jax.make_jaxpr(jax.grad(lambda *a: experts(*a).sum()))(x, w).jaxpr
  assert bool(lower._upcast(jaxpr, values)) == n
  plain = micro.config_of({"model.dtype": "float32"})
  assert lower._upcast(jaxpr, plain) == []
  elsewhere = jax.make_jaxpr(jax.grad(lambda x: (x @ w[0]).sum()))(x).jaxpr
  assert lower._upcast(elsewhere, values) == []


def test_xlas_warning_about_a_large_array_is_a_surprise():
  text = "W0 spmd: Involuntary full rematerialization of %dot.3 = f32[{},1024]"
  (told,) = lower._remade(["x", text.format(9999), text.format(8)])
  assert "f32[9999,1024]" in told


@pytest.mark.parametrize("target", ["h200", "cpu:", "v5p:4x", ":8"])
def test_what_is_no_target_is_said(target):
  with pytest.raises(ConfigError, match="wanted one such as cpu:8"):
    lower.devices(target)
