"""What a recipe has beside the weights of a model, outside the model.

A step quantises every Linear's weight once (`prepare`), however many
microbatches follow, and hands the copies to the model in place of the arrays
(`attach`). What a recipe remembers from step to step is a `Memory`, arrays in
and arrays out (`remember`). Names are those of the parameters, with dots; the
first dim of all arrays is the layer in its stack.
"""

import dataclasses
import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3 import config
from dsv3.nn.layers import Matrix, canonical
from dsv3.nn.transformer import gemm_of
from dsv3.ops import fp8, report
from dsv3.ops.gemm import passes_of
from dsv3.ops.linear import Weight, unread, weight_copies
from dsv3.ops.products import Products
from dsv3.ops.recipes import Recipe

Named = dict[str, Any]


class Memory(NamedTuple):
  """What a recipe remembers; empty where it remembers nothing."""

  history: Named  # [X, 3, steps] amax of x, w and g, the newest first
  high: Named  # [X] bool: Linears that the guard keeps high


def linears(params: nnx.State) -> dict[str, Matrix]:
  """The weights of all Linears, stacked over layers, by name."""
  return {
    ".".join(path): variable
    for path, variable in nnx.to_flat_state(params)
    if isinstance(variable, Matrix)
  }


def layer_name(name: str, layer: int) -> str:
  """The name of one Linear: of `moe.attention.w_o` the third is `moe.2....`.

  >>> layer_name("moe.attention.w_o", 2)
  'moe.2.attention.w_o'
  """
  stack, rest = name.split(".", 1)
  return f"{stack}.{layer}.{rest}"


def names_of(high: Named) -> list[str]:
  """The Linears of a `Memory.high` that are kept high, layer by layer."""
  return [
    layer_name(name, int(layer))
    for name, high_X in sorted(high.items())
    for layer in np.flatnonzero(high_X)
  ]


def recipe_of(model: config.Model) -> Recipe | None:
  """The recipe of a model; None if it quantises nothing."""
  return gemm_of(model).recipe


def first_memory(params: nnx.State, model: config.Model) -> Memory:
  """The memory before the first step.

  A guard's Linears are remembered whatever the recipe, also where none is
  quantised: the run may go back.
  """
  recipe = recipe_of(model)
  history, high = {}, {}
  for name, w in linears(params).items():
    n_layers = len(w.get_value())
    if recipe and recipe.scaling == "delayed":
      history[name] = jnp.zeros((n_layers, 3, recipe.history), jnp.float32)
    if model.precision.guard and model.precision.guard_action == "keep_high":
      high[name] = jnp.zeros(n_layers, bool)
  return Memory(history, high)


def check_patterns(params: nnx.State, model: config.Model) -> None:
  """Raises ConfigError for a pattern of `precision.high` without a Linear."""
  names = [
    layer_name(name, layer)
    for name, w in linears(params).items()
    for layer in range(len(w.get_value()))
  ]
  for pattern in model.precision.high:
    if not fnmatch.filter(names, pattern):
      raise config.ConfigError(
        f"config.model.precision.high: found {pattern!r}, which no Linear is "
        f"named; wanted patterns of names such as {names[0]}"
      )


def prepare(
  params: nnx.State, model: config.Model, memory: Memory | None = None
) -> dict[str, Weight]:
  """Beside every Linear of a step: copies, past amaxes, which stay high."""
  recipe = recipe_of(model)
  if recipe is None:
    return {}
  memory = memory or Memory({}, {})
  prepared = {}
  for name, w in linears(params).items():
    passes = passes_of(recipe, w.role, model.dtype, Products(), swiglu=False)
    master = canonical(w.get_value(), w.dims)
    past = None
    if name in memory.history:
      past = memory.history[name].max(-1)
    copies = jax.vmap(lambda m, p, passes=passes: weight_copies(passes, m, p))
    fprop, dgrad = copies(master, past)
    prepared[name] = Weight(
      None,
      fprop,
      dgrad,
      past=past,
      high=_high(name, len(master), model, memory),
    )
  return prepared


def _high(name, n_layers, model, memory):
  """[X] bool, or None where none stays high."""
  names = [layer_name(name, layer) for layer in range(n_layers)]
  patterns = model.precision.high
  fixed = np.array(
    [any(fnmatch.fnmatch(n, p) for p in patterns) for n in names]
  )
  if name in memory.high:
    return memory.high[name] | fixed
  return jnp.asarray(fixed) if fixed.any() else None


def attach(
  params: nnx.State,
  model: config.Model,
  prepared: dict[str, Weight],
  **more: Named | None,
) -> nnx.State:
  """Parameters for `nnx.merge`: Linears with what is beside them.

  `more` are further fields of `Weight` by name: amax, report, seed.
  """
  if not prepared:
    return params
  recipe, flat = recipe_of(model), []
  for path, variable in nnx.to_flat_state(params):
    name = ".".join(path)
    if name in prepared:
      fields = {field: named[name] for field, named in more.items() if named}
      fields["master"] = variable.get_value()
      weight = dataclasses.replace(prepared[name], **fields)
      if not _is_read(weight, recipe):
        weight = dataclasses.replace(weight, master=unread(weight.master))
      variable = variable.replace(weight)
    flat.append((path, variable))
  return nnx.from_flat_state(flat)


def _is_read(weight: Weight, recipe: Recipe) -> bool:
  """Whether anything reads the array itself, beside its copies."""
  readers = weight.amax, weight.report, weight.high
  copied = recipe.fprop_w and recipe.dgrad_w
  return not copied or any(reader is not None for reader in readers)


def zeros(params: nnx.State, shape: tuple[int, ...]) -> Named:
  """An array of zeros beside every Linear of every layer."""
  return {
    name: jnp.zeros((len(w.get_value()), *shape), jnp.float32)
    for name, w in linears(params).items()
  }


def amax_zeros(params: nnx.State, model: config.Model) -> Named:
  """Where a step puts its amaxes; empty where the recipe asks for none."""
  recipe = recipe_of(model)
  delayed = recipe is not None and recipe.scaling == "delayed"
  return zeros(params, (3,)) if delayed else {}


def report_zeros(params: nnx.State) -> Named:
  """Where a report of every Linear goes."""
  return zeros(params, report.SHAPE)


def seeds(params: nnx.State, model: config.Model, key: jax.Array) -> Named:
  """A seed for every Linear; empty where rounding is to nearest."""
  recipe = recipe_of(model)
  if recipe is None or recipe.rounding != "stochastic":
    return {}
  return {
    name: jax.random.bits(
      jax.random.fold_in(key, i), (len(w.get_value()),), jnp.uint32
    )
    for i, (name, w) in enumerate(linears(params).items())
  }


def loss_scale(model: config.Model, n_tokens: jax.Array) -> jax.Array | float:
  """What a loss is multiplied by before its gradient is taken; 1 without FP8.

  The least power of two that is not under the tokens of the global batch, so
  that nothing is rounded.

  Departs: the report says nothing of it. The gradient of a mean over its 63M
  tokens would lie below the least scale that the released kernels allow.
  """
  if recipe_of(model) is None:
    return 1.0
  return fp8.ceil_power2(jnp.maximum(n_tokens, 1).astype(jnp.float32))


def remember(memory: Memory, amax: Named) -> Memory:
  """The memory with the amaxes of one more step."""
  push = lambda old, new: jnp.concatenate([new[..., None], old[..., :-1]], -1)
  return memory._replace(history=jax.tree.map(push, memory.history, amax))
