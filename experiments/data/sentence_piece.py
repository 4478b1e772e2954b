"""SentencePiece models (`.model`), by the package `sentencepiece`.

Dimension letters: V vocabulary.
"""

import hashlib

import numpy as np

from ..config import ConfigError


class SentencePieceTokenizer:
  """A `.model` file. Text is only text: no text encodes to a control token.

  Args:
    data: the file.
    path: its name, for messages.
    begins: whether texts begin with its `<s>`, if it has one.

  Raises:
    ConfigError: it is unusable, or the package is missing.
  """

  def __init__(self, data: bytes, path: str, begins: bool = True):
    try:
      import sentencepiece  # an extra
    except ImportError as e:
      raise ConfigError(f"{path} needs sentencepiece: pip install 'meshyard[sentencepiece]'") from e
    try:
      self._model = model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as e:
      raise ConfigError(f"{path} is no SentencePiece model: {e}") from e
    self.data, self.eod = data, model.eos_id()
    self.bos = model.bos_id() if begins and model.bos_id() >= 0 else None
    if self.eod < 0:
      raise ConfigError(f"{path} has no end-of-document token: its model was trained without </s>")
    self.vocab_size = model.get_piece_size()
    ids = range(self.vocab_size)
    pieces = [model.id_to_piece(i) for i in ids]
    self.special = {pieces[i]: i for i in ids if model.is_control(i)}
    masks = [i for i in ids if pieces[i] in ("[MASK]", "<mask>")]
    self.mask = masks[0] if masks else self.vocab_size
    self.fingerprint = hashlib.sha256(data).hexdigest()
    self.byte_lengths_V = np.array([self._byte_length(i, pieces[i]) for i in ids], np.int32)

  def _byte_length(self, i: int, piece: str) -> int:
    if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i):
      return 0
    return 1 if self._model.is_byte(i) else len(piece.replace("▁", " ").encode("utf-8"))

  def encode(self, text: str) -> np.ndarray:
    text.encode("utf-8")  # what is not Unicode raises as it does elsewhere
    return np.asarray(self._model.encode(text), np.int32)

  def encode_special(self, text: str) -> np.ndarray:
    """Control tokens that the text names are them."""
    ids: list[int] = []
    while text:
      found = [(at, -len(t), t) for t in self.special if (at := text.find(t)) >= 0]
      at, _, token = min(found, default=(len(text), 0, ""))
      if at:
        ids.extend(self._model.encode(text[:at]))
      if token:
        ids.append(self.special[token])
      text = text[at + len(token) :]
    return np.asarray(ids, np.int32)

  def decode(self, ids) -> str:
    ids = np.asarray(ids, np.int32)
    return self._model.decode(ids[(ids >= 0) & (ids < self.vocab_size)].tolist())
