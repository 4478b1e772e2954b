"""The dense twin of moe_tiny: equal active FLOPs a token, equal steps, the same data.

Command: python -m experiments.run --config=dense_tiny
Hardware: two CPU cores.
Result: 1.857 held-out bits a byte on two cores, 2026-11-21.
"""

import dataclasses

from experiments.config import Config
from layers.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec, Segment

from . import moe_tiny


def _dense(layer: LayerSpec) -> LayerSpec:
  mlp = layer.mlp.expert if isinstance(layer.mlp, MoeSpec) else layer.mlp
  assert isinstance(mlp, MlpSpec)
  return dataclasses.replace(layer, mlp=mlp)


def config() -> Config:
  sparse = moe_tiny.config()
  segments = tuple(Segment(tuple(map(_dense, s.layers)), s.repeats) for s in sparse.model.segments)
  model: ModelSpec = dataclasses.replace(sparse.model, segments=segments)
  return dataclasses.replace(
    sparse,
    name="dense_tiny",
    model=model,
    eval=dataclasses.replace(sparse.eval, twin=""),
  )
