"""What all commands have in common: mistakes in flags and configs are one line and exit code 2.

`check` reads the flags and the config before a command imports what takes seconds; `run` then calls
its main function. No jax here.
"""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
import sys
import traceback
import typing

from absl import app, flags, logging
from ml_collections import config_flags

from lightwam_jax import bucket as bucket_lib
from lightwam_jax import config as config_lib
from lightwam_jax import config_read, interrupts, next_command

_AGAIN = "what is finished is kept: run the same command again to continue"
# What a config file, being Python, may raise when it is loaded.
_OF_A_FILE = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError)
_OF_A_FILE += (OSError, RuntimeError, SyntaxError, TypeError, ValueError)
_arguments = None  # of the command, once its flags are read


def define_config(text="Python file with get_config(); its keys: docs/config.md."):
    """Defines --config and --config.KEY."""
    config_flags.DEFINE_config_file("config", None, text, lock_config=True)


def check(argv=None):
    """Reads flags and config; ends the program with one line where something is wrong.

    Returns:
      The arguments that are no flags, as `main` gets them.
    """
    global _arguments
    interrupts.listen()
    if _arguments is None:
        app.define_help_flags()
        with one_line():
            _arguments = parse(sys.argv if argv is None else argv, flags.FLAGS)
    return _arguments


def run(main, again=_AGAIN):
    """Calls main(arguments) after `check`; a mistake is one line, Ctrl-C too.

    Args:
      again: what Ctrl-C leaves behind and how to go on.
    """

    def guarded(arguments):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax reports every file it reads or moves
        with one_line(), interrupts.interruptible(again):
            return main(arguments)

    interrupts.listen()
    app.run(guarded, flags_parser=check)


@contextlib.contextmanager
def one_line():
    """Ends the program with one line and exit code 2 where flags are used in a wrong way."""
    try:
        yield
    except (app.UsageError, flags.Error, config_read.ConfigError) as error:
        fail(error)


def fail(error):
    """Prints the error and ends the program with exit code 2."""
    print(f"error: {next_command.with_config_given(str(error))}", file=sys.stderr)
    sys.exit(2)


def parse(argv, values):
    """Reads argv into the flags `values` and checks the config they give.

    Returns:
      argv without the flags.

    Raises:
      config_read.ConfigError: with what to do.
    """
    with_config = "config" in values
    if with_config and (place := _value_of(argv, "config")) is not None:
        load(place)  # its own message: what ml_collections makes of an error is a traceback
        _check_keys(argv)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise config_read.ConfigError(_unknown(error.flagname, values)) from error
    except flags.Error as error:
        raise config_read.ConfigError(_short(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise config_read.ConfigError(f"--config.KEY=VALUE: {_last_line(error)}") from error
    if with_config and values.config is not None:
        try:
            config_lib.from_config_dict(values.config)
        except ValueError as error:
            raise config_read.ConfigError(str(error)) from error
    return rest


def load(place):
    """Returns the ConfigDict of a config file, FILE.py or FILE.py:ARGUMENT.

    Raises:
      config_read.ConfigError: no such file, an argument it does not take, or an error in it.
    """
    path, colon, argument = place.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        there = sorted(map(str, pathlib.Path("configs").glob("[!_]*.py")))
        near = difflib.get_close_matches(path, there, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}"
        raise config_read.ConfigError(
            f"--config={place}: no such file{'; ' + advice if there else ''}"
        )
    space = {"__name__": "config_file", "__file__": str(file)}
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), space)
        make = space["get_config"]
    except KeyError as error:
        if error.args != ("get_config",):
            raise config_read.ConfigError(_in_file(place, file, error)) from error
        raise config_read.ConfigError(f"--config={place}: it has no get_config()") from error
    except _OF_A_FILE as error:
        raise config_read.ConfigError(_in_file(place, file, error)) from error
    try:
        made = make(*([argument] if colon else []))
    except _OF_A_FILE as error:
        calls = traceback.extract_tb(error.__traceback__)
        if isinstance(error, TypeError) and len(calls) == 1:  # it was not even entered
            takes = "takes no :ARGUMENT" if colon else f"needs an argument: {path}:ARGUMENT"
            raise config_read.ConfigError(f"--config={place}: get_config {takes}") from error
        if isinstance(error, ValueError) and path in str(error):  # made for the reader
            raise config_read.ConfigError(str(error)) from error
        raise config_read.ConfigError(_in_file(place, file, error)) from error
    if not hasattr(made, "to_dict"):
        kind = type(made).__name__
        raise config_read.ConfigError(
            f"--config={place}: get_config() returned a {kind}; expected a ConfigDict, such as "
            "configs/base.py makes"
        )
    return made


