"""Commands on pages and in docstrings: found, and parsed by what would parse them.

Flags of absl and argparse are read from a program's source (importing every program takes a minute
of processor time); config files, arguments and keys go through `command_line.parse`, as they do
when the command is run.
"""

import argparse
import ast
import functools
import json
import pathlib
import re
import shlex
import tomllib
import types
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from converters import __main__ as converters
from lightwam_jax import command_line
from lightwam_jax.inference import serving_options

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = r"(?:\S*/)?python3?"
# What a line of a block or a piece of inline code begins with where it is a command.
_BEGINS = re.compile(
    rf"(?:[A-Z_]+=\S+ |\[[^]]*\] )*(?:{PYTHON}|make|pip|bash|cp|git|docker|apt-get|\.) "
)
_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_SHELL = ("", "bash", "sh", "console")
# Words in capitals stand for what a reader fills in.
_FILLED_IN = {"CONFIG": "configs/demo.py", "I": "0", "N": "1"}
_OUTPUTS = ("--out", "--record", "--docs")
_INPUTS = (
    "--in",
    "--weights",
    "--vae",
    "--text",
    "--workdir",
    "--limits",
    "--results",
    "--prompts",
)
_INPUTS += ("--config.train.init", "--config.data.codec_weights", "--config.data.text_weights")
_INPUTS += ("--tokenizer", "--stats", "--study")


class Command(NamedTuple):
    """A command as it is written, and where."""

    page: str
    text: str

    def words(self):
        """Returns its words without comment, ellipsis, optional parts and variables before it."""
        words = shlex.split(self.text, comments=True)
        words = [word for word in words if word != "..." and not word.startswith("[")]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        return words


def found(page, text):
    """Returns the `Command`s of a Markdown text or a docstring."""
    blocks = [match[2] for match in _FENCE.finditer(text) if match[1] in _SHELL]
    rest = _FENCE.sub("\n", text)
    blocks += re.findall(r"(?:^ {4,}\S[^\n]*\n?)+", rest, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in _joined(block).split("\n")]
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
    lines = [re.sub(r"^(\$|next:|srun( --\S+)*) ", "", line) for line in lines + inline]
    return [Command(page, line) for line in lines if _BEGINS.match(line)]


def _joined(block):
    """A line that ends with a backslash, and the one after it, are one."""
    return re.sub(r"\\\n\s*", " ", block)


