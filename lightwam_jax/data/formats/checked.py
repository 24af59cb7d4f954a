"""Metadata files read with care: every value is checked where it is read.

What is wrong is a `Wrong`, whose message names the file, the line or row and the key, what came and
what was expected.
"""

import dataclasses
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq

_SHOWN, _NAMES = 60, 300  # characters of a value, and of a list of names, in a message
_MOST = 2**53  # larger whole numbers are not exact as floats


class Wrong(ValueError):
    """Metadata that cannot be used as they are; `place` is the file, and the line or row."""

    def __init__(self, message, place=""):
        super().__init__(message)
        self.place = str(place)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A JSON object or a row of a table; `place` is its file, and the line or row."""

    values: dict
    place: str

    def whole(self, key, least=0):
        """Returns a whole number from `least` on; 3.0 is one, as pandas writes 3 beside a null."""
        value = self._value(key, expected := f"a whole number, {least} or more")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST:
            raise self.wrong(key, expected)
        return value

    def number(self, key, above=-math.inf):
        """Returns a finite number above `above`."""
        limit = "" if above == -math.inf else f" above {above:g}"
        value = self._value(key, expected := f"a number{limit}")
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not above < value or not abs(value) < _MOST:
            raise self.wrong(key, expected)
        return float(value)

    def text(self, key):
        """Returns a text that is not empty."""
        value = self._value(key, expected := "text")
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, expected)
        return value

    def entry(self, key):
        """Returns a JSON object as an `Entry`."""
        value = self._value(key, expected := "a JSON object")
        if not isinstance(value, dict):
            raise self.wrong(key, expected)
        return Entry(value, f"{self.place}: {key}")

    def absent(self, key):
        """Whether there is no such value, or a null, or NaN, which is how pandas writes one."""
        value = self.values.get(key)
        return value is None or value != value

    def wrong(self, key, expected):
        """Returns the `Wrong` of a value that is not what was expected."""
        return Wrong(f"{self.place}: {key} is {shown(self.values[key])}; expected {expected}")

    def _value(self, key, expected):
        if key not in self.values:
            there = ", ".join(map(str, self.values))[:_NAMES] or "nothing"
            raise Wrong(f"{self.place} lacks {key} ({expected}); it has {there}")
        return self.values[key]


def shown(value):
    """Returns a value as a message names it."""
    if value is None:
        return "null"
    text = "NaN" if value != value else repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"the text {text}" if isinstance(value, str) else text


def json_object(file):
    """Returns the `Entry` of a JSON file that holds one object."""
    return _object(_read(file), file)


def json_lines(file):
    """Yields the `Entry` of each line of a JSON-lines file, or the `Wrong` in its place."""
    # Only a line feed ends a line: JSON may hold other separators, e.g. U+2028, as they are.
    for number, line in enumerate(_read(file).split("\n"), 1):
        if line.strip():
            try:
                yield _object(line, f"{file}, line {number}", "; expected one JSON object per line")
            except Wrong as error:
                yield error


def table(file, columns=lambda name: True):
    """Returns ([`Entry`] of each row, names of the columns, metadata) of a parquet file.

    Args:
      file: path.
      columns: which of the columns to read, by name.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            rows = parquet.read(columns=[name for name in schema.names if columns(name)])
        rows = rows.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Wrong(f"{file} cannot be read, nor the dataset without it: {error}") from error
    entries = [Entry(row, f"{file}, row {number}") for number, row in enumerate(rows)]
    return entries, schema.names, schema.metadata or {}


def _read(file):
    try:
        return file.read_text(encoding="utf-8-sig")  # editors may put a byte-order mark in front
    except FileNotFoundError:
        raise Wrong(f"{file} does not exist; the dataset cannot be read without it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Wrong(f"{file} cannot be read as UTF-8 text: {error}") from error


def _object(text, place, expected=""):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = expected or "; copy it again"
        raise Wrong(f"{place} is not JSON ({error}){advice}", place) from error
    if not isinstance(value, dict):
        raise Wrong(f"{place} is {shown(value)}; expected a JSON object", place)
    return Entry(value, str(place))
