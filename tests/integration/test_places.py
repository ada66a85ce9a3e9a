"""Serves an engine from folders whose names have spaces, quotes and characters beyond ASCII, and one that is replaced
while it is served."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import make_image

from nvlm_trt.benchmark.target import Target
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.engine import Engine
from nvlm_trt.errors import RequestError
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.served_engine import find_served_engine
from nvlm_trt.serving.server_answerer import ServerAnswerer
from nvlm_trt.serving.triton.server import TritonServer

NAME = "nvlm-d-tiny"
ODD = 'Prüfung 試し \'it"s" $x; a:b'
Directory = Callable[[str], Path]


@pytest.fixture(scope="module")
def place(engine: Directory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an engine and a folder for temporary files."""
    folder = tmp_path_factory.mktemp("places") / ODD
    shutil.copytree(engine(NAME), folder / "engine")
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[TritonServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(place / "tmp"))
        with TritonServer(place / "engine") as running:
            yield running
    assert list((place / "tmp").iterdir()) == []


def test_an_engine_in_any_folder_is_served(server: TritonServer, place: Path) -> None:
    with Client(server.address) as client:
        answer = client.generate("What?", images=[make_image(1)], sampling={"max_tokens": 3, "ignore_eos": True})
        assert len(answer.token_ids) == 3
        assert client.served_engine()[1] == str(place / "engine")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_the_command_serves_it_in_any_locale(place: Path, locale: str) -> None:
    command = [sys.executable, "-m", "nvlm_trt.cli", "serve", "engine", "--grpc-port", "0", "--http-port", "0"]
    environment = {**os.environ, "TMPDIR": str(place / "tmp"), "LC_ALL": locale}
    with subprocess.Popen(
        [*command, "--metrics-port", "0"], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert line.startswith(b"serving at grpc://"), errors
    assert process.returncode == 0


def test_what_is_measured_is_what_the_server_has_loaded(
    server: TritonServer, place: Path, checkpoint: Directory
) -> None:
    before = Engine.open(place / "engine")
    served = find_served_engine(server.address)
    assert served.engine is not None
    assert not served.replaced
    assert Target.connect(server.address).limits == before.limits.model_dump()
    build_engine(checkpoint(NAME), place / "engine", {"max_slots": 2}, overwrite=True, smoke_test=False)
    served = find_served_engine(server.address)
    assert (served.engine, served.replaced) == (None, True)
    target = Target.connect(server.address)
    assert target.replaced
    assert (target.limits, target.digest) == (before.limits.model_dump(), before.digest)
    with pytest.raises(RequestError, match="was replaced since .* restart the server, or pass --tokenizer"):
        target.tokenizer(None)
    assert target.tokenizer(place / "engine").vocab_size
    assert ServerAnswerer(server.address, 1).identity.digest == before.digest
    command = [sys.executable, "-m", "nvlm_trt.cli", "bench", "--url", server.address, "--tokenizer", place / "engine"]
    command += ["--requests", "1", "--warmup", "0", "--concurrency", "1", "--images", "0", "--output-tokens", "2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "was replaced since the server loaded it" in done.stderr
    shutil.rmtree(place / "engine")
    gone = Target.connect(server.address)
    assert (gone.replaced, gone.digest) == (False, before.digest)
    with pytest.raises(RequestError, match="is not on this machine; pass --tokenizer"):
        gone.tokenizer(None)
