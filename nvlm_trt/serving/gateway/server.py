"""Runs a gateway on a thread of its own.

A thread, because the process beside it has little to do: `serve` watches tritonserver, `gateway --engine` waits for
ONNX Runtime, which lets other threads run. A process of its own would outlive a killed parent, and would need a guard
as tritonserver does; a thread ends with its process. The main thread keeps the signals.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import wait

import uvicorn

from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.errors import ServerError
from nvlm_trt.serving.gateway.app import create_app
from nvlm_trt.serving.gateway.auth import check_exposure
from nvlm_trt.serving.gateway.canary import run_canary
from nvlm_trt.serving.gateway.gateway import Gateway, GatewayOptions
from nvlm_trt.serving.gateway.source import ChatSource
from nvlm_trt.serving.triton.ports import bind_port, listen_address

_POLL_SECONDS = 0.05
_STOP_SECONDS = 5


class GatewayServer(ClosedOnExit):
    """Listens from its construction on, answers /health from `start` on, and requests from `serve` on."""

    def __init__(self, options: GatewayOptions, no_auth: bool = False) -> None:
        """Take the port. Raises ServerError if that is not possible, NvlmError if everyone could ask from other
        machines, unless `no_auth`."""
        address = listen_address(options.host)
        check_exposure(options.host, address, options.keys, no_auth)
        self._socket = bind_port(address, options.port)
        self._address = self._socket.getsockname()
        self._gateway = Gateway(options)
        self._loop = asyncio.new_event_loop()
        config = uvicorn.Config(
            create_app(self._gateway),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            loop="none",
            http="h11",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="nvlm-gateway", daemon=True)

    @property
    def address(self) -> str:
        return f"http://{self._address[0]}:{self._address[1]}"

    def announce(self) -> None:
        """Print where requests and people go."""
        print(f"OpenAI endpoint at {self.address}/v1", flush=True)
        if self._gateway.options.has_page:
            print(f"page to try it at {self.address}/", flush=True)

    def start(self) -> None:
        """Answer /health; everything else has to wait for `serve`."""
        self._thread.start()

    def serve(self, connect: Callable[[], Awaitable[ChatSource]], give_up: threading.Event | None = None) -> bool:
        """Answer requests with the source that `connect` returns, once it has answered two canary requests.

        Returns False if `give_up` is set before. Raises the errors of `connect` and of the source."""

        async def open_source() -> None:
            source = await connect()
            try:
                await run_canary(source)
            except BaseException:
                await source.close()
                raise
            self._gateway.source = source

        opening = asyncio.run_coroutine_threadsafe(open_source(), self._loop)
        while not wait([opening], _POLL_SECONDS).done:
            self.check()
            if give_up is not None and give_up.is_set():
                opening.cancel()
                return False
        opening.result()
        return True

    def check(self) -> None:
        """Raise ServerError if the gateway's thread has ended."""
        if not self._thread.is_alive():
            raise ServerError("the gateway has ended; see the messages above, and start it again")

    def drain(self) -> None:
        """Refuse new requests; /health/ready says so. The open ones go on."""
        self._gateway.draining = True

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Finish the open requests, within the seconds of the options and unless `hurry` is set, then stop."""
        self.drain()
        deadline = time.monotonic() + self._gateway.options.drain_seconds
        while self._gateway.open_requests and time.monotonic() < deadline and not (hurry and hurry.is_set()):
            time.sleep(_POLL_SECONDS)
        self.close()

    def close(self) -> None:
        """Stop at once."""
        self._uvicorn.should_exit = True
        self._uvicorn.force_exit = True
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        try:
            await self._uvicorn.serve(sockets=[self._socket])
        finally:
            # the tasks of requests that are still answered: their slots must be free
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._loop.shutdown_asyncgens()
            await self._gateway.close()