def pages():
    """Returns {name: text} of all pages, and of the docstrings of configs."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
    paths += sorted((ROOT / "docs").rglob("*.md"))
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    for path in sorted((ROOT / "configs").glob("*.py")):
        texts[f"configs/{path.name}"] = (
            ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        )
    return texts


# ---- one command ---------------------------------------------------------------------------------


def check(command, copies, known):
    """Checks a `Command`.

    Args:
      copies: {file that a page tells to make by copying: what it is a copy of}.
      known: names that an input may have though the checkout has no such file.

    Raises:
      ValueError, or what `command_line.parse` raises: what is wrong with it.
    """
    program, *arguments = command.words()
    if program == "make":
        _check_targets(arguments)
    elif program == "pip":
        _check_requirements(arguments)
    elif program in ("cp", "bash"):
        _check_exists(arguments[0])
    elif re.fullmatch(PYTHON, program):
        _check_python(arguments, copies)
        _check_inputs(arguments, known)
    else:
        raise ValueError(f"nothing here checks a command of {program}")


def made(command):
    """Returns the files and directories that a `Command` makes."""
    words = command.words()
    if words[0] == "cp":
        return {words[-1]}
    outputs = _OUTPUTS + (("--workdir",) if "train.py" in words else ())
    return {value for flag, value in _pairs(words) if flag in outputs}


def _check_targets(arguments):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    for target in arguments:
        if "=" not in target and target not in targets:
            raise ValueError(f"the Makefile has no target {target}; it has {sorted(targets)}")


def _check_requirements(arguments):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    for before, argument in zip(["", *arguments], arguments):
        if before == "-r":
            _check_exists(argument)
        if extra := re.fullmatch(r"\.\[(.*)\]", argument):
            for name in extra[1].split(","):
                if name not in extras:
                    raise ValueError(f"pyproject.toml has no extra {name}")


def _check_exists(name):
    if not (ROOT / name).exists():
        raise ValueError(f"there is no {name}")


def _check_inputs(arguments, known):
    for flag, value in _pairs(arguments):
        is_input = flag in _INPUTS and not (flag == "--workdir" and "train.py" in arguments)
        if not is_input or re.fullmatch(r"[A-Z_/]+", value) or value.startswith("hf:"):
            continue
        if value not in known and not (ROOT / value).exists():
            raise ValueError(f"{flag} {value}: neither in the checkout nor made by a command")


def _pairs(words):
    """(flag, value) of --flag value and --flag=value."""
    for word, after in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            yield flag, value if equals else after


def _check_python(arguments, copies):
    if arguments[0] == "-m":
        path, arguments = module_file(arguments[1]), arguments[2:]
    else:
        path, arguments = pathlib.Path(arguments[0]), arguments[1:]
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no {path}")
    arguments = [_filled_in(word, copies) for word in arguments]
    for flag, value in _pairs(arguments):
        if flag == "--env" and not isinstance(json.loads(value), dict):
            raise ValueError(f"--env {value}: not an object")
        if flag == "--mode" and value not in _modes():
            raise ValueError(f"--mode {value}: not of {_modes()}")
    if path.parts[0] == "converters":
        _parse_converters(arguments)
    else:
        parse(path, arguments)


def module_file(name):
    """Returns the file of a module of the project, relative to its root."""
    path = pathlib.Path(*name.split("."))
    return path / "__main__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")


@functools.cache
def _modes():
    for node in ast.parse((ROOT / "evaluate.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CLOSED_LOOP":
            closed = ast.literal_eval(node.value)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MODES":
            return eval(ast.unparse(node.value), {"CLOSED_LOOP": closed})
    raise AssertionError("evaluate.py has no MODES")


def _filled_in(word, copies):
    start, equals, value = word.rpartition("=")
    file, colon, argument = value.partition(":")
    value = copies.get(file, file) + colon + argument
    return start + equals + _FILLED_IN.get(value, value)


# ---- the flags of a program ----------------------------------------------------------------------


def parse(path, arguments):
    """Parses the arguments of a program by the flags that its source defines."""
    calls = _calls(path)
    if any(name == "add_argument" for name, _ in calls):
        parser = _Parser()
        for name, call in calls:
            if name == "add_argument":
                _add_argument(parser, call)
        parser.parse_args(arguments)
        return
    values, argv = flags.FlagValues(), [str(path), *arguments]
    for name, call in calls:
        if name in ("define_config", "DEFINE_config_file"):
            default = _literal(call.args[1], None) if len(call.args) > 1 else None
            config_flags.DEFINE_config_file(
                "config", default, lock_config=True, flag_values=values, sys_argv=argv
            )
        elif name == "define_flags":
            defined = {each: _into(values, each) for each in dir(flags) if each.startswith("DEF")}
            serving_options.define_flags(types.SimpleNamespace(**defined))
        else:
            _define(values, name, call)
    rest = command_line.parse(argv, values)
    if len(rest) > 1 and path.name in ("train.py", "precompute.py", "scale.py"):
        raise ValueError(f"{' '.join(rest[1:])}: {path} takes no arguments")


@functools.cache
def _calls(path):
    """(name, call) of what defines flags in a file."""
    names = ("define_config", "define_flags", "add_argument")
    return [
        (node.func.attr, node)
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr.startswith("DEFINE_") or node.func.attr in names
    ]


def _define(values, kind, call):
    """Defines a flag as the call does; texts and choices that are computed are left out."""
    name, default, *rest = call.args
    name, default = ast.literal_eval(name), _literal(default, None)
    numbers = {key.arg: _literal(key.value, None) for key in call.keywords}
    if kind == "DEFINE_enum":
        if (choices := _literal(rest[0], None)) is None:
            kind = "DEFINE_string"
        else:
            flags.DEFINE_enum(name, default, choices, "", flag_values=values)
            return
    getattr(flags, kind)(name, default, "", flag_values=values, **numbers)


def _into(values, kind):
    return functools.partial(getattr(flags, kind), flag_values=values)


def _literal(node, otherwise):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return otherwise


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _add_argument(parser, call):
    kinds = {"int": int, "float": float}
    given = {key.arg: key.value for key in call.keywords if key.arg != "help"}
    kept = {key: _literal(node, None) for key, node in given.items() if key != "type"}
    if "type" in given:
        kept["type"] = kinds.get(getattr(given["type"], "id", ""), str)
    parser.add_argument(*map(ast.literal_eval, call.args), **kept)


def _parse_converters(arguments):
    parser = converters._parser()
    try:
        told, rest = parser.parse_known_args(arguments)
    except SystemExit as error:
        raise ValueError(f"python -m converters {' '.join(arguments)}: exit {error}") from error
    place = getattr(told, "config", None)
    if wrong := [flag for flag in rest if not (place and flag.startswith("--config."))]:
        raise ValueError(f"python -m converters: {' '.join(wrong)}")
    if place:
        values, argv = flags.FlagValues(), ["converters", f"--config={place}", *rest]
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        command_line.parse(argv, values)
