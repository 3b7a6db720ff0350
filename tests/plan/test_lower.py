"""Compiling for devices that are not there: what is read in the program."""

import time

import jax
import jax.numpy as jnp
import pytest

from dsv3.config import ConfigError, Mesh
from dsv3.errors import RunError
from dsv3.plan import count, hlo, lower
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
  assert hlo.meanwhile(TEXT, "shared") == (1, 2)
  assert hlo.meanwhile(TEXT, "routed") == (0, 0)


@pytest.mark.slow
def test_a_step_on_devices_that_are_there_for_the_test():
  values = micro.config_of({"mesh.data": 2, "mesh.expert": 2})
  found = lower.lower(values, "cpu:4")
  assert found.mesh == Mesh(data=2, expert=2)
  size = count.parameters(values.model)
  # Experts over two, moments over both replicas: more than weights, less than all.
  assert 4 < found.arguments / (size.main + size.mtp) < 12
  assert found.temporary > 0 and found.surprises == []
  kinds = {c.kind for c in found.collectives}
  assert "all-to-all" in kinds and "all-reduce" in kinds
  assert "all-to-all: " in found.text()


def test_the_compiler_is_not_waited_for_longer_than_was_said():
  begin = time.monotonic()
  with pytest.raises(RunError, match=r"0.001 minutes \(--max_minutes\)"):
    lower._within(0.001, lambda: time.sleep(5))
  assert time.monotonic() - begin < 3
  assert lower._within(1, lambda: 7) == 7
  with pytest.raises(KeyError):
    lower._within(1, {}.popitem)


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
