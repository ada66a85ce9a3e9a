"""Runs the batch script for Slurm with programs that stand in for Slurm's and for the ranks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_deployment import deployment_of, engine_of

from nvlm_trt.deployment.slurm import batch_script

# Starts the command once for each task, as srun does; containers are not there.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "$1" >>"$OUT/options"; shift; done
for ((task = 0; task < TASKS; task++)); do SLURM_PROCID=$task "$@"; done
"""
SCONTROL = "#!/bin/sh\necho node7\necho node8\n"
RANK = '#!/bin/sh\necho "$SLURM_PROCID: ${0##*/} $*" >>"$OUT/ranks"\n'


def run(script: str, tmp_path: Path, tasks: int, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "nvlm-trt": RANK, "python3": RANK}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "serve.sbatch").write_text(script)
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "TASKS": str(tasks),
        "SLURM_JOB_NODELIST": "node[7-8]",
        **environment,
    }
    command = ["bash", tmp_path / "serve.sbatch"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_rank_0_serves_on_the_ports_of_its_replica(tmp_path: Path) -> None:
    script = batch_script(deployment_of(engine_of(2, 2, path=Path("/srv/my engines/d")), nodes=2, replicas=3))
    result = run(script, tmp_path, 4, SLURM_ARRAY_TASK_ID="2", NVLM_TRT_IMAGE="/shared/nvlm.sqsh")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "nvlm-d-72b 2: grpc://node7:8021\n"
    first, *others = (tmp_path / "ranks").read_text().splitlines()
    ports = "--http-port 8020 --grpc-port 8021 --metrics-port 8022"
    assert first == f"0: nvlm-trt serve /engine --host 0.0.0.0 {ports}"
    assert others == [f"{n}: python3 -m nvlm_trt.backends.tensorrt_llm.worker /engine" for n in (1, 2, 3)]
    options = (tmp_path / "options").read_text().splitlines()
    assert "--mpi=pmix" in options
    assert "--container-image=/shared/nvlm.sqsh" in options
    assert "--container-mounts=/srv/my engines/d:/engine:ro" in options


def test_one_rank_and_another_place_of_the_engine(tmp_path: Path) -> None:
    script = batch_script(deployment_of(engine_of(1, 1)))
    place = {"NVLM_TRT_IMAGE": "i", "NVLM_TRT_ENGINE": "/scratch/d"}
    result = run(script, tmp_path, 1, SLURM_ARRAY_TASK_ID="0", **place)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ranks").read_text().startswith("0: nvlm-trt serve /engine ")
    assert "--container-mounts=/scratch/d:/engine:ro" in (tmp_path / "options").read_text()


@pytest.mark.parametrize("ranks", [1, 4])
def test_without_an_image_nothing_starts(tmp_path: Path, ranks: int) -> None:
    result = run(batch_script(deployment_of(engine_of(ranks, 1))), tmp_path, ranks, SLURM_ARRAY_TASK_ID="0")
    assert result.returncode != 0
    assert "set NVLM_TRT_IMAGE to the image of the server" in result.stderr
    assert not (tmp_path / "ranks").exists()
