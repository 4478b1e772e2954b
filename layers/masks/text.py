"""Masks as text, for configs and the command line."""

import ast
from typing import Any

from . import algebra, patterns, rules
from .algebra import Mask, PerHead, require

_NAMES = {
  name: cls
  for module in (rules, algebra, patterns)
  for name, cls in vars(module).items()
  if isinstance(cls, type)
  and issubclass(cls, Mask | PerHead)
  and not getattr(cls, "__abstractmethods__", ())
}


def parse_mask(text: str) -> Mask | PerHead:
  """The mask that an expression names: `Causal() & (Local(255) | Global(64))`, or a mask's repr.

  Raises:
    ValueError: text that is not made of these names, `&`, `|`, `~`, numbers and words, or a mask
      that refuses its arguments.
  """
  try:
    mask = _evaluate(ast.parse(text.strip(), mode="eval").body)
  except SyntaxError as error:
    raise ValueError(f"mask {text!r} is not an expression: {error.msg}") from None
  except (TypeError, ValueError) as error:
    raise ValueError(f"mask {text!r}: {error}") from None
  require(isinstance(mask, Mask | PerHead), f"mask {text!r} is no mask; try Local(255)")
  return mask


def _evaluate(node: ast.AST) -> Any:
  match node:
    case ast.Constant(value=int() | str() as value):
      return value
    case ast.Tuple(elts=items):
      return tuple(map(_evaluate, items))
    case ast.UnaryOp(op=ast.Invert(), operand=operand):
      return ~_evaluate(operand)
    case ast.UnaryOp(op=ast.USub(), operand=operand):
      return -_evaluate(operand)
    case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
      return _evaluate(left) & _evaluate(right)
    case ast.BinOp(left=left, op=ast.BitOr(), right=right):
      return _evaluate(left) | _evaluate(right)
    case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _NAMES:
      named = {keyword.arg: _evaluate(keyword.value) for keyword in keywords if keyword.arg}
      return _NAMES[name](*map(_evaluate, args), **named)
  raise ValueError(f"{ast.unparse(node)!r} is unknown; there are {', '.join(_NAMES)}, &, | and ~")
