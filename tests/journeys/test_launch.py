"""The configurations for accelerate and Slurm: they parse, every option exists, and they ask for what `test_sharding` tries."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

from dedpo_diffusion.models.tiny import KINDS, _unet
from support.processes import FSDP

CONFIGS = Path(__file__).parents[2] / "configs"
SLURM = CONFIGS / "slurm" / "train.sbatch"
LAUNCHES = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def parser():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def test_every_option_given_to_the_launcher_exists():
    known = parser()._option_string_actions
    for file in (SLURM, *LAUNCHES, CONFIGS / "sdxl_full_fsdp.yaml"):
        [*parts] = re.findall(r"accelerate launch(.*?)pipelines/train\.py", file.read_text().replace("\\\n", " "), re.S)
        assert parts, file
        for part in parts:
            options = re.findall(r"(--\w+)", part)
            assert options or "way[@]" in part
            assert not [option for option in options if option not in known], file
    ways = re.search(r"way=\((--multi_gpu.*?)\)", SLURM.read_text())
    assert all(option in known for option in re.findall(r"--\w+", ways.group(1)))


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.stem)
def test_the_launcher_takes_the_file(file):
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import prepare_multi_gpu_env

    given, *_ = _validate_launch_command(parser().parse_args(["--config_file", str(file), "pipelines/train.py"]))
    assert (given.num_processes, given.mixed_precision) == (8, "no")
    env = prepare_multi_gpu_env(given)
    assert {name: env[name] for name in FSDP} == FSDP
    assert env["FSDP_OFFLOAD_PARAMS"] == "false"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrapped_is_in_every_unet(kind):
    names = {type(module).__name__ for module in _unet(kind).modules()}
    assert set(FSDP["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")) <= names


@pytest.mark.parametrize("way", [None, ""])
def test_the_slurm_script_launches_on_its_machine(tmp_path, way):
    """With stand-ins for Slurm's commands and the launcher, which prints what it is given."""
    stands = {"scontrol": "echo first; echo second", "srun": 'shift; exec "$@"', "accelerate": 'printf "%s\\n" "$@"'}
    for name, body in stands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4"}
    env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({} if way is None else {"LAUNCH": way})
    command = ["bash", str(SLURM), "configs/sdxl_full_fsdp.yaml", "--out", "a folder"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    given = dict(itertools.pairwise(lines))
    wanted = {"--num_machines": "2", "--num_processes": "8", "--machine_rank": "1", "--main_process_ip": "first"}
    assert {name: given[name] for name in wanted} == wanted
    assert lines[-5:] == ["pipelines/train.py", "--config", "configs/sdxl_full_fsdp.yaml", "--out", "a folder"]
    assert ("--multi_gpu" in lines) == (way == "")
    assert given.get("--config_file") == (None if way == "" else "configs/accelerate/fsdp2.yaml")


def test_the_slurm_script_of_ray_runs_one_command_on_all_machines(tmp_path):
    """With stand-ins for Slurm's commands, Ray's and ours, which print what they are given."""
    log = tmp_path / "log"
    stands = {
        "scontrol": "echo first; echo second", "srun": f'echo srun "$@" >> {log}', "ray": f'echo ray "$@" >> {log}',
        "dedpo": f'sleep 0.5; echo dedpo "$@" >> {log}; exit 3',
    }  # fmt: skip
    for name, body in stands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}
    command = ["bash", str(SLURM.with_name("ray.sbatch")), "label", "a folder", "--with", "pickscore"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 3, "the command's own code"
    said = log.read_text()
    node = "ray start --block --num-cpus 16 --num-gpus 4"
    assert f"srun --nodes=1 --ntasks=1 --nodelist=first {node} --head --port 20007" in said
    assert f"--nodes=1 --ntasks=1 --exclude=first {node} --address first:20007" in said
    assert said.splitlines()[-1] == "dedpo label a folder --with pickscore --engine ray --ray.address first:20007"
