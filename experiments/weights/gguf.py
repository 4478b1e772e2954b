"""GGUF files, by the `gguf` package: tensors with any of its quantizations, metadata, tokenizer."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ..config import ConfigError
from ..data.tokenizer import BpeTokenizer
from .source import Source, Tensor

# What cuts text before the bytes, by the name that GGUF has for it.
_BEFORE = {
  "gpt-2": [],
  "smollm": [tokenizers.pre_tokenizers.Digits(individual_digits=True)],
}
_CONTROL = 3  # type of a token that is no text
_FIELDS = {
  "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.sliding_window": "sliding_window", "rope.freq_base": "rope_theta",
  "vocab_size": "vocab_size",
}  # fmt: skip


def open_gguf(path: Path) -> Source:
  """Names, shapes and metadata; a tensor is dequantized, to float32, when it is read.

  Raises:
    ConfigError: the package is missing, the file is damaged, or of a type that is not read.
  """
  try:
    import gguf  # an extra
  except ImportError as e:
    raise ConfigError(f"{path} needs the gguf package: pip install 'meshyard[gguf]'") from e
  try:
    reader = gguf.GGUFReader(path)
  except Exception as e:  # it raises whatever the bytes lead to
    raise ConfigError(f"{path} is damaged or no GGUF file: {e}") from e
  tensors = {}
  for t in reader.tensors:
    plain = t.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    if not plain and t.tensor_type not in gguf.quants._type_traits:
      raise ConfigError(f"{path}: {t.name} is {t.tensor_type.name}, which is not read")
    shape = tuple(int(n) for n in reversed(t.shape))
    tensors[t.name] = Tensor(shape, partial(_read, t, shape))
  return Source(path, tensors, _config(path, reader, tensors), reader)


def _read(tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
  import gguf  # the same

  return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def metadata(source: Source, name: str) -> Any:
  """What the file says under this name; None if nothing."""
  return field.contents() if (field := source.gguf.get_field(name)) else None


def read_tokenizer(source: Source) -> BpeTokenizer:
  """The tokenizer inside the file.

  Raises:
    ConfigError: there is none, or of a kind that is not read.
  """
  field = lambda name: f.contents() if (f := source.gguf.get_field(name)) else None
  kind, before = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
  if kind != "gpt2" or before not in _BEFORE:
    raise ConfigError(
      f"{source.path}: its tokenizer is {kind}/{before}; read are gpt2 with {', '.join(_BEFORE)}: "
      "put a tokenizer.json beside it and give its path as --config.data.tokenizer"
    )
  words, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
  vocab = {word: i for i, word in enumerate(words)}
  merges = [tuple(pair.split(" ", 1)) for pair in field("tokenizer.ggml.merges")]
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
  split = tokenizers.pre_tokenizers
  made.pre_tokenizer = split.Sequence([*_BEFORE[before], split.ByteLevel(add_prefix_space=False)])
  made.decoder = tokenizers.decoders.ByteLevel()
  control = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
  made.add_special_tokens(
    [tokenizers.AddedToken(w, special=True, normalized=False) for w in control]
  )
  return BpeTokenizer(made.to_str().encode(), str(source.path))


def _config(path: Path, reader: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
  """The metadata in the words of a config.json."""
  value = lambda name: field.contents() if (field := reader.get_field(name)) else None
  kind = value("general.architecture")
  if not isinstance(kind, str):
    raise ConfigError(f"{path} names no architecture")
  config = {"model_type": kind, "tie_word_embeddings": "output.weight" not in tensors}
  for theirs, ours in _FIELDS.items():
    if (found := value(f"{kind}.{theirs}")) is not None:
      config[ours] = found
  if "token_embd.weight" in tensors:
    config.setdefault("vocab_size", tensors["token_embd.weight"].shape[0])
  if (end := value("tokenizer.ggml.eos_token_id")) is not None:
    config["eos_token_id"] = end
  scaling = value(f"{kind}.rope.scaling.type")
  if scaling not in (None, "none") or "rope_freqs.weight" in tensors:
    raise ConfigError(f"{path}: rotary positions scaled as {scaling or 'a table'} are not read yet")
  return config
