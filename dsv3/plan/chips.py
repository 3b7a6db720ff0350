"""Accelerators as data: what the makers' sheets say, in SI units.

Rates are dense (no sparsity) and one way. Memory is the sheet's, where NVIDIA's
GB are 1e9 bytes and Google's GiB; devices report up to 7% more than that. What is
reached of all this is in `fitted.py` and `network.py`, never here.
"""

import dataclasses
import difflib
import re

from dsv3.config import ConfigError

REPORTED = 1.07  # the most that a device reports, over the sheet's memory


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip as it is sold and counted in a pod."""

  name: str
  kinds: tuple[str, ...]  # words of JAX's device kind, lower case
  family: str  # hopper | blackwell | tpu: what the fits are by
  bf16: float  # FLOP/s
  fp8: float  # FLOP/s; the BF16 rate where there are no FP8 units
  hbm: float  # bytes
  hbm_rate: float  # bytes/s
  domain: int  # devices joined by the fast links: a node, a rack, a slice
  link_rate: float  # bytes/s one way, of a device inside its domain
  network_rate: float  # bytes/s one way, of a device between domains
  torus: int  # dimensions of the domain's torus; 0: all pairs, by a switch
  watts: float  # that it may draw: what limits clocks under dense products
  price: float | None  # US$ an hour where a source states it
  source: str
  devices: int = 1  # as JAX counts them


def _nvidia(
  name, kinds, family, bf16, hbm, hbm_rate, domain, link, net, watts, source
):
  price = 2.0 if name == "h800" else None  # arXiv 2412.19437, Table 1
  return Chip(
    name,
    kinds,
    family,
    bf16 * 1e12,
    2 * bf16 * 1e12,
    hbm * 1e9,
    hbm_rate * 1e12,
    domain,
    link * 1e9,
    net * 1e9,
    0,
    watts,
    price,
    source,
  )


def _tpu(
  name, kinds, bf16, fp8, hbm, hbm_rate, domain, link, net, torus, source,
  devices=1,
):  # fmt: skip
  return Chip(
    name,
    kinds,
    "tpu",
    bf16 * 1e12,
    fp8 * 1e12,
    hbm * 2.0**30,
    hbm_rate * 1e9,
    domain,
    link * 1e9,
    net * 1e9,
    torus,
    1.0,  # not published; the shares of tpus are fitted without it
    None,
    source,
    devices,
  )


# Read in November 2025 and, of TPUs, 2026.
_NODE = "; 8 x ConnectX-7 a node, 400 Gb/s each"
_HOPPER = "H100 data sheet, nvidia.com/en-us/data-center/h100" + _NODE
_H200 = "H200 data sheet, nvidia.com/en-us/data-center/h200" + _NODE
_H800 = "arXiv 2505.09343, Sec. 4 and Table 5: NVLink 400 GB/s both ways"
_HGX = "HGX data sheet, nvidia.com/en-us/data-center/hgx; 400, 800 Gb/s a GPU"
_NVL72 = (
  "GB200, GB300 NVL72 data sheets, nvidia.com/en-us/data-center/gb200-nvl72; "
  "400, 800 Gb/s a GPU"
)
_GOOGLE = "docs.cloud.google.com/tpu/docs/tpu7x (table of three chips)"
_V5E = "docs.cloud.google.com/tpu/docs/v5e; network of a pod, over its 256"

# Longer names first where one is part of another: the first that fits counts.
CHIPS = {
  chip.name: chip
  for chip in (
    _nvidia("gb300", ("gb300",), "blackwell", 2500, 279, 8.0, 72, 900, 100, 1400, _NVL72),
    _nvidia("gb200", ("gb200",), "blackwell", 2500, 186, 8.0, 72, 900, 50, 1200, _NVL72),
    _nvidia("b300", ("b300",), "blackwell", 2250, 268, 8.0, 8, 900, 100, 1100, _HGX),
    _nvidia("b200", ("b200",), "blackwell", 2250, 180, 8.0, 8, 900, 50, 1000, _HGX),
    _nvidia("h200", ("h200",), "hopper", 989, 141, 4.8, 8, 450, 50, 700, _H200),
    _nvidia("h100", ("h100",), "hopper", 989, 80, 3.35, 8, 450, 50, 700, _HOPPER),
    _nvidia("h800", ("h800",), "hopper", 989, 80, 3.35, 8, 200, 50, 700, _H800),
    _tpu("tpu7x", ("tpu7x", "tpu 7x"), 2307, 4614, 192, 7380, 9216, 600, 12.5, 3, _GOOGLE, 2),
    _tpu("v6e", ("tpu v6",), 918, 918, 32, 1638, 256, 400, 12.5, 2, _GOOGLE),
    _tpu("v5p", ("tpu v5p", "tpu v5"), 459, 459, 95, 2765, 8960, 600, 6.25, 3, _GOOGLE),
    _tpu("v5e", ("tpu v5 lite", "tpu v5e"), 197, 197, 16, 819, 256, 200, 3.125, 2, _V5E),
  )
}  # fmt: skip
_ALSO = {"7x": "tpu7x", "trillium": "v6e", "ironwood": "tpu7x"}
# Known by their BF16 peak alone: what a run's MFU needs. The first that fits.
_PEAKS = {
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "GH200": 989e12,
  "A100": 312e12,
  "TPU v4": 275e12,
}


def chip(name: str) -> Chip:
  """The chip `name`; ConfigError with the known ones for any other."""
  key = name.lower().removeprefix("tpu-")
  key = _ALSO.get(key, key)
  if key not in CHIPS:
    close = difflib.get_close_matches(key, CHIPS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    known = ", ".join(sorted(CHIPS))
    raise ConfigError(f"--chip: found {name}, wanted one of {known}{hint}")
  return CHIPS[key]


def of_device(kind: str) -> Chip | None:
  """The chip of a JAX device kind; None for what is not in the table.

  >>> of_device("NVIDIA H100 80GB HBM3").name, of_device("TPU v5 lite").name
  ('h100', 'v5e')
  """
  if _known_by_peak(kind):
    return None
  found = [
    (len(part), one)
    for one in CHIPS.values()
    for part in one.kinds
    if re.search(rf"\b{part}", kind.lower())
  ]
  return max(found, key=lambda pair: pair[0])[1] if found else None


def peak_flops(kind: str) -> float | None:
  """BF16 dense peak of a JAX device, FLOP/s; None if it is not known (a CPU).

  >>> peak_flops("TPU7x") * 2 == CHIPS["tpu7x"].bf16
  True
  """
  if found := of_device(kind):
    return found.bf16 / found.devices
  return _known_by_peak(kind)


def _known_by_peak(kind: str) -> float | None:
  for name, peak in _PEAKS.items():
    if name.lower() in kind.lower():
      return peak
  return None
