"""What a model asks of the devices it is spread over: values, handed to it.

The model speaks of logical dims, letters of the legend; `dsv3.parallel` makes the
values of a mesh. The ones here are those of a single device.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsv3.ops.dispatch import through_experts


@dataclasses.dataclass(frozen=True)
class Peers:
  """The other devices, to a function that each runs on its own part.

  total(x, dims): the sum of x over the devices that share these dims.
  whole(x, dim, axis): the parts of x along `dim`, its `axis`, in their order.
  starts(n): of the n positions here, the first of each run of neighbours; the
    runs are equally long.
  exchange: as `dispatch.through_experts`, wherever the experts are.
  """

  total: Callable[[Any, str], Any]
  whole: Callable[[jax.Array, str, int], jax.Array]
  starts: Callable[[int], Sequence[jax.Array | int]]
  exchange: Callable[..., tuple]


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the arrays of a model lie, and which device computes what.

  place(x, dims): x, shared out by its dims: "BLD" deals sequences. One that does
    not divide lies where the compiler has it.
  parts(dim): the devices that have different parts of a dim, which it is a
    multiple of where a function is `spread`.
  dealt(x): x with positions, its last dim, in the order of the devices that share
    them: each has early and late ones, so that all have as much past to see.
  gather(weights, dtype): a weight, or the weights of a module, as products read
    them: still float32, and of a Linear (or of the one that is given) no more
    than the digits of `dtype`, in which it is multiplied.
  spread(function, dims_in, dims_out): `function`, run by every device on its
    own part. It takes Peers and then arrays of these dims, or modules (""). What
    it returns is the same on the devices that share no dim of it.
  """

  place: Callable[[Any, str], Any]
  parts: Callable[[str], int]
  dealt: Callable[[jax.Array], jax.Array]
  gather: Callable[[Any, Any], Any]
  spread: Callable[[Callable, Sequence[str], Any], Callable]


ALONE = Peers(
  total=lambda x, dims: x,
  whole=lambda x, dim, axis: x,
  starts=lambda n: (0,),
  exchange=through_experts,
)

ONE_DEVICE = Placement(
  place=lambda x, dims: x,
  parts=lambda dim: 1,
  dealt=lambda x: x,
  gather=lambda weights, dtype: weights,
  spread=lambda function, dims_in, dims_out: functools.partial(function, ALONE),
)
