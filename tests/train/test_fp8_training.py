"""Training under a recipe: copies, memory, reports, the guard, a new recipe."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3.config import ConfigError
from dsv3.eval import fp8_map
from dsv3.nn import precision
from dsv3.nn.transformer import make_model, split
from dsv3.ops import fp8
from dsv3.ops import losses as losses_of
from dsv3.train import loop, schedule, step, watch
from dsv3.train import run as run_folder
from dsv3.train.logs import read_metrics
from dsv3.train.restore import restore
from tests import micro
from tests.train import steps

RECIPE = "model.precision.recipe"
# One layer of each kind: programs with FP8 take long to compile.
SMALL = {"model.n_layers": 2, "model.mtp.depth": 0}
FP8 = {RECIPE: "deepseek_v3", **SMALL}


def train(prepared, n=3, start=None):
  """Metrics of n steps, and the state after them."""
  state, out = start or prepared.start, []
  for seed in range(n):
    batch = steps.random_batch(prepared.values, seed)
    state, metrics = prepared.step(state, batch)
    out.append(jax.device_get(metrics))
  return out, state


@pytest.mark.slow
def test_sec33_a_microbatch_reads_the_copies_of_the_step_alone():
  """With other masters beside the same copies the forward pass is the same, so
  no microbatch quantises a weight; Dgrad reads copies, too."""
  prepared = steps.prepared(FP8)
  values, start = prepared.values, prepared.start
  graphdef, batch = watch.graphdef_of(values), steps.random_batch(values)
  copies = precision.prepare(start.params, values.model)
  masters = set(copies)
  other = nnx.from_flat_state(
    (path, v.replace(v.get_value() * 0) if ".".join(path) in masters else v)
    for path, v in nnx.to_flat_state(start.params)
  )
  hyper = schedule.make(values)(start.step)
  count = losses_of.counts(batch.labels_BPL, batch.segments_BL)

  @jax.jit
  def of(params):
    return jax.value_and_grad(step.objective, has_aux=True)(
      params,
      {},
      start,
      copies,
      batch,
      jnp.int32(0),
      count,
      None,
      hyper,
      graphdef=graphdef,
      values=values,
    )

  (loss, _), grads = of(start.params)
  (other_loss, _), other_grads = of(other)
  assert loss == other_loss
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
    np.testing.assert_array_equal(a, b)


def test_sec331_what_is_no_linear_stays_high():
  """Embedding, head, router, norms and MTP's projection have no copy."""
  model = micro.config_of({RECIPE: "deepseek_v3"}).model
  create = lambda: split(make_model(model, jax.random.key(0)))[1]
  params = jax.eval_shape(create)
  names = set(precision.linears(params))
  others = {".".join(path) for path, _ in nnx.to_flat_state(params)} - names
  last = {name.split(".")[-1] for name in others}
  assert last == {"embed", "head", "centroid", "gain", "proj"}
  assert {name.split(".")[-1] for name in names} == {
    *("w_dq w_uq w_qr w_dkv w_kr w_uk w_uv w_o w_gate_up w_down".split())
  }


@pytest.mark.parametrize(
  "diff, more, read",
  [
    ({}, (), []),
    ({}, ("amax",), ["w_kr", "w_o"]),
    ({}, ("report",), ["w_kr", "w_o"]),
    ({"model.precision.high": ("*.w_o",)}, (), ["w_o"]),
    ({"model.precision.changes": ("dgrad_w=bf16",)}, (), ["w_kr", "w_o"]),
  ],
  ids=str,
)
def test_a_weight_is_there_for_what_reads_it(diff, more, read):
  """And nothing is in its place where the copies are all that is read."""
  start = steps.prepared({**FP8, **diff})
  params, model = start.start.params, start.values.model
  prepared = precision.prepare(params, model)
  zeros = {name: precision.zeros(params, (3,)) for name in more}
  found = precision.attach(params, model, prepared, **zeros)
  attention = found["moe"]["attention"]
  there = [
    name
    for name in ("w_kr", "w_o")
    if not jnp.isnan(attention[name].get_value().master).any()
  ]
  assert there == read


