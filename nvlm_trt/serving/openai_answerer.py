"""Asks the samples of an evaluation to an OpenAI endpoint over HTTP: ours, or another server's."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from nvlm_trt import strict_json
from nvlm_trt.api import Message
from nvlm_trt.errors import QueueFullError, RequestError, ServerError
from nvlm_trt.evaluation.answerers import Answers, ModelIdentity, answer_concurrently
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.prompt.conversation import place_images

KEY_VARIABLE = "NVLM_TRT_API_KEY"
_CONCURRENCY = 8
_QUEUE_RETRY_SECONDS = 0.5
_QUEUE_RETRIES = 240  # two minutes
_TIMEOUT_SECONDS = 600
_MOST_BYTES = 64 << 20  # of an answer
_TYPES = {b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


class OpenAiAnswerer:
    """Implements `Answerer` by chat completions of one endpoint, of the first model that it lists."""

    def __init__(self, url: str, max_tokens: int, concurrency: int | None = None) -> None:
        """Find out which model is served. `url` is http(s)://host:port, with or without /v1.

        Raises ServerError if no OpenAI endpoint answers there."""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._max_tokens = max_tokens
        self._concurrency = concurrency or _CONCURRENCY
        self._opener = urllib.request.build_opener()
        if self._url.startswith(("http://127.", "http://localhost")):  # without the environment's proxy
            self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        models = self._call("/models", None)
        try:
            card = models["data"][0]
            self._model = str(card["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self._url}/models lists no model; name an OpenAI endpoint") from None
        # another server does not tell which weights it has: then another address is another model
        digest = card.get("checkpoint_digest") or hashlib.sha256(f"{self._url} {self._model}".encode()).hexdigest()
        self.identity = ModelIdentity("server", self._model, str(digest))

    def __enter__(self) -> OpenAiAnswerer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return answer_concurrently(self._ask, samples, self._concurrency)

    def _ask(self, sample: Sample) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": _content(sample.prompt, sample.images)}],
            "max_tokens": self._max_tokens,
            "temperature": 0,
        }
        for _ in range(_QUEUE_RETRIES):
            try:
                choice = self._call("/chat/completions", body)["choices"][0]
                return str(choice["message"]["content"])
            except QueueFullError:  # other clients use the server too
                time.sleep(_QUEUE_RETRY_SECONDS)
            except (KeyError, IndexError, TypeError):
                raise ServerError(f"{self._url} gives an answer without choices; name an OpenAI endpoint") from None
        raise QueueFullError(f"the queue of {self._url} stays full; try again later, or with a lower --concurrency")

    def _call(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        if KEY_VARIABLE in os.environ:
            request.add_header("Authorization", f"Bearer {os.environ[KEY_VARIABLE]}")
        try:
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                return strict_json.loads(response.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise _error(self._url, error) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"no server answers at {self._url} ({reason}); check the address") from None
        except ValueError:
            raise ServerError(f"{self._url}{path} does not answer with JSON; name an OpenAI endpoint") from None


def _content(prompt: str, images: Sequence[bytes]) -> list[dict[str, Any]]:
    """Write a sample as parts, so that the prompt is the one that an engine makes of the sample."""
    (turn,) = place_images([Message("user", prompt)], len(images))
    rest = iter(images)
    return [
        {"type": "image_url", "image_url": {"url": _data_uri(next(rest))}}
        if part is None
        else {"type": "text", "text": part}
        for part in turn.parts
    ]


def _data_uri(image: bytes) -> str:
    kind = next((kind for start, kind in _TYPES.items() if image.startswith(start)), "image/png")
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def _error(url: str, error: urllib.error.HTTPError) -> QueueFullError | RequestError | ServerError:
    try:
        message = str(strict_json.loads(error.read(_MOST_BYTES))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        message = f"status {error.code}"
    if error.code == 429:
        return QueueFullError(message)
    if error.code == 401:
        return ServerError(f"{url} wants an API key; set {KEY_VARIABLE}")
    return RequestError(message) if error.code < 500 else ServerError(f"{url} fails ({message}); see what it says")
