"""Functional layers for large language models, importable from any JAX project.

Pure functions (`attention`, `switch_route`, `moe`, `mlp`, `rms_norm`, ...) take arrays and return
arrays; Linen shells (`Attention`, `SwitchMoE`, `TransformerLM`, ...) own the weights. `init_params`
and `to_nnx` give unboxed parameters with and without a mesh.
"""
