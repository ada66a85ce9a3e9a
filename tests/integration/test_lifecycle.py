"""Starts, breaks and stops the real server, also through the real command."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from live_server import ENDLESS, is_ready_over_http, make_image, metric, wait_until

from nvlm_trt.engine import Manifest, write_manifest
from nvlm_trt.errors import EngineError, ServerError
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton.server import TritonServer

ENGINE = "nvlm-d-tiny"
LONG = {"max_tokens": 400, "ignore_eos": True}


class ServeCommand:
    """A process that runs `nvlm-trt serve`."""

    def __init__(self, engine: Path, directory: Path, *arguments: str) -> None:
        listen = ("--host", "localhost", "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
        # puts its temporary files where the test can see whether they are removed
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nvlm_trt.cli", "serve", str(engine), *(arguments or listen)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(directory)},
            start_new_session=True,
        )
        self.address = self.http_address = self.metrics_address = ""

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.end()
        (self.address,) = re.findall(r"grpc://[^ )]+", line)
        (self.http_address,) = re.findall(r"HTTP (http://[^ ,]+)", line)
        (self.metrics_address,) = re.findall(r"http://[^ )]+/metrics", line)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Waits for the end of the process. Returns exit status and stderr."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture
def serve(engine: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., ServeCommand]]:
    started: list[ServeCommand] = []

    def start(*arguments: str) -> ServeCommand:
        started.append(ServeCommand(engine(ENGINE), tmp_path, *arguments))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


def is_rejected(client: Client) -> bool:
    try:
        client.generate("Too late?", sampling={"max_tokens": 1})
    except ServerError as error:
        return "stopping" in str(error)
    return False


def assert_all_gone(processes: list[psutil.Process], directory: Path) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    wait_until(lambda: not list(directory.glob("nvlm-trt-*")), "temporary files are removed")


def test_a_signal_lets_running_requests_finish(serve: Callable[..., ServeCommand]) -> None:
    """Finishes requests that are being decoded or whose images are not encoded yet; rejects later ones."""
    command = serve()
    command.wait_until_ready()
    processes = command.descendants()
    assert len(processes) >= 5  # the server, its three python models, the guard
    with Client(command.address) as client, ThreadPoolExecutor(8) as pool:
        longer = LONG | {"max_tokens": 1000}  # they run until the others are accepted
        streams = [client.stream("Tell me", images=[make_image(i)], sampling=longer) for i in range(4)]
        for stream in streams:
            next(stream)
        asked = [
            pool.submit(client.generate, "Tell me", images=[make_image(100 + i, 300, 200)], sampling=LONG)
            for i in range(8)
        ]
        wait_until(lambda: metric(command, "nvlm_open_requests") == 12, "all requests are accepted")
        command.signal(signal.SIGTERM)
        wait_until(lambda: is_rejected(client), "new requests are rejected")
        assert [list(stream)[-1].finish_reason for stream in streams] == ["length"] * 4
        assert [len(future.result().token_ids) for future in asked] == [LONG["max_tokens"]] * 8
    assert command.end() == (0, "")
    assert_all_gone(processes, command.directory)


def test_a_server_that_drains_is_not_ready(serve: Callable[..., ServeCommand]) -> None:
    """Over HTTP at once, over gRPC as soon as no image is left to encode."""
    command = serve()
    command.wait_until_ready()
    with Client(command.address) as client:
        assert client.ready()
        assert is_ready_over_http(command.http_address)
        stream = client.stream("Tell me", sampling=LONG | {"max_tokens": 2000})
        next(stream)
        command.signal(signal.SIGTERM)
        wait_until(lambda: not is_ready_over_http(command.http_address), "readiness over HTTP is false")
        wait_until(lambda: not client.ready(), "readiness over gRPC is false")
        with pytest.raises(ServerError, match="the server is stopping"):
            client.generate("Too late?", sampling={"max_tokens": 1})
        assert metric(command, "nvlm_open_requests") == 1
        assert list(stream)[-1].finish_reason == "length"
    assert command.end() == (0, "")


def test_a_server_stops_well_without_its_temporary_folder(serve: Callable[..., ServeCommand]) -> None:
    """Something removes files of /tmp that are days old."""
    command = serve()
    command.wait_until_ready()
    processes = command.descendants()
    (folder,) = command.directory.glob("nvlm-trt-*")
    shutil.rmtree(folder)
    with Client(command.address) as client:
        streams = [client.stream("Tell me", images=[make_image(i)], sampling=LONG) for i in range(2)]
        for stream in streams:
            next(stream)
        command.signal(signal.SIGTERM)
        wait_until(lambda: is_rejected(client), "new requests are rejected")
        assert [list(stream)[-1].finish_reason for stream in streams] == ["length"] * 2
    assert command.end() == (0, "")
    assert_all_gone(processes, command.directory)


@pytest.mark.parametrize("last", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_a_killed_guard_is_replaced(serve: Callable[..., ServeCommand], last: signal.Signals) -> None:
    command = serve()
    command.wait_until_ready()
    processes = command.descendants()
    (guard,) = (process for process in processes if "nvlm_trt.serving.triton.guard" in process.cmdline())
    guard.kill()
    wait_until(lambda: len({*command.descendants()} - {*processes}) == 1, "there is another guard")
    processes = command.descendants()
    command.signal(last)
    command.end()
    assert_all_gone(processes, command.directory)


def test_a_second_signal_stops_at_once(serve: Callable[..., ServeCommand]) -> None:
    command = serve()
    command.wait_until_ready()
    processes = command.descendants()
    with Client(command.address) as client:
        stream = client.stream("Tell me", sampling=ENDLESS)
        next(stream)
        command.signal(signal.SIGINT)
        wait_until(lambda: is_rejected(client), "new requests are rejected")
        command.signal(signal.SIGINT)
        with pytest.raises(ServerError):
            list(stream)
    assert command.end() == (0, "")
    assert_all_gone(processes, command.directory)


def test_a_killed_supervisor_takes_the_server_along(serve: Callable[..., ServeCommand]) -> None:
    command = serve()
    command.wait_until_ready()
    processes = command.descendants()
    command.process.kill()
    assert_all_gone(processes, command.directory)


def test_a_server_whose_line_nobody_reads_serves(serve: Callable[..., ServeCommand]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    ports = ("--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0")
    command = serve(*ports)
    assert command.process.stdout is not None
    command.process.stdout.close()
    command.process.stdout = None

    def answers() -> bool:
        with Client(f"grpc://127.0.0.1:{port}") as client:
            try:
                return bool(client.generate("Hi", sampling={"max_tokens": 1}).token_ids)
            except ServerError:
                return False

    wait_until(answers, "the server answers")
    command.signal(signal.SIGTERM)
    assert command.end()[0] == 0


def test_a_model_that_dies_while_it_is_loaded_is_told(serve: Callable[..., ServeCommand]) -> None:
    command = serve()

    def models() -> list[psutil.Process]:
        found = []
        for child in command.descendants():
            with contextlib.suppress(psutil.Error):  # it has ended
                found += [child] if "/nvlm/1/model.py" in " ".join(child.cmdline()) else []
        return found

    wait_until(lambda: bool(models()), "the process of nvlm")
    models()[0].kill()
    status, errors = command.end()
    assert status == 2
    assert "the process of a model has died while the server started" in errors


def test_a_server_whose_supervisor_and_guard_were_killed_ends(serve: Callable[..., ServeCommand]) -> None:
    command = serve()
    command.wait_until_ready()
    processes = command.descendants()
    for process in processes:
        if "nvlm_trt.serving.triton.guard" in process.cmdline():
            process.kill()
    command.process.kill()
    psutil.wait_procs(processes, timeout=60)
    assert_all_gone(processes, command.directory)


@pytest.mark.parametrize(
    ("victim", "reason"),
    [
        ("/nvlm/1/model.py", "the process of nvlm_0_0 has died"),
        ("/vision_encoder/1/model.py", "the process of vision_encoder_0_0 has died"),
        ("/bin/tritonserver", "tritonserver was ended by SIGKILL"),
    ],
)
def test_the_server_stops_when_a_process_has_died(victim: str, reason: str, serve: Callable[..., ServeCommand]) -> None:
    """The bundled tritonserver does not notice a dead model: alone, it would go on reporting ready."""
    command = serve()
    command.wait_until_ready()
    processes = command.descendants()
    with Client(command.address) as client:
        assert client.ready()
        (process,) = [p for p in processes if any(argument.endswith(victim) for argument in p.cmdline())]
        process.kill()
        wait_until(lambda: not client.ready(), "readiness is false")
    status, errors = command.end()
    assert status == 2
    last = errors.strip().splitlines()[-1]
    assert re.fullmatch(f"error: {reason}.*start it again", last)
    assert_all_gone(processes, command.directory)


def test_a_start_can_be_given_up_while_the_canary_runs(
    engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up = threading.Event()

    def slow_canary(client: Client) -> None:
        for _ in client.stream("Hello", sampling=ENDLESS):
            give_up.set()

    monkeypatch.setattr("nvlm_trt.serving.triton.server.run_canary", slow_canary)
    server = TritonServer(engine(ENGINE))
    assert not server.start(give_up)
    with Client(server.address) as client:
        assert not client.ready()


def test_a_port_in_use_is_named(serve: Callable[..., ServeCommand]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        status, errors = serve("--http-port", str(port)).end()
    assert (status, errors) == (
        2,
        f"error: port {port} of 127.0.0.1 is in use; choose another port, or 0 for a free one\n",
    )


def test_a_start_that_fails_leaves_nothing(
    engine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "models"))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("nvlm_trt.serving.triton.server.render_repository", full_disk)
    with pytest.raises(ServerError, match=r"cannot start tritonserver \(No space left on device: .*models\)"):
        TritonServer(engine(ENGINE)).start()
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_cannot_be_loaded_is_explained(
    engine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is no graph, but its hash matches the manifest: only the process of the model finds the fault."""
    broken = tmp_path / "engine"
    shutil.copytree(engine(ENGINE), broken)
    (broken / "decoder.onnx").write_bytes(b"not a graph")
    manifest = Manifest.model_validate_json((broken / "manifest.json").read_text())
    (broken / "manifest.json").unlink()
    write_manifest(broken, manifest)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    server = TritonServer(broken)
    with pytest.raises(
        ServerError, match="could not load model nvlm: engine file .*decoder.onnx cannot be loaded"
    ) as raised:
        server.start()
    assert "\n" not in str(raised.value)
    assert server.log_tail
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_truncated_engine_is_not_started(engine: Callable[[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "engine"
    shutil.copytree(engine(ENGINE), broken)
    weights = max(broken.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(EngineError, match=weights.name):
        TritonServer(broken).start()
