"""The report's deployment units, by name: what `--preset` sets (Sec. 3.1, 3.4)."""

import dataclasses

from dsv3.plan.mesh import Mesh
from dsv3.plan.unit import Unit


@dataclasses.dataclass(frozen=True)
class Preset:
  """Values for what the command line leaves open."""

  text: str
  chip: str = "h800"
  chips: int = 2048
  mesh: Mesh | None = None
  microbatches: int | None = None
  schedule: str | None = None
  unit: Unit | None = None  # of serving; such a preset does not train


PRESETS = {
  "train2048": Preset(
    "pre-training: 16 stages of DualPipe, experts over 8 nodes (Sec. 3.2)",
    mesh=Mesh(data=2, expert=64, stage=16),
    microbatches=120,
    schedule="dualpipe",
  ),
  # 8 + 1 redundant experts a chip: 32 redundant in all (Sec. 3.4.1).
  "prefill32": Preset(
    "prefill on 4 nodes: attention TP 4, DP 8, experts EP 32 (Sec. 3.4.1)",
    chips=32,
    unit=Unit(chips=32, tensor=4, redundant=32),
  ),
  # One expert a chip, 64 chips hold redundant and shared ones (Sec. 3.4.2);
  # planned with the shared expert on every chip, 2.6 GB more.
  "decode320": Preset(
    "decoding on 40 nodes: attention TP 4, DP 80, experts EP 320 (Sec. 3.4.2)",
    chips=320,
    unit=Unit(chips=320, tensor=4, redundant=64),
  ),
  # Two routed experts and the shared one a chip (open-infra-index, day 6).
  "decode144": Preset(
    "decoding as served in 2025: DP 144, experts EP 144, 32 redundant",
    chips=144,
    unit=Unit(chips=144, redundant=32),
  ),
}
