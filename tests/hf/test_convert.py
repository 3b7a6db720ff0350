"""Folders in and out: exact, whole or not at all, and every defect named."""

import json
import math
import pathlib
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3 import cli, config, hf
from dsv3.config import ConfigError
from dsv3.hf import blocks, files, imported, names, read, write
from dsv3.infer import Sampling, generate
from dsv3.nn import transformer
from dsv3.train.restore import restore
from tests import micro

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
DIFF = {"model.mtp.concat": "embedding_hidden"}  # the release's order
# A leaf, a name of the release, and the slice of the leaf that it is.
Q = "model.layers.1.self_attn.q_b_proj.weight"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def weights(model):
  return transformer.split(model)[1:]


def same(a, b) -> bool:
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def model():
  """Weights that are exact in bfloat16, biases that are not zero."""
  made = transformer.make_model(micro.config_of(DIFF).model, jax.random.key(0))
  graphdef, params, router = transformer.split(made)
  short = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  noise = lambda x: x + np.linspace(-0.5, 5.0, x.size).reshape(x.shape)
  return transformer.nnx.merge(
    graphdef, jax.tree.map(short, params), jax.tree.map(noise, router)
  )


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  """An FP8 release in several files, scales not with their weights."""
  out = tmp_path_factory.mktemp("hf") / "release"
  hf.save(model, out, fp8=True, file_bytes=30_000)
  assert len(list(out.glob("*.safetensors"))) > 3
  return out


def test_logits_of_a_folder_that_transformers_has_saved_are_theirs():
  loaded = hf.load(GOLDEN / "hf_folder")
  golden = np.load(GOLDEN / "hf_yarn.npz")
  hidden = loaded(jnp.asarray(golden["rows"][:, :-1])).hidden[0]
  np.testing.assert_allclose(
    loaded.logits(hidden), golden["logits/0"], rtol=2e-5, atol=2e-5
  )


