"""What a model costs, where it fits, how fast it can be: without hardware.

>>> from dsv3 import config, overlay, plan
>>> values = config.build(overlay.load("v3_671b"))
>>> found = plan.of(values, preset="train2048")
>>> f"{found.step.tokens_chip:.0f} tokens/s a chip, MFU {found.step.mfu:.1%}"
'1543 tokens/s a chip, MFU 40.7%'
"""

from dsv3.plan.answer import Plan, as_dict, of
from dsv3.plan.chips import CHIPS, chip
from dsv3.plan.mesh import Mesh
from dsv3.plan.presets import PRESETS
from dsv3.plan.unit import Unit

__all__ = (
  "CHIPS", "PRESETS", "Mesh", "Plan", "Unit", "as_dict", "chip", "of",
)  # fmt: skip
