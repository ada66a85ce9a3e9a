"""Calls an OpenAI endpoint by hand: requests, replies, images."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

CHAT = "/v1/chat/completions"
COUNT = "/v1/chat/completions/input_tokens"
ENDLESS = {"max_tokens": 3000, "ignore_eos": True}


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after a check that it has the form that clients read and tells nothing of the inside."""
        assert self.headers["content-type"] == "application/json"
        assert self.json.keys() == {"error"}, self.json
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["code"], str)
        assert "\n" not in error["message"]
        assert not any(word in error["message"] for word in ("Traceback", "nvlm_trt", ".py", "/tmp", "grpc://"))
        assert len(error["message"]) < 1000
        return error


@dataclass
class Endpoint:
    """A gateway on this machine."""

    port: int
    model: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call("POST", path, data, **{"content_type": "application/json", **headers})

    def chat(self, content: Any = "Hi", **fields: Any) -> Reply:
        return self.post(CHAT, self.body(content, **fields))

    def body(self, content: Any = "Hi", **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "max_tokens": 8, **fields}

    def events(self, body: dict[str, Any], path: str = CHAT) -> list[Any]:
        """The chunks of a stream, which must end with [DONE]."""
        reply = self.post(path, {**body, "stream": True})
        assert reply.status == 200, reply.body
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def begin(self, body: dict[str, Any], path: str = CHAT) -> socket.socket:
        """Send a request and read nothing."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request_head(path, len(data)) + data)
        return connection


def request_head(path: str, length: int) -> bytes:
    kind = "Content-Type: application/json"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def png(seed: int = 0, width: int = 120, height: int = 80) -> bytes:
    """A PNG of random colour blocks, another for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(encoded, "PNG")
    return encoded.getvalue()


def data_uri(image: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def image_part(image: bytes, **fields: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image), **fields}}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
