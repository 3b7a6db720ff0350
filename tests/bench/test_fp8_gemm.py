"""The benchmark of FP8 products: what it prints, and that it checks first."""

import json
import sys

import jax.numpy as jnp
import pytest

from dsv3.bench import fp8_gemm
from dsv3.ops import hopper

SMALL = "--m=128 --k=128 --n=256 --rounds=1"


def run(monkeypatch, capsys, text):
  """The lines of the command, by product."""
  monkeypatch.setattr(sys, "argv", ["fp8_gemm", *text.split()])
  try:
    fp8_gemm.main()
    end = None
  except SystemExit as stop:
    end = stop.code
  about, *lines = map(json.loads, capsys.readouterr().out.splitlines() or "0")
  return about, {line["product"]: line for line in lines}, end


def test_every_pass_is_right_and_timed(monkeypatch, capsys):
  options = f"{SMALL} --experts=8 --expert-n=128"
  about, lines, end = run(monkeypatch, capsys, options)
  assert about["kernel"] == "plain: the backend is cpu, no Hopper GPU"
  assert end is None
  sizes = {name: line["size"] for name, line in lines.items()}
  assert sizes == {  # 128 tokens to 8 of 8 experts are 128 rows each
    "fprop": [128, 128, 256],
    "dgrad": [128, 256, 128],
    "wgrad": [128, 128, 256],
    "grouped_fprop": [1024, 128, 128],
    "grouped_dgrad": [1024, 128, 128],
    "grouped_wgrad": [128, 1024, 128],
  }
  for line in lines.values():
    assert line["error"] < 4e-3  # half of bfloat16's spacing
    assert 0.03 < line["error_to_bf16"] < 0.04  # 3 bits behind the point, twice
    assert line["ms"].keys() >= {"fp8", "kernel"}
    assert not line["problems"]


def test_wrong_products_are_named_and_not_timed(monkeypatch, capsys):
  right = hopper.plain_matmul
  with_fp8 = lambda a, *rest, **keywords: (
    right(a, *rest, **keywords)
    * jnp.where(a.dtype.itemsize == 1, 1.02, 1).astype(jnp.float32)
  )
  monkeypatch.setattr(hopper, "plain_matmul", with_fp8)
  _, lines, end = run(monkeypatch, capsys, SMALL)
  assert end == "wrong or failed, not timed: fprop, dgrad, wgrad"
  assert all(
    line["error"] == pytest.approx(0.02, 0.1) for line in lines.values()
  )
  assert not any("ms" in line for line in lines.values())


def test_a_product_that_fails_is_named_and_the_others_are_timed(
  monkeypatch, capsys
):
  right = hopper.plain_matmul

  def fails_for_wgrad(*arguments, out_dtype):
    if out_dtype == jnp.float32 and arguments[0].dtype.itemsize == 1:
      raise MemoryError("no memory\nat all")
    return right(*arguments, out_dtype=out_dtype)

  monkeypatch.setattr(hopper, "plain_matmul", fails_for_wgrad)
  _, lines, end = run(monkeypatch, capsys, SMALL)
  assert end == "wrong or failed, not timed: wgrad"
  assert lines["wgrad"]["problem"] == "no memory"
  assert "ms" in lines["fprop"] and "ms" in lines["dgrad"]


@pytest.mark.parametrize(
  "option, message",
  [
    ("--k=100", "found --k=100, wanted a multiple of 128"),
    ("--experts=-1", "found --experts=-1, wanted 0 or more"),
  ],
)
def test_bad_sizes_end_with_one_line(monkeypatch, capsys, option, message):
  assert run(monkeypatch, capsys, option)[2] == message
