"""Text of tokens as they are drawn, up to where it ends."""

from collections.abc import Collection, Sequence

from ..data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what stands for bytes that are no character, or not yet


class TextStream:
  """The text of one row. What it has given out it never takes back: a character waits for all its
  bytes, and what may become a stop string for the tokens that decide.

  Args:
    tokenizer: of the tokens.
    ends: ids that end the text; not part of it.
    stops: strings that end the text; not part of it.
    before: tokens that the text goes on from, so that blanks between are kept.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    ends: Collection[int] = (),
    stops: Sequence[str] = (),
    before: Sequence[int] = (),
  ):
    self.tokens: list[int] = []  # drawn, up to and with the one that ended the text
    self.text = ""  # given out
    self.finish_reason = ""  # "stop" after an end, "length" after `finish` without one
    self._tokenizer, self._ends, self._stops = tokenizer, ends, stops
    # Tokens that are decoded, and how many of them belong to text that is known: decoding some
    # that are known along with the new ones gives their text in its surroundings.
    self._window = list(before)
    self._known = len(self._window)
    self._waiting = ""

  @property
  def ended(self) -> bool:
    return bool(self.finish_reason)

  def feed(self, tokens: Sequence[int]) -> str:
    """New text. Tokens after the end are not looked at."""
    given = ""
    for token in tokens:
      if self.ended:
        break
      self.tokens.append(token)
      if token in self._ends:
        given += self._end("stop")
        break
      self._window.append(token)
      given += self._release(self._decode())
    return given

  def finish(self) -> str:
    """The text that still waited, when no more tokens come."""
    return "" if self.ended else self._end("length")

  def _end(self, reason: str) -> str:
    given = self._release(self._decode(last=True))
    if not self.ended:
      self.finish_reason = reason
      given += self._give(self._waiting)
      self._waiting = ""
    return given

  def _decode(self, last: bool = False) -> str:
    decode = self._tokenizer.decode
    known, whole = decode(self._window[: self._known]), decode(self._window)
    if len(whole) <= len(known) or (whole.endswith(_UNFINISHED) and not last):
      return ""
    del self._window[: self._known]
    self._known = len(self._window)
    return whole[len(known) :]

  def _release(self, new: str) -> str:
    """Of the text that waits and `new`, what can't be part of a stop string."""
    text = self._waiting + new
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self.finish_reason, self._waiting = "stop", ""
      return self._give(text[: min(found)])
    longest = max(map(len, self._stops), default=1) - 1
    starts = lambda part: any(stop.startswith(part) for stop in self._stops)
    keep = next((n for n in range(min(longest, len(text)), 0, -1) if starts(text[-n:])), 0)
    self._waiting = text[len(text) - keep :]
    return self._give(text[: len(text) - keep])

  def _give(self, text: str) -> str:
    self.text += text
    return text
