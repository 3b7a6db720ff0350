"""Which experts a text uses: recorded, stored, and run again."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3 import cli
from dsv3.config import ConfigError
from dsv3.lab import routing
from dsv3.nn.transformer import make_model
from dsv3.train import loop
from tests import micro


@pytest.fixture(scope="module")
def model():
  values = micro.config_of().model
  found = jax.jit(lambda: make_model(values, jax.random.key(0)))()
  # Far from even, so that choices differ from token to token.
  bias = found.moe.ffn.router.bias
  bias.set_value(bias.get_value() + np.linspace(0, 0.01, 4))
  return found


TOKENS = np.random.default_rng(0).integers(0, 256, (3, 32))


def test_a_trace_has_the_loads_of_the_forward_pass(model):
  segments = np.ones_like(TOKENS)
  segments[2, 20:] = 0  # padding counts nowhere
  trace = routing.record(model, TOKENS, segments)
  assert trace.experts_XBLK.shape == (2, 3, 32, 2)
  load = np.asarray(jax.jit(model)(TOKENS, segments).traffic.load)
  inside = segments > 0
  for layer in range(2):
    found = np.bincount(trace.experts_XBLK[layer][inside].ravel(), minlength=4)
    np.testing.assert_array_equal(found, load[layer])
  mean = 2 * inside.sum() / 4
  np.testing.assert_allclose(routing.relative_load(trace), load / mean)
  # Gates add up to the scale of Eq. 13.
  scale = model.model.moe.routed_scale
  np.testing.assert_allclose(trace.gate_XBLK.sum(-1), scale, rtol=1e-5)


def test_own_choices_give_the_same_loss_and_others_another(model, tmp_path):
  trace = routing.record(model, TOKENS)
  free = routing.loss(model, TOKENS)
  hidden = jax.jit(model)(TOKENS).hidden[0]
  logp = np.asarray(jax.nn.log_softmax(model.logits(hidden)))[:, :-1]
  picked = np.take_along_axis(logp, TOKENS[:, 1:, None], 2)
  assert free == pytest.approx(-picked.mean(), rel=1e-5)
  trace.save(tmp_path / "a.npz")
  stored = routing.load(tmp_path / "a.npz")
  assert routing.loss(model, TOKENS, stored) == free
  other = stored._replace(experts_XBLK=3 - stored.experts_XBLK)
  assert abs(routing.loss(model, TOKENS, other) - free) > 1e-6
  assert (routing.agreement(trace, stored) == 1).all()
  assert (routing.agreement(trace, other) < 1).all()
  again = routing.record(model, TOKENS, experts_XBLK=other.experts_XBLK)
  np.testing.assert_array_equal(again.experts_XBLK, other.experts_XBLK)


def test_a_frozen_choice_leaves_the_gates_to_the_router(model):
  """Gates are of the router's own affinities: freezing is of the choice alone."""
  trace = routing.record(model, TOKENS)
  other = micro.config_of({"model.moe.gate": "softmax"}).model
  swapped = jax.jit(lambda: make_model(other, jax.random.key(0)))()
  found = routing.record(swapped, TOKENS, experts_XBLK=trace.experts_XBLK)
  np.testing.assert_array_equal(found.experts_XBLK, trace.experts_XBLK)
  assert not np.allclose(found.gate_XBLK, trace.gate_XBLK)


def test_what_is_no_trace_of_the_text_is_said(model, tmp_path):
  trace = routing.record(model, TOKENS)
  with pytest.raises(ConfigError, match=r"wanted \(2, 2, 32, 2\)"):
    routing.loss(model, TOKENS[:2], trace)
  (tmp_path / "b.npz").write_bytes(b"no")
  with pytest.raises(ConfigError, match="no routing trace"):
    routing.load(tmp_path / "b.npz")
  values = dataclasses.replace(micro.config_of().model, ffn="dense")
  dense = jax.jit(lambda: make_model(values, jax.random.key(0)))()
  with pytest.raises(ConfigError, match="wanted routers"):
    routing.record(dense, TOKENS)


def test_routing_of_a_run_by_domain(tmp_path, capsys):
  few = {"train.steps": 2, "train.checkpoint_every": 2, "model.mtp.depth": 0}
  run = tmp_path / "run"
  loop.train(micro.config_of({**micro.write_corpus(tmp_path), **few}), run)
  (tmp_path / "a.txt").write_text("import numpy as np\n" * 20)
  (tmp_path / "b.txt").write_text("7 8 9 " * 60)
  domains = [f"code={tmp_path}/a.txt", f"numbers={tmp_path}/b.txt"]
  words = ["routing", f"--workdir={run}", "--rows=2", "--domains", *domains]
  capsys.readouterr()
  assert cli.main(words) == 0
  said = capsys.readouterr().out
  assert "layer 0: MaxVio" in said and "  numbers: most to experts" in said
  trace = routing.load(run / "routing" / "step_2.npz")
  assert trace.experts_XBLK.shape[1] == 4  # two rows of each
  picture = run / "routing" / "step_2.png"
  assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_routing_of_an_earlier_step_under_later_weights(tmp_path, capsys):
  run = tmp_path / "run"
  loop.train(micro.config_of(micro.write_corpus(tmp_path)), run)
  capsys.readouterr()
  assert cli.main(["routing", f"--workdir={run}"]) == 0
  said = capsys.readouterr().out
  assert "layer 0: MaxVio" in said and "layer 1: MaxVio" in said
  stored = run / "routing" / "step_8.npz"
  assert stored.is_file() and stored.with_suffix(".png").is_file()
  (tmp_path / "a.txt").write_text("import numpy as np\n" * 20)
  (tmp_path / "b.txt").write_text("7 8 9 " * 60)
  domains = [f"code={tmp_path}/a.txt", f"numbers={tmp_path}/b.txt"]
  words = ["routing", f"--workdir={run}", "--rows=2", "--domains", *domains]
  assert cli.main(words) == 0
  assert "  numbers: most to experts" in capsys.readouterr().out
  # Step 6's choices under the weights of step 8.
  words = [*words, "--step=6", f"--out={tmp_path}/four"]
  assert cli.main(words) == 0
  frozen = f"--frozen={tmp_path}/four/step_6.npz"
  capsys.readouterr()
  assert cli.main([*words[:-2], frozen]) == 0
  assert "with its own" in capsys.readouterr().out
  unit = ["--devices=2", "--slots=6"]
  assert cli.main(["routing", f"--workdir={run}", *unit]) == 0
  said = capsys.readouterr().out
  assert "6 slots on 2 devices" in said and said.count("experts ") >= 2
  unit[1] = "--slots=2"
  assert cli.main(["routing", f"--workdir={run}", *unit]) == 2
  assert "slots: found 2, wanted 4 or more" in capsys.readouterr().err
  assert cli.main(["routing", f"--workdir={run}", "--domains", "x"]) == 2
  assert "wanted NAME=FILE" in capsys.readouterr().err
