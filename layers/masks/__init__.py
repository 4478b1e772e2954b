"""Which key a query may see: frozen, hashable values that combine with `&`, `|` and `~`.

A mask is a rule on position ids, of numpy, JAX or a Pallas kernel alike: comparisons and int32
arithmetic only. It can be a static argument of `jax.jit` and a field of a config. Kernels also ask
what it says of whole blocks (`blocks`), and skip those that hold nothing. "Visible" below means
that query position i may attend to key position j. Sources: arXiv 2106.04554 for the patterns that
others are made of; those with a model's name give their own.

To add one, write a frozen dataclass with `visible`, `blocks` and `reach` (`rules`), or, if it is
made of others, a `Pattern` with `rule` (`patterns`), and name it in `text`.
"""

from .algebra import And, Mask, Not, Or, PerHead
from .patterns import (
  BigBird,
  Chunked,
  GemmaLocal,
  GPT3Banded,
  Longformer,
  MistralWindow,
  SparseTransformer,
)
from .rules import (
  BlockLocal,
  Causal,
  Dilated,
  Fixed,
  Full,
  Global,
  Local,
  RandomBlocks,
  Strided,
)
from .text import parse_mask

__all__ = [
  "And", "BigBird", "BlockLocal", "Causal", "Chunked", "Dilated", "Fixed", "Full", "GPT3Banded",
  "GemmaLocal", "Global", "Local", "Longformer", "Mask", "MistralWindow", "Not", "Or", "PerHead",
  "RandomBlocks", "SparseTransformer", "Strided", "parse_mask",
]  # fmt: skip
