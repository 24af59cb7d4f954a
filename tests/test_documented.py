"""Every command of the pages and of the docstrings of configs can be parsed, or is named here."""

import functools
import re

import pytest

from lightwam_jax import command_line
from tests import documented

# Commands that nothing here parses, by how they begin, and why.
UNCHECKED = {
    ". .venv/bin/activate": "of the shell",
    "apt-get install": "packages of the system",
    "docker build": "needs Docker; tests/test_dockerfile.py reads the file",
    "git clone https://": "the network",
    "pip check": "pip's own",
    "pip uninstall": "pip's own",
    "python script/eval_policy": "of RoboTwin's checkout",
    "JAX_PLATFORMS=cuda python -m pytest -m gpu": "pytest's own; the marker is in pyproject.toml",
}
# Inputs that neither the checkout has nor a command on the pages makes, and where they come from.
GIVEN = {
    "step_150000.pt": "the released checkpoint",
    "Wan2.1_VAE.pth": "released by Wan",
    "models_t5_umt5-xxl-enc-bf16.pth": "released by Wan",
    "tokenizer.json": "released by Wan",
    "Wan2.2-TI2V-5B": "released by Wan",
    "Wan2.2-TI2V-5B/Wan2.2_VAE.pth": "released by Wan",
    "instructions.txt": "the reader's own",
    "runs/x": "stands for a run",
    "runs/demo": "made by `make demo`",
    "runs/policies/demo": "made by evaluate.py --workdir policies/demo",
}
COPIES = {"configs/mine.py": "configs/hdf5_robot.py"}


@functools.cache
def commands():
    return [c for page, text in documented.pages().items() for c in documented.found(page, text)]


def known():
    return set(GIVEN).union(*map(documented.made, filter(is_checked, commands())))


def is_checked(command):
    return not command.text.startswith(tuple(UNCHECKED))


@pytest.mark.parametrize("page", documented.pages())
def test_every_command_parses(page, monkeypatch):
    monkeypatch.chdir(documented.ROOT)
    wrong, inputs = [], known()
    for command in dict.fromkeys(c for c in commands() if c.page == page and is_checked(c)):
        for source in sources(page) if "configs/mine.py" in command.text else [""]:
            try:
                documented.check(command, {"configs/mine.py": source}, inputs)
            except Exception as error:
                wrong.append(f"{command.text}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def sources(page):
    """What configs/mine.py is a copy of: the config itself, on other pages any of a robot's."""
    own = [f"configs/{kind}_robot.py" for kind in ("hdf5", "lerobot", "rlds")]
    return [page] if page in own else own


# What a command needs where the config starts from released weights.
WEIGHTS = {
    "python train.py": ("train.init",),
    "python -m lightwam_jax.evaluation.ablations": ("train.init",),
    "python -m lightwam_jax.precompute": ("data.codec_weights", "data.text_weights"),
}


def test_commands_on_released_weights_name_them():
    """Without them precompute stops, and train.py leaves what is frozen at random values."""
    needing = 0
    for command in commands():
        text = re.sub(r"configs/mine\.py", COPIES["configs/mine.py"], command.text)
        program = next((p for p in WEIGHTS if p in text), None)
        place = re.search(r"--config (configs/\S+)", text)
        if not (program and place) or re.search(r"source=fake|--what stats", text):
            continue
        if command_line.load(place[1]).data.codec != "pca":
            needing += 1
            for key in WEIGHTS[program]:
                assert f"--config.{key}=" in text, (command, key)
    assert needing >= 10


def test_no_command_is_overlooked():
    """What looks like a command of this project is one of those that were found."""
    looks = re.compile(r"python (?:-m [\w.]+|\w+\.py)")
    for page, text in documented.pages().items():
        if page == "docs/config.md":  # its comments name a program, without its flags
            continue
        said = looks.findall(re.sub(r"\\\n\s*", " ", text))
        mine = [c for c in commands() if c.page == page]
        there = [match for c in mine for match in looks.findall(c.text)]
        assert sorted(said) == sorted(there), page


def test_what_is_listed_here_is_needed():
    texts = [c.text for c in commands()]
    assert [b for b in UNCHECKED if not any(t.startswith(b) for t in texts)] == []
    words = {word for c in commands() for word in re.split(r"[\s=]", c.text)}
    assert [name for name in GIVEN if name not in words] == []


@pytest.mark.parametrize(
    "right, wrong, said",
    [
        ("python train.py --workdir runs/x", "python train.py --workdri runs/x", "--workdri"),
        (
            "python train.py --config CONFIG --config.train.steps=20",
            "python train.py --config CONFIG --config.train.step=20",
            "train.step",
        ),
        (
            "python train.py --config CONFIG --config.train.steps=20",
            "python train.py --config CONFIG --config.train.steps=many",
            "many",
        ),
        (
            "python train.py --config configs/demo.py",
            "python train.py --config configs/dmo.py",
            "no such file",
        ),
        (
            "python train.py --config configs/libero.py:spatial",
            "python train.py --config configs/libero.py:spatiel",
            "spatiel",
        ),
        (
            """python evaluate.py --env '{"rendering": "fast"}'""",
            """python evaluate.py --env '{"rendering": fast}'""",
            "Expecting value",
        ),
        ("python evaluate.py --mode demo", "python evaluate.py --mode dmo", "dmo"),
        ("python evaluate.py --workdir runs/x", "python evaluate.py --workdir runs/z", "runs/z"),
        (
            "python -m benchmarks.data --rounds 3",
            "python -m benchmarks.data --round_s 3",
            "round_s",
        ),
        ("python -m benchmarks.data", "python -m benchmarks.dta", "benchmarks/dta.py"),
        (
            "python -m lightwam_jax.inference.server --max_batch 8",
            "python -m lightwam_jax.inference.server --maxbatch 8",
            "maxbatch",
        ),
        (
            "python -m converters verify DIR",
            "python -m converters verfy DIR",
            "verfy",
        ),
        (
            "python -m converters latents --in DIR --config configs/libero.py:spatial",
            "python -m converters latents --in DIR --config configs/libero.py:spatiel",
            "spatiel",
        ),
        ("make verify", "make verfiy", "verfiy"),
        ("pip install -r requirements-tpu.txt", "pip install -r requirements-tqu.txt", "tqu"),
        ("pip install '.[cuda]'", "pip install '.[cudda]'", "cudda"),
        ("cp configs/rlds_robot.py configs/mine.py", "cp configs/rlsd_robot.py x", "rlsd_robot"),
    ],
)
def test_a_slip_is_noticed(right, wrong, said, monkeypatch):
    monkeypatch.chdir(documented.ROOT)
    inputs = known()
    check = lambda text: documented.check(documented.Command("page", text), COPIES, inputs)
    check(right)
    with pytest.raises(Exception, match=re.escape(said)):
        check(wrong)


def test_commands_are_found_wherever_they_stand():
    text = (
        "Say `make  demo` or\n\n```\n$ python a.py \\\n    --b 1  # why\noutput\n```\n\n"
        "```python\nmake = 1\n```\n\n    python -m c --d\n\n`python` alone; `OUT=DIR bash e.sh`.\n"
    )
    found = documented.found("page", text)
    assert [c.words() for c in found] == [
        ["python", "a.py", "--b", "1"],
        ["python", "-m", "c", "--d"],
        ["make", "demo"],
        ["bash", "e.sh"],
    ]
