"""Continue prompts, or hold a conversation:

    python -m experiments.generate --workdir=PATH --prompt=TEXT
    python -m experiments.generate --weights=PATH --chat

`--weights` takes models made elsewhere, safetensors and GGUF, in place of a run directory."""

import json
import math
import sys
from typing import Any, NamedTuple

from absl import flags

from mesh.constrain import use_mesh

from . import cli
from .config import ConfigError
from .inference.chat import Conversation, talk
from .inference.draw import Draw, problem_with
from .inference.prompts import read_prompts
from .inference.sampling import Decoder, prompt_width
from .inference.template import ChatTemplate
from .inference.text import TextStream
from .restore import Loaded, load_run, load_weights, open_run, restore
from .weights.special import chat_template, special_tokens

_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "Text to continue; several times for several. None starts a new document."
)
_PROMPTS = flags.DEFINE_string(
  "prompts", "", "File of prompts: one a line, or .jsonl with prompt, messages or instruction."
)
_CHAT = flags.DEFINE_bool(
  "chat", False, "A conversation, by the model's template; with prompts, one answer to each."
)
_SYSTEM = flags.DEFINE_string("system", "", "With --chat, the system prompt.")
_JSON = flags.DEFINE_bool("json", False, "A JSON line for each prompt.")
_LOGPROBS = flags.DEFINE_bool("logprobs", False, "Log-probabilities of the tokens as well.")
_BATCH = flags.DEFINE_integer("batch", 8, "Prompts that run at once, at most.", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
  "max_tokens", None, "Tokens to add at most; default 256, with --chat 1024.", lower_bound=1
)
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the answer; several times for more.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest; 0 is all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest that have so much together.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw among those with so much of the likeliest's.")
_PENALTY = flags.DEFINE_float(
  "repetition_penalty", 1.0, "Above 1: tokens that stand in the text are less likely."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, upper_bound=(1 << 32) - 1)

_STRIDE = 4  # tokens that are shown at once


class _Request(NamedTuple):
  """A prompt: what it was given as, its text, its tokens, and how much room they leave."""

  given: dict[str, Any]
  text: str
  ids: list[int]
  count: int


def main() -> int:
  given = read_prompts(_PROMPTS.value) if _PROMPTS.value else []
  given = [{"prompt": text} for text in _PROMPT.value] + given
  talking = _CHAT.value and not given
  _check_flags(talking)
  model = load_weights(cli.weights()) if cli.weights() else _trained()
  draw = _drawing(model.tokenizer.vocab_size)
  chats = _CHAT.value or any("messages" in one for one in given)
  template = _template(model) if chats else None
  with use_mesh(model.setup.mesh, model.setup.rules):
    if talking and template is not None:
      conversation = Conversation(
        model.setup.model, model.params, model.tokenizer, template, draw=draw, seed=_SEED.value,
        ends=model.stops, stops=tuple(_STOP.value), system=_SYSTEM.value, max_tokens=_most(),
      )  # fmt: skip
      talk(conversation, _shown)
    else:
      _continue(model, [_request(one, model, template) for one in given or [{"prompt": ""}]], draw)
  return cli.FINISHED


def _check_flags(talking: bool) -> None:
  """Raises ConfigError where flags mean nothing, or nothing together."""
  _drawing(1)
  for flag in (_TOP_K, _TOP_P, _MIN_P):
    if _TEMPERATURE.value == 0 and flag.value != flag.default:
      raise ConfigError(
        f"--temperature=0 takes the likeliest token, so --{flag.name}={flag.value} does nothing"
      )
  if "" in _STOP.value:
    raise ConfigError("--stop is empty: every text would end at once")
  if _SYSTEM.value and not _CHAT.value:
    raise ConfigError("--system belongs to --chat")
  for flag in (_JSON, _LOGPROBS):
    if talking and flag.value:
      raise ConfigError(f"--{flag.name} needs prompts: give --chat some by --prompt or --prompts")


def _drawing(vocab_size: int) -> Draw:
  draw = Draw(
    vocab_size, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value, _PENALTY.value
  )
  if problem := problem_with(draw):
    raise ConfigError(f"--{problem}")
  return draw


def _most() -> int:
  return _TOKENS.value or (1024 if _CHAT.value else 256)


def _shown(text: str) -> str:
  return cli.harmless(text) if sys.stdout.isatty() else text


def _trained() -> Loaded:
  """The model of `--workdir`."""
  folder = cli.require_workdir()
  setup = open_run(folder, batch=False)
  if setup.config.data.objective != "next_token":
    raise ConfigError(f"{folder} learned to tell masked tokens: it can't continue a prompt")
  return load_run(restore(setup, folder), folder)


