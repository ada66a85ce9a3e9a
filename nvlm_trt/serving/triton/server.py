"""Runs tritonserver for one engine: starts, tests, watches, drains and stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from nvlm_trt.backends.spec import TritonPlacement
from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError, ServerError
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton.canary import run_canary
from nvlm_trt.serving.triton.command import triton_command
from nvlm_trt.serving.triton.drain_channel import DrainChannel
from nvlm_trt.serving.triton.http_probe import get
from nvlm_trt.serving.triton.install import TritonInstall, find_triton
from nvlm_trt.serving.triton.ports import choose_ports, listen_address, port_in_use
from nvlm_trt.serving.triton.process import TritonProcess
from nvlm_trt.serving.triton.process_limits import check_descriptors, too_few_descriptors
from nvlm_trt.serving.triton.repository import (
    ENGINE_LINK,
    RepositoryOptions,
    check_backend,
    placement_of,
    render_repository,
)
from nvlm_trt.serving.triton.server_folder import ServerFolder
from nvlm_trt.serving.triton.shared_memory import SharedMemory, largest_request
from nvlm_trt.serving.triton.stopping import EXIT_SECONDS, stop_process
from nvlm_trt.temporary import temporary_folder

_PORT_ATTEMPTS = 5
_POLL_SECONDS = 0.1
_REASON_SECONDS = 10  # for tritonserver to end after one of its models did
_TAIL_LINES = 20
_LOOPBACK = {"0.0.0.0": "127.0.0.1"}


@dataclass(frozen=True)
class ServerOptions:
    """Settings of a server. Port 0 stands for a free port."""

    host: str = "127.0.0.1"
    grpc_port: int = 0
    http_port: int = 0
    metrics_port: int = 0
    repository: RepositoryOptions = field(default_factory=RepositoryOptions)
    startup_seconds: float = 600
    answer_seconds: float = 900  # from request to last token, over gRPC; then the connection ends
    drain_seconds: float = 30  # for open requests when the server is stopped

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.grpc_port, self.http_port, self.metrics_port


class TritonServer:
    """A context manager: the server is ready on entry; on exit it finishes its requests and stops."""

    def __init__(self, engine: str | os.PathLike[str], options: ServerOptions | None = None) -> None:
        self._engine_path = Path(engine)
        self._options = options or ServerOptions()
        self._listen = self._host = ""  # IPv4 addresses: to listen on, and to reach it from this machine
        self._grpc_port = self._http_port = self._metrics_port = 0
        self._channel: DrainChannel | None = None
        self._process: TritonProcess | None = None
        self._stopping = threading.Event()
        self._failure: str | None = None
        self.log_tail: list[str] = []  # last log lines of a server that has failed

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """The address that clients connect to."""
        return f"grpc://{self._host}:{self._grpc_port}"

    @property
    def http_address(self) -> str:
        return f"http://{self._host}:{self._http_port}"

    @property
    def metrics_address(self) -> str:
        return f"http://{self._host}:{self._metrics_port}/metrics"

    def start(self, give_up: threading.Event | None = None) -> bool:
        """Starts the server. Returns True once it has answered two canary requests, False if `give_up` is set before.

        Raises EngineError if the engine is incomplete; ServerError with the reason if there is no tritonserver, a port
        is in use, or a model does not load.
        """
        engine = Engine.open(self._engine_path, full_check=True)
        install = find_triton()
        placement = placement_of(engine)
        check_backend(engine, placement, install.backends)
        self._listen = listen_address(self._options.host)
        self._host = _LOOPBACK.get(self._listen, self._listen)
        memory = SharedMemory(engine, placement, self._options.repository.image_limits)
        memory.check()
        check_descriptors()
        give_up = give_up or threading.Event()
        try:
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._launch(engine, placement, install, memory)
                if self._wait_until_loaded(give_up, retry_ports=attempt < _PORT_ATTEMPTS):
                    break
                self.kill()
                if give_up.is_set():
                    return False
            self._watch()
            if not self._try_out(give_up):
                return False
            self.check()
        except NvlmError:
            self._keep_log_tail()
            self.kill()
            self.check()  # a model that died meanwhile is the true reason
            raise
        except BaseException:
            self.kill()
            raise
        return True

    def check(self) -> None:
        """Raises ServerError if the server or one of its models has died; all its processes have ended then."""
        if self._failure:
            raise ServerError(self._failure)

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Refuses new requests, finishes the open ones and ends the server; ends it at once when `hurry` is set."""
        if self._process is None:
            return
        self._stopping.set()
        if self._failure is None and self._channel is not None:
            seconds, hurry = self._options.drain_seconds, hurry or threading.Event()
            stop_process(self._process, self._channel, self._host, self._http_port, seconds, hurry)
        self.kill()

    def kill(self) -> None:
        """Ends the server at once."""
        self._stopping.set()
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self._channel is not None:
            self._channel.close()

    # --- starting ----------------------------------------------------------------------------------------------------

    def _launch(self, engine: Engine, placement: TritonPlacement, install: TritonInstall, memory: SharedMemory) -> None:
        options = self._options
        self._grpc_port, self._http_port, self._metrics_port = ports = choose_ports(self._listen, options.ports)
        self._stopping.clear()
        try:
            folder = ServerFolder.make()
            with contextlib.ExitStack() as undo:
                undo.callback(folder.remove)
                self._channel = channel = DrainChannel()
                undo.callback(channel.close)
                models = folder.path / "models"
                # The server runs in its folder and has paths from there. Triton writes paths into a shell command
                # without quotes, and Python in its models cannot open a path of other characters than ASCII.
                render_repository(engine, placement, models, channel.descriptor, options.repository)
                (folder.path / ENGINE_LINK).symlink_to(engine.path.absolute())
                backends, environment = install.prepare(folder.path)
                command = triton_command(
                    install.executable,
                    Path(models.name),
                    Path(backends.name),
                    self._listen,
                    ports,
                    folder.shm_prefix,
                    answer_seconds=options.answer_seconds,
                    exit_seconds=options.drain_seconds + EXIT_SECONDS,
                    request_bytes=largest_request(options.repository.image_limits),
                )
                self._process = TritonProcess(command, environment, folder, channel, memory.most_per_model)
                undo.pop_all()
        except OSError as error:
            where = error.filename or temporary_folder()
            raise ServerError(
                f"cannot start tritonserver ({error.strerror}: {where}); free space there or set TMPDIR to another "
                "folder"
            ) from error

    def _wait_until_loaded(self, give_up: threading.Event, retry_ports: bool) -> bool:
        """Waits until all models are loaded.

        Returns False if `give_up` is set, or if another program has taken a port that was free: then try again.
        """
        assert self._process is not None
        deadline = time.monotonic() + self._options.startup_seconds
        dead_since: dict[int, float] = {}
        while self._process.exit_status is None:
            if get(self._host, self._http_port, "/v2/health/ready") is not None:
                return True
            if self._process.log.out_of_descriptors:
                raise too_few_descriptors()
            now = time.monotonic()
            dead_since = {pid: dead_since.get(pid, now) for pid in self._process.dead_children()}
            # a model that cannot be loaded ends its process, too, and tritonserver then says why and ends
            if any(now - since > _REASON_SECONDS for since in dead_since.values()):
                raise ServerError("the process of a model has died while the server started; start it again")
            if now > deadline:
                raise ServerError(f"the server was not ready within {self._options.startup_seconds:.0f} s; see its log")
            if give_up.wait(_POLL_SECONDS):
                return False
        taken = self._process.taken_port()
        if taken is None:
            raise ServerError(self._exit_reason(self._process))
        if not retry_ports or taken in self._options.ports:
            raise port_in_use(self._listen, taken)
        return False

    def _try_out(self, give_up: threading.Event) -> bool:
        """Runs the canary. Ends the server and returns False if `give_up` is set before its answers."""
        with Client(self.address) as client, ThreadPoolExecutor(1, "nvlm-canary") as executor:
            canary = executor.submit(run_canary, client)
            while not canary.done():
                if give_up.is_set():
                    self.kill()  # ends the canary too
                    return False
                wait([canary], _POLL_SECONDS)
            canary.result()
        return True

    def _exit_reason(self, process: TritonProcess) -> str:
        process.log.settle()
        reason = process.load_error()
        if reason:
            return f"the server could not load {reason}"
        status = process.exit_status or 0
        if status < 0:
            return f"tritonserver was ended by {signal.Signals(-status).name}; start it again"
        last = process.log.tail(1)
        return f"tritonserver ended with status {status}: {last[0] if last else 'it printed nothing'}"

    # --- while it runs -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._process is not None
        self._process.watch_models()
        threading.Thread(target=self._watch_process, args=(self._process,), name="nvlm-watch", daemon=True).start()

    def _watch_process(self, process: TritonProcess) -> None:
        """Ends a server that has lost a model: it would report ready for ever."""
        while not self._stopping.wait(_POLL_SECONDS):
            if process.exit_status is not None:
                self._failure = self._exit_reason(process)
            elif dead := process.dead_models():
                self._failure = f"the process of {', '.join(dead)} has died, so the server was stopped; start it again"
            if self._failure:
                self._keep_log_tail()
                process.kill()
                return
            process.keep_guarded()

    def _keep_log_tail(self) -> None:
        """Keeps the last lines of the log, which `kill` removes with the server's directory."""
        process = self._process
        if process is not None:
            self.log_tail = process.log.tail(_TAIL_LINES) or self.log_tail
