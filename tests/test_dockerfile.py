"""The Dockerfile, as far as it can be checked without Docker: its steps refer to what is there."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def steps():
    """[(instruction, arguments)] of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def of(name):
    return [arguments for instruction, arguments in steps() if instruction == name]


def test_instructions_are_known_and_in_order():
    names = [name for name, _ in steps()]
    known = "ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK RUN STOPSIGNAL USER WORKDIR"
    assert set(names) <= set(known.split()) and names[0] == "FROM"
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert names.count("ENTRYPOINT") == names.count("CMD") == 1


def test_what_is_copied_exists_and_reaches_the_builder():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for arguments in of("COPY"):
        *sources, _ = arguments.split()
        for source in sources:
            assert list(ROOT.glob(source)), source
            assert source in kept, f"{source} is left out by .dockerignore"


@pytest.mark.parametrize("extra", ["", "cuda"])
def test_the_extras_are_those_of_the_package(extra):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]["dynamic"]
    assert '".${EXTRA:+[$EXTRA]}"' in of("RUN")[0]
    assert not extra or extra in extras["optional-dependencies"]


def test_the_command_starts_the_server_with_flags_that_it_has():
    command = json.loads(of("ENTRYPOINT")[0]) + json.loads(of("CMD")[0])
    assert command[:3] == ["python", "-m", "lightwam_jax.inference.server"]
    assert importlib.util.find_spec(command[2])
    sources = (ROOT / "lightwam_jax" / "inference").glob("*.py")
    defined = set(
        re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', "".join(map(Path.read_text, sources)))
    )
    for flag in command[3:]:
        assert flag.removeprefix("--").partition("=")[0] in defined, flag
    port = next(flag for flag in command if flag.startswith("--port=")).partition("=")[2]
    assert of("EXPOSE") == [port]
    assert f":{port}/healthz" in shlex.split(of("HEALTHCHECK")[0].partition("CMD")[2])[-1]
