import numpy as np
import pytest

from dsv3.data.mixture import BLOCK, Mixture, Once, apportion


@pytest.mark.parametrize("weights", [(1,), (3, 1), (0.1, 0.2, 0.7), (1e-9, 1)])
def test_mixture_counts_are_exact_in_every_block(weights):
  mixture = Mixture(weights, seed=3)
  share = np.array(weights) / sum(weights) * BLOCK
  wanted = apportion(weights, BLOCK)
  assert (abs(wanted - share) <= 1).all() and wanted.sum() == BLOCK
  orders = []
  for block in (0, 1, 7):
    rows = range(block * BLOCK, (block + 1) * BLOCK)
    orders.append([mixture.locate(row)[0] for row in rows])
    assert np.array_equal(np.bincount(orders[-1]), wanted)
  if len(weights) > 1:
    assert orders[0] != orders[1]
    assert sorted(orders[0]) != orders[0]


def test_mixture_reads_every_source_row_by_row():
  mixture = Mixture((3, 2, 1), seed=0)
  seen = [0, 0, 0]
  for row in range(3 * BLOCK):
    assert [mixture.n_of(s, row) for s in range(3)] == seen
    source, at = mixture.locate(row)
    assert at == seen[source]
    seen[source] += 1


def test_mixture_order_is_of_the_seed():
  orders = []
  for seed in (0, 1, 0):
    mixture = Mixture((1, 1), seed)
    orders.append([mixture.locate(row)[0] for row in range(BLOCK)])
  assert orders[0] == orders[2] != orders[1]


def test_apportion_is_exact_where_it_can_be():
  assert apportion((3, 1), 8).tolist() == [6, 2]
  assert apportion((2, 1, 1), 1024).tolist() == [512, 256, 256]
  assert apportion((1000, 1, 1), 8).tolist() == [6, 1, 1]


def test_once_has_every_row_once():
  once = Once([3, 0, 5])
  found = [once.locate(row) for row in range(len(once))]
  assert sorted(found) == [(0, i) for i in range(3)] + [
    (2, i) for i in range(5)
  ]
  assert found != sorted(found)
  for rows in (0, 4, 8):
    counts = [sum(s == i for s, _ in found[:rows]) for i in range(3)]
    assert [once.n_of(i, rows) for i in range(3)] == counts
