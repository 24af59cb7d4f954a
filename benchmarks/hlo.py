"""Reads the text of a compiled program (`compiled.as_text()`)."""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_ODD_SIZES = {"pred": 1, "s4": 1, "u4": 1, "token": 0}


class Instruction(NamedTuple):
    """A line of a computation. `result` is its type, `attributes` all that follows the operands."""

    name: str
    result: str
    opcode: str
    operands: tuple
    attributes: str
    is_root: bool

    def names(self, key):
        """The computation that an attribute such as `calls=%f` names, or None."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


def parse(text):
    """Returns ({computation: {name: `Instruction`}}, name of the entry) of a module's text.

    Raises:
      ValueError: no entry: not the text of a module.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None and (header := _COMPUTATION.match(line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation; expected that of compiled.as_text()")
    return computations, entry


def arrays(result):
    """Returns [(dtype, shape)] of a type: one array, or those of a tuple."""
    found = _ARRAY.findall(result)
    return [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found]


def size(result):
    """Returns the bytes of a type."""
    return sum(math.prod(shape) * _itemsize(dtype) for dtype, shape in arrays(result))


def _itemsize(dtype):
    if dtype in _ODD_SIZES:
        return _ODD_SIZES[dtype]
    return int(re.search(r"\d+", dtype)[0]) // 8


def _instruction(line):
    """The `Instruction` of a line such as `ROOT %y = f32[2]{0} add(%a, f32[2] %b), calls=%c`."""
    name, _, rest = re.sub(r"/\*.*?\*/", "", line).strip().partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    operands = () if opcode in ("constant", "parameter") else _operands(rest[1 : end - 1])
    plain = name.removeprefix("ROOT ").lstrip("%")
    return Instruction(plain, result, opcode, operands, rest[end:], name.startswith("ROOT "))


def _closing(text):
    """Index behind the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    raise ValueError(f"unbalanced parentheses: {text[:200]!r}")


def _operands(text):
    flat = re.sub(r"\{[^{}]*\}|\[[^\]]*\]", "", text)  # types and layouts have commas too
    return tuple(part.split()[-1].lstrip("%") for part in flat.split(",") if part.strip())
