"""Masks as sets of visible keys, a pair at a time."""

import numpy as np


def causal(i, j):
  return j <= i


def local(window):
  """The query's own key and the window - 1 before it."""
  return lambda i, j: j in range(i - window + 1, i + 1)


def block_local(chunk):
  def visible(i, j):
    start = i - i % chunk
    return j in range(start, start + chunk)

  return visible


def both(*rules):
  return lambda i, j: all(rule(i, j) for rule in rules)


def table(rule, queries, keys):
  """bool [queries, keys] over the given ids."""
  return np.array([[rule(int(i), int(j)) for j in keys] for i in queries])