@pytest.mark.slow
def test_losses_are_near_those_of_bf16_and_not_the_same():
  low, _ = train(steps.prepared(FP8))
  high, _ = train(steps.prepared({**FP8, RECIPE: "bf16"}))
  for a, b in zip(low, high):
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=5e-3)
    assert a["loss"] != b["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "cut",
  [
    {"train.microbatches": 2},
    *(
      pytest.param(cut, marks=pytest.mark.slow)
      for cut in (
        {"model.layers": "unrolled"},
        {"model.remat": "paper"},
        {"model.moe.kernel": "dense"},
      )
    ),
  ],
  ids=str,
)
def test_cuts_change_next_to_nothing(cut):
  """Tiles along rows are of other rows in another microbatch, no more."""
  whole, _ = train(steps.prepared(FP8), 1)
  parts, _ = train(steps.prepared({**FP8, **cut}), 1)
  # A sum that rounds otherwise may turn one FP8 number, and that one choice.
  moved = np.abs(whole[0]["load_XE"] - parts[0]["load_XE"])
  assert moved.sum() <= 4
  assert float(parts[0]["loss"]) == pytest.approx(
    float(whole[0]["loss"]), rel=1e-4
  )
  assert float(parts[0]["grad_norm"]) == pytest.approx(
    float(whole[0]["grad_norm"]), rel=1e-2
  )


def test_gradients_of_a_mean_do_not_underflow():
  """Over many tokens they lie below the least scale; the step scales them."""
  values = steps.prepared(FP8).values
  scale = precision.loss_scale(values.model, jnp.int32(60_000_000))
  assert float(scale) == 2**26
  assert precision.loss_scale(micro.config_of().model, jnp.int32(5)) == 1
  tiny = fp8.quantise(jnp.full((1, 128), 1e-10), fp8.operand("e4m3 1x128"))
  assert not tiny.dequantise().any()


DELAYED = {RECIPE: "delayed", **SMALL}


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_delayed_scaling_remembers_the_largest_of_a_step(microbatches):
  prepared = steps.prepared({**DELAYED, "train.microbatches": microbatches})
  _, state = train(prepared, 2)
  history = state.precision.history["moe.attention.w_o"]
  assert history.shape == (1, 3, 16)
  assert (history[..., :2] > 0).all() and not history[..., 2:].any()
  weights = prepared.start.params["moe"]["attention"]["w_o"].get_value()
  wanted = jnp.abs(weights).max((1, 2, 3))
  np.testing.assert_allclose(history[:, 1, 1], wanted, rtol=1e-6)


@pytest.mark.slow
def test_delayed_amax_is_that_of_the_whole_batch():
  history = {}
  for n in (1, 2):
    prepared = steps.prepared({**DELAYED, "train.microbatches": n})
    _, state = train(prepared, 1)
    history[n] = state.precision.history
  for name, whole in history[1].items():
    # Added up they would be about twice as large.
    np.testing.assert_allclose(history[2][name], whole, rtol=0.2)


def test_delayed_scales_are_of_the_largest_of_the_history():
  start = steps.prepared(DELAYED)
  params, model = start.start.params, start.values.model
  memory = precision.first_memory(params, model)
  steps_16 = (
    jnp.zeros(16).at[jnp.array([0, 5, 15])].set(jnp.array([2.0, 7.0, 3.0]))
  )
  history = {k: v + steps_16 for k, v in memory.history.items()}
  found = precision.prepare(params, model, memory._replace(history=history))
  for weight in found.values():
    assert (weight.past == 7).all()
    assert weight.fprop.scale.max() == np.float32(7) * np.float32(1 / 448)


@pytest.mark.slow  # programs with FP8 to compile
def test_a_step_that_is_left_out_is_not_remembered():
  prepared = steps.prepared(DELAYED)
  _, state = train(prepared, 1)
  bad = jax.tree.map(lambda x: x * jnp.nan, state.params)
  _, after = train(prepared, 1, state.replace(params=bad))
  for name, history in state.precision.history.items():
    np.testing.assert_array_equal(after.precision.history[name], history)


@pytest.mark.slow  # programs with FP8 to compile
def test_stochastic_rounding_differs_by_step_and_repeats_by_seed():
  changes = ("rounding=stochastic",)
  prepared = steps.prepared({**FP8, "model.precision.changes": changes})
  batch = steps.random_batch(prepared.values)
  first = prepared.step(prepared.start, batch)[1]["grad_norm"]
  again = prepared.step(prepared.start, batch)[1]["grad_norm"]
  later = prepared.start.replace(step=jnp.int32(1))
  assert first == again != prepared.step(later, batch)[1]["grad_norm"]


@pytest.mark.slow  # programs with FP8 to compile
def test_patterns_keep_linears_high():
  everything = {**FP8, "model.precision.high": ("*",)}
  high, _ = train(steps.prepared(everything), 1)
  plain, _ = train(steps.prepared({**FP8, RECIPE: "bf16"}), 1)
  low, _ = train(steps.prepared(FP8), 1)
  assert float(high[0]["loss"]) == pytest.approx(float(plain[0]["loss"]), 1e-5)
  some = {**FP8, "model.precision.high": ("moe.0.*", "*.w_o")}
  mixed, _ = train(steps.prepared(some), 1)
  assert len({float(m[0]["loss"]) for m in (plain, low, mixed)}) == 3


