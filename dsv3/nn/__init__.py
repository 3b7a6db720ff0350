"""Flax NNX modules: one per box of Figures 2 and 3 of the report.

They own parameters, named by the paper's symbols, and call `dsv3.ops` for the
equations. A module is a pytree: `jax.jit`, `jax.vmap` and `jax.lax.scan` take
it as it is.
"""
