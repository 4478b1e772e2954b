"""A conversation with a model, and one in the terminal."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from layers.transformer import TransformerLM

from ..config import ConfigError
from ..data.tokenizer import Tokenizer
from .draw import Draw
from .sampling import Decoder
from .template import ChatTemplate, Message
from .text import TextStream

_FIRST_LENGTH = 2048  # tokens that caches hold at first; doubled as a conversation grows
_STRIDE = 4  # tokens that are shown at once
_WIDTH = 64  # of the pieces in which what is said is read
_HINT = "/reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer"


class Conversation:
  """What was said, and the caches of it: each turn runs only what is new.

  Args:
    ends, stops: ids and strings that end an answer.
    system: the system prompt; empty: the template's own.
    max_tokens: of an answer.

  Raises:
    ConfigError: the template takes no system prompt.
  """

  def __init__(
    self,
    model: TransformerLM,
    params: Any,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    draw: Draw,
    seed: int = 0,
    ends: frozenset[int] = frozenset(),
    stops: tuple[str, ...] = (),
    system: str = "",
    max_tokens: int = 1024,
  ):
    self._model, self._params, self._template = model, params, template
    self._tokenizer, self._ends, self._stops = tokenizer, ends, stops
    self._draw, self._seed, self._max_tokens = draw, seed, max_tokens
    self._system: list[Message] = [{"role": "system", "content": system}] if system else []
    self._decoder: Decoder | None = None
    self.context = model.spec.max_length
    self.messages: list[Message] = []
    # Of the last answer: stop, length (as many as allowed), context; empty if it was not heard out.
    self.finish_reason = ""
    self.reused = 0  # tokens of the last turn that were not run again
    template.render([*self._system, {"role": "user", "content": "Hello"}])
    self.reset()

  def reset(self) -> None:
    """Forget all but the system prompt."""
    self.messages = list(self._system)

  def answer(self, text: str) -> Iterator[str]:
    """What the model says to `text`, in parts; what was heard of it is remembered.

    Raises:
      ConfigError: the conversation is over the context; the turn is forgotten.
    """
    asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
    prompt = self._template.encode(asked, self._tokenizer)
    room = self.context - len(prompt)
    if room < 1:
      raise ConfigError(
        f"the conversation would be {len(prompt)} tokens, but the model's context is "
        f"{self.context}: /reset starts anew"
      )
    count = min(room, self._max_tokens)
    decoder = self._decoder_for(len(prompt) + count)
    stream = TextStream(self._tokenizer, ends=self._ends, stops=self._stops)
    try:
      yield stream.feed(decoder.feed([prompt]).tokens_BN[0].tolist())
      self.reused = decoder.reused
      while not stream.ended and (left := count - len(stream.tokens)) > 0:
        yield stream.feed(decoder.step(left).tokens_BN[0].tolist())
      yield stream.finish()
    finally:  # also where nobody listens on
      self.messages = [*asked, {"role": "assistant", "content": stream.text}]
      full = stream.finish_reason == "length" and count == room
      self.finish_reason = "context" if full else stream.finish_reason

  def _decoder_for(self, length: int) -> Decoder:
    """One whose caches hold so many tokens."""
    if self._decoder is None or self._decoder.length < length:
      capacity = _FIRST_LENGTH
      while capacity < length:
        capacity *= 2
      self._decoder = None  # not two sets of caches
      self._decoder = Decoder(
        self._model, self._params, batch=1, length=min(capacity, self.context), draw=self._draw,
        seed=self._seed, ends=sorted(self._ends), width=_WIDTH, stride=_STRIDE,
      )  # fmt: skip
    return self._decoder


def talk(conversation: Conversation, show: Callable[[str], str]) -> None:
  """A conversation in the terminal, or with a pipe, whose lines are the turns.

  Args:
    show: what is printed of a text.

  Raises:
    ConfigError: from a pipe, a turn that is over the context.
  """
  terminal = sys.stdin.isatty()
  if terminal:
    print(_HINT, file=sys.stderr)
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401 - lines can be edited and called back; not on every system
  for line in _typed() if terminal else _piped():
    text = line.strip()
    if text == "/quit":
      return
    if text == "/reset":
      conversation.reset()
      print("(all is forgotten)", file=sys.stderr)
    elif text:
      if not terminal:
        print(f"> {show(text)}", flush=True)
      try:
        _print_answer(conversation, text, show)
      except ConfigError as e:
        if not terminal:
          raise
        print(f"error: {e}", file=sys.stderr)


def _typed() -> Iterator[str]:
  while True:
    try:
      yield input("> ")
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print("\n(Ctrl-D or /quit ends)", file=sys.stderr)


def _piped() -> Iterator[str]:
  try:
    yield from sys.stdin
  except UnicodeDecodeError as e:
    raise ConfigError(f"what was piped in is not UTF-8 text: {e}") from e


def _print_answer(conversation: Conversation, text: str, show: Callable[[str], str]) -> None:
  said = False
  with _interrupts() as stopped:
    answer = conversation.answer(text)
    for part in answer:
      part = part if said else part.lstrip()
      said = said or bool(part)
      print(show(part), end="", flush=True)
      if stopped:
        answer.close()
        break
  print("\n", flush=True)
  notes = {
    "length": "(stopped at --max_tokens)",
    "context": f"(stopped where the context of {conversation.context} tokens is full)",
  }
  if stopped:
    print("(stopped)", file=sys.stderr)
  elif note := notes.get(conversation.finish_reason):
    print(note, file=sys.stderr)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[bool]]:
  """Ctrl-C fills the list that is given, and only a second one interrupts."""
  came: list[bool] = []
  before = signal.getsignal(signal.SIGINT)

  def note(*_) -> None:
    came.append(True)
    signal.signal(signal.SIGINT, before)

  signal.signal(signal.SIGINT, note)
  try:
    yield came
  finally:
    signal.signal(signal.SIGINT, before)