def test_bfloat16_out_and_in_is_the_same_model(model, tmp_path):
  hf.save(model, tmp_path / "out")
  assert same(weights(hf.load(tmp_path / "out")), weights(model))
  again = hf.load(tmp_path / "out", dtype="bfloat16")
  params, router = weights(again)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(router)} == {np.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_fp8_in_and_out_is_byte_for_byte_mtp_and_biases_included(
  folder, dtype, tmp_path
):
  run, out = tmp_path / "run", tmp_path / "out"
  words = ["convert", "from-hf", str(folder), f"--out={run}"]
  assert cli.main([*words, f"--dtype={dtype}"]) == 0
  words = ["convert", "to-hf", str(run), f"--out={out}", "--fp8"]
  assert cli.main(words) == 0
  there, back = files.Folder(folder), files.Folder(out)
  assert there.index.keys() == back.index.keys()
  assert any("layers.3." in name for name in there.index)  # the MTP layer
  for name, stored in there.index.items():
    assert back.index[name].dtype == stored.dtype
    assert back[name].tobytes() == there[name].tobytes(), name
  a, b = (json.loads((f / "config.json").read_text()) for f in (folder, out))
  assert a == b


def test_a_shard_is_filled_from_its_tensors_alone(folder):
  """Experts over two devices, one of them a dim with two parts."""
  source = read.open_source(folder)
  mesh = jax.make_mesh(
    (2, 2), ("e", "f"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  spec = jax.sharding.PartitionSpec
  shardings = {
    "moe/ffn/experts/w_gate_up": spec(None, "e", None, None, "f"),
    "moe/attention/w_uk": spec(None, "f", "e"),
    "head": spec(None, "f"),
  }
  shardings = {
    k: jax.sharding.NamedSharding(mesh, s) for k, s in shardings.items()
  }
  _, *whole = read.parameters(source)
  _, *sharded = read.parameters(source, shardings=shardings)
  assert same(whole, sharded)
  experts = sharded[0]["moe"]["ffn"]["experts"]["w_gate_up"][...]
  assert experts.sharding == shardings["moe/ffn/experts/w_gate_up"]


def test_a_folder_is_loaded_onto_a_mesh_and_decodes_there(folder):
  """Every device has its part; the text is that of one."""
  whole = hf.load(folder)
  dealt = hf.load(folder, mesh=config.Mesh(expert=2, tensor=2))
  assert same(weights(whole), weights(dealt))
  experts = dealt.moe.ffn.experts.w_down[...]
  assert len(experts.sharding.device_set) == 4
  assert math.prod(experts.sharding.shard_shape(experts.shape)) * 4 == (
    experts.size
  )
  one, four = (
    generate(m, [[1, 2, 3]], max_tokens=4, sampling=Sampling(0.0))[0].tokens
    for m in (whole, dealt)
  )
  assert one == four
  with pytest.raises(ConfigError, match="config.mesh.expert"):
    hf.load(folder, mesh=config.Mesh(expert=8, data=1))


@pytest.mark.slow  # converts, evaluates, trains: the longest
def test_an_imported_run_is_evaluated_and_trained_on(folder, tmp_path, capsys):
  run = tmp_path / "run"
  words = ["convert", "from-hf", str(folder), f"--out={run}"]
  assert cli.main(words) == 0
  corpus = micro.write_corpus(tmp_path)
  sets = {
    **{k: v for k, v in micro.DIFF.items() if not k.startswith("model.")},
    **corpus,
    "data.tokenizer": "bytes",
    "data.fim_rate": 0.0,
    "schedule.time": "share",
    "train.steps": 4,
  }
  overrides = []
  for key, value in sets.items():
    value = ",".join(value) if isinstance(value, tuple) else value
    overrides.append(f"--config.{key}={value}")
  overrides = [o for o in overrides if "config.name" not in o]
  assert cli.main(["train", f"--workdir={run}", *overrides]) == 0
  assert "4 of 4 steps done" in capsys.readouterr().out
  assert cli.main(["eval", f"--workdir={run}"]) == 0
  out = tmp_path / "out"
  assert cli.main(["convert", "to-hf", str(run), f"--out={out}"]) == 0
  assert "after step 4" in capsys.readouterr().out
  back = tmp_path / "back"  # what it began with is still there, as step 0
  words = ["convert", "to-hf", str(run), f"--out={back}", "--fp8", "--step=0"]
  assert cli.main(words) == 0
  assert "after step 0" in capsys.readouterr().out
  there, found = files.Folder(folder), files.Folder(back)
  assert all(found[n].tobytes() == there[n].tobytes() for n in there.index)
  assert "there are 0, " in refusal([*words[:3], "--out=x", "--step=3"], capsys)
  params = weights(hf.load(out))[0]
  old = weights(hf.load(folder))[0]
  assert not np.array_equal(params["head"][...], old["head"][...])


def test_dry_run_reports_and_leaves_nothing(folder, tmp_path, capsys):
  words = ["convert", "from-hf", str(folder), f"--out={tmp_path / 'x'}"]
  assert cli.main([*words, "--dry-run", "--dtype=float32"]) == 0
  said = capsys.readouterr().out
  assert not (tmp_path / "x").exists()
  size = sum(x.size for x in jax.tree.leaves(weights(hf.load(folder))))
  assert f"{size:,}" in said and f"{4 * size:,}" in said


def test_a_conversion_that_was_killed_goes_on_after_its_last_whole_file(
  model, folder, tmp_path, monkeypatch
):
  out, real, written = tmp_path / "out", write.write_file, []

  def dies(path, tensors, tell):
    if len(written) == 2:
      path.with_name(f"{path.name}.tmp").write_bytes(b"half")
      raise KeyboardInterrupt
    written.append(path.name)
    real(path, tensors, tell)

  monkeypatch.setattr(write, "write_file", dies)
  with pytest.raises(KeyboardInterrupt):
    hf.save(model, out, fp8=True, file_bytes=30_000)
  assert not (out / files.INDEX).exists() and not (out / "config.json").exists()
  monkeypatch.setattr(
    write,
    "write_file",
    lambda p, t, tell: (written.append(p.name), real(p, t, tell)),
  )
  hf.save(model, out, fp8=True, file_bytes=30_000)
  assert len(written) == len(set(written))  # none twice
  assert contents(out) == contents(folder)
  with pytest.raises(ConfigError, match="found files in it"):
    hf.save(model, out)


def test_an_import_that_was_killed_goes_on_after_its_last_whole_file(
  folder, tmp_path, monkeypatch, capsys
):
  run, real, written = tmp_path / "run", write.write_file, []
  monkeypatch.setattr(write, "FILE_BYTES", 30_000)
  whole = tmp_path / "whole"
  words = ["convert", "from-hf", str(folder)]
  assert cli.main([*words, f"--out={whole}"]) == 0

  def dies(path, tensors, tell):
    if len(written) == 2:
      path.with_name(f"{path.name}.tmp").write_bytes(b"half")
      raise SystemExit(137)
    written.append(path.name)
    real(path, tensors, tell)

  monkeypatch.setattr(write, "write_file", dies)
  with pytest.raises(SystemExit):
    cli.main([*words, f"--out={run}"])
  assert not imported.is_there(run) and not (run / "config.json").exists()
  # Neither other weights nor another type may be mixed with what is there.
  for other in (
    [*words, "--dtype=float32"],
    ["convert", "from-hf", str(GOLDEN / "hf_folder")],
  ):
    capsys.readouterr()
    assert cli.main([*other, f"--out={run}"]) == 2
    assert "unfinished conversion of something else" in capsys.readouterr().err
  monkeypatch.setattr(
    write,
    "write_file",
    lambda p, t, tell: (written.append(p.name), real(p, t, tell)),
  )
  assert cli.main([*words, f"--out={run}"]) == 0
  assert len(written) == len(set(written)) > 3  # none twice
  assert contents(run / "hf").keys() == contents(whole / "hf").keys()
  for name, value in contents(run / "hf").items():
    if name != "scales.npz":  # a zip has the time of day
      assert contents(whole / "hf")[name] == value, name
  assert "found files in it" in refusal([*words, f"--out={run}"], capsys)


def refusal(words, capsys) -> str:
  capsys.readouterr()
  assert cli.main(words) == 2
  return capsys.readouterr().err


def test_an_import_as_fp8_is_the_release_s_own_bytes(folder, tmp_path):
  run = tmp_path / "run"
  words = ["convert", "from-hf", str(folder), f"--out={run}", "--dtype=fp8"]
  assert cli.main(words) == 0
  there, kept = files.Folder(folder), files.Folder(run / "hf")
  assert there.index.keys() == kept.index.keys()
  for name, stored in there.index.items():
    assert kept.index[name].dtype == stored.dtype
    assert kept[name].tobytes() == there[name].tobytes(), name
  # What is loaded is what the folder holds: in bfloat16, and exact in float32.
  assert same(restored(run), weights(hf.load(folder)))
  with pytest.raises(ConfigError, match="--ema: the imported weights"):
    restored(run, ema=True)
  with pytest.raises(ConfigError, match="--step=3: no such checkpoint"):
    restored(run, 3)
  short = restored(run, as_stored=True)
  assert {x.dtype for x in jax.tree.leaves(short[0])} == {
    np.dtype(jnp.bfloat16)
  }


def restored(run, *args, **kwargs):
  trained = restore(run, *args, **kwargs)
  return trained.params, trained.router


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_load_and_save_from_python_is_byte_for_byte(
  folder, dtype, power_of_two, tmp_path
):
  source = shutil.copytree(folder, tmp_path / "source")
  if power_of_two:
    as_powers_of_two(source)
  loaded = hf.load(source, dtype=dtype)
  hf.save(loaded, tmp_path / "out", fp8=True, like=source)
  there, back = files.Folder(source), files.Folder(tmp_path / "out")
  assert there.index.keys() == back.index.keys()
  for name, stored in there.index.items():
    assert back.index[name].dtype == stored.dtype
    assert back[name].tobytes() == there[name].tobytes(), name
  # Without blocks a model is written as precisely as it is.
  hf.save(loaded, tmp_path / "wide")
  assert same(weights(hf.load(tmp_path / "wide", dtype=dtype)), weights(loaded))
  with pytest.raises(ConfigError, match="dtype: found int8"):
    hf.save(loaded, tmp_path / "bad", dtype="int8")


def as_powers_of_two(release):
  """Scales as V3.1 has them, in a type of eight bits."""
  there = files.Folder(release)
  for name in [n for n in there.index if n.endswith("_scale_inv")]:
    weight_name = name.removesuffix("_scale_inv")
    value = blocks.dequantize(there[weight_name], there[name])
    pair = blocks.quantize(value, power_of_two=True)

    def change(arrays, name=name, weight_name=weight_name, pair=pair):
      arrays[weight_name] = "F8_E4M3", pair[0]
      arrays[name] = "F8_E8M0", pair[1].astype(ml_dtypes.float8_e8m0fnu)

    rewrite(release, name, change)


def test_float32_weights_that_were_bfloat16_keep_their_blocks():
  rng = np.random.default_rng(0)
  first = blocks.quantize(rng.normal(size=(200, 300)).astype(np.float32))
  short = blocks.dequantize(*first).astype(ml_dtypes.bfloat16)
  again = blocks.quantize(short.astype(np.float32), first[1])
  assert [a.tobytes() for a in first] == [b.tobytes() for b in again]


@pytest.mark.slow  # a program for each of two ways
def test_the_paper_s_order_of_the_mtp_projection_goes_out_and_in(tmp_path):
  """Eq. 21 has the hidden state first, the release the embedding."""
  ours = micro.config_of({"model.mtp.concat": "hidden_embedding"}).model
  made = transformer.make_model(ours, jax.random.key(0))
  hf.save(made, tmp_path / "out")
  loaded = hf.load(tmp_path / "out")
  assert loaded.model.mtp.concat == "embedding_hidden"
  tokens = jnp.arange(12)[None]
  ahead = jnp.roll(tokens, -1, axis=1)[:, None]
  a, b = (m(tokens, None, ahead).hidden[1] for m in (made, loaded))
  np.testing.assert_allclose(a, b, atol=1e-5)
  halves = np.split(np.asarray(made.mtp.proj[...]), 2, axis=1)
  assert np.array_equal(
    loaded.mtp.proj[...], np.concatenate(halves[::-1], axis=1)
  )


@pytest.mark.parametrize(
  "words, wanted",
  [
    (["to-hf", "--dry-run"], "--dry-run: no option of to-hf"),
    (["to-hf", "--dtype=fp8"], "wanted --fp8"),
    (["from-hf", "--fp8"], "--fp8: no option of from-hf"),
    (["from-hf", "--ema"], "--ema: no option of from-hf"),
    (["from-hf", "--step=0"], "--step: no option of from-hf"),
  ],
)
def test_options_of_the_other_direction_are_refused(
  words, wanted, folder, tmp_path, capsys
):
  out = tmp_path / "out"
  words = ["convert", words[0], str(folder), f"--out={out}", words[1]]
  assert wanted in refusal(words, capsys)
  assert not out.exists()


@pytest.mark.parametrize(
  "values, wanted",
  [
    (b"[1]", "found no JSON object"),
    (b"\xff\xfe", "damaged"),
    ({"num_hidden_layers": None}, "config.json: a field of a wrong type"),
    ({"first_k_dense_replace": None}, "a field of a wrong type"),
    ({"rope_scaling": [1]}, "a field of a wrong type"),
    (
      {"quantization_config": {"quant_method": "awq"}},
      "quantization_config.quant_method: found 'awq'",
    ),
    (
      {"quantization_config": {"weight_block_size": [64, 64]}},
      "weight_block_size: found [64, 64]",
    ),
  ],
)
def test_a_config_json_that_cannot_be_is_one_line(
  values, wanted, folder, tmp_path, capsys
):
  copy = shutil.copytree(folder, tmp_path / "copy")
  path = copy / "config.json"
  if isinstance(values, dict):
    values = json.dumps(json.loads(path.read_text()) | values).encode()
  path.write_bytes(values)
  line = refusal(["convert", "from-hf", str(copy), "--out=x"], capsys)
  assert wanted in line and line.count("\n") == 1


def test_an_import_of_full_precision_as_fp8_is_quantised(model, tmp_path):
  hf.save(model, tmp_path / "wide", dtype="float32")
  run = tmp_path / "run"
  words = ["convert", "from-hf", str(tmp_path / "wide"), f"--out={run}"]
  assert cli.main([*words, "--dtype=fp8"]) == 0
  kinds = {s.dtype for s in files.Folder(run / "hf").index.values()}
  assert kinds == {"F8_E4M3", "F32", "BF16"}
  found, wanted = restored(run)[0], weights(model)[0]
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    assert np.abs(a - b).max() <= np.abs(b).max() / 14  # half of E4M3's step
  assert not same(found, wanted)


def test_scales_as_powers_of_two_in_eight_bits_are_read_and_kept(
  model, tmp_path
):
  """V3.1: `ue8m0`, in a type of its own."""
  release = tmp_path / "release"
  hf.save(model, release, fp8=True)
  as_powers_of_two(release)
  there = files.Folder(release)
  assert there.index[Q + "_scale_inv"].dtype == "F8_E8M0"
  wanted = blocks.dequantize(there[Q], there[Q + "_scale_inv"])
  assert np.array_equal(read.read_tensor(there, tensor_named(Q, model)), wanted)
  for dtype in ("fp8", "bfloat16"):
    run, out = tmp_path / dtype, tmp_path / f"{dtype}_out"
    words = ["convert", "from-hf", str(release), f"--out={run}"]
    assert cli.main([*words, f"--dtype={dtype}"]) == 0
    words = ["convert", "to-hf", str(run), f"--out={out}", "--fp8"]
    assert cli.main(words) == 0
    back = files.Folder(out)
    for name, stored in there.index.items():
      assert back.index[name].dtype == stored.dtype
      assert back[name].tobytes() == there[name].tobytes(), name


def tensor_named(name, model):
  return next(t for t in names.tensors(model.model) if t.name == name)


@pytest.mark.slow  # an import and a run
def test_a_run_begins_with_the_weights_of_another(folder, tmp_path, capsys):
  first, second = tmp_path / "first", tmp_path / "second"
  words = ["convert", "from-hf", str(folder), f"--out={first}"]
  assert cli.main([*words, "--dtype=float32"]) == 0
  diff = {**micro.write_corpus(tmp_path), **DIFF}
  diff |= {"train.steps": 2, "schedule.lr_peak": 1e-9, "train.eval_batches": 0}
  diff |= {"train.final_eval_batches": 0, "model.dtype": "float32"}
  stage = micro.write_config(
    tmp_path / "stage.py",
    {**diff, "train.start_from": str(first), "model.rope.yarn_factor": 4.0},
  )
  words = ["train", f"--config={stage}", f"--workdir={second}"]
  assert cli.main(words) == 0
  a, b = restored(first)[0], restored(second)[0]
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_allclose(x, y, atol=1e-6)
  wrong = [*words[:2], f"--workdir={tmp_path / 'third'}"]
  line = refusal([*wrong, "--config.model.mtp.depth=0"], capsys)
  assert "config.model.mtp.depth: found 0, wanted 1" in line
  order = "--config.model.mtp.concat=hidden_embedding"
  line = refusal([*wrong, order], capsys)
  assert "mtp.concat: found 'hidden_embedding', wanted 'embed" in line
  line = refusal([*wrong, "--config.train.start_from=nowhere"], capsys)
  assert "config.train.start_from: nowhere: found no run" in line


def test_weights_of_any_recipe_go_on_under_any_other():
  of = lambda recipe: micro.config_of({"model.precision.recipe": recipe}).model
  imported.check_fits(of("deepseek_v3"), of("bf16"), "runs/a")
  with pytest.raises(ConfigError, match="model.dim: found 64, wanted 32"):
    imported.check_fits(
      micro.config_of({"model.dim": 64}).model, of("bf16"), ""
    )


def rewrite(folder, name, change):
  """Writes a file of a folder again, its tensors changed."""
  there = files.Folder(folder)
  path = there.index[name].path
  kept = {n: s for n, s in there.index.items() if s.path == path}
  arrays = {n: (s.dtype, np.array(there[n])) for n, s in kept.items()}
  change(arrays)
  files.write_file(
    path,
    [
      files.ToWrite(n, kind, a.shape, lambda a=a: a)
      for n, (kind, a) in arrays.items()
    ],
  )


def missing_shard(folder):
  sorted(folder.glob("*.safetensors"))[1].unlink()
  return "missing"


def truncated(folder):
  path = sorted(folder.glob("*.safetensors"))[1]
  path.write_bytes(path.read_bytes()[:-1])
  return "bytes, wanted"


def cut_header(folder):
  path = sorted(folder.glob("*.safetensors"))[1]
  path.write_bytes(path.read_bytes()[:20])
  return "cut short"


def huge_header(folder):
  path = sorted(folder.glob("*.safetensors"))[1]
  path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
  return "cut short"


def outside(folder):
  index = json.loads((folder / files.INDEX).read_text())
  index["weight_map"][Q] = "../../etc/passwd"
  (folder / files.INDEX).write_text(json.dumps(index))
  return "outside the folder"


def wrong_shape(folder):
  def change(arrays):
    kind, value = arrays[Q]
    arrays[Q] = kind, value[:-1]

  rewrite(folder, Q, change)
  return f"{Q}: found shape"


def wrong_dtype(folder):
  name = "model.layers.1.mlp.gate.e_score_correction_bias"
  change = lambda arrays: arrays.update(
    {name: ("BF16", arrays[name][1].astype(ml_dtypes.bfloat16))}
  )
  rewrite(folder, name, change)
  return f"{name}: found BF16, wanted F32"


def no_scale(folder):
  name = Q + "_scale_inv"
  rewrite(folder, name, lambda arrays: arrays.pop(name))
  (folder / files.INDEX).unlink()
  return f"{name}: missing"


def no_tensor(folder):
  name = "model.norm.weight"
  rewrite(folder, name, lambda arrays: arrays.pop(name))
  (folder / files.INDEX).unlink()
  return f"{name}: missing"


def not_in_its_file(folder):
  rewrite(folder, Q, lambda arrays: arrays.pop(Q))
  return f"{Q}: found in no file"


def unknown(folder):
  name = "model.norm.weight"
  add = lambda a: a.update({"model.layers.0.mystery": a[name]})
  rewrite(folder, name, add)
  return "model.layers.0.mystery: no place for it"


def not_finite(folder):
  name = "model.norm.weight"

  def change(arrays):
    arrays[name][1][3] = np.nan

  rewrite(folder, name, change)
  return f"{name}: holds values that are not finite"


def other_copy(folder):
  name = "model.layers.3.embed_tokens.weight"

  def change(arrays):
    arrays[name][1][0, 0] += 1

  rewrite(folder, name, change)
  return f"{name}: differs from model.embed_tokens.weight"


def twice(folder):
  first = sorted(folder.glob("*.safetensors"))[0]
  shutil.copy(first, folder / "copy.safetensors")
  (folder / files.INDEX).unlink()
  return "as well"


def no_config(folder):
  (folder / "config.json").unlink()
  return "config.json: No such file"


def pickle_only(folder):
  for path in folder.glob("*.safetensors*"):
    path.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"x")
  return "pickles are not read"


@pytest.mark.parametrize(
  "spoil",
  [
    missing_shard,
    truncated,
    cut_header,
    huge_header,
    outside,
    wrong_shape,
    wrong_dtype,
    no_scale,
    no_tensor,
    not_in_its_file,
    unknown,
    not_finite,
    other_copy,
    twice,
    no_config,
    pickle_only,
  ],
)
def test_a_defect_of_a_folder_is_one_line_and_leaves_no_run(
  spoil, folder, tmp_path, capsys
):
  copy = shutil.copytree(folder, tmp_path / "copy")
  wanted = spoil(copy)
  run = tmp_path / "run"
  assert cli.main(["convert", "from-hf", str(copy), f"--out={run}"]) == 2
  line = capsys.readouterr().err
  assert wanted in line and line.count("\n") == 1
  assert not (run / "config.json").exists()
  # Mended, the next call makes it whole.
  shutil.rmtree(copy)
  shutil.copytree(folder, copy)
  assert cli.main(["convert", "from-hf", str(copy), f"--out={run}"]) == 0


def test_a_folder_in_use_is_not_overwritten(folder, tmp_path, capsys):
  (tmp_path / "mine.txt").write_text("mine")
  words = ["convert", "from-hf", str(folder), f"--out={tmp_path}"]
  assert cli.main(words) == 2
  assert "found files in it" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
