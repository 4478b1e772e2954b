"""What a model says to the three kinds of requests of the lm-evaluation-harness."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from ..config import ConfigError
from ..inference.draw import Draw, problem_with
from ..inference.sampling import generate
from ..inference.text import TextStream
from .requests import Encoder, cut, pair, windows
from .scoring import Row, Score, Scorer
from .subject import Subject

_MAX_TOKENS = 256  # of an answer, where the task names no number: the harness's own
_MAX_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = tuple(name for name in Draw._fields if name != "vocab_size")


class Answers:
  """Answers requests; use it inside `use_mesh`.

  Attributes:
    cut_requests: how many texts were longer than the context and lost their beginning,
    cut_tokens: and how many tokens that was in all.

  Raises:
    ConfigError: see `Scorer`.
  """

  def __init__(self, subject: Subject):
    self._subject = subject
    self._scorer = Scorer(subject.setup, subject.params, subject.tokenizer.vocab_size)
    self._encoder = Encoder(subject.tokenizer.encode, subject.begin, subject.prefix)
    self.cut_requests = self.cut_tokens = 0

  def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Of each (context, continuation) the continuation's.

    Raises:
      ConfigError: a continuation that is longer than the context of the model.
    """
    rows = [self._fit(pair(self._encoder, *both)) for both in pairs]
    return self._score("log-likelihoods", rows)

  def rolling(self, texts: Sequence[str]) -> list[float]:
    """The log-likelihood of each text, cut into windows where it is longer than the context."""
    ids = [[int(i) for i in self._encoder.encode(text)] for text in texts]
    parts = [windows(each, self._encoder.prefix, self._scorer.context) for each in ids]
    scores = iter(self._score("texts", [row for part in parts for row in part]))
    return [sum(next(scores).log_likelihood for _ in part) for part in parts]

  def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What follows each context, up to the first of its stop strings.

    Raises:
      ConfigError: settings that mean nothing here, or leave no room for the context.
    """
    alike = defaultdict(list)
    for i, (_, settings) in enumerate(requests):
      alike[json.dumps(settings, sort_keys=True)].append(i)
    plans = [(_Settings.read(json.loads(key), self), where) for key, where in alike.items()]
    answers = [""] * len(requests)
    with _progress("answers", len(requests)) as done:
      for settings, where in plans:
        for i, text in self._generate([(i, requests[i][0]) for i in where], settings):
          answers[i] = text
          done(1)
    return answers

  def _generate(self, contexts: list[tuple[int, str]], settings: "_Settings"):
    """(index, answer) of contexts with the same settings, the longest first."""
    room = self._scorer.context - settings.max_tokens
    prompts = [(i, self._shorten(self._encoder.text(text), room)) for i, text in contexts]
    prompts.sort(key=lambda found: -len(found[1]))
    rows = self._scorer.rows(1, len(prompts))
    for start in range(0, len(prompts), rows):
      batch = prompts[start : start + rows]
      tokens = [ids for _, ids in batch]
      tokens += [tokens[-1]] * (rows - len(batch))  # one shape for all batches
      streams = self._batch(tokens, len(batch), settings, seed=start)
      yield from ((i, stream.text) for (i, _), stream in zip(batch, streams, strict=True))

  def _batch(self, prompts, count, settings, *, seed) -> list[TextStream]:
    subject = self._subject
    stream = lambda: TextStream(subject.tokenizer, ends=subject.stops, stops=settings.until)
    streams = [stream() for _ in range(count)]
    chunks = generate(
      subject.setup.model,
      subject.params,
      prompts,
      num_tokens=settings.max_tokens,
      draw=settings.draw,
      seed=seed,
    )
    for tokens_BN in chunks:
      for row, tokens_N in zip(streams, tokens_BN, strict=False):  # the rest fills the batch
        row.feed(tokens_N.tolist())
      if all(row.ended for row in streams):
        break
    for row in streams:
      row.finish()
    return streams

  def _fit(self, row: Row) -> Row:
    if row.count > self._scorer.context:
      raise ConfigError(
        f"a continuation of {row.count} tokens is longer than the model's context of "
        f"{self._scorer.context}"
      )
    row, over = cut(row, self._scorer.context)
    self._note(over)
    return row

  def _shorten(self, ids: list[int], room: int) -> list[int]:
    self._note(max(0, len(ids) - room))
    return ids[-room:] or [self._encoder.prefix]

  def _note(self, over: int) -> None:
    self.cut_requests += over > 0
    self.cut_tokens += over

  def _score(self, what: str, rows: list[Row]) -> list[Score]:
    with _progress(what, len(rows)) as done:
      return self._scorer.score(rows, done)

  @property
  def limits(self) -> tuple[int, int]:
    """The model's context, and how many ids have a text."""
    return self._scorer.context, self._subject.tokenizer.vocab_size


class _Settings(NamedTuple):
  """A task's `generation_kwargs`."""

  until: tuple[str, ...]
  max_tokens: int
  draw: Draw

  @classmethod
  def read(cls, given: dict[str, Any], answers: Answers) -> "_Settings":
    """In the harness's words.

    Raises:
      ConfigError: one that is not known, or a number that means nothing.
    """
    context, vocab_size = answers.limits
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    lengths = [given[name] for name in _MAX_NAMES if given.get(name) is not None]
    max_tokens = int(lengths[0]) if lengths else _MAX_TOKENS
    if not 0 < max_tokens < context:
      raise ConfigError(
        f"a task asks for answers of {max_tokens} tokens, but the model's context is {context}: "
        "set max_gen_toks in the task's generation_kwargs"
      )
    numbers = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    sampled = given.get("do_sample", float(numbers.get("temperature", 0)) > 0)
    unknown = given.keys() - {"until", "do_sample", *_MAX_NAMES, *_SAMPLING}
    if unknown and sampled:
      raise ConfigError(
        f"a task's generation_kwargs have {', '.join(sorted(unknown))}; known are until, "
        f"do_sample, {_MAX_NAMES[0]}, {', '.join(_SAMPLING)}"
      )
    draw = Draw(vocab_size, temperature=0.0)
    if sampled:
      draw = draw._replace(**{"temperature": 1.0, **numbers})
    if problem := problem_with(draw):
      raise ConfigError(f"a task's generation_kwargs: {problem}")
    return cls(tuple(filter(None, until)), max_tokens, draw)


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
  console = Console(stderr=True)
  with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
    task = bar.add_task(what, total=total)
    yield lambda count: bar.advance(task, count)
