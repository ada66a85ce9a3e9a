"""Reads the input tensors and the parameters of a Triton request, and refuses parameters that have no effect."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy.typing as npt

from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import RequestError

_INPUTS = ("prompt", "messages", "image", "max_tiles", "sampling_parameters")
_SEQUENCE_FLAGS = {1: "sequence_start", 2: "sequence_end"}  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_...


def input_array(pb_utils: Any, request: Any, name: str) -> npt.NDArray[Any] | None:
    """Read an input tensor in host memory; None if the request lacks it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def request_parameters(request: Any, known: Collection[str] = ()) -> dict[str, Any]:
    """Read the parameters of the request, which stand beside the inputs. Raises RequestError for one that is not
    `known`: no model looks for it.

    Triton keeps `priority` of a gRPC request to itself, so that one cannot be refused."""
    sent = dict(_parameters(request))
    name = next((name for name in sent if name not in known), None)
    if name is None:
        return sent
    shown = reprlib.repr(name)
    sampling = ", ".join(SamplingParams.model_fields)
    if name in SamplingParams.model_fields:
        raise RequestError(
            f"request parameter {shown} has no effect there; put it into the input sampling_parameters, a JSON object "
            f"of {sampling}"
        )
    if name == "timeout":
        raise RequestError("request parameter 'timeout' is not supported; cancel the request, or give it a deadline")
    raise RequestError(
        f"unknown request parameter {shown}; a request has the inputs {', '.join(_INPUTS)}, and sampling_parameters is "
        f"a JSON object of {sampling}"
    )


def _parameters(request: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a request, and the KServe parameters that Triton has taken out."""
    try:
        sent = request.parameters()
    except UnicodeDecodeError:  # tritonserver passes bytes of HTTP on as they are
        raise RequestError("a request parameter is not UTF-8; send the request in UTF-8") from None
    yield from json.loads(sent or "{}").items()
    if request.timeout():
        yield "timeout", request.timeout()
    if request.correlation_id():
        yield "sequence_id", request.correlation_id()
    for flag, name in _SEQUENCE_FLAGS.items():
        if request.flags() & flag:
            yield name, True
