"""The masks of published models, made of the rules."""

import abc
from dataclasses import dataclass
from typing import Any

from .algebra import Array, Mask, Reach, require
from .rules import (
  BlockLocal,
  Causal,
  Dilated,
  Fixed,
  Global,
  Local,
  RandomBlocks,
  Strided,
)


class Pattern(Mask):
  """A mask made of others."""

  @property
  @abc.abstractmethod
  def rule(self) -> Mask:
    """What it is made of."""

  def visible(self, i: Array, j: Array) -> Any:
    return self.rule.visible(i, j)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    return self.rule.blocks(i0, i1, j0, j1)

  @property
  def reach(self) -> Reach:
    return self.rule.reach

  @property
  def interval(self) -> Reach | None:
    return self.rule.interval

  @property
  def relative(self) -> bool:
    return self.rule.relative


@dataclass(frozen=True)
class Chunked(Pattern):
  """Causal, within runs of `size` positions (Llama 4)."""

  size: int

  @property
  def rule(self) -> Mask:
    return Causal() & BlockLocal(self.size)


@dataclass(frozen=True)
class MistralWindow(Pattern):
  """The last `window` positions, the query's own included (arXiv 2310.06825)."""

  window: int = 4096

  @property
  def rule(self) -> Mask:
    return Local(self.window - 1)


@dataclass(frozen=True)
class GemmaLocal(Pattern):
  """The local layers of Gemma: 4096 in Gemma 2 (arXiv 2408.00118), 512 or 1024 in Gemma 3."""

  window: int = 1024

  @property
  def rule(self) -> Mask:
    return Local(self.window - 1)


@dataclass(frozen=True)
class GPT3Banded(Pattern):
  """The locally banded layers of GPT-3 (arXiv 2005.14165), whose width was not published."""

  width: int = 256

  @property
  def rule(self) -> Mask:
    return Local(self.width - 1)


@dataclass(frozen=True)
class SparseTransformer(Pattern):
  """Factorised attention (arXiv 1904.10509, section 4.3), causal.

  strided: the last `stride` positions and one's own, and every `stride`-th; fixed: one's own run of
  `stride` positions, and the `last` positions of all runs. `part` is what one head or layer of
  those that alternate sees: "local", "far", or "both".
  """

  stride: int = 128
  kind: str = "strided"
  last: int = 8  # fixed only
  part: str = "both"

  def __post_init__(self):
    require(self.kind in ("strided", "fixed"), f"kind {self.kind!r} is neither strided nor fixed")
    require(
      self.part in ("local", "far", "both"), f"part {self.part!r} is none of local, far, both"
    )

  @property
  def rule(self) -> Mask:
    if self.kind == "strided":
      near, far = Local(self.stride), Strided(self.stride)
    else:
      near, far = BlockLocal(self.stride), Fixed(self.stride, self.last)
    return Causal() & {"local": near, "far": far, "both": near | far}[self.part]


@dataclass(frozen=True)
class Longformer(Pattern):
  """A window to both sides, `dilation` apart, and tokens at the start that see and are seen by all
  (arXiv 2004.05150); not causal."""

  window: int = 512
  tokens: int = 0
  dilation: int = 1

  @property
  def rule(self) -> Mask:
    near = Dilated(self.dilation, self.window // 2, self.window // 2)
    return near | Global(self.tokens) if self.tokens else near


@dataclass(frozen=True)
class BigBird(Pattern):
  """Three runs around the query's, the first and the last, and some at random (arXiv 2007.14062,
  internal form); not causal, and not circular."""

  num_blocks: int
  size: int = 64
  random: int = 3
  seed: int = 0

  @property
  def rule(self) -> Mask:
    last = (self.num_blocks - 1) * self.size
    rule = BlockLocal(self.size, 1, 1) | Global(self.size) | Global(self.size, start=last)
    if not self.random:
      return rule
    return rule | RandomBlocks(self.seed, self.size, self.random, self.num_blocks, edges=1, near=1)
