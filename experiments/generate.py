"""Continue a prompt: `python -m experiments.generate --workdir=PATH --prompt=TEXT`."""

from absl import flags

from mesh.constrain import use_mesh

from . import cli
from .config import ConfigError
from .data.tokenizer import load_tokenizer
from .inference.sampling import Draw, generate
from .restore import restore

_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Tokens to add at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest; 0 is all.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main() -> int:
  folder = cli.require_workdir()
  trained = restore(folder)
  setup, spec = trained.setup, trained.setup.config.model
  tokenizer = load_tokenizer(setup.config.data.tokenizer)
  prompt = [int(i) for i in tokenizer.encode(_PROMPT.value)] or [tokenizer.eod]
  room = spec.max_length - len(prompt)
  if room < 1:
    raise ConfigError(
      f"the prompt has {len(prompt)} tokens, but the model's context is {spec.max_length}; "
      "shorten it to leave room for an answer"
    )
  draw = Draw(_TEMPERATURE.value, _TOP_K.value, tokenizer.vocab_size)
  print(_PROMPT.value, end="", flush=True)
  tokens: list[int] = []
  shown = 0
  with use_mesh(setup.mesh, setup.rules):
    for chunk in generate(
      setup.model,
      trained.params,
      [prompt],
      num_tokens=min(_TOKENS.value, room),
      draw=draw,
      seed=_SEED.value,
    ):
      tokens += [int(t) for t in chunk[0]]
      ended = tokenizer.eod in tokens
      if ended:
        tokens = tokens[: tokens.index(tokenizer.eod)]
      text = tokenizer.decode(tokens)
      if not ended:
        text = text.rstrip("\ufffd")  # the rest of a character may come with the next chunk
      print(text[shown:], end="", flush=True)
      shown = len(text)
      if ended:
        break
  print()
  return cli.FINISHED


if __name__ == "__main__":
  cli.run(main)