def _template(model: Loaded) -> ChatTemplate:
  source = None if model.source is None else chat_template(model.source)
  if model.source is None or source is None:
    raise ConfigError(
      "the model has no chat template: it continues texts, give it one by --prompt without --chat"
    )
  return ChatTemplate(source, special_tokens(model.source))


def _request(given: dict[str, Any], model: Loaded, template: ChatTemplate | None) -> _Request:
  """Raises ConfigError if the prompt is not text, or leaves no room in the model's context."""
  text, messages = given.get("prompt", ""), given.get("messages")
  said = repr(text if len(text) <= 40 else text[:37] + "...") if messages is None else "messages"
  if messages is None and _CHAT.value and "instruction" not in given:
    messages = [{"role": "user", "content": text}]
  if messages is not None and _SYSTEM.value and messages[0]["role"] != "system":
    messages = [{"role": "system", "content": _SYSTEM.value}, *messages]
  try:
    if messages is not None and template is not None:
      ids, text = template.encode(messages, model.tokenizer), ""
    else:
      begin = [] if model.begin is None else [model.begin]
      ids = begin + [int(i) for i in model.tokenizer.encode(text)] or [model.tokenizer.eod]
  except UnicodeEncodeError as e:
    raise ConfigError(f"the prompt {said} is not UTF-8 text") from e
  context = model.setup.config.model.max_length
  if len(ids) >= context:
    raise ConfigError(
      f"the prompt {said} has {len(ids)} tokens, but the model's context is {context}; "
      "shorten it to leave room for an answer"
    )
  return _Request(given, text, ids, min(_most(), context - len(ids)))


def _continue(model: Loaded, requests: list[_Request], draw: Draw) -> None:
  batch = min(_BATCH.value, len(requests))
  longest = max(len(request.ids) for request in requests)
  decoder = Decoder(
    model.setup.model,
    model.params,
    batch=batch,
    length=max(len(request.ids) + request.count for request in requests),
    draw=draw,
    seed=_SEED.value,
    ends=sorted(model.stops),
    width=prompt_width(longest),
    stride=_STRIDE,
  )
  for first in range(0, len(requests), batch):
    _run(model, requests[first : first + batch], decoder, first, alone=len(requests) == 1)


def _run(model: Loaded, requests: list[_Request], decoder: Decoder, first: int, alone: bool):
  """One batch; a prompt alone is printed as it grows."""
  streams = [
    TextStream(
      model.tokenizer,
      ends=model.stops,
      stops=_STOP.value,
      before=request.ids if request.text else (),
    )
    for request in requests
  ]
  logprobs: list[list[float]] = [[] for _ in requests]
  live = alone and not _JSON.value
  if live:
    print(_shown(requests[0].text), end="", flush=True)
  rows = [request.ids for request in requests]
  rows += rows[:1] * (decoder.batch - len(rows))  # the last batch may have fewer
  chunk = decoder.feed(rows, first)
  while True:
    for b, (stream, request) in enumerate(zip(streams, requests, strict=True)):
      before, left = len(stream.tokens), request.count - len(stream.tokens)
      new = stream.feed(chunk.tokens_BN[b, :left].tolist())
      logprobs[b] += chunk.logprobs_BN[b, : len(stream.tokens) - before].tolist()
      new += stream.finish() if len(stream.tokens) >= request.count else ""
      if live:
        print(_shown(new), end="", flush=True)
    if all(stream.ended for stream in streams):
      break
    chunk = decoder.step()
  if live:
    print()
  for request, stream, numbers in zip(requests, streams, logprobs, strict=True):
    _report(request, stream, numbers, model, alone)


def _report(request: _Request, stream: TextStream, logprobs: list[float], model: Loaded, alone):
  """What was not printed yet."""
  if _JSON.value:
    found = {"text": stream.text, "finish_reason": stream.finish_reason}
    found |= {"prompt_tokens": len(request.ids), "tokens": stream.tokens}
    if _LOGPROBS.value:
      found["logprobs"] = [round(x, 6) if math.isfinite(x) else None for x in logprobs]
    print(json.dumps(request.given | found, ensure_ascii=False), flush=True)
    return
  if not alone:
    print(f"{_shown(request.text + stream.text)}\n", flush=True)
  if _LOGPROBS.value:
    for token, logprob in zip(stream.tokens, logprobs, strict=True):
      print(f"{logprob:12.6f} {token:8d}  {model.tokenizer.decode([token])!r}")
    print()
  if stream.finish_reason == "length" and request.count < _most():
    length = model.setup.config.model.max_length
    print(f"(stopped where the context of {length} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
