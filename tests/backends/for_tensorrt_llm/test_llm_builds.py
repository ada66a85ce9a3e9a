"""Tests `nvlm-trt build --backend tensorrt-llm`, with a stand-in for trtllm-build and one for the executor."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import Run, assert_one_line_error

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.tensorrt_llm.record import record_of
from nvlm_trt.builders import unfinished_build
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.builders.tensorrt_llm import rank_files
from nvlm_trt.builders.tensorrt_llm_checkpoint import check_llm_checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.runtime.pipeline import Pipeline

LIMITS = {"max_slots": 3, "max_seq_len": 512}
IMAGE = Path(__file__).parents[3] / "docs" / "images" / "receipt.png"
QUESTION = ChatRequest([Message("user", "<image>Hi")], (IMAGE.read_bytes(),), SamplingParams(max_tokens=6), max_tiles=1)
BACKEND = ("--backend", "tensorrt-llm", "--max-slots", "3", "--max-seq-len", "512")
Directory = Callable[[str], Path]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Puts the stand-in for trtllm-build on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "trtllm-build"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_trtllm_build.py")} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return script


@pytest.fixture
def oracle(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> Directory:
    def named(name: str) -> Path:
        monkeypatch.setenv("TRTLLM_ORACLE", str(checkpoint(name)))
        return checkpoint(name)

    return named


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_a_built_engine_answers(
    name: str, program: Path, oracle: Directory, executors: list[Any], written: Directory, tmp_path: Path
) -> None:
    engine = build_engine(oracle(name), tmp_path / "engine", LIMITS, backend="tensorrt-llm")
    assert record_of(engine).form == "engine"
    assert not (engine.path / "checkpoint").exists()
    with Pipeline.open(engine.path) as built, Pipeline.open(written(name)) as by_hand:
        answers = [[delta.token_ids for delta in each.generate(QUESTION)] for each in (built, by_hand)]
    assert answers[0] == answers[1]
    assert answers[0]


def test_a_checkpoint_is_completed_elsewhere(checkpoint: Directory, tmp_path: Path, run_cli: Run) -> None:
    """Needs neither TensorRT-LLM nor its programs."""
    half = tmp_path / "half"
    status, _, err = run_cli(
        "build", "--checkpoint", checkpoint("nvlm-h-tiny"), "--output", half, *BACKEND, "--checkpoint-only"
    )
    assert status == 0
    assert f"run `nvlm-trt build --continue {half} --output ENGINE`" in err
    engine = Engine.open(half, full_check=True)
    assert record_of(engine).form == "checkpoint"
    check_llm_checkpoint(half / "checkpoint", engine.config)
    with pytest.raises(EngineError, match=f"nvlm-trt build --continue {half} --output ENGINE"):
        Pipeline.open(half)


def test_completing_keeps_the_checkpoint(
    program: Path, oracle: Directory, executors: list[Any], tmp_path: Path, run_cli: Run
) -> None:
    half, whole = tmp_path / "half", tmp_path / "whole"
    options = {"checkpoint_only": True}
    before = build_engine(oracle("nvlm-x-tiny"), half, LIMITS, backend="tensorrt-llm", options=options)
    assert run_cli("build", "--continue", half, "--output", whole)[0] == 0
    engine = Engine.open(whole, full_check=True)
    assert record_of(engine).form == "engine"
    assert (engine.manifest.checkpoint_digest, engine.limits) == (before.manifest.checkpoint_digest, before.limits)
    assert not (whole / "checkpoint").exists()
    Engine.open(half, full_check=True)
    assert_one_line_error(
        run_cli("build", "--continue", whole, "--output", tmp_path / "again"), f"engine {whole} is complete"
    )


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("status", "trtllm-build ended with status 1: MemoryError: the GPU has too little memory"),
        ("rank", "trtllm-build wrote no rank1.engine"),
    ],
)
def test_a_program_that_fails_leaves_nothing_but_the_written_checkpoint(
    fault: str, told: str, program: Path, oracle: Directory, executors: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRTLLM_FAULT", fault)
    output = tmp_path / "out" / "engine"
    with pytest.raises(EngineError, match=told):
        build_engine(oracle("nvlm-d-tiny"), output, LIMITS, backend="tensorrt-llm", options={"tp": 2})
    assert list(output.parent.iterdir()) == []


def test_a_gpu_that_would_run_it_wrongly_is_refused(
    program: Path, oracle: Directory, executors: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (12, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a Blackwell GPU")
    with pytest.raises(EngineError, match=r"masks no cross-attention on a Blackwell GPU \(compute capability 12.0\)"):
        build_engine(oracle("nvlm-x-tiny"), tmp_path / "engine", LIMITS, backend="tensorrt-llm")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_the_program_ends_with_an_interrupt(
    program: Path, oracle: Directory, executors: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_FAULT", "wait")

    def interrupted(description: str, done: float, total: float) -> None:
        if description == "trtllm-build" and programs():
            raise KeyboardInterrupt

    def programs() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "fake_trtllm_build" in " ".join(child.cmdline())]

    with pytest.raises(KeyboardInterrupt):
        build_engine(oracle("nvlm-d-tiny"), tmp_path / "engine", LIMITS, progress=interrupted, backend="tensorrt-llm")
    assert not programs()
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("description", ["writing the ranks", "writing the vision encoder", "hashing"])
def test_a_build_goes_on_where_it_stopped(
    oracle: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, description: str
) -> None:
    monkeypatch.setattr(unfinished_build, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(rank_files, "_SYNC_BYTES", 1)
    checkpoint, output = oracle("nvlm-d-tiny"), tmp_path / "engine"
    options = {"checkpoint_only": True, "tp": 2}

    class StoppedError(Exception):
        pass

    def stop(stage: str, done: float, total: float) -> None:
        if stage == description and done > total / 2:
            raise StoppedError

    def watch(stage: str, done: float, total: float) -> None:
        first.setdefault(stage, done / total)

    with pytest.raises(StoppedError):
        build_engine(checkpoint, output, LIMITS, progress=stop, backend="tensorrt-llm", options=options)
    assert not output.exists()
    first: dict[str, float] = {}
    build_engine(checkpoint, output, LIMITS, progress=watch, backend="tensorrt-llm", options=options)
    assert list(tmp_path.iterdir()) == [output]
    stages = ["writing the ranks", "writing the vision encoder", "hashing"]
    assert list(first) == stages[stages.index(description) :]
    straight = build_engine(checkpoint, tmp_path / "other", LIMITS, backend="tensorrt-llm", options=options)
    assert straight.manifest.files == Engine.open(output).manifest.files


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tp", "5"), "--tp 5 does not split"),
        (("--pp", "7"), "--pp 7 does not split"),
        (("--tp", "2000"), "--tp 2000 is not from 1 to 1024"),
        (("--precision", "fp32"), "the backend tensorrt-llm computes nothing in fp32; choose one of bf16, fp16"),
        (("--precision", "lm_head=int8"), "lm_head=int8: TensorRT-LLM engines compute lm_head in floating point"),
        (("--precision", "int8-weight-only", "--gate-samples", "5"), "leave it out with --checkpoint-only"),
    ],
)
def test_what_cannot_be_built_is_told(
    arguments: tuple[str, ...], told: str, checkpoint: Directory, tmp_path: Path, run_cli: Run
) -> None:
    common = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "engine")
    assert_one_line_error(run_cli(*common, *BACKEND, "--checkpoint-only", *arguments), told)
    assert list(tmp_path.iterdir()) == []


def test_without_tensorrt_llm_the_container_is_named(checkpoint: Directory, tmp_path: Path, run_cli: Run) -> None:
    common = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", tmp_path / "engine")
    assert_one_line_error(run_cli(*common, *BACKEND), "nvcr.io/nvidia/tritonserver", "--checkpoint-only")


@pytest.mark.parametrize("precision", ["fp16", "int8-weight-only", "int4-weight-only"])
def test_precisions_without_calibration(precision: str, checkpoint: Directory, tmp_path: Path) -> None:
    engine = build_engine(
        checkpoint("nvlm-x-tiny"), tmp_path / "engine", LIMITS, precision=precision, backend="tensorrt-llm",
        options={"checkpoint_only": True},
    )  # fmt: skip
    record = record_of(engine)
    assert record.quantization == {"int8-weight-only": "W8A16", "int4-weight-only": "W4A16"}.get(precision)
    if record.quantization:
        assert engine.manifest.accuracy_gate == {"result": "not measured"}
