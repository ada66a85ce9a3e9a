"""Installs the stand-in for TensorRT-LLM's executor, and opens engines over it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Directory = Callable[[str], Path]
TRAINED = Path(__file__).parents[3] / "checkpoints"


@pytest.fixture(scope="session")
def engine(exact_engine: Directory) -> Directory:
    """Compares this backend with engines of ONNX Runtime that compute everything in fp32."""
    return exact_engine


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Puts the stand-in where the real package would be. Returns the executors that are made, as they are made."""
    from bound_classes import executor_module
    from fake_executor import FakeExecutor

    from nvlm_trt.backends import tensorrt_llm as room
    from nvlm_trt.backends.tensorrt_llm.contract import VERSION

    made: list[Any] = []

    class Executor(FakeExecutor):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            made.append(self)

    module: Any = executor_module(Executor)
    Executor.module = module
    package: Any = types.ModuleType("tensorrt_llm")
    package.__version__, package.__path__ = VERSION, []
    bindings: Any = types.ModuleType("tensorrt_llm.bindings")
    bindings.__path__ = []
    for name, one in (("", package), (".bindings", bindings), (".bindings.executor", module)):
        monkeypatch.setitem(sys.modules, f"tensorrt_llm{name}", one)
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(room, "DEVICE", "cpu")
    return made


@pytest.fixture(scope="session")
def written(shared_folder: Path, checkpoint: Directory) -> Callable[[str], Path]:
    """`written("nvlm-d-tiny")` is an engine directory with 3 slots of 512 tokens and steps of 40 tokens; "trained d" is
    that of the trained checkpoint."""
    from filelock import FileLock
    from written_engines import write_engine_directory

    def write(name: str) -> Path:
        trained = name.removeprefix("trained ")
        source = TRAINED / f"nvlm-{trained}-tiny" if trained != name else checkpoint(name)
        directory = shared_folder / "tensorrt-llm" / name
        with FileLock(shared_folder / f"tensorrt-llm-{name}.lock"):
            if not directory.exists():
                write_engine_directory(source, directory)
        return directory

    return write


@pytest.fixture
def opened(executors: list[Any], written: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """`opened("nvlm-d-tiny")` is a pipeline over an engine; it is closed at the end."""
    from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

    pipelines: list[Pipeline] = []

    def open_(name: str, max_queue: int = 16) -> Pipeline:
        pipelines.append(Pipeline.open(written(name), options=RuntimeOptions(max_queue=max_queue)))
        return pipelines[-1]

    yield open_
    for executor in executors:
        executor.release()
    for pipeline in pipelines:
        pipeline.close(drain=False)
