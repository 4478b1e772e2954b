"""Masks as sets of visible keys, a pair at a time."""

import numpy as np


def full(i, j):
  return True


def causal(i, j):
  return j <= i


def local(left, right=0):
  return lambda i, j: j in range(i - left, i + right + 1)


def dilated(step, left, right=0):
  return lambda i, j: j in {i + k * step for k in range(-left, right + 1)}


def strided(stride):
  return lambda i, j: any(abs(i - j) == k * stride for k in range(abs(i - j) + 1))


def block_local(size, left=0, right=0):
  def visible(i, j):
    start = i - i % size
    return j in range(start - left * size, start + (right + 1) * size)

  return visible


def fixed(stride, last):
  summaries = lambda upto: {s - 1 - k for s in range(stride, upto, stride) for k in range(last)}
  return lambda i, j: j in summaries(j + 2 * stride)


def global_tokens(tokens, start=0):
  chosen = range(start, start + tokens)
  return lambda i, j: i in chosen or j in chosen


def both(*rules):
  return lambda i, j: all(rule(i, j) for rule in rules)


def either(*rules):
  return lambda i, j: any(rule(i, j) for rule in rules)


def none(rule):
  return lambda i, j: not rule(i, j)


def table(rule, queries, keys):
  """bool [queries, keys] over the given ids."""
  return np.array([[rule(int(i), int(j)) for j in keys] for i in queries])
