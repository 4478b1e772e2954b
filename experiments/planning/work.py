"""What a device computes in a step of a compiled TPU program: products, kernels, cycles.

The compiler's own counts take a loop once; here it counts as often as it runs. Nothing else is
modelled: not memory, not the network, not how they overlap.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .program import Line, lines, op_name, result

_PRODUCT = re.compile(r" convolution\(%([\w.\-]+), %([\w.\-]+)\)(.*)")
_CYCLES = re.compile(r'window_config":\{.*?"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r' custom-call\(.*custom_call_target="tpu_custom_call"')
_UNKNOWN = 2**62  # the compiler writes 2**63 where it has no estimate
_COST = r'cost_estimate":\{[^}]*"%s":"?(\d+)'
_FLOPS, _BYTES = re.compile(_COST % "flops"), re.compile(_COST % "bytes_accessed")


class Op(NamedTuple):
  """Part of the work of a step."""

  kind: str  # product, kernel: `amount` is FLOP; cycles: those the compiler expects
  name: str  # where in the model it comes from
  amount: float  # each time
  times: int  # how often a step runs it
  bytes: float = 0.0  # a kernel's, in memory, each time

  @property
  def total(self) -> float:
    return self.amount * self.times

  @property
  def recomputed(self) -> bool:
    """Whether the backward pass repeats it."""
    return "rematted_computation" in self.name


def work(text: str) -> list[Op]:
  """Every product, kernel and cycle estimate of a program.

  Products and their fusions have estimated cycles too; kernels have none. A kernel's FLOP and
  bytes are what its author states (`pl.CostEstimate`).
  """
  listed = list(lines(text))
  shapes = {made[0]: made[2] for line in listed if (made := result(line.text))}
  found = []
  for line in listed:
    found += _ops(line, shapes)
  return found


def _ops(line: Line, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Op]:
  name = op_name(line.text)
  if product := _PRODUCT.search(line.text):
    made = result(line.text)
    assert made, line.text
    flops = _flops(made[2], shapes[product[1]], shapes[product[2]], product[3])
    yield Op("product", name, flops, line.times)
  if _KERNEL.search(line.text):
    flops, size = (int(s[1]) if (s := p.search(line.text)) else 0 for p in (_FLOPS, _BYTES))
    yield Op("kernel", name, flops, line.times, size)
  if (cycles := _CYCLES.search(line.text)) and int(cycles[1]) < _UNKNOWN:
    yield Op("cycles", name, int(cycles[1]), line.times)


def _flops(out: tuple, left: tuple, right: tuple, attributes: str) -> int:
  """Of a convolution, as which the TPU's compiler writes every matrix product.

  Letters of `dim_labels`: b batch, f feature, i and o features of the right side, digits window
  dims. Positions of a window that lie in padding or in the gaps of a dilated side multiply nothing.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  assert labels, attributes
  size = lambda shape, letters, which: shape[letters.index(which)] if which in letters else 1
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _braces(attributes)))
  groups = re.search(r"feature_group_count=(\d+)", attributes)
  batches = re.search(r"batch_group_count=(\d+)", attributes)
  positions = 1
  for i, digit in enumerate(sorted(filter(str.isdigit, labels[1]))):
    at = lambda key, default, i=i: window[key].split("x")[i] if key in window else default
    positions *= _valid(
      size(left, labels[1], digit),
      size(right, labels[2], digit),
      size(out, labels[3], digit),
      stride=int(at("stride", "1")),
      before=int(at("pad", "0_0").split("_")[0]),
      gap=int(at("lhs_dilate", "1")),
      step=int(at("rhs_dilate", "1")),
    )
  contracted = size(left, labels[1], "f") // (int(groups[1]) if groups else 1)
  batch = size(left, labels[1], "b") // (int(batches[1]) if batches else 1)
  return 2 * contracted * batch * size(right, labels[2], "o") * positions


def _braces(attributes: str) -> str:
  found = re.search(r"window=\{([^}]*)\}", attributes)
  return found[1] if found else ""


def _valid(rows, window, results, *, stride, before, gap, step) -> int:
  """Pairs of a result and a place in its window that meet a row."""
  last = (rows - 1) * gap
  places = (o * stride + k * step - before for o in range(results) for k in range(window))
  return sum(0 <= place <= last and place % gap == 0 for place in places)


def totals(found: Iterable[Op], groups: Iterable[str]) -> dict[str, float]:
  """Sums by the first of `groups` that the name contains; what has none is "other"."""
  sums = dict.fromkeys((*groups, "other"), 0.0)
  for op in found:
    sums[next((group for group in groups if group in op.name), "other")] += op.total
  return sums
