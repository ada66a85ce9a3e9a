"""Replaces the part of triton_python_backend_utils that the models use, without server and shared memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

FINAL = 1


class Tensor:
    made = 0  # tensors made so far

    def __init__(self, name: str, array: np.ndarray) -> None:
        Tensor.made += 1
        self._name, self._array = name, array

    @classmethod
    def from_dlpack(cls, name: str, capsule: Any) -> Tensor:
        tensor = cls(name, np.empty(0))
        tensor._array = torch.utils.dlpack.from_dlpack(capsule)
        return tensor

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class TritonError:
    INVALID_ARG, UNAVAILABLE, INTERNAL = "invalid", "unavailable", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor for tensor in output_tensors}
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Request:
    """`beside`: the parameters, timeout, sequence and flags of the request, by the names of the methods."""

    def __init__(self, sender: ResponseSender | None = None, beside: Any = None, **inputs: np.ndarray) -> None:
        self.beside = {"parameters": "{}", "timeout": 0, "correlation_id": 0, "flags": 0, **(beside or {})}
        self._inputs = {name: Tensor(name, array) for name, array in inputs.items()}
        self._sender = sender

    def inputs(self) -> list[Tensor]:
        return list(self._inputs.values())

    def input(self, name: str) -> Tensor | None:
        return self._inputs.get(name)

    def get_response_sender(self) -> ResponseSender | None:
        return self._sender

    def request_id(self) -> str:
        return "a request"

    def parameters(self) -> str:
        return self.beside["parameters"]

    def timeout(self) -> int:
        return self.beside["timeout"]

    def correlation_id(self) -> int | str:
        return self.beside["correlation_id"]

    def flags(self) -> int:
        return self.beside["flags"]


class ResponseSender:
    """Collects the responses sent. `cancelled`: the client has cancelled; `send_raises`: its connection fails."""

    def __init__(self) -> None:
        self.sent: list[tuple[InferenceResponse | None, int]] = []
        self.cancelled = False
        self.asked = 0
        self.send_raises: Exception | None = None

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.send_raises:
            raise self.send_raises
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self.cancelled

    @property
    def ended(self) -> bool:
        return bool(self.sent) and self.sent[-1][1] == FINAL


def fake_pb_utils(run: Callable[[SimpleNamespace], InferenceResponse] | None = None) -> SimpleNamespace:
    """Makes the module. `run` answers the requests that a model sends to other models."""

    def inference_request(**fields: Any) -> SimpleNamespace:
        request = SimpleNamespace(**fields)
        request.exec = lambda: run(request)  # type: ignore[misc]
        return request

    logged: list[str] = []
    informed: list[str] = []
    return SimpleNamespace(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        InferenceRequest=inference_request,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        get_input_tensor_by_name=lambda request, name: request.input(name),
        get_output_tensor_by_name=lambda response, name: response.tensors.get(name),
        Logger=SimpleNamespace(log_error=logged.append, log_info=informed.append),
        logged=logged,
        informed=informed,
    )


def strings(*values: bytes) -> np.ndarray:
    return np.array(values, np.object_)
