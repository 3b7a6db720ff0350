"""AdamW with clipping by global norm (Sec. 4.2), on a dict of arrays."""

import math

import numpy as np


def global_norm(grads):
  """Root of the sum of squares of all entries of all arrays."""
  return math.sqrt(
    sum(float(x) ** 2 for grad in grads.values() for x in np.ravel(grad))
  )


def clip(grads, largest):
  """Gradients scaled down together to a global norm of at most `largest`."""
  norm = global_norm(grads)
  scale = largest / norm if norm > largest else 1.0
  return {name: grad * scale for name, grad in grads.items()}


def adamw(
  params, grads, m, v, step, lr, decayed, b1=0.9, b2=0.95, eps=1e-8, decay=0.1
):
  """One step; the gradients come in clipped.

  Args:
    params, grads, m, v: dicts of arrays of the same names.
    step: 1 for the first step.
    lr: learning rate of the step.
    decayed: names that weight decay acts on.
    b1, b2, eps, decay: of AdamW; eps is not in the report.

  Returns:
    params, m, v after the step.
  """
  new_params, new_m, new_v = {}, {}, {}
  for name, param in params.items():
    grad = grads[name]
    new_m[name] = b1 * m[name] + (1 - b1) * grad
    new_v[name] = b2 * v[name] + (1 - b2) * grad**2
    m_hat = new_m[name] / (1 - b1**step)
    v_hat = new_v[name] / (1 - b2**step)
    update = m_hat / (np.sqrt(v_hat) + eps)
    if name in decayed:
      update = update + decay * param
    new_params[name] = param - lr * update
  return new_params, new_m, new_v
