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
"""


def page():
    """Returns the text of docs/config.md."""
    parts = [HEAD, *_section("config", config.Config)]
    names = [f.name for f in dataclasses.fields(config.ModelConfig) if _default(f) is None]
    rows = [
        (f"`{name}`", *(_code(table[name]) for table in variants.VARIANTS.values()))
        for name in names
        if name != "variant"
    ]
    parts += [
        "## Sizes of the model variants\n",
        _table(("key", *(f"`{name}`" for name in variants.VARIANTS)), rows),
    ]
    return "\n".join(parts)


def _section(path, cls):
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    rows, inner = [], []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            inner += _section(f"{path}.{field.name}", kind)
        else:
            default = _default(field)
            shown = "by variant" if default is None else _code(default)
            rows.append((f"`{field.name}`", _kind(kind), shown, comments[field.name]))
    about = [f"{cls.__doc__}\n"] if not cls.__doc__.startswith(f"{cls.__name__}(") else []
    table = _table(("key", "type or values", "default", "meaning"), rows)
    return [f"## {path}\n", *about, table, *inner]


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
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


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


def _table(head, rows):
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        f"| {' | '.join(x.replace('|', chr(92) + '|') for x in line)} |\n" for line in lines
    )


if __name__ == "__main__":
    PAGE.write_text(page())
