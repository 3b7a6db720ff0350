"""DeepSeek-V3 in JAX and Flax: the technical report, runnable and readable."""

__version__ = "0.1.0"
