"""The shells in Flax NNX programs."""

import dataclasses
from typing import Any

from flax import linen as nn

from .params import unbox


def to_nnx(shell: nn.Module, rngs: Any, *inputs: Any, **kwargs: Any) -> Any:
  """An NNX module of a Linen shell, its weights drawn for `inputs`; with and without a mesh.

  `flax.nnx.bridge.ToNNX` by itself keeps the logical axes as if they were mesh axes, and raises
  where there is no mesh to match; here the parameters are plain.

  Args:
    shell: any shell of this package.
    rngs: `flax.nnx.Rngs`.
    inputs, kwargs: as for a call of the shell.

  Returns:
    A module called like the shell, whose parameters are `nnx.Param`s.
  """
  # NNX is a second module system, which most programs never load.
  from flax import nnx

  class Plain(type(shell)):
    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
      out, variables = super().init_with_output(*args, **kwargs)
      return out, unbox(variables)

  fields = (
    f.name for f in dataclasses.fields(shell) if f.init and f.name not in ("parent", "name")
  )
  module = nnx.bridge.ToNNX(Plain(**{name: getattr(shell, name) for name in fields}), rngs)
  return nnx.bridge.lazy_init(module, *inputs, **kwargs)