def test_patterns_and_the_guard_both_keep_linears_high():
  guarded = {
    **FP8,
    "model.precision.high": ("*.w_o",),
    "model.precision.report_every": 1,
    "model.precision.guard": 0.5,
    "model.precision.guard_action": "keep_high",
  }
  start = steps.prepared(guarded)
  params, model = start.start.params, start.values.model
  memory = precision.first_memory(params, model)
  caught = "moe.attention.w_dkv"
  high = {**memory.high, caught: jnp.ones_like(memory.high[caught])}
  plain = steps.prepared({**guarded, RECIPE: "bf16"}).values.model
  assert precision.first_memory(params, plain).high.keys() == high.keys()
  found = precision.prepare(params, model, memory._replace(high=high))
  kept = {name for name, weight in found.items() if bool(weight.high.all())}
  assert kept == {caught, "dense.attention.w_o", "moe.attention.w_o"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  written = micro.write_corpus(tmp_path_factory.mktemp("corpus"))
  return {**written, **FP8, "train.checkpoint_every": 4}


def run(diff, workdir):
  return loop.train(micro.config_of(diff), workdir)


def losses(workdir):
  return [x["loss"] for x in read_metrics(workdir) if "loss" in x]


@pytest.mark.slow  # three programs with FP8 to compile
def test_delayed_scales_are_in_the_checkpoint(corpus, tmp_path):
  # In tokens: a schedule in shares would be another in the shorter run.
  diff = {**corpus, **DELAYED, "schedule.time": "tokens"}
  run(diff, tmp_path / "straight")
  run({**diff, "train.steps": 4}, tmp_path / "halves")
  assert run(diff, tmp_path / "halves").step == 8
  assert len(losses(tmp_path / "halves")) == 8
  assert losses(tmp_path / "halves") == losses(tmp_path / "straight")


@pytest.mark.slow  # four programs to compile
def test_a_run_goes_on_with_another_recipe_and_says_so(
  corpus, tmp_path, capsys
):
  more = {"train.checkpoint_every": 2, "train.checkpoints_kept": 5}
  corpus = {**corpus, **more}
  run({**corpus, "train.steps": 4}, tmp_path)
  capsys.readouterr()
  outcome = run({**corpus, **DELAYED}, tmp_path)
  said = capsys.readouterr()
  assert outcome.step == 8
  assert "model.precision.recipe: deepseek_v3 -> delayed" in said.err
  assert "start anew" in said.out
  run({**corpus, RECIPE: "bf16", "train.steps": 10}, tmp_path)
  assert "delayed -> bf16" in capsys.readouterr().err
  # A look back is at what the run was then.
  then = lambda step: (
    run_folder.config_at(tmp_path, step).model.precision.recipe
  )
  wanted = {3: "deepseek_v3", 4: "delayed", 7: "delayed", 8: "bf16"}
  assert {step: then(step) for step in wanted} == wanted
  assert restore(tmp_path, 2).values.model.precision.recipe == "deepseek_v3"
  assert restore(tmp_path).values.model.precision.recipe == "bf16"
  with pytest.raises(ConfigError, match="model.dim"):
    run({**corpus, "model.dim": 64}, tmp_path)


@pytest.mark.slow
def test_reports_and_a_guard_that_keeps_the_worst_high(
  corpus, tmp_path, capsys
):
  diff = {
    **corpus,
    "train.steps": 4,
    "model.precision.report_every": 2,
    "model.precision.guard": 1e-6,  # all are over it
    "model.precision.guard_action": "keep_high",
  }
  run(diff, tmp_path)
  said = capsys.readouterr().err
  assert "step 2: dense.0.attention.queries.w_dq: relative error" in said
  told = [line for line in said.splitlines() if "relative error" in line]
  assert all("high precision from here on" in line for line in told)
  assert {line.split(":")[0] for line in told} == {"step 2"}
  rows = [json.loads(x) for x in (tmp_path / "fp8.jsonl").open()]
  assert {row["step"] for row in rows} == {2, 4}
  linears = {row["linear"] for row in rows}
  assert {"dense.0.ffn.w_down", "moe.0.ffn.experts.w_gate_up"} <= linears
  assert len(rows) == 2 * 3 * len(linears)
  fprop = next(row for row in rows if row["pass"] == "fprop")
  assert 1e-3 < fprop["error"] < 0.1 and "x_underflow" in fprop
  metrics = read_metrics(tmp_path)
  assert any("fp8/error_max" in line for line in metrics)
  kept = [row for row in rows if row["step"] == 4]
  assert all(row["error"] is None for row in kept)


@pytest.mark.slow  # four programs with FP8 to compile
def test_what_a_guard_keeps_outlives_the_process_and_not_the_guard(
  corpus, tmp_path, capsys
):
  diff = {
    **corpus,
    "train.steps": 4,
    "model.precision.report_every": 2,
    "model.precision.guard": 1e-6,
    "model.precision.guard_action": "keep_high",
  }
  run(diff, tmp_path)
  capsys.readouterr()
  # None is told of a second time.
  run({**diff, "train.steps": 6}, tmp_path)
  assert "relative error" not in capsys.readouterr().err
  # Without its guard a run names those that are quantised again.
  off = {"model.precision.guard": 0.0, "train.steps": 8}
  run({**diff, **off}, tmp_path)
  said = capsys.readouterr().out
  assert "quantised again" in said and "moe.0.ffn.experts.w_down" in said
  run({**diff, **off, "train.steps": 10}, tmp_path)
  assert "quantised again" not in capsys.readouterr().out


@pytest.mark.slow  # three programs with FP8 to compile
def test_delayed_scales_stay_where_a_guard_comes_and_goes(
  corpus, tmp_path, capsys
):
  diff = {**corpus, **DELAYED, "train.steps": 4}
  run(diff, tmp_path)
  guard = {"model.precision.guard": 0.5, "model.precision.report_every": 2}
  keep = {**guard, "model.precision.guard_action": "keep_high"}
  run({**diff, **keep, "train.steps": 6}, tmp_path)
  assert "anew" not in capsys.readouterr().out


@pytest.mark.slow  # two programs with FP8 to compile
def test_a_guard_that_only_tells_tells_again(corpus, tmp_path, capsys):
  guard = {"model.precision.guard": 1e-6, "model.precision.report_every": 2}
  run({**corpus, "train.steps": 4, **guard}, tmp_path)
  said = capsys.readouterr().err
  told = [line for line in said.splitlines() if "relative error" in line]
  assert {line.split(":")[0] for line in told} == {"step 2", "step 4"}
  assert "from here on" not in said


def test_an_error_that_is_not_finite_is_over_the_guard():
  report = {"moe.w": np.zeros((2, 3, 9))}
  report["moe.w"][1, 2, 0] = np.inf
  assert watch.over(report, 0.5)["moe.w"].tolist() == [False, True]
  row = watch.rows_of(report)[-1]
  assert json.dumps(watch.plain(row)).count('"error": "Infinity"') == 1


def test_what_stays_high_is_in_no_mean_and_over_no_guard():
  report = {"moe.w": np.full((3, 3, 9), 0.25)}
  report["moe.w"][1] = np.nan
  assert watch.over(report, 0.5)["moe.w"].tolist() == [False] * 3
  assert watch.summary(report)["fp8/error_wgrad"] == 0.25
  rows = [watch.plain(row) for row in watch.rows_of(report)]
  assert [row["error"] for row in rows][::3] == [0.25, None, 0.25]
  assert "fp8/error_max" not in watch.summary({"moe.w": report["moe.w"][1:2]})
  table = fp8_map.table(watch.rows_of({"moe.w": report["moe.w"][1:2]}))
  assert table.splitlines()[1].split() == ["w", "fprop", *"------"]
  table = fp8_map.table(watch.rows_of(report))
  assert table.splitlines()[1].split()[:4] == ["w", "fprop", "0.2500", "0.2500"]


@pytest.mark.slow  # programs with FP8 to compile
def test_a_report_is_of_the_gradients_that_training_has():
  """Wrong ones would have other scales: those of g, over all microbatches."""
  prepared = steps.prepared(FP8)
  values = prepared.values
  graphdef = watch.graphdef_of(values)
  report = watch.make_report(graphdef, values, schedule.make(values))
  found = report(prepared.start, steps.random_batch(values))
  assert all(np.isfinite(v).all() for v in found.values())
  name = watch.summary(found)
  assert 0.01 < name["fp8/error_dgrad"] < 0.08


@pytest.mark.parametrize(
  "diff, words",
  [
    ({RECIPE: "deepseek"}, "model.precision.recipe: found 'deepseek', wanted"),
    ({"model.precision.changes": ("x=y",)}, "config.model.precision.changes"),
    ({"model.precision.kernel": "hopper"}, "found hopper, but the backend"),
    ({"model.precision.high": ("moe.7.*",)}, "found 'moe.7.\\*', which no"),
    ({"model.precision.guard": -1.0}, "model.precision.guard: found -1.0"),
  ],
  ids=str,
)
def test_what_cannot_be_is_one_line(corpus, diff, words, tmp_path):
  with pytest.raises(ConfigError, match=words):
    run({**corpus, **diff}, tmp_path / "run")
  assert not (tmp_path / "run").exists()
