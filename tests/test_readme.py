"""The README's commands run as they stand, in order, against a server where they name one."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lab.shaped_checkpoint import write_shaped_checkpoint
from nvlm_trt.model.presets import PRESETS

ROOT = Path(__file__).parent.parent
ANSWER = "48.20"  # the total on docs/images/receipt.png
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_block(language: str, containing: str) -> str:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (block,) = [block for name, block in blocks if name == language and containing in block]
    return block


def commands(containing: str) -> list[list[str]]:
    lines = code_block("", containing).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("nvlm-trt ")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("docs", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(arguments: list[str], folder: Path, status: int = 0) -> str:
    """Returns stdout, or stderr if the command is expected to end with another status than 0."""
    command = [sys.executable, "-m", "nvlm_trt.cli", *arguments[1:]]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == status, result.stderr
    return result.stderr if status else result.stdout


@contextlib.contextmanager
def serving(line: list[str], folder: Path) -> Iterator[str]:
    """Runs the command that serves, on free ports, and yields the server's address."""
    free_ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "nvlm_trt.cli", *line[1:], *free_ports]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = re.search(r"grpc://[^ )]+", server.stdout.readline())
        assert url
        yield url[0]
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_the_commands_of_the_readme(folder: Path) -> None:
    lines = commands("nvlm-trt init-checkpoint")
    assert {line[1] for line in lines} == {
        "build", "verify", "eval", "ask", "tiles", "serve", "bench", "plan", "init-checkpoint",
    }  # fmt: skip
    with contextlib.ExitStack() as servers:
        for line in lines:
            if line[1] == "serve":
                url = servers.enter_context(serving(line, folder))
            elif "--url" in line:
                line[line.index("--url") + 1] = url
                output = run(line, folder)
                if line[1] == "bench":
                    continue
                assert output.strip() == ANSWER
                snippet = code_block("python", "Client(").replace("grpc://127.0.0.1:8001", url)
                answer = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, check=True)
                assert answer.stdout.decode() == ANSWER
            else:
                output = run(line, folder)
                assert line[1] != "ask" or output.strip() == ANSWER


def test_the_walk_with_a_checkpoint_of_your_own(folder: Path) -> None:
    """On a folder in the form of NVLM-D-72B, with few and narrow layers."""
    config = PRESETS["nvlm-d-tiny"]
    vision = replace(config.vision, hidden_size=200, num_heads=25)
    write_shaped_checkpoint(folder / "NVLM-D-72B", replace(config, vision=vision), shards=4, random=True)
    *before, serve, ask = commands("nvlm-trt inspect")
    assert [line[1] for line in before] == ["inspect", "plan", "build", "verify"]
    for line in before:
        run(line, folder)
    with serving(serve, folder) as url:
        ask[ask.index("--url") + 1] = url
        assert run(ask, folder).strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_the_commands_for_an_rtx_gpu_end_where_a_gpu_is_needed(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'nvlm-trt[tensorrt-rtx]'")
    build, ask = commands("tensorrt-rtx")
    run(build, folder)
    message = run(ask, folder, status=2)
    assert message.startswith("error: TensorRT needs an NVIDIA GPU, and none can be used here")
    assert message.count("\n") == 1
