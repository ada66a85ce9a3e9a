"""Session fixtures: random tiny checkpoints, the engines built from them, and a process with TensorRT's Python API.

`./build.sh test` runs pytest in several workers. They share the checkpoints and engines, and each has its own cores.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hypothesis
import pytest
from child_process import child_process
from filelock import FileLock

TESTS = Path(__file__).parent
SHIM = TESTS.parent / "lab" / "tensorrt_shim.sh"
TENSORRT_VERSION = "11.4.0.106"

DirectoryByName = Callable[[str], Path]

# how long an example takes is the machine's business
hypothesis.settings.register_profile("nvlm", deadline=None)
hypothesis.settings.load_profile("nvlm")

# Folders whose tests share something expensive, such as a running server: one worker runs all of such a folder.
ONE_WORKER = ("integration",)


def pytest_configure(config: pytest.Config) -> None:
    """Lets tests interrupt commands, and gives each worker its share of the cores: the threads of two workers would
    wait for each other."""
    # a shell starts background jobs with SIGINT ignored, nohup starts any with SIGHUP ignored, and the commands that
    # tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = sorted(os.sched_getaffinity(0))
    if worker and len(cores) >= workers:
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file in one worker, so that the file's fixtures are made once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            folder, _, file = str(item.path.relative_to(TESTS)).partition("/")
            item.add_marker(pytest.mark.xdist_group(folder if folder in ONE_WORKER else f"{folder}/{file}"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of this test run that all workers share. Hold a FileLock beside a file while you write it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


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
def checkpoint(shared_folder: Path) -> DirectoryByName:
    """`checkpoint("nvlm-h-tiny")` is the directory of a random checkpoint of that preset, seed 0."""
    from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint

    def make(name: str) -> Path:
        directory = shared_folder / "checkpoints" / name
        with FileLock(shared_folder / f"checkpoint-{name}.lock"):
            if not directory.exists():
                init_checkpoint(directory, name, seed=0)
        return directory

    return make


@pytest.fixture(scope="session")
def engine(shared_folder: Path, checkpoint: DirectoryByName) -> DirectoryByName:
    """`engine("nvlm-h-tiny")` is the directory of the ONNX Runtime engine built from `checkpoint("nvlm-h-tiny")`."""
    from nvlm_trt.builders.engine_build import build_engine

    def make(name: str) -> Path:
        directory = shared_folder / "engines" / name
        with FileLock(shared_folder / f"engine-{name}.lock"):
            if not directory.exists():
                build_engine(checkpoint(name), directory)
        return directory

    return make


@pytest.fixture(scope="session")
def exact_engine(shared_folder: Path, checkpoint: DirectoryByName) -> DirectoryByName:
    """`exact_engine("nvlm-h-tiny")` is an engine as `engine` makes, all of it in fp32, also the vision encoder."""
    from nvlm_trt.builders.engine_build import build_engine

    def make(name: str) -> Path:
        directory = shared_folder / "exact_engines" / name
        with FileLock(shared_folder / f"exact-engine-{name}.lock"):
            if not directory.exists():
                build_engine(checkpoint(name), directory, precision="fp32")
        return directory

    return make


@pytest.fixture(scope="session")
def tensorrt_process(shared_folder: Path) -> Iterator[ProcessPoolExecutor]:
    """A process with TensorRT's real bindings and no builder. Its wheels are fetched once into the user's cache."""
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    shim = cache / "nvlm-trt" / f"tensorrt-shim-{TENSORRT_VERSION}-py{sys.version_info.major}{sys.version_info.minor}"
    with FileLock(shared_folder / "tensorrt-shim.lock"):
        if not shim.exists():
            if shutil.which("gcc") is None:
                pytest.skip("TensorRT's bindings need stub libraries, and there is no gcc to build them")
            environment = {**os.environ, "PYTHON": sys.executable, "TENSORRT_VERSION": TENSORRT_VERSION}
            made = subprocess.run([SHIM, shim], env=environment, capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"TensorRT's bindings cannot be had: {made.stderr.strip().splitlines()[-1]}")
    libraries = os.pathsep.join([str(shim / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    with child_process({"LD_LIBRARY_PATH": libraries}, str(shim / "python")) as executor:
        yield executor
