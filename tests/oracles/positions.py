"""Position encodings from the papers' definitions, a number at a time, in float64."""

import cmath
import math

import numpy as np


def frequency(pair, dims, theta):
  return 1.0 / theta ** (2 * pair / dims)


def llama3_frequency(f, factor, low, high, length):
  """Meta's rule in wavelengths."""
  wavelength = 2 * math.pi / f
  if wavelength < length / high:
    return f
  if wavelength > length / low:
    return f / factor
  smooth = (length / wavelength - low) / (high - low)
  return (1 - smooth) * f / factor + smooth * f


def yarn_frequencies(dims, theta, factor, length, fast, slow, truncate):
  """Find by bisection the real pair index that makes `fast` (`slow`) turns in `length` positions,
  then go over from f to f / factor linearly between the two."""

  def index_of(turns):
    low, high = -2.0 * dims, 2.0 * dims
    for _ in range(200):
      middle = (low + high) / 2
      if length * frequency(middle, dims, theta) / (2 * math.pi) > turns:
        low = middle
      else:
        high = middle
    return low

  first, last = index_of(fast), index_of(slow)
  if truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dims - 1)
  result = []
  for pair in range(dims // 2):
    f = frequency(pair, dims, theta)
    if pair <= first:
      result.append(f)
    elif pair >= last:
      result.append(f / factor)
    else:
      share = (pair - first) / (last - first)
      result.append(f * (1 - share) + f / factor * share)
  return np.array(result)


def rotate(x, positions, inv_freq, interleaved, factor=1.0):
  """Each pair as a complex number times factor * exp(i * position * frequency)."""
  x = np.asarray(x, np.float64)
  y, half = x.copy(), len(inv_freq)
  for b, t, n in np.ndindex(x.shape[:3]):
    for k, f in enumerate(inv_freq):
      first, second = (2 * k, 2 * k + 1) if interleaved else (k, half + k)
      z = complex(x[b, t, n, first], x[b, t, n, second])
      z *= factor * cmath.exp(1j * float(positions[b, t]) * float(f))
      y[b, t, n, first], y[b, t, n, second] = z.real, z.imag
  return y


def alibi_slopes(num_heads):
  """The paper's recursion over powers of two."""
  if num_heads & (num_heads - 1) == 0:
    ratio = 2 ** (-8 / num_heads)
    return [ratio ** (h + 1) for h in range(num_heads)]
  below = 1
  while 2 * below <= num_heads:
    below *= 2
  return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: num_heads - below]


def t5_bucket(relative_position, num_buckets, max_distance, bidirectional):
  """T5's rule in its own sign: relative position = key position - query position."""
  bucket = 0
  if bidirectional:
    num_buckets //= 2
    if relative_position > 0:
      bucket += num_buckets
    n = abs(relative_position)
  else:
    n = max(-relative_position, 0)
  exact = num_buckets // 2
  if n < exact:
    return bucket + n
  share = math.log(n / exact) / math.log(max_distance / exact)
  # 1e-12: at an edge the real value is a whole number that the logarithms miss by rounding.
  return bucket + min(exact + math.floor(share * (num_buckets - exact) + 1e-12), num_buckets - 1)


def sinusoids(num_positions, dim, theta=10_000.0):
  table = np.zeros((num_positions, dim))
  for r in range(num_positions):
    for k in range(dim // 2):
      table[r, k] = math.sin(r * frequency(k, dim, theta))
      table[r, dim // 2 + k] = math.cos(r * frequency(k, dim, theta))
  return table
