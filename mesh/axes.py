"""Names of mesh axes and of logical axes, and the legend of dimension letters.

Dimension letters, used as suffixes of array names (`x_BTD`) and in einsum strings:

  B batch            D model width       V vocabulary        C expert capacity
  T query positions  F feed-forward      L layers            R routed rows, or positions a page
  S key positions    N query heads       M tokens (B*T)      X experts chosen per token
  H head size        K key/value heads   E experts           G = N // K, or routing groups
  U value head size  P pages of a cache  J pages a row
"""

# Slowest network first: whole replicas over `data`, pipeline stages next, then the axes that
# exchange in every layer, with `tensor` innermost where the links are fastest.
MESH_AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")

PARAM_AXES = (
  "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab",
  "expert", "expert_embed", "expert_mlp", "norm", "layers",
)  # fmt: skip

ACTIVATION_AXES = (
  "act_batch", "act_seq", "act_norm_seq", "act_embed", "act_mlp", "act_heads", "act_kv_heads",
  "act_vocab", "act_expert",
)  # fmt: skip

CACHE_AXES = ("cache_batch", "cache_seq", "cache_heads")

LOGICAL_AXES = PARAM_AXES + ACTIVATION_AXES + CACHE_AXES
