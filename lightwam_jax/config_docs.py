"""Writes docs/config.md, the list of all config keys, from the dataclasses of `config.py`.

python -m lightwam_jax.config_docs
"""

import ast
import dataclasses
import inspect
import io
import pathlib
import tokenize
import typing

from lightwam_jax import config
from lightwam_jax.models import variants

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "config.md"
HEAD = """# Config keys

Made from `lightwam_jax/config.py` by `make docs`; change it there. A key is set in a file of
`configs/`, `c.data.canvas = (64, 128)`, or on the command line, `--config.data.canvas="(64, 128)"`.
Three defaults of a key are those of the model variants wan21_1_3b, wan22_5b and tiny.
"""


def page():
    """Returns the text of docs/config.md."""
    return "\n".join([HEAD, *_section("config", config.Config)])


def _section(path, cls):
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    rows, inner = [("key", "type or values", "default", "meaning"), ("---",) * 4], []
    for field in dataclasses.fields(cls):
        name, kind = field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            inner += _section(f"{path}.{name}", kind)
        else:
            rows.append((f"`{name}`", _kind(kind), _default(field), comments[name]))
    about = [f"{cls.__doc__}\n"] if not cls.__doc__.startswith(f"{cls.__name__}(") else []
    return [f"## {path}\n", *about, "".join(f"| {' | '.join(row)} |\n" for row in rows), *inner]


def _comments(cls):
    """{key: the comment above it, and the one behind it} of a dataclass."""
    source = inspect.getsource(cls)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while (above := comments.get(first - 1)) and above.line.strip() == above.string:
                first -= 1
            lines = range(first, node.end_lineno + 1)
            texts = [comments[line].string.lstrip("# ") for line in lines if line in comments]
            found[node.target.id] = " ".join(texts)
    return found


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return _code(field.default_factory())
    if field.default is not dataclasses.MISSING:
        return _code(field.default)
    tables = variants.VARIANTS.items()
    return " / ".join(_code(table.get(field.name, variant)) for variant, table in tables)


def _kind(kind):
    inner = [x for x in typing.get_args(kind) if x is not ...]
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(_code, inner))
    if typing.get_origin(kind) is tuple:
        return f"tuple of {_kind(inner[0])}"
    return kind.__name__


def _code(value):
    if isinstance(value, tuple) and len(value) > 3 and value == tuple(range(len(value))):
        return f"`(0, 1, ..., {value[-1]})`"
    return f"`{value!r}`" if not isinstance(value, str) else f'`"{value}"`'


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
