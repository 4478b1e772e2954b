"""Continue a prompt: `python -m experiments.generate --workdir=PATH --prompt=TEXT`, or
`--weights=PATH` in place of a run directory: safetensors and GGUF from elsewhere."""

import math
import sys

from absl import flags

from layers.spec import ModelSpec
from mesh.constrain import use_mesh

from . import cli
from .closing import harmless
from .config import ConfigError
from .data.tokenizer import Tokenizer, load_tokenizer
from .inference.sampling import Draw, generate
from .restore import Loaded, load_weights, open_run, restore

_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; none starts a new document.")
_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Tokens to add at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest; 0 is all.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, upper_bound=(1 << 32) - 1)


def main() -> int:
  if math.isnan(_TEMPERATURE.value) or math.isinf(_TEMPERATURE.value):
    raise ConfigError(f"--temperature={_TEMPERATURE.value}: give a number, 0 for greedy")
  setup, params, tokenizer, stops = load_weights(cli.weights()) if cli.weights() else _trained()
  prompt = _encode(_PROMPT.value, tokenizer, setup.config.model)
  room = setup.config.model.max_length - len(prompt)
  draw = Draw(tokenizer.vocab_size, _TEMPERATURE.value, _TOP_K.value)
  show = harmless if sys.stdout.isatty() else str
  print(_PROMPT.value, end="", flush=True)
  tokens: list[int] = []
  shown = 0
  with use_mesh(setup.mesh, setup.rules):
    for chunk in generate(
      setup.model,
      params,
      [prompt],
      num_tokens=min(_TOKENS.value, room),
      draw=draw,
      seed=_SEED.value,
    ):
      tokens += [int(t) for t in chunk[0]]
      ends = [i for i, token in enumerate(tokens) if token in stops]
      ended = bool(ends)
      tokens = tokens[: ends[0]] if ends else tokens
      text = tokenizer.decode(tokens)
      whole = text if ended else text.rstrip("\ufffd")  # the next chunk may finish a character
      print(show(whole[shown:]), end="", flush=True)
      shown = max(shown, len(whole))
      if ended:
        break
  print(show(text[shown:]))
  if not ended and room < _TOKENS.value:
    length = setup.config.model.max_length
    print(f"(stopped where the context of {length} tokens is full)", file=sys.stderr)
  return cli.FINISHED


def _trained() -> Loaded:
  """The model of `--workdir`."""
  folder = cli.require_workdir()
  setup = open_run(folder, batch=False)
  if setup.config.data.objective != "next_token":
    raise ConfigError(f"{folder} learned to tell masked tokens: it can't continue a prompt")
  tokenizer = load_tokenizer(setup.config.data.tokenizer)
  return Loaded(setup, restore(setup, folder).params, tokenizer, frozenset([tokenizer.eod]))


def _encode(text: str, tokenizer: Tokenizer, spec: ModelSpec) -> list[int]:
  """Token ids of a prompt, at least one.

  Raises:
    ConfigError: the prompt is not text, or leaves no room in the model's context.
  """
  try:
    prompt = [int(i) for i in tokenizer.encode(text)] or [tokenizer.eod]
  except UnicodeEncodeError as e:
    raise ConfigError("--prompt is not UTF-8 text") from e
  if len(prompt) >= spec.max_length:
    raise ConfigError(
      f"the prompt has {len(prompt)} tokens, but the model's context is {spec.max_length}; "
      "shorten it to leave room for an answer"
    )
  return prompt


if __name__ == "__main__":
  cli.run(main)
