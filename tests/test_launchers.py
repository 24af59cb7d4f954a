"""The launchers in docs/launch do what they say, as far as one machine can tell."""

import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from absl import flags

import train
from lightwam_jax import config as config_lib
from tests import interrupted, pod

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "docs" / "launch"
assert train  # defines the flags


def check_arguments(words):
    """Every word is a flag of train.py, or a key of the config it names."""
    given = [word.split("=")[0].lstrip("-") for word in words if word.startswith("--")]
    named = re.search(r"configs/(\w+)\.py(?::(\w+))?", " ".join(words))
    module = __import__(f"configs.{named[1]}", fromlist=["get_config"])
    config = module.get_config(*filter(None, [named[2]]))
    for name in given:
        if name.startswith("config."):
            section, key = name.split(".")[1:]
            assert key in config[section], name
        else:
            assert name in flags.FLAGS, name
    # Else what is frozen is random.
    assert config.data.codec == "pca" or "config.train.init" in given


@pytest.mark.parametrize("name", ["slurm.sh", "tpu_vm.sh"])
def test_scripts_parse_and_pass_flags_that_exist(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    text = (LAUNCH / name).read_text(encoding="utf-8")
    check_arguments(shlex.split(re.search(r"TRAIN=[(\"](.*)[)\"]", text)[1]))


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_manifests_are_consistent(name):
    jobset = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    job = jobset["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    pod_spec = spec["template"]["spec"]
    container = pod_spec["containers"][0]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    check_arguments([*container["command"], *container["args"]])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod_spec["volumes"]}
    workdir = next(a for a in container["args"] if a.startswith("--workdir=")).split("=")[1]
    assert any(workdir.startswith(m["mountPath"] + "/") for m in container["volumeMounts"])
    limits = container["resources"]["limits"]
    if name == "gke_tpu.yaml":
        topology = pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        chips = math.prod(map(int, topology.split("x")))
        assert chips == spec["parallelism"] * limits["google.com/tpu"]
    else:
        command = container["command"]
        assert f"--num_processes={spec['parallelism']}" in command
        first = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
        assert any(word.startswith(f"--coordinator={first}:") for word in command)


SRUN = """#!/bin/bash
# Two tasks of a step on this machine, with the variables that SLURM gives them.
while [[ "$1" == --* ]]; do shift; done
export SLURM_JOB_ID SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NODEID=0 "$@" & jobs[i]=$!; done
code=0
for job in ${jobs[@]}; do wait $job || code=$?; done
exit $code
"""


@pytest.mark.slow
def test_the_slurm_script_trains_with_two_tasks_and_is_queued_again_when_told_to_stop(tmp_path):
    """The script itself, but for what is trained; srun and scontrol are stand-ins."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", f"#!/bin/bash\necho $@ >> {tmp_path}/said\n")):
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    here = tmp_path / "repository"
    here.mkdir()
    for name in ("train.py", "lightwam_jax", "configs"):
        (here / name).symlink_to(ROOT / name)
    python = here / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (here / "tiny.py").write_text(
        "import json, os, ml_collections\ndef get_config():\n"
        "    return ml_collections.ConfigDict(json.loads(os.environ['LIGHTWAM_TEST_CONFIG']))\n",
        encoding="utf-8",
    )
    script = (LAUNCH / "slurm.sh").read_text(encoding="utf-8")
    trains = f'TRAIN=(--config "{here}/tiny.py" --workdir "{tmp_path}/run" --config.mesh.fsdp=2)'
    script = re.sub(r"^TRAIN=.*$", trains, script, flags=re.M)

    config = pod.make_config(**{"train.checkpoint_every": 0})
    environ = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "LIGHTWAM_TEST_CONFIG": config_lib.to_json(config),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=here,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 process(es)" in done.stdout and "data=1 x fsdp=2" in done.stdout
    assert pod.arrays(tmp_path / "run")[0] == config.train.steps
    assert not (tmp_path / "said").exists()

    stopped = re.sub(r"srun .*", "( exit 143 )", script)
    done = subprocess.run(["bash", "-c", stopped], cwd=here, env=environ, check=False)
    assert done.returncode == 143
    assert (tmp_path / "said").read_text(encoding="utf-8") == "requeue 4711\n"


@pytest.mark.slow
def test_precompute_under_srun_shares_the_work_and_makes_the_same_cache(tmp_path):
    """Two tasks with nothing but SLURM's variables, beside one process."""
    (tmp_path / "srun").write_text(SRUN, encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)
    python, env = (sys.executable, "-m"), os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    made = f"--suite demo --episodes 12 --noise 0.5 --images png --out {tmp_path}/episodes".split()
    subprocess.run((*python, "lightwam_jax.envs.record", *made), cwd=ROOT, env=env, check=True)
    said = {}
    for name, start in (("one", ()), ("two", (tmp_path / "srun",))):
        config = ("--config", "configs/demo.py", f"--config.data.path={tmp_path}/episodes")
        command = (
            *python,
            "lightwam_jax.precompute",
            *config,
            f"--config.data.cache={tmp_path}/{name}",
        )
        ran = subprocess.run((*start, *command), cwd=ROOT, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-4000:]
        said[name] = ran.stdout
    assert "stats: left to process 0" in said["two"] and "left to" not in said["one"]
    one, two = (interrupted.contents(tmp_path / name) for name in ("one", "two"))
    assert len(one) > 5 and sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []
