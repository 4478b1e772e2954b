"""A LLaMA of a few thousand weights in Hugging Face's layout, its tokenizer, and examples."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

WIDTH, HIDDEN, LAYERS, HEADS, LENGTH = 32, 48, 2, 2, 256
VOCAB = 257  # bytes and the end
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def make_weights(folder: Path, *, begin: bool = False) -> Path:
  """Random, of the shapes that LLaMA's checkpoints have.

  Args:
    begin: texts begin with a token, as LLaMA's do, which takes the place of the byte 0; and there
      is a chat template.
  """
  folder.mkdir()
  rng = np.random.default_rng(0)
  d, f = WIDTH, HIDDEN
  shapes = {"model.embed_tokens": (VOCAB, d), "model.norm": (d,), "lm_head": (VOCAB, d)}
  for n in range(LAYERS):
    layer = f"model.layers.{n}"
    shapes |= {f"{layer}.{name}_layernorm": (d,) for name in ("input", "post_attention")}
    shapes |= {f"{layer}.self_attn.{x}_proj": (d, d) for x in "qkvo"}
    shapes |= {f"{layer}.mlp.{x}_proj": (f, d) for x in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj"] = (d, f)
  draw = lambda s: (0.2 * rng.standard_normal(s) + (len(s) == 1)).astype(np.float32)
  save_file({f"{k}.weight": draw(s) for k, s in shapes.items()}, folder / "model.safetensors")
  config = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": d, "intermediate_size": f,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": LENGTH,
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config))
  make_tokenizer(folder, begin)
  return folder


def make_tokenizer(folder: Path, begin: bool) -> None:
  """As above."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  if begin:
    letters[letters.index("Ā")] = "<s>"
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(["<|endoftext|>", *(["<s>"] if begin else [])])
  if begin:
    first = ("<s>", letters.index("<s>"))
    made.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[first]
    )
    said = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
  made.save(str(folder / "tokenizer.json"))


def make_examples(path: Path, count: int = 40) -> Path:
  """Sums in words; half of them with an input."""
  lines = []
  for i in range(count):
    record = {"instruction": f"Add {i} and {i % 7}.", "output": f"It is {i + i % 7}."}
    lines.append(record | ({"input": "short"} if i % 2 else {}))
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path
