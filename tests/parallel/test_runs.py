"""A run on a mesh is the run of one device, and goes on on another mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3 import cli
from dsv3.nn.transformer import make_model
from dsv3.train import layout, loop, optimizer, run, schedule, state, step
from dsv3.train.logs import read_metrics
from tests import micro
from tests.train import steps

STEPS = 8
# Of a loss after some steps: sums in another order, and Adam on top of them.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  written = micro.write_corpus(tmp_path_factory.mktemp("corpus"))
  diff = {"train.checkpoint_every": 4, "train.final_eval_batches": 1}
  diff["schedule.time"] = "tokens"  # a run of fewer steps is the same so far
  return {**written, **diff, "train.steps": STEPS, "train.eval_batches": 0}


def values_of(corpus, mesh, n_steps=STEPS):
  diff = {f"mesh.{axis}": n for axis, n in {"data": 1, **mesh}.items()}
  return micro.config_of({**corpus, **diff, "train.steps": n_steps})


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
  """The folder of a run on one device."""
  workdir = tmp_path_factory.mktemp("runs") / "straight"
  loop.train(values_of(corpus, {}), workdir)
  return workdir


def lines(workdir):
  return [line for line in read_metrics(workdir) if "loss/main" in line]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(corpus, straight, tmp_path):
  """On 4 devices, then on 8 in another mixture, then on 1: the same losses."""
  stages = [(3, {"data": 2, "expert": 2}), (6, {"fsdp": 2, "context": 4})]
  for n_steps, mesh in [*stages, (STEPS, {})]:
    outcome = loop.train(values_of(corpus, mesh, n_steps), tmp_path)
    assert outcome.step == n_steps
  found, wanted = lines(tmp_path), lines(straight)
  assert [line["step"] for line in found] == list(range(1, STEPS + 1))
  for one, other in zip(found, wanted):
    assert one["tokens"] == other["tokens"]
    for name in ("loss", "loss/main", "loss/mtp_1", "loss/sequence"):
      assert one[name] == pytest.approx(other[name], rel=RELATIVE), name
    assert one["bits_per_byte"] == pytest.approx(
      other["bits_per_byte"], rel=RELATIVE
    )
    assert one["max_vio_X"] == other["max_vio_X"]  # of the loads
    assert one["bias_max"] == other["bias_max"]
  assert run.stored_config(tmp_path).mesh.size == 1


MESHES = [
  {"data": 4},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"expert": 4, "context": 2},
]


@functools.cache
def program_of(items):
  """The first state and the step on a mesh."""
  values = micro.config_of({**steps.BASE, "mesh.data": 1, **dict(items)})
  where, adam = layout.of_run(values), optimizer.make(values.optimizer)
  create = lambda: state.create(values, adam, where.placement)
  graphdef, like = jax.eval_shape(create)
  shardings = where.of_state(like)
  function = functools.partial(
    step.train_step,
    graphdef=graphdef,
    optimizer=adam,
    schedule=schedule.make(values),
    values=values,
    placement=where.placement,
  )
  start = jax.jit(lambda: create()[1], out_shardings=shardings)()
  program = jax.jit(
    function,
    in_shardings=(shardings, where.of_batch()),
    out_shardings=(shardings, None),
  )
  return values, start, program


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_state_after_steps_is_that_of_one_device(mesh):
  """Loads and biases to the bit, losses to 1e-5, arrays to 1e-4 of their norm.

  First weights are equal but for the last bit, in which XLA's normals depend on
  the shape that is drawn.
  """
  _, alone, step_alone = program_of(())
  items = tuple((f"mesh.{axis}", n) for axis, n in mesh.items())
  values, found, step_found = program_of(items)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(b, a, rtol=3e-7, atol=1e-9)
  for seed in range(3):
    batch = steps.random_batch(values, seed)
    alone, one = step_alone(alone, batch)
    found, other = step_found(found, batch)
    np.testing.assert_array_equal(one["load_XE"], other["load_XE"])
    for name in ("loss", "grad_norm", "param_norm"):
      assert float(other[name]) == pytest.approx(float(one[name]), rel=RELATIVE)
  for a, b in zip(jax.tree.leaves(alone.router), jax.tree.leaves(found.router)):
    np.testing.assert_array_equal(a, b)
  for part in ("params", "opt_state", "ema"):
    trees = (
      jax.tree.leaves(getattr(alone, part)),
      jax.tree.leaves(getattr(found, part)),
    )
    for a, b in zip(*trees, strict=True):
      a, b = np.asarray(a, float), np.asarray(b, float)
      assert np.linalg.norm(b - a) <= 1e-4 * np.linalg.norm(a)


@pytest.mark.slow
def test_a_run_on_a_mesh_begins_with_the_weights_of_another(
  corpus, straight, tmp_path
):
  found = {}
  for name, mesh in {"one": {}, "mesh": {"fsdp": 2, "expert": 2}}.items():
    values = values_of(corpus, mesh, 3)
    train = dataclasses.replace(values.train, start_from=str(straight))
    loop.train(dataclasses.replace(values, train=train), tmp_path / name)
    found[name] = [x["loss/main"] for x in lines(tmp_path / name)]
  assert found["mesh"] == pytest.approx(found["one"], rel=RELATIVE)
  assert found["one"][0] < lines(straight)[0]["loss/main"]


def test_moments_are_over_the_replicas_and_weights_are_not():
  """ZeRO-1 (Sec. 3.2): a fourth of both moments on each of 4 devices."""
  _, start, _ = program_of((("mesh.data", 4),))
  of = lambda tree: sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
  )
  whole = sum(x.nbytes for x in jax.tree.leaves(start.params))
  assert of(start.params) == whole
  assert of(start.opt_state) == pytest.approx(2 * whole / 4, rel=0.02)
  assert of(start.ema) == pytest.approx(whole / 4, rel=0.02)


def test_a_weight_is_sent_in_the_digits_that_multiply_it():
  """A Linear's in bfloat16, a router's in float32; gradients in all digits."""
  values = micro.config_of({"mesh.fsdp": 2, "model.dtype": "bfloat16"})
  where = layout.of_run(values)
  gather = where.placement.gather
  model = make_model(values.model, jax.random.key(0), where.placement)
  layer = jax.tree.map(lambda a: a[0], model.moe.ffn)
  sent = jax.jit(lambda layer: gather(layer, jnp.bfloat16))(layer)
  rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  for of in (lambda f: f.experts.w_down, lambda f: f.shared.w_gate_up):
    found, w = of(sent)[...], of(layer)[...]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, rounded(w))
    assert np.any(found != w)
  centroid = layer.router.centroid[...]
  np.testing.assert_array_equal(sent.router.centroid[...], centroid)
  for one in (model.embed, layer.shared.w_down):
    factor = jax.random.normal(jax.random.key(1), one[...].shape)
    assert np.any(rounded(factor) != factor)

    def loss(w, one=one, factor=factor):
      return jnp.sum(gather(one.replace(w), jnp.bfloat16)[...] * factor)

    program = jax.jit(jax.value_and_grad(loss))
    total, gradient = program(one[...])
    np.testing.assert_array_equal(gradient, factor)
    wanted = jnp.sum(rounded(one[...]) * factor)
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)


def test_print_sharding_shows_every_array(tmp_path, capsys):
  file = micro.write_config(tmp_path / "c.py", {})
  words = f"train --config={file} --print_sharding --config.mesh.expert=2"
  assert cli.main([*words.split(), "--config.mesh.fsdp=2"]) == 0
  out = capsys.readouterr().out
  row = next(
    line for line in out.splitlines() if "params/moe/ffn/experts/w_down" in line
  )
  shape, dtype, spec, n_bytes = re.split(r"\s{2,}", row)[1:]
  assert (shape, dtype) == ("2x4x16x32", "float32")
  assert spec == "-,expert,-,fsdp"
  assert n_bytes == f"{2 * 4 * 16 * 32 * 4 // 4:,}"
  assert out.splitlines()[-1].endswith("bytes on each of 4: fsdp=2,expert=2")


def test_the_planner_shows_the_arrays_of_devices_that_are_not_there(
  tmp_path, capsys
):
  """As the run does where they are."""
  file = micro.write_config(tmp_path / "c.py", {})
  axes = "expert=2,fsdp=2"
  words = f"plan --config={file} --print_sharding --mesh={axes}"
  assert cli.main(words.split()) == 0
  planned = capsys.readouterr().out
  over = [f"--config.mesh.{axis}" for axis in axes.split(",")]
  words = f"train --config={file} --print_sharding --config.mesh.data=1"
  assert cli.main([*words.split(), *over]) == 0
  assert capsys.readouterr().out == planned

  words = "plan --config=v3_671b --print_sharding"
  on_pod = "--mesh=fsdp=4,expert=64,expert_nodes=8"
  assert cli.main([*words.split(), on_pod]) == 0
  rows = capsys.readouterr().out.splitlines()
  row = next(r for r in rows if r.startswith("params/moe/ffn/experts/w_down"))
  shape, _, spec, n_bytes = re.split(r"\s{2,}", row)[1:]
  assert (shape, spec) == ("58x256x2048x7168", "-,node+expert,-,fsdp")
  assert n_bytes == f"{58 * 256 * 2048 * 7168 * 4 // 256:,}"
  assert rows[-1].startswith("38,524,380,176 bytes on each of 256")

  words += " --mesh=data=-1,expert=64 --chips=100"
  assert cli.main(words.split()) == 2
  assert "no divisor of 100" in capsys.readouterr().err
