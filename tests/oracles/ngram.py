"""Interpolated Witten-Bell n-grams by dictionaries (Witten and Bell 1991)."""

import math
from collections import Counter, defaultdict


def bits_per_byte(train, heldout, order, eod):
  followers = defaultdict(Counter)
  for length in range(order):
    for i in range(length, len(train)):
      followers[tuple(train[i - length : i])][train[i]] += 1

  def probability(symbol, context):
    shorter = probability(symbol, context[1:]) if context else 1 / (eod + 1)
    seen = followers.get(context)
    if seen is None:
      return shorter
    total, kinds = sum(seen.values()), len(seen)
    return (seen[symbol] + kinds * shorter) / (total + kinds)

  line = [*train, *heldout]
  bits, num_bytes = 0.0, 0
  for i in range(len(train) + 1, len(line)):
    if line[i - 1] == eod:
      continue
    bits -= math.log2(probability(line[i], tuple(line[i - order + 1 : i])))
    num_bytes += line[i] != eod
  return bits / num_bytes
