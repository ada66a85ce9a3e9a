"""Runs functions in a process of their own, so that a crash of NVIDIA's libraries or a hang costs one check only."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

from lab.gpu_check.record import SLOW, NotAvailableError, Result

Call = Callable[[], Result]


class ApartError(Exception):
    """A function failed in its process; the first line says how, the others are its traceback."""


class Apart:
    """Runs functions that can be pickled, one after the other, in one process. An error ends the process: the error may
    have broken the GPU's context. The next function gets a new process."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, function: Call, seconds: float, fresh: bool = False) -> Result:
        """Run `function`, in a new process if `fresh`.

        A function that takes more than `seconds` is ended and SLOW. Raises NotAvailableError if the function does, and
        ApartError for any other error and for a process that dies."""
        if fresh:
            self.close()
        process, pipe = self._running()
        pipe.send(function)
        try:
            if not pipe.poll(seconds):
                self.close()
                return Result(SLOW, note=f"it took more than {seconds:.0f} s and was ended")
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            process.join(10)
            code = process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            self.close()
            raise ApartError(f"its process ended with {name}; see its messages") from None
        if isinstance(answer, ApartError):
            self.close()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Result), answer
        return answer

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def _running(self) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        if self._process is None or self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()  # else a process that dies would not end the pipe
        return self._process, self._pipe


def _serve(pipe: Connection) -> None:
    """Run what comes through the pipe until the other end closes."""
    with contextlib.suppress(EOFError):
        while True:
            function: Call = pipe.recv()
            answer: Result | Exception
            try:
                answer = function()
            except NotAvailableError as error:
                answer = NotAvailableError(str(error))
            except Exception as error:
                line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                answer = ApartError(f"{line}\n{traceback.format_exc()}")
            pipe.send(answer)
