"""Functional layers for large language models, importable from any JAX project.

Pure functions take arrays and keywords and return arrays or NamedTuples; Linen shells own the
weights and call them. `init_params` and `to_nnx` give plain parameters, with and without a mesh.
Specs (`AttentionSpec`, `MoeSpec`, `ModelSpec`, ...) are frozen dataclasses that describe shells.
"""

from .attention import Attention, Rows, causal_mask
from .block import Block
from .cache import KVCache, LinearState, empty_cache, empty_state, update_cache
from .count import count_params, train_flops_per_token
from .dispatch import assign_slots, expert_capacity, permute, slot_weights, sort_slots, unpermute
from .embedding import Embedding, embed_tokens
from .experts import ExpertMath, ExpertWeights, expert_mlp, grouped_expert_mlp
from .kernels.attention import attention
from .kernels.cross_entropy import CrossEntropy, cross_entropy
from .kernels.grouped_matmul import grouped_matmul, grouped_mlp
from .kernels.linear_attention import linear_attention
from .latent_attention import LatentAttention, absorbed_attention, latent_attention
from .linear import dense
from .linear_attention import LinearAttention, elu_plus_one, favor_features, favor_projection
from .masks import BlockLocal, Causal, Local, Mask
from .mlp import Mlp, activate, mlp
from .moe import MoeStats, SwitchMoE, moe
from .norms import Norm, layer_norm, rms_norm
from .params import init_params, to_nnx
from .positions import alibi_slopes, apply_rotary, rotary_table
from .router import (
  Routing,
  expert_choice_route,
  gshard_route,
  hash_route,
  no_token_left_behind_route,
  switch_route,
  top_k_route,
)
from .spec import (
  AlibiSpec,
  AttentionSpec,
  BucketedSpec,
  EmbeddingSpec,
  HeadSpec,
  InitSpec,
  LatentAttentionSpec,
  LayerSpec,
  LearnedPositionSpec,
  LinearAttentionSpec,
  LinearScaling,
  Llama3Scaling,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
  TransformerXLSpec,
  YarnScaling,
)
from .transformer import LMOutput, TransformerLM, init_caches

__all__ = [
  "AlibiSpec", "Attention", "AttentionSpec", "Block", "BlockLocal", "BucketedSpec", "Causal",
  "CrossEntropy", "Embedding", "EmbeddingSpec", "ExpertMath", "ExpertWeights", "HeadSpec",
  "InitSpec", "KVCache", "LMOutput", "LatentAttention", "LatentAttentionSpec", "LayerSpec",
  "LearnedPositionSpec", "LinearAttention", "LinearAttentionSpec", "LinearScaling", "LinearState",
  "Llama3Scaling", "Local", "Mask", "Mlp", "MlpSpec", "ModelSpec", "MoeSpec", "MoeStats", "Norm",
  "NormSpec", "RotarySpec", "Routing", "Rows", "Segment", "SwitchMoE", "TransformerLM",
  "TransformerXLSpec", "YarnScaling", "absorbed_attention", "activate", "alibi_slopes",
  "apply_rotary", "assign_slots", "attention", "causal_mask", "count_params", "cross_entropy",
  "dense", "elu_plus_one", "embed_tokens", "empty_cache", "empty_state", "expert_capacity",
  "expert_choice_route", "expert_mlp", "favor_features", "favor_projection", "grouped_expert_mlp",
  "grouped_matmul", "grouped_mlp", "gshard_route", "hash_route", "init_caches", "init_params",
  "latent_attention", "layer_norm", "linear_attention", "mlp", "moe",
  "no_token_left_behind_route", "permute", "rms_norm", "rotary_table", "slot_weights",
  "sort_slots", "switch_route", "to_nnx", "top_k_route", "train_flops_per_token", "unpermute",
  "update_cache",
]  # fmt: skip
