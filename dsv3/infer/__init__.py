"""Decoding: latent cache, absorbed attention, sampling."""

from dsv3.infer.decoder import Decoder
from dsv3.infer.generate import Completion, Step, generate, stream
from dsv3.infer.sampling import Sampling

__all__ = [
  "Completion",
  "Decoder",
  "Sampling",
  "Step",
  "generate",
  "stream",
]
