"""Decoding: latent cache, absorbed attention, sampling."""

from dsv3.infer.decoder import Decoder
from dsv3.infer.generate import Completion, Step, generate, stream
from dsv3.infer.sampling import Sampling
from dsv3.infer.speculative import acceptance

__all__ = [
  "Completion",
  "Decoder",
  "Sampling",
  "Step",
  "acceptance",
  "generate",
  "stream",
]


def __getattr__(name: str):
  """`LM`, whose harness is an extra that few installations have."""
  if name == "LM":
    from dsv3.infer.lm import LM

    return LM
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
