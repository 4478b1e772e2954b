"""Numbers from the blocks of GGUF's quantized types, one at a time in float64.

Written from the structs of ggml-common.h and the loops of ggml-quants.c (github.com/ggml-org/ggml);
each function takes the bytes of a block.
"""

import numpy as np

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NONLINEAR = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def half(b, at):
  return float(b[at : at + 2].view(np.float16)[0])


def low_high(qs):
  """Of n bytes the low halves, then the high ones."""
  return [q & 15 for q in qs] + [q >> 4 for q in qs]


def q4_0(b):
  return [half(b, 0) * (q - 8) for q in low_high(b[2:].tolist())]


def q4_1(b):
  return [half(b, 0) * q + half(b, 2) for q in low_high(b[4:].tolist())]


def fifth(b, at):
  bits = int(b[at : at + 4].view("<u4")[0])
  low = low_high(b[at + 4 :].tolist())
  return [q | (bits >> i & 1) << 4 for i, q in enumerate(low)]


def q5_0(b):
  return [half(b, 0) * (q - 16) for q in fifth(b, 2)]


def q5_1(b):
  return [half(b, 0) * q + half(b, 2) for q in fifth(b, 4)]


def q8_0(b):
  return [half(b, 0) * int(q) for q in b[2:].view(np.int8)]


def q2_k(b):
  scales, qs, d, least = b[:16].tolist(), b[16:80].tolist(), half(b, 80), half(b, 82)
  made = []
  for i in range(256):
    part, shift, j = i // 128, i % 128 // 32 * 2, i % 32
    s = scales[i // 16]
    made.append(d * (s & 15) * (qs[32 * part + j] >> shift & 3) - least * (s >> 4))
  return made


def q3_k(b):
  mask, qs, packed, d = b[:32].tolist(), b[32:96].tolist(), b[96:108].tolist(), half(b, 108)
  scales = []
  for i in range(16):
    low = packed[i] & 15 if i < 8 else packed[i - 8] >> 4
    scales.append((low | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32)
  made = []
  for i in range(256):
    part, shift, j = i // 128, i % 128 // 32 * 2, i % 32
    q = (qs[32 * part + j] >> shift & 3) - (0 if mask[j] >> (i // 32) & 1 else 4)
    made.append(d * scales[i // 16] * q)
  return made


def scale_and_least(packed, j):
  if j < 4:
    return packed[j] & 63, packed[j + 4] & 63
  low, high = packed[j + 4] & 15, packed[j + 4] >> 4
  return low | packed[j - 4] >> 6 << 4, high | packed[j] >> 6 << 4


def q4_k(b):
  d, least, packed, qs = half(b, 0), half(b, 2), b[4:16].tolist(), b[16:].tolist()
  made = []
  for i in range(256):
    scale, low = scale_and_least(packed, i // 32)
    q = qs[i // 64 * 32 + i % 32]
    made.append(d * scale * (q >> 4 if i % 64 >= 32 else q & 15) - least * low)
  return made


def q5_k(b):
  d, least, packed = half(b, 0), half(b, 2), b[4:16].tolist()
  high, qs = b[16:48].tolist(), b[48:].tolist()
  made = []
  for i in range(256):
    scale, low = scale_and_least(packed, i // 32)
    q = qs[i // 64 * 32 + i % 32]
    q = (q >> 4 if i % 64 >= 32 else q & 15) + 16 * (high[i % 32] >> (i // 32) & 1)
    made.append(d * scale * q - least * low)
  return made


def q6_k(b):
  low, high, d = b[:128].tolist(), b[128:192].tolist(), half(b, 208)
  scales = b[192:208].view(np.int8).tolist()
  made = []
  for i in range(256):
    part, quarter, j = i // 128, i % 128 // 32, i % 32
    byte = low[64 * part + 32 * (quarter % 2) + j]
    q = (byte >> 4 if quarter >= 2 else byte & 15) | (high[32 * part + j] >> 2 * quarter & 3) << 4
    made.append(d * scales[i // 16] * (q - 32))
  return made


def iq4_nl(b):
  return [half(b, 0) * NONLINEAR[q] for q in low_high(b[2:].tolist())]


def iq4_xs(b):
  d, high, low = half(b, 0), int(b[2:4].view("<u2")[0]), b[4:8].tolist()
  made = []
  for i in range(8):
    scale = (low[i // 2] >> 4 * (i % 2) & 15 | (high >> 2 * i & 3) << 4) - 32
    made += [d * scale * NONLINEAR[q] for q in low_high(b[8 + 16 * i : 24 + 16 * i].tolist())]
  return made


def mxfp4(b):
  values = [*E2M1, *(-x for x in E2M1)]
  return [2.0 ** (int(b[0]) - 127) * values[q] for q in low_high(b[1:].tolist())]


def tq2_0(b):
  qs, d = b[:64].tolist(), half(b, 64)
  return [d * ((qs[i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3) - 1) for i in range(256)]


def bf16(b):
  return [float((b.view("<u2").astype("<u4") << 16).view("<f4")[0])]


# By name: the function, where its float16 factors are, bytes and numbers of a block.
BLOCKS = {
  "Q4_0": (q4_0, (0,), 18, 32), "Q4_1": (q4_1, (0, 2), 20, 32), "Q5_0": (q5_0, (0,), 22, 32),
  "Q5_1": (q5_1, (0, 2), 24, 32), "Q8_0": (q8_0, (0,), 34, 32), "Q2_K": (q2_k, (80, 82), 84, 256),
  "Q3_K": (q3_k, (108,), 110, 256), "Q4_K": (q4_k, (0, 2), 144, 256),
  "Q5_K": (q5_k, (0, 2), 176, 256), "Q6_K": (q6_k, (208,), 210, 256),
  "IQ4_NL": (iq4_nl, (0,), 18, 32), "IQ4_XS": (iq4_xs, (0,), 136, 256),
  "MXFP4": (mxfp4, (), 17, 32), "TQ2_0": (tq2_0, (64,), 66, 256),
}  # fmt: skip
