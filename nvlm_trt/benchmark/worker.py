"""Runs one load process: sends the questions that its parent names, without waiting for earlier answers.

    python -m nvlm_trt.benchmark.worker grpc://host:port SECONDS

JSON lines on stdin -> JSON lines on stdout:

    {"draw": [[width, height], ...]}          {"drawn": count}         draws images before anything is timed
    {"ask": question, "due": time or null}    {"record": record}       once the question is answered
    {"cpu": true}                             {"cpu_s": seconds}       CPU time of this process up to now
    {"cancel": true}                                                   ends every open question, with its record

A question without a complete answer after SECONDS has failed. When stdin ends, also because the parent has died, the
process cancels its open questions and ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from nvlm_trt.benchmark.images import draw, encode
from nvlm_trt.benchmark.questions import Question
from nvlm_trt.benchmark.record import Record, Status, clock
from nvlm_trt.benchmark.workload import ImageSize
from nvlm_trt.errors import ImageError, NvlmError, QueueFullError, RequestError
from nvlm_trt.serving.client import AsyncClient

LONGEST_LINE = 1 << 28  # bytes; a record has about 30 per token of its answer


async def ask(client: AsyncClient, question: Question, due: float | None, timeout: float) -> Record:
    """Asks one question; cancels it after `timeout` seconds.

    Raises nothing for errors of the server or the connection: the record holds them.
    """
    images = [encode(image) for image in question.images]
    record = Record(question.index, question.output_tokens, len(images), sent=clock(), due=due)
    try:
        finish_reason = await asyncio.wait_for(_receive(client, question, images, record), timeout)
    except asyncio.CancelledError:
        record.ended = clock()
        return record
    except asyncio.TimeoutError:
        record.ended = clock()
        record.status = "failed"
        record.error = f"no end within {timeout:g} s; a slow server needs a larger --timeout"
        return record
    except NvlmError as error:
        record.ended = clock()
        record.status, record.error = _status_of(error), str(error)
        return record
    record.ended = record.ended or clock()
    if finish_reason == "length" and record.tokens == question.output_tokens:
        record.status = "ok"
    elif finish_reason == "length":
        record.status = "refused"
        record.error = (
            f"the server ended an answer after {record.tokens} of {question.output_tokens} tokens: it holds no more "
            "with the prompt; ask for fewer --output-tokens or --prompt-tokens, or rebuild with --max-seq-len"
        )
    else:
        record.status = "failed"
        record.error = f"the answer ended after {record.tokens} tokens ({finish_reason or 'without an end'})"
    return record


async def _receive(client: AsyncClient, question: Question, images: list[bytes], record: Record) -> str | None:
    """Writes the answer into `record` as it arrives.

    Returns the finish reason, None if the stream ended without one.
    """
    finish_reason = None
    sampling = {"max_tokens": question.output_tokens, "ignore_eos": True}
    max_tiles = question.max_tiles if images else None
    async for delta in client.stream(question.text, images=images, sampling=sampling, max_tiles=max_tiles):
        now = clock()
        if delta.token_ids:
            record.arrivals.append((now, len(delta.token_ids)))
        if delta.finish_reason:
            record.ended, record.usage, finish_reason = now, delta.usage, delta.finish_reason
    return finish_reason


def _status_of(error: NvlmError) -> Status:
    if isinstance(error, QueueFullError):
        return "rejected"
    return "refused" if isinstance(error, (RequestError, ImageError)) else "failed"


class Worker:
    """Handles the messages of the parent."""

    def __init__(self, client: AsyncClient, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._open: set[asyncio.Task[None]] = set()

    async def serve(self, messages: asyncio.StreamReader) -> None:
        """Handles messages until their stream ends, then cancels the open questions."""
        try:
            async for line in messages:
                self._handle(json.loads(line))
        finally:
            self._cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    def _handle(self, message: dict[str, Any]) -> None:
        if "ask" in message:
            task = asyncio.ensure_future(self._ask(Question.from_json(message["ask"]), message["due"]))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
        elif "draw" in message:
            for width, height in message["draw"]:
                draw(ImageSize(width, height))
            _reply({"drawn": len(message["draw"])})
        elif "cpu" in message:
            _reply({"cpu_s": time.process_time()})
        elif "cancel" in message:
            self._cancel()

    async def _ask(self, question: Question, due: float | None) -> None:
        _reply({"record": (await ask(self._client, question, due, self._timeout)).to_json()})

    def _cancel(self) -> None:
        for task in self._open:
            task.cancel()


def _reply(message: dict[str, Any]) -> None:
    # may block while the pipe is full, but not for long: the parent reads all the time
    sys.stdout.buffer.write(json.dumps(message, allow_nan=False).encode() + b"\n")
    sys.stdout.buffer.flush()


async def _main(url: str, timeout: float) -> None:
    messages = asyncio.StreamReader(limit=LONGEST_LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(messages), sys.stdin)
    async with AsyncClient(url) as client:
        await Worker(client, timeout).serve(messages)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], float(sys.argv[2])))
