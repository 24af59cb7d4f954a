"""Text files are UTF-8 in every locale, and their lines end at \\n and nowhere else."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("lightwam_jax", "converters", "configs", "benchmarks", "tests")
FILES = sorted(
    [*(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")), *ROOT.glob("*.py")]
)


def without_encoding(source):
    """Yields the calls that read or write a text file and leave the encoding to the locale.

    ruff's PLW1514 sees only those whose path it can follow.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and not {k.arg for k in node.keywords} & {"encoding", None}:
            name, owner = getattr(node.func, "attr", ""), getattr(node.func, "value", None)
            # `atomic.write_text` takes no encoding, and PyAV opens videos.
            ours = isinstance(owner, ast.Name) and owner.id in ("atomic", "av")
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            modes += [k.value.value for k in node.keywords if k.arg == "mode"]
            text = not any("b" in mode for mode in modes if isinstance(mode, str))
            opened = isinstance(node.func, ast.Name) and node.func.id == "open" and text
            method = name == "open" and any(mode in ("r", "w", "a", "x", "r+") for mode in modes)
            if opened or ((method or name in ("read_text", "write_text")) and not ours):
                yield ast.unparse(node)


def split_at_more(source):
    """Yields the calls that split what was read from a file at more than line feeds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "splitlines":
            inner = getattr(node.func.value, "func", None)
            if getattr(inner, "attr", "") == "read_text":
                yield ast.unparse(node)


@pytest.mark.parametrize(
    "source",
    [
        "path.read_text()",
        "(a / b).write_text(text)",
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='a')",
        "path.open('a')",
        "files.existing(x).read_text().splitlines()",
    ],
)
def test_what_leaves_the_encoding_open_is_seen(source):
    assert list(without_encoding(source))


def test_what_names_its_encoding_is_left_alone():
    said = "open(p, 'rb'); p.read_text(encoding='utf-8'); atomic.write_text(p, t); p.read_bytes()"
    assert not list(without_encoding(said))
    assert list(split_at_more("p.read_text(encoding='utf-8').splitlines()"))
    assert not list(split_at_more("p.read_text(encoding='utf-8').split('\\n'); error.splitlines()"))


def test_every_text_file_names_its_encoding():
    found = {p: [*without_encoding(p.read_text(encoding="utf-8"))] for p in FILES}
    assert not {str(p.relative_to(ROOT)): calls for p, calls in found.items() if calls}


def test_lines_end_at_line_feeds_only():
    """U+2028 in an instruction, or a form feed in a log, ends no line."""
    files = [p for p in FILES if not p.is_relative_to(ROOT / "tests")]
    found = {p: [*split_at_more(p.read_text(encoding="utf-8"))] for p in files}
    assert not {str(p.relative_to(ROOT)): calls for p, calls in found.items() if calls}


def in_the_c_locale(code):
    """What Python code prints under LC_ALL=C without UTF-8 mode, where the default is ASCII."""
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_json_is_written_and_read_alike_in_every_locale(tmp_path):
    text = "d\u00e9placer le cube \u628a\u7ea2\u8272\u65b9\u5757"
    code = (
        "import locale; from lightwam_jax import atomic; "
        f"atomic.write_text('{tmp_path}/t', {json.dumps(text, ensure_ascii=False)!a}); "
        f"print(locale.getpreferredencoding(False), ascii(atomic.read_json('{tmp_path}/t')))"
    )
    assert in_the_c_locale(code) == f"ANSI_X3.4-1968 {text!a}"


@pytest.mark.parametrize("name", ["tasks.jsonl", "info.json"])
def test_a_dataset_is_read_alike_in_every_locale(name, tmp_path):
    text = "d\u00e9placer \u628a\u7ea2\u8272"
    content = json.dumps({"task_index": 0, "task": text}, ensure_ascii=False)
    (tmp_path / name).write_text(content, encoding="utf-8")
    how = "next(checked.json_lines(file))" if name == "tasks.jsonl" else "checked.json_object(file)"
    code = (
        "import pathlib; from lightwam_jax.data.formats import checked; "
        f"file = pathlib.Path('{tmp_path}/{name}'); print(ascii({how}.text('task')))"
    )
    assert in_the_c_locale(code) == ascii(text)
