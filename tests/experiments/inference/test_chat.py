"""Conversations of a small random model: what is remembered, run again, shown and refused."""

import io
import os
import signal
import sys
from functools import cache

import pytest

from experiments.config import ConfigError
from experiments.data.tokenizer import ByteTokenizer
from experiments.inference import chat
from experiments.inference.chat import Conversation, talk
from experiments.inference.draw import Draw
from experiments.inference.sampling import generate
from experiments.inference.template import ChatTemplate
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RotarySpec, Segment
from layers.transformer import TransformerLM
from tests.experiments.programs import random_params

pytest.importorskip("jinja2", reason="needs the extra chat")
CONTEXT = 192
BYTES = ByteTokenizer()
TEMPLATE = (
  "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
  "{% if add_generation_prompt %}a:{% endif %}"
)
PICKY = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}hi"
GREEDY = Draw(BYTES.vocab_size, temperature=0)


@cache
def model():
  attention = AttentionSpec(num_heads=2, head_dim=8, position=RotarySpec())
  segments = (Segment((LayerSpec(attention, MlpSpec(hidden=16)),)),)
  spec = ModelSpec(vocab_size=257, embed_dim=16, max_length=CONTEXT, segments=segments)
  made = TransformerLM(spec, unroll=1)
  return made, random_params(made, scale=0.7, seed=4)


def conversation(template=TEMPLATE, **settings):
  settings = {"draw": GREEDY, "ends": frozenset([BYTES.eod]), "max_tokens": 9} | settings
  return Conversation(*model(), BYTES, ChatTemplate(template, {}), **settings)


def alone(text, count):
  """What the model says to a text, by `generate`."""
  prompt = BYTES.encode(text).tolist()
  chunks = generate(*model(), [prompt], num_tokens=count, draw=GREEDY)
  return BYTES.decode([int(t) for chunk in chunks for t in chunk[0]])


def test_turns_are_remembered_and_not_run_again():
  talked = conversation()
  first = "".join(talked.answer("Hi"))
  assert first == alone("u:Hi;a:", 9) and talked.finish_reason == "length"
  before = len(BYTES.encode("u:Hi;a:"))
  second = "".join(talked.answer("Well?"))
  assert second == alone(f"u:Hi;a:{first};u:Well?;a:", 9)
  assert talked.messages[1::2] == [{"role": "assistant", "content": t} for t in (first, second)]
  if BYTES.encode(first).size == 9:  # its bytes were characters, so they are the same again
    assert talked.reused == before + 8
  talked.reset()
  assert "".join(talked.answer("Hi")) == first and talked.messages[2:] == []


def test_stop_strings_end_an_answer():
  whole = alone("u:Hi;a:", 9)
  talked = conversation(stops=(whole[4:6],))
  assert "".join(talked.answer("Hi")) == whole[: whole.index(whole[4:6])]
  assert talked.finish_reason == "stop"


def test_system_prompt():
  talked = conversation(system="Be brief")
  assert "".join(talked.answer("Hi")) == alone("s:Be brief;u:Hi;a:", 9)
  talked.reset()
  assert talked.messages == [{"role": "system", "content": "Be brief"}]
  with pytest.raises(ConfigError, match="refuses the conversation: no system"):
    conversation(PICKY, system="Be brief")


def test_the_context_is_the_end():
  talked = conversation(max_tokens=1000)
  text = "x" * (CONTEXT - 5 - 30)
  assert len(BYTES.encode(f"u:{text};a:")) == CONTEXT - 30
  "".join(talked.answer(text))
  assert talked.finish_reason == "context"
  before = list(talked.messages)
  with pytest.raises(ConfigError, match=r"the conversation would be \d+ tokens, but .* is 192"):
    "".join(talked.answer("and more"))
  assert talked.messages == before


def pipe(monkeypatch, capsys, text, talked=None):
  monkeypatch.setattr(sys, "stdin", io.StringIO(text))
  talk(talked or conversation(), str)
  return capsys.readouterr()


def test_a_pipe_has_a_turn_in_each_line(monkeypatch, capsys):
  first = alone("u:Hi;a:", 9)
  said = pipe(monkeypatch, capsys, "Hi\n\n/reset\nHi\n/quit\nnever\n")
  turn = f"> Hi\n{first.lstrip()}\n\n"
  assert said.out == 2 * turn
  assert said.err.splitlines() == [
    "(stopped at --max_tokens)", "(all is forgotten)", "(stopped at --max_tokens)"
  ]  # fmt: skip


def test_a_pipe_over_the_context_is_refused(monkeypatch, capsys):
  with pytest.raises(ConfigError, match="/reset starts anew"):
    pipe(monkeypatch, capsys, "x" * CONTEXT)


def test_ctrl_c_stops_the_answer_alone(monkeypatch, capsys):
  talked, feeds = conversation(max_tokens=60), []
  step = chat.Decoder.step

  def slow(decoder, *arguments):
    feeds.append(1)
    if len(feeds) == 2:
      os.kill(os.getpid(), signal.SIGINT)
    return step(decoder, *arguments)

  monkeypatch.setattr(chat.Decoder, "step", slow)
  handler = signal.getsignal(signal.SIGINT)
  said = pipe(monkeypatch, capsys, "Hi\nHi\n", talked)
  assert said.err.splitlines()[0] == "(stopped)"
  assert signal.getsignal(signal.SIGINT) is handler
  heard, whole = talked.messages[1]["content"], alone("u:Hi;a:", 60)
  assert 0 < len(heard) < len(whole) and whole.startswith(heard)
  assert len(talked.messages) == 4  # the second turn was answered


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_terminal_is_asked_and_told_how_to_end(monkeypatch, capsys):
  lines = iter(["Hi", KeyboardInterrupt(), "x" * CONTEXT, EOFError()])

  def typed(prompt):
    assert prompt == "> "
    line = next(lines)
    if isinstance(line, BaseException):
      raise line
    return line

  monkeypatch.setattr("builtins.input", typed)
  monkeypatch.setattr(sys, "stdin", Terminal())
  talk(conversation(), str)
  said = capsys.readouterr()
  assert said.out.startswith(alone("u:Hi;a:", 9).lstrip()) and "> Hi" not in said.out
  hint, length, again, over = (line for line in said.err.splitlines() if line)
  assert hint.startswith("/reset forgets") and "--max_tokens" in length
  assert again == "(Ctrl-D or /quit ends)" and over.startswith("error: the conversation would be")
