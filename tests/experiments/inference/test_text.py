"""Text as it comes: nothing is taken back, whatever the pieces, stop strings and characters."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from experiments.data.tokenizer import BpeTokenizer, ByteTokenizer
from experiments.inference.text import TextStream

BYTES = ByteTokenizer()
END = BYTES.eod
settings = hypothesis.settings(max_examples=200, deadline=None)
some_text = st.text(st.sampled_from("ab \u00e9\u4f60\U0001f600ENDend\n"), max_size=40)


def stream_of(text, sizes, **options):
  """A text fed in pieces of these sizes; every piece that came out."""
  ids, stream, given = BYTES.encode(text).tolist(), TextStream(BYTES, ends=[END], **options), []
  for size in [*sizes, len(ids)]:
    given.append(stream.feed(ids[:size]))
    ids = ids[size:]
  return stream, [*given, stream.finish()]


@settings
@hypothesis.given(some_text, st.lists(st.integers(1, 5), max_size=10))
def test_pieces_join_to_the_text(text, sizes):
  stream, given = stream_of(text, sizes)
  assert "".join(given) == stream.text == text
  assert not any("\ufffd" in part for part in given)
  assert stream.finish_reason == "length" and stream.tokens == BYTES.encode(text).tolist()


@settings
@hypothesis.given(some_text, st.lists(st.integers(1, 5), max_size=10))
def test_text_ends_before_the_first_stop_string(text, sizes):
  stops = ("END", "nd\n", "\u4f60")
  stream, given = stream_of(text, sizes, stops=stops)
  first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
  assert "".join(given) == stream.text == text[:first]
  assert stream.finish_reason == ("length" if first is None else "stop")


def test_what_may_become_a_stop_string_waits():
  stream = TextStream(BYTES, stops=["END."])
  feed = lambda text: stream.feed(BYTES.encode(text).tolist())
  assert [feed("a E"), feed("N"), feed("D"), feed("x")] == ["a ", "", "", "ENDx"]
  assert [feed("EN"), stream.finish()] == ["", "EN"]  # nothing more came
  assert stream.text == "a ENDxEN" and stream.finish_reason == "length"


def test_an_end_token_ends_and_is_no_text():
  stream = TextStream(BYTES, ends=[END], stops=["xyz"])
  assert stream.feed([97, 120, END, 98]) == "ax"
  assert stream.ended and stream.finish_reason == "stop"
  assert stream.tokens == [97, 120, END]
  assert stream.feed([99]) == "" and stream.finish() == "" and stream.text == "ax"


def test_bytes_that_stay_no_character_are_shown_in_the_end():
  stream = TextStream(BYTES)
  assert [stream.feed([97, 0xE4]), stream.feed([0xBD]), stream.finish()] == ["a", "", "\ufffd"]
  stream = TextStream(BYTES)
  assert stream.feed([0xE4, 98]) == "\ufffdb"  # decided by the next byte


@pytest.fixture(scope="module")
def metaspace():
  """As Llama's: a mark for each blank, one before the text, and bytes for what has no piece."""
  pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  pieces += ["\u2581", "a", "b", "\u2581a", "\u2581b", "ab"]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b")]
  model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
  made = tokenizers.Tokenizer(model)
  replace = tokenizers.normalizers.Replace(" ", "\u2581")
  made.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("\u2581"), replace]
  )
  decoders = tokenizers.decoders
  made.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
     decoders.Strip(" ", 1, 0)]
  )  # fmt: skip
  made.add_special_tokens(["<unk>", "</s>"])
  return BpeTokenizer(made.to_str().encode(), "test")


@settings
@hypothesis.given(st.text(st.sampled_from("ab \u00e9\u4f60"), max_size=20))
def test_blanks_and_bytes_of_sentencepiece(metaspace, text):
  ids = metaspace.encode(text).tolist()
  assert metaspace.decode(ids) == text
  stream = TextStream(metaspace)
  given = [stream.feed([token]) for token in ids]
  assert "".join([*given, stream.finish()]) == text
  assert not any("\ufffd" in part for part in given)


def test_a_blank_between_prompt_and_answer_is_kept(metaspace):
  prompt, answer = metaspace.encode("a b").tolist(), metaspace.encode("a").tolist()
  assert TextStream(metaspace, before=prompt).feed(answer) == " a"
  assert TextStream(metaspace).feed(answer) == "a"
  assert metaspace.decode(np.array(prompt + answer)) == "a b a"