def check_directory(place, flag, bucket=False):
    """Raises ConfigError where a directory cannot be made or written to; nothing is made here.

    Args:
      bucket: whether it may be an address of object storage too.
    """
    if bucket_lib.is_address(place):
        if not bucket:
            raise config_read.ConfigError(f"{flag}={place}: expected a directory, not an address")
        try:
            bucket_lib.check(place, flag)
        except ValueError as error:
            raise config_read.ConfigError(str(error)) from error
        return
    path = pathlib.Path(place).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise config_read.ConfigError(
            f"{flag}={place}: {nearest} is no directory; expected a directory, or the name of a "
            "new one"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise config_read.ConfigError(
            f"{flag}={place}: no right to write in {nearest}; give another place or change its "
            "permissions"
        )


def check_new(place, flag):
    """Raises ConfigError where nothing can be made at a path: `check_directory` of its parent."""
    if bucket_lib.is_address(place):
        check_directory(place, flag)
    check_directory(os.path.dirname(os.path.abspath(place)), flag)


# ---- messages ----------------------------------------------------------------------------------


def _value_of(argv, name):
    """The (last) value of a flag in argv, None where it is not given."""
    found = None
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL):
            found = match[1] if match[1] is not None else " ".join(argv[i + 1 : i + 2])
    return found


def _check_keys(argv):
    """Whether each --config.KEY is one."""
    for argument in argv:
        if match := re.match(r"--?(?:no)?config\.([\w.]+)", argument):
            try:
                config_read.check_path(match[1].split("."), config_lib.Config)
            except ValueError as error:
                raise config_read.ConfigError(str(error)) from error


def _unknown(name, values):
    """An unknown flag, and what was probably meant."""
    with_config = "config" in values
    if with_config and name.startswith("config."):
        return f"--{name} needs --config=FILE as well"
    keys, bare = _config_keys() if with_config else [], name.removeprefix("no")
    meant = [f"--config.{key}" for key in keys if key == name or key.rpartition(".")[2] == bare]
    own = [flag for flag in values if not flag.startswith("config.")]
    near = [] if meant else difflib.get_close_matches(name, own, n=1, cutoff=0.7)
    meant += [f"--{flag}" for flag in near]
    if not meant:
        leaves = {key.rpartition(".")[2]: key for key in keys}
        near = difflib.get_close_matches(bare, leaves, n=1, cutoff=0.7)
        meant = [f"--config.{leaves[leaf]}" for leaf in near]
    advice = f"; did you mean {' or '.join(meant[:4])}?" if meant else "; --help lists the flags"
    return f"there is no flag --{name}{advice}"


def _config_keys(cls=config_lib.Config, start=""):
    """Dotted names of all config keys."""
    found = []
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found += _config_keys(kind, f"{start}{name}.")
        else:
            found.append(start + name)
    return found


def _short(error):
    """A message of absl as one line."""
    text = " ".join(str(error).split())
    needed = re.findall(r"Flag (--\w+) must have a value other than None", text)
    return f"{' and '.join(dict.fromkeys(needed))} is needed; --help says more" if needed else text


def _last_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _in_file(place, file, error):
    """An error in a config file, with its line."""
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        calls = traceback.extract_tb(error.__traceback__)
        line = next((c.lineno for c in reversed(calls) if c.filename == str(file)), None)
    where = f", line {line}" if line else ""
    return f"--config={place}{where}: {type(error).__name__}: {_last_line(error)}"
