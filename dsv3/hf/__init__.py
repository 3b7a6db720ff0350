"""Released checkpoints in and out: names, FP8 blocks, files, streaming."""

from dsv3.hf.read import load
from dsv3.hf.write import save

__all__ = ["load", "save"]
