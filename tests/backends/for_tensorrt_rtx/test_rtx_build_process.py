"""Tests the process in which TensorRT-RTX builds a plan: however it ends, the command prints one line and leaves
nothing, and it ends with the command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import psutil
import pytest
from command_line import Run, assert_one_line_error
from onnx import TensorProto, helper

from nvlm_trt.backends.tensorrt_rtx import build as rtx_build
from nvlm_trt.backends.tensorrt_rtx.options import RtxOptions
from nvlm_trt.backends.tensorrt_rtx.plan import build_plan
from nvlm_trt.errors import EngineError

pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")

Directory = Callable[[str], Path]
ReplacePython = Callable[[str], None]
PROFILE = {"x": [[1, 8], [1, 8], [4, 8]]}
MEMORY = "the build was expected to take 3.50 GB of host memory; free memory, or choose a --precision with smaller"
PROCESS = "import time; import nvlm_trt.backends.tensorrt_rtx.build_process as process"
# builds nothing and waits, for a day if it is not ended
WAITING = f"{PROCESS}; process.STILL_SECONDS = %d; process.fulfil = lambda order: time.sleep(86_400); process.main()"
# waits for itself for 15 seconds, not for two minutes
IMPATIENT = f"{PROCESS}; process.STILL_SECONDS = 15; process.main()"


@pytest.fixture
def replace_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReplacePython:
    """`replace_python("exit 3")`: the builder's process runs these lines of bash instead of `"$PYTHON" "$@"`."""

    def replace(lines: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/bash\nPYTHON={sys.executable}\n{lines}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return replace


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", 8]) for name in "xy")
    chain = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "decoder", [x], [y])
    path = tmp_path / "decoder.onnx"
    onnx.save(helper.make_model(chain, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


def build(graph: Path, plan: Path | None = None) -> bool | None:
    return build_plan(graph, plan or graph.with_suffix(".plan"), [PROFILE], RtxOptions(), True, 3_500_000_000)


@pytest.mark.parametrize(
    ("lines", "ending"),
    [
        ("kill -KILL $$", "the builder's process was ended by SIGKILL, perhaps for lack of memory; "),
        ("kill -SEGV $$", "the builder's process was ended by SIGSEGV, perhaps for lack of memory; "),
        ("exit 3", r"the builder's process gave up \(without a word\), perhaps for lack of memory; "),
        (
            "exec 1>&-; sleep 0.5; echo first >&2; echo MemoryError >&2; exit 1",
            r"the builder's process gave up \(MemoryError\), perhaps for lack of memory; ",
        ),
        (f"exec \"$PYTHON\" -c '{WAITING % 1}'", r"gave up \(the builder has stood still for 1 s\), perhaps for lack"),
    ],
    ids=["killed", "segmentation fault", "silent", "with a word", "waiting for itself"],
)
def test_a_builder_that_ends_without_an_answer(
    graph: Path, replace_python: ReplacePython, lines: str, ending: str
) -> None:
    replace_python(lines)
    with pytest.raises(EngineError, match=f"^decoder.onnx could not be built for 8.0, .*{ending}") as caught:
        build(graph)
    assert MEMORY in str(caught.value)


@pytest.mark.parametrize("megabytes", [20, 340, 450])
def test_too_little_memory_is_one_line(
    run_cli: Run, checkpoint: Directory, tmp_path: Path, replace_python: ReplacePython, megabytes: int
) -> None:
    """The address space is limited. With one size, the builder says that memory is short; with others, it dies or waits
    for itself."""
    replace_python(f"ulimit -v $((1024 * {megabytes})); exec \"$PYTHON\" -c '{IMPATIENT}'")
    options = ("--backend", "tensorrt-rtx", "--max-seq-len", 256)
    result = run_cli(
        "build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "out" / "engine", *options
    )
    assert_one_line_error(result, "vision_encoder.onnx could not be built", "GB of host memory; free memory, or choose")
    assert "memory" in result[2].split("expected")[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_an_error(graph: Path) -> None:
    """TensorRT-RTX prints the errors of its writer and reports a plan that is built."""
    with pytest.raises(OSError, match="No space left on device") as caught:
        build(graph, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_is_one_line(
    run_cli: Run, checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx_build, "build_plan", lambda graph, plan, *rest: build_plan(graph, Path("/dev/full"), *rest))
    output = tmp_path / "out" / "engine"
    result = run_cli(
        "build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", output, "--backend", "tensorrt-rtx"
    )
    assert_one_line_error(result, f"disk full while writing {output}; free space there")
    assert list(output.parent.iterdir()) == []


def test_what_the_builder_prints_does_not_reach_the_user(graph: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError):
        build(graph, Path("/dev/full"))
    assert capfd.readouterr() == ("", "")


def test_an_answer_leaves_no_process(graph: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    assert build(graph) is None
    assert graph.with_suffix(".plan").read_bytes().startswith(b"vtrt")
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("number", "whole_group", "status"),
    [
        (signal.SIGINT, True, 130),  # a Ctrl-C in the terminal
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_the_builder_ends_with_the_command(
    checkpoint: Directory,
    tmp_path: Path,
    replace_python: ReplacePython,
    number: signal.Signals,
    whole_group: bool,
    status: int,
) -> None:
    output, python = tmp_path / "out" / "engine", sys.executable
    replace_python(f"exec \"$PYTHON\" -c '{WAITING % 86_400}'")
    command = f"import sys; sys.executable = '{sys.executable}'; from nvlm_trt.cli import main; main()"
    options = ["--checkpoint", str(checkpoint("nvlm-d-tiny")), "--output", str(output), "--backend", "tensorrt-rtx"]
    process = subprocess.Popen(
        [python, "-c", command, "build", *options], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    builder = wait_for_builder(process)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs([builder], timeout=10)
    for survivor in alive:
        survivor.kill()
    assert alive == []
    assert not output.exists()
    if number != signal.SIGKILL:
        assert list(output.parent.iterdir()) == []


def wait_for_builder(process: subprocess.Popen[str]) -> psutil.Process:
    """Waits until the builder has its order, and waits."""
    command = psutil.Process(process.pid)
    while process.poll() is None:
        for child in command.children():
            if child.num_threads() == 3:  # the main thread and those that watch
                return child
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])
