"""What lies in a device's memory when a compiled program needs most of it, by what it is for.

Read from the files that XLA writes before it generates code, so also of programs that do not fit.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .program import computations, op_name

TRAFFIC, OTHER = "at work: gathered weights, traffic", "other"
READS = tuple(
  f"after_optimizations{name}.txt" for name in ("-live-range", "-buffer-assignment", "")
)
KINDS = ("attention", "mlp", "experts")  # of a layer
_INSTRUCTION = re.compile(
  r"^(?:ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)"
)
_VALUE = re.compile(
  r" value: <\d+ ([^\s{]+)(?:\{([\d,]*)\})? (?:\(phi\) )?@0> \(size=(\d+),offset=(\d+)\)"
)
_GIVEN = ("parameters", "optimizer", "caches", "batch")
GROUPS = (  # in the order they are shown
  *_GIVEN, "kept: layer inputs", *(f"kept: {kind}" for kind in KINDS), "gradients",
  "the loss and its gradient", *(f"at work: {kind}" for kind in KINDS), TRAFFIC, "the update",
  OTHER,
)  # fmt: skip
_ARGUMENTS = {"params": "parameters", "opt": "optimizer", "step": "optimizer", "caches": "caches"}
_FARTHEST = 50  # instructions between a value and who made it
_COPIES = ("bitcast", "copy", "copy-done", "copy-start", "reshape", "transpose", "convert")
_COLLECTIVE = re.compile(
  r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|async-collective"
)


class Buffer(NamedTuple):
  """A value in memory at the peak."""

  group: str  # one of GROUPS
  shape: str  # dtype and dims
  size: int  # bytes
  where: str  # in the model, or the argument it is; empty if the program does not say


class Instruction(NamedTuple):
  name: str
  shape: str
  op: str
  operands: list[str]
  line: str
  computation: str
  is_root: bool

  @property
  def where(self) -> str:
    return op_name(self.line).replace("\\'", "'")


class Peak(NamedTuple):
  """Bytes of a device when a program needs most."""

  total: int  # arguments, results that are not written over them, temporaries
  buffers: list[Buffer]  # the largest first

  @property
  def gaps(self) -> int:
    """Bytes between them."""
    return self.total - sum(buffer.size for buffer in self.buffers)


def at_peak(folder: Path) -> Peak:
  """What lives when most memory is needed.

  Args:
    folder: where XLA dumped one program.
  """
  (ranges,), (places,), (program,) = (folder.glob(f"*{name}") for name in READS)
  lives = _lives(ranges.read_text())
  values = _Values(program.read_text())
  total, kept, temporary = _placed(places.read_text())
  buffers = []
  for same in kept:
    found = _named(values, same)
    given = [buffer for buffer in found if buffer.group in _GIVEN]  # not what overwrites it
    buffers += (given or found)[:1]
  for same in _fullest(temporary, lives):
    found = _named(values, same)
    telling = [buffer for buffer in found if buffer.group != OTHER] or found
    # What is an argument here is a copy of one.
    is_copy = telling and telling[0].group in _GIVEN
    buffers += [telling[0]._replace(group=TRAFFIC)] if is_copy else telling[:1]
  return Peak(total, sorted(buffers, key=lambda buffer: -buffer.size))


def by_group(found: list[Buffer]) -> dict[str, int]:
  """Bytes of each group, in order."""
  sums = dict.fromkeys(GROUPS, 0)
  for buffer in found:
    sums[buffer.group] += buffer.size
  return sums


class _Value(NamedTuple):
  name: str
  index: tuple[int, ...]
  size: int
  offset: int


_Same = list[_Value]  # values that lie in one place


def _lives(text: str) -> dict[tuple[str, tuple[int, ...]], tuple[int, int]]:
  """(value, index) -> first and last place in the schedule."""
  found = re.findall(r"^    (\S+?)\{([\d,]*)\}:(\d+)-(\d+)$", text, re.MULTILINE)
  return {(name, _index(at)): (int(first), int(last)) for name, at, first, last in found}


def _index(text: str) -> tuple[int, ...]:
  return tuple(int(i) for i in text.split(",") if i)


def _placed(text: str) -> tuple[int, list[_Same], list[_Value]]:
  """(bytes in all, arguments and results, temporaries) in the main memory."""
  total, kept, temporary = 0, [], []
  here: list[_Value] | None = None
  for line in text.splitlines():
    if match := re.match(r"allocation \d+: size (\d+), page 0, (.*)", line):
      what, here = match[2], []
      if what.startswith("preallocated-temp"):
        here = temporary
      elif what.startswith(("parameter", "maybe-live-out", "output")):
        kept.append(here)
      else:
        continue
      total += int(match[1])
    elif line.startswith("allocation"):
      here = None
    elif here is not None and (match := _VALUE.match(line)):
      here.append(_Value(match[1], _index(match[2] or ""), int(match[3]), int(match[4])))
  return total, kept, temporary


def _fullest(values: list[_Value], lives) -> list[_Same]:
  """Of temporaries, those that live when most bytes do, by place."""
  spans = [(lives[v.name, v.index], v) for v in values if (v.name, v.index) in lives and v.size]
  events = [(span[0], 1, v) for span, v in spans] + [(span[1] + 1, 0, v) for span, v in spans]
  count: dict[tuple[int, int], int] = {}
  now = most = when = 0
  for at, begins, value in sorted(events, key=lambda event: event[:2]):
    place = value.offset, value.size
    count[place] = count.get(place, 0) + (1 if begins else -1)
    if count[place] == begins:  # it came, or the last one went
      now += value.size if begins else -value.size
    if now > most:
      most, when = now, at
  alive = [v for span, v in spans if span[0] <= when <= span[1]]
  found: list[_Same] = []
  for value in sorted(alive, key=lambda v: (v.offset, -v.size)):
    if found and value.offset < found[-1][0].offset + found[-1][0].size:
      found[-1].append(value)
    else:
      found.append([value])
  return found


def _named(values: "_Values", same: _Same) -> list[Buffer]:
  found = []
  for value in same:
    if made := values.made_by(value.name, value.index):
      group, where = values.group(made)
      shape = made.shape if made.shape[0] != "(" else _element(made.shape, value.index)
      found.append(Buffer(group, re.sub(r"\{.*", "", shape), value.size, where))
  return found


def _element(shape: str, index: tuple[int, ...]) -> str:
  parts = re.findall(r"\w+\[[\d,]*\]", shape)
  return parts[index[0]] if index and index[0] < len(parts) else parts[0] if parts else shape


class _Values:
  """Who makes each value of a program."""

  def __init__(self, text: str):
    bodies, self._entry = computations(text)
    self._by_name: dict[str, Instruction] = {}
    self._roots: dict[str, Instruction] = {}
    self._loops: dict[str, Instruction] = {}  # body -> its while
    self._users: dict[str, list[Instruction]] = {}
    self._inside: dict[str, list[str]] = {}  # computation -> where its instructions come from
    self._updating: dict[str, Instruction] = {}  # computation -> what writes a part of an array
    for computation, lines in bodies.items():
      for line in lines:
        if not (match := _INSTRUCTION.match(line)):
          continue
        operands = re.findall(r"%([\w.\-]+)", _until_closed(match["rest"]))
        made = Instruction(
          match["name"], match["shape"], match["op"], operands, line, computation,
          line.startswith("ROOT"),
        )  # fmt: skip
        self._by_name[made.name] = made
        for operand in operands:
          self._users.setdefault(operand, []).append(made)
        if made.is_root:
          self._roots[computation] = made
        if made.op == "while" and (body := re.search(r"body=%([\w.\-]+)", line)):
          self._loops[body[1]] = made
        if where := made.where:
          self._inside.setdefault(computation, []).append(where)
        if made.op == "dynamic-update-slice":
          self._updating[computation] = made

  def made_by(self, name: str, index: tuple[int, ...], seen: frozenset = frozenset()):
    """The instruction that fills a value: through tuples, loops and what only passes it on."""
    made = self._by_name.get(name)
    if made is None or (name, index) in seen:
      return made
    seen |= {(name, index)}
    follow = lambda other, index: self.made_by(other, index, seen) or made
    if made.op == "get-tuple-element":
      (which,) = re.findall(r"index=(\d+)", made.line)
      return follow(made.operands[0], (int(which), *index))
    if made.op in ("tuple", "opt-barrier") and index and made.operands:
      if made.op == "opt-barrier":
        return follow(made.operands[0], index)
      return follow(made.operands[index[0]], index[1:])
    if made.op == "while":
      return self._carried(made, index, seen) or made
    if made.op == "parameter" and made.computation in self._loops and index:
      return self._carried(self._loops[made.computation], index, seen) or made
    if made.op in ("bitcast", "copy", "copy-done", "copy-start", "reshape") and made.operands:
      return follow(made.operands[0], ())
    if "AllocateBuffer" in made.line:  # filled by the loop it goes into
      for user in self._users.get(name, []):
        loops = self._users.get(user.name, []) if user.op == "tuple" else []
        for loop in (u for u in loops if u.op == "while"):
          return self._carried(loop, (user.operands.index(name),), seen) or made
    return made

  def _carried(self, loop: Instruction, index, seen) -> Instruction | None:
    """Of a loop's value: what it begins as if that is an argument, else what the body makes."""
    first = self.made_by(loop.operands[0], index, seen)
    if first is not None and first.op == "parameter":
      return first
    body = re.search(r"body=%([\w.\-]+)", loop.line)
    assert body, loop.line
    later = self.made_by(self._roots[body[1]].name, index, seen)
    passed_on = later is None or later.op in ("parameter", "get-tuple-element", "while")
    return first if passed_on else later

  def group(self, made: Instruction) -> tuple[str, str]:
    """(one of GROUPS, where in the model)."""
    where = self._where(made)
    if made.op == "parameter" and made.computation == self._entry:
      return _ARGUMENTS.get(re.split(r"[\[_]", where.removeprefix("state."))[0], "batch"), where
    back = "transpose(" in where
    if "/head" in where or "_head/" in where or "cross_entropy" in where:
      return "the loss and its gradient", where
    if "optimizer/" in where:
      return "the update", where
    if _called(made) in self._updating and "_segments" in where:
      return ("gradients", where) if back else self._kept(made)
    if (
      where.startswith("state.")
      or _COLLECTIVE.search(made.op + made.name)
      or (re.search(r"all_gather|reduce_scatter|psum|ppermute|all_to_all", where))
    ):
      return TRAFFIC, where
    if kind := kind_of(where):
      return f"at work: {kind}", where
    if re.search(r"while/body/((closed_call|eval_jaxpr)/)?add(_any)?$|embedding", where) and (
      made.shape.startswith("f32") and back | ("jvp" not in where)
    ):
      return "gradients", where
    if "_segments" in where:
      return self._taken(made), where
    return OTHER, where

  def _kept(self, made: Instruction) -> tuple[str, str]:
    """What a layer of the forward pass leaves for the backward pass, by who made it."""
    where = self._written(made)
    # What a layer hands to the next one is a sum, of branches that may be normalised.
    kind = "" if re.search(r"Block/\w+/add$", where) else kind_of(where)
    return f"kept: {kind or 'layer inputs'}", where or made.where

  def _written(self, made: Instruction) -> str:
    """Where in a layer the part comes from that a fusion writes into an array."""
    here, source = made, self._by_name.get(self._updating[_called(made)].operands[1])
    for _ in range(_FARTHEST):
      if source is None:
        break
      root = self._roots.get(_called(source))
      for where in (source.where, root.where if root else ""):
        if "Block/" in where:
          return where
      if source.op == "parameter":
        number = re.search(r"parameter\((\d+)\)", source.line)
        if source.computation != _called(here) or number is None:
          return ""  # the loop's own argument
        source = self.made_by(here.operands[int(number[1])], ())
        here = source if source is not None else here
      else:
        source = self._by_name.get(source.operands[0]) if source.operands else None
    return ""

  def _taken(self, made: Instruction) -> str:
    """The group of a layer's part of what all layers keep, or of their weights."""
    for operand in made.operands:
      source = self.made_by(operand, ())
      if source is not None and source is not made and _called(source) in self._updating:
        kind = self.group(source)[0].removeprefix("kept: ")
        return f"at work: {kind if kind in KINDS else KINDS[0]}"
    return TRAFFIC

  def _sources(self, made: Instruction) -> Iterator[str]:
    yield from self._inside.get(_called(made), [])
    for operand in made.operands:
      source = self.made_by(operand, ())
      if source is not None:
        yield source.where
        yield from self._inside.get(_called(source), [])

  def _where(self, made: Instruction) -> str:
    """Its own name, or that of what it is made of, or of who uses it."""
    if where := made.where or next(iter(self._inside.get(_called(made), [])), ""):
      return where
    if made.op in _COPIES and made.operands:
      before = self.made_by(made.operands[0], ())
      if before is not None and before is not made and before.where:
        return before.where
    for user in self._users.get(made.name, []):
      if user.op == "tuple":
        index = (user.operands.index(made.name),)
        loops = [u for u in self._users.get(user.name, []) if u.op == "while"]
        for loop in loops:
          later = self._carried(loop, index, frozenset())
          if later is not None and later is not made and later.where:
            return later.where
      elif user.where:
        return user.where
    return ""


def _called(made: Instruction) -> str:
  found = re.search(r"calls=%([\w.\-]+)", made.line)
  return found[1] if found else ""


def kind_of(where: str) -> str:
  """Of a layer's scope: attention, mlp, experts; empty where there is none."""
  found = re.search(r"Block/(\w+)", where)
  if not found:
    return ""
  if re.search(r"moe|expert|router|dispatch", where):
    return "experts"
  return "mlp" if found[1].startswith("mlp") else "attention"


def _until_closed(text: str) -> str:
  depth = 1
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return text[:i]
  return text
