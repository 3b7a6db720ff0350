"""Planned bytes against XLA's own account of the compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3 import config, overlay, plan
from dsv3.infer import Decoder, decoder
from dsv3.infer import cache as caches
from dsv3.nn.transformer import make_model
from dsv3.plan import count, memory, unit
from dsv3.train import optimizer, schedule, state, step

MARGIN = 0.15
# XLA's CPU backend multiplies bfloat16 as float32 there, and as it is in 0.12.
WIDENS = jax.__version__.startswith("0.10.")
SMALL = "experiments/performance/s30m.py"
NO_MTP = {"model.mtp.depth": 0}
STEPS = [  # config, sequences, diff
  *(
    pytest.param("tiny", 8, diff, marks=pytest.mark.slow)
    for diff in (
      {"model.remat": "paper", "model.dtype": "bfloat16"},
      {"model.remat": "full", "train.microbatches": 4},
      {"model.layers": "unrolled", **NO_MTP},
    )
  ),
  ("tiny", 8, {"model.ffn": "dense", "model.remat": "paper", **NO_MTP}),
  ("tiny", 4, {"model.dtype": "bfloat16", "model.moe.top_k": 2, **NO_MTP}),
  ("tiny", 2, {"model.attention.kind": "gqa", "model.ffn": "dense"}),
  (SMALL, 2, {"model.n_layers": 3}),
]


def of(name: str, diff) -> config.Config:
  return config.build(overlay.overlay(overlay.load(name), diff))


def total(analysis) -> int:
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )


def lowered(values: config.Config, n_sequences: int, devices=None):
  """The training step of a config; over `devices`, sequences dealt to them."""
  adam = optimizer.make(values.optimizer)
  graphdef, at = jax.eval_shape(lambda: state.create(values, adam))
  run = functools.partial(
    step.train_step,
    graphdef=graphdef,
    optimizer=adam,
    schedule=schedule.make(values),
    values=values,
  )
  length, depths = values.data.seq_len, 1 + values.model.mtp.depth
  shape = lambda *dims: jax.ShapeDtypeStruct((n_sequences, *dims, length), "i4")
  batch = step.Batch(shape(), shape(depths), shape())
  if devices is None:
    return jax.jit(run, donate_argnums=0).lower(at, batch)
  mesh = Mesh(np.array(devices), ("data",))
  everywhere = NamedSharding(mesh, PartitionSpec())
  dealt = NamedSharding(mesh, PartitionSpec("data"))
  jitted = jax.jit(
    run,
    donate_argnums=0,
    in_shardings=(everywhere, dealt),
    out_shardings=(everywhere, None),
  )
  return jitted.lower(at, batch)


@pytest.mark.parametrize("name, n_sequences, diff", STEPS, ids=str)
def test_training_step_takes_what_xla_says(name, n_sequences, diff):
  values = of(name, diff)
  found = total(lowered(values, n_sequences).compile().memory_analysis())
  planned = memory.training(
    values, batch=n_sequences, on_cpu=True, widens=WIDENS
  ).total
  assert planned == pytest.approx(found, rel=MARGIN)


def test_activations_are_dealt_over_data():
  """Of a dense model; XLA alone does not deal the sorting of experts' rows."""
  values = of("tiny", {"model.ffn": "dense", **NO_MTP})
  program = lowered(values, 8, jax.devices()[:4]).compile()
  parts = memory.training(
    values, mesh=plan.Mesh(data=4), batch=8, on_cpu=True
  ).parts
  planned = sum(
    parts[k] for k in ("gradients", "activations", "working", "logits")
  )
  found = program.memory_analysis().temp_size_in_bytes
  assert planned == pytest.approx(found, rel=MARGIN)


@functools.cache
def decoder_of(dtype: str) -> Decoder:
  model = of("tiny", {"model.dtype": dtype}).model
  return Decoder(jax.jit(lambda: make_model(model, jax.random.key(0)))())


