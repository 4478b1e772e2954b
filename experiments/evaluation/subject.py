"""The model that is asked, from a run or from weights made elsewhere."""

from typing import Any, NamedTuple

from ..data.tokenizer import Tokenizer
from ..restore import Loaded
from ..training.setup import Setup
from ..weights.special import special_tokens


class Subject(NamedTuple):
  setup: Setup
  params: Any
  tokenizer: Tokenizer
  stops: frozenset[int]  # ids that end an answer
  begin: int | None  # what the tokenizer puts before every text
  prefix: int  # what goes before a text without context


def subject_of(found: Loaded) -> Subject:
  """A text without context goes after the token that begins texts, also where the tokenizer does
  not put it there; if there is none, after the one that ends them."""
  named = special_tokens(found.source)
  ids = [found.tokenizer.special.get(named.get(name, "")) for name in ("bos_token", "eos_token")]
  known = [i for i in (found.begin, *ids, found.tokenizer.eod) if i is not None]
  return Subject(found.setup, found.params, found.tokenizer, found.stops, found.begin, known[0])
