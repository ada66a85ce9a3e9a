"""Session fixtures: random tiny checkpoints and the engines built from them, made once per run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

DirectoryByName = Callable[[str], Path]

# how long an example takes is the machine's business
hypothesis.settings.register_profile("nvlm", deadline=None)
hypothesis.settings.load_profile("nvlm")


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run_cli("ask", ...)` -> (exit status, stdout, stderr) of `nvlm-trt ask ...`, in this process."""
    from nvlm_trt import cli

    monkeypatch.delenv("NVLM_TRT_DEBUG", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nvlm-trt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> DirectoryByName:
    """`checkpoint("nvlm-h-tiny")` is the directory of a random checkpoint of that preset, seed 0."""
    from nvlm_trt.random_checkpoint import init_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            init_checkpoint(directory, name, seed=0)
        return directory

    return make


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, checkpoint: DirectoryByName) -> DirectoryByName:
    """`engine("nvlm-h-tiny")` is the directory of the ONNX Runtime engine built from `checkpoint("nvlm-h-tiny")`."""
    from nvlm_trt.builders.onnx_engine import build_engine

    root = tmp_path_factory.mktemp("engines")

    def make(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            build_engine(checkpoint(name), directory)
        return directory

    return make