@pytest.mark.parametrize(
  "dtype, chunk", [("float32", 1), ("bfloat16", 1), ("bfloat16", 256)]
)
def test_decoder_takes_what_xla_says(dtype, chunk):
  """A step of decoding, and of prefill by 256 tokens at a time."""
  one, n_sequences, capacity = decoder_of(dtype), 4, 8192
  if chunk == 1:
    past = caches.empty(one.model, n_sequences, capacity)
    tokens_B = jnp.zeros(n_sequences, jnp.int32)
    step = one.compiled(decoder.one_step, "cache")
    program = step.lower(one.weights, past, tokens_B)
  else:
    past = one._empty(n_sequences, capacity, 0)
    rows_BL = np.zeros((n_sequences, chunk + 1), np.int32)
    length_B = np.full(n_sequences, chunk, np.int32)
    read = one.compiled(decoder.read_chunk, "past")
    program = read.lower(one.weights, past, rows_BL, length_B, 0)
  # Of bfloat16 a CPU keeps experts and head (infer/cpu.py): most weights. Planned is
  # with the kernels of a C++ compiler (infer/few_rows.py).
  precision = {"float32": "float32", "bfloat16": "bf16"}[dtype]
  alone = unit.Unit(1, precision=precision, cache=dtype)
  planned = unit.memory(
    one.model,
    alone,
    sequences=n_sequences,
    context=capacity,
    chunk=chunk,
    drafts=False,
    on_cpu=True,
  )
  found = total(program.compile().memory_analysis())
  assert planned.total == pytest.approx(found, rel=MARGIN)


V3 = of("v3_671b", {})


def test_state_of_v3_is_eight_bytes_a_parameter():
  """float32 master weights and two bfloat16 moments (Sec. 3.3.3)."""
  parts = memory.training(V3, batch=1).parts
  n = 671_026_419_200 + 11_610_068_224 - 59 * 256  # router biases aside
  assert parts["weights"] + parts["optimizer"] == pytest.approx(8 * n, rel=1e-6)
  assert parts["gradients"] == pytest.approx(4 * n, rel=1e-6)


def test_sec323_policy_of_the_report_keeps_latents_outputs_and_swiglu_inputs():
  """bfloat16 of a token in a MoE layer of V3, and its log-sum-exps."""
  stream = 2 * 7168
  wide = 9 * 2 * 2048
  wanted = 2 * (stream + 1536 + 512 + 64 + 128 * 128 + wide) + 4 * 128
  assert memory.kept(V3.model, "moe", "paper", "bfloat16") == wanted
  assert memory.kept(V3.model, "moe", "full", "bfloat16") == 2 * 7168


@pytest.mark.parametrize("axis", ["expert", "tensor", "stage", "fsdp"])
def test_more_devices_hold_less_each(axis):
  kwargs = {"batch": 64, "microbatches": 8}
  schedule_ = lambda n: "1f1b" if axis == "stage" and n > 1 else "none"
  totals = [
    memory.training(
      V3, mesh=plan.Mesh(**{axis: n}), schedule=schedule_(n), **kwargs
    ).total
    for n in (2, 4, 8)
  ]
  assert totals[0] > totals[1] > totals[2]


def test_cache_of_decoding_is_the_published_one():
  one = unit.Unit(1, precision="bf16")
  parts = unit.memory(V3.model, one, sequences=3, context=4096).parts
  # The module that drafts has a latent of its own.
  assert parts["cache"] == pytest.approx(3 * 4096 * 70_272 * 62 / 61)
  by_head = 61 * 128 * 512 * (128 + 128)
  n = count.by_formula(V3.model)
  assert parts["weights"] == 2 * (n.main + by_head)
  assert parts["MTP module"] == pytest.approx(2 * n.mtp, rel=2e-4)


def test_a_unit_holds_every_part_once_but_what_all_share():
  """16 chips with no expert twice, against one: what is sharded, what is not."""
  kwargs = {"sequences": 4, "context": 4096}
  one, many = (
    unit.memory(V3.model, unit.Unit(n, overlap=False), **kwargs).parts
    for n in (1, 16)
  )
  s = count.sizes(V3.model)
  experts = 58 * 256 * s.expert
  assert one["weights"] - many["weights"] == experts * 15 / 16
  assert "exchange" not in one
  rows = 4 * 256  # every token at every expert of the chip's, from 16 chips
  assert many["exchange"] == rows * 7168 * (1 + 4 / 128 + 2)
  assert one["cache"] == many["cache"]


def test_what_fits_in_a_chip_is_what_its_parts_leave():
  one = unit.Unit(144, redundant=32)
  n = unit.fitting(V3.model, one, 8192, 80e9)
  held = lambda n: unit.memory(V3.model, one, sequences=n, context=8192).total
  assert held(n) == pytest.approx(0.95 * 80e9)
  assert unit.fitting(V3.model, unit.Unit(1), 8192, 80e9) == 0
