"""A folder as `transformers` reads it: weights, config.json, generation_config.json, tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from layers.spec import ModelSpec

from .express import Expressed
from .gguf import metadata
from .landing import refuse_without_room
from .save import Written, item_bytes, plan, save
from .source import Source, read_json

# Classes that `transformers` has for a causal model of a kind.
_CLASSES = {
  "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3", "mixtral": "Mixtral",
  "qwen3_moe": "Qwen3Moe", "gemma2": "Gemma2", "gemma3_text": "Gemma3",
  "deepseek_v3": "DeepseekV3", "gpt_oss": "GptOss", "gpt2": "GPT2LMHeadModel", "opt": "OPT",
  "gpt_neo": "GPTNeo", "gptj": "GPTJ", "bloom": "Bloom",
}  # fmt: skip


class Ids(NamedTuple):
  """Special tokens of a model."""

  bos: int | None = None
  eos: int | list[int] | None = None
  pad: int | None = None
  stops: tuple[int, ...] = ()  # that end an answer

  def words(self) -> dict[str, Any]:
    return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def write(
  folder: Path,
  expressed: Expressed,
  spec: ModelSpec,
  leaves: dict[str, jax.Array],
  *,
  ids: Ids,
  files: dict[str, bytes],
  dtype: str,
  largest: int,
  progress: Callable[[int, int], None],
) -> Written:
  """Write the model into `folder`, which is there and empty.

  Args:
    leaves: parameters by path.
    files: more files, by name: of the tokenizer.
    dtype, largest: of the tensors, and bytes of a file, as in `save`.

  Raises:
    ConfigError: the disk has no room for it.
    OSError: the disk refuses.
  """
  planned = plan(expressed.table, spec, leaves)
  refuse_without_room(folder, sum(tensor.size for tensor in planned) * item_bytes(dtype))
  name = _CLASSES[expressed.kind]
  architecture = name if name.endswith("Model") else f"{name}ForCausalLM"
  said = ids.words() | {"torch_dtype": dtype}
  config = {"architectures": [architecture], **expressed.config, **said}
  (folder / "config.json").write_bytes(_json(config))
  for name, data in {"generation_config.json": generation_config(ids), **files}.items():
    (folder / name).write_bytes(data)
  return save(folder, planned, leaves, dtype=dtype, largest=largest, progress=progress)


def generation_config(ids: Ids) -> bytes:
  """The file of that name."""
  stops = {"eos_token_id": list(ids.stops)} if len(ids.stops) > 1 else {}
  return _json(ids.words() | stops)


def beside_a_run(files: dict[str, bytes], ids: Ids) -> dict[str, bytes]:
  """The files of a tokenizer, as a run directory keeps them: with a generation_config.json that has
  all tokens that end an answer, which is said there nowhere else."""
  said = json.loads(files.get("generation_config.json") or generation_config(ids))
  stops = list(ids.stops)
  said |= {"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {}
  return files | {"generation_config.json": _json(said)}


def ids_of(source: Source, stops: tuple[int, ...]) -> Ids:
  """What a checkpoint says, and the tokens that end an answer."""
  pad = source.config.get("pad_token_id")
  first = source.config.get("bos_token_id")
  if source.gguf is not None:
    pad = metadata(source, "tokenizer.ggml.padding_token_id")
    first = metadata(source, "tokenizer.ggml.bos_token_id")
  eos = source.config.get("eos_token_id")
  return Ids(first, stops[0] if eos is None and stops else eos, pad, stops)


def read_ids(folder: Path) -> Ids | None:
  """Those of a folder's generation_config.json; None if it has none."""
  path = folder / "generation_config.json"
  if not path.is_file():
    return None
  said = read_json(path)
  eos = said.get("eos_token_id")
  stops = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
  return Ids(said.get("bos_token_id"), eos, said.get("pad_token_id"), stops)


def _json(value: dict[str, Any]) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()
