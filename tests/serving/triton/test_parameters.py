"""Parameters beside the inputs of a request, and those that a rendered configuration gives to a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_pb_utils import Request, fake_pb_utils, strings

from nvlm_trt.engine import MANIFEST, Engine
from nvlm_trt.errors import EngineError, RequestError, ServerError
from nvlm_trt.serving.served_record import ServedRecord
from nvlm_trt.serving.triton.models.chat_request import read_chat
from nvlm_trt.serving.triton.models.inputs import request_parameters
from nvlm_trt.serving.triton.models.parameters import open_engine
from nvlm_trt.serving.triton.models.tiling import TilingModel

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a sampling parameter": (
        {"parameters": '{"max_tokens": 5}'},
        r"'max_tokens' has no effect there; put it into the input sampling_parameters, .*max_tokens, temp.*stop",
    ),
    "unknown": (
        {"parameters": '{"x": 1}'},
        r"unknown request parameter 'x'; .* prompt, messages, image, max_tiles, sampling_parameters, .*temperature",
    ),
    "one that Triton takes out": ({"timeout": 1000}, "'timeout' is not supported"),
    "a timeout over HTTP": ({"parameters": '{"timeout": 1000}'}, "'timeout' is not supported"),
    "a sequence": ({"correlation_id": 7}, "unknown request parameter 'sequence_id'"),
    "a sequence by name": ({"correlation_id": "abc"}, "unknown request parameter 'sequence_id'"),
    "the start of a sequence": ({"flags": 1}, "unknown request parameter 'sequence_start'"),
    "the end of a sequence": ({"flags": 2}, "unknown request parameter 'sequence_end'"),
    "a name without end": ({"parameters": json.dumps({"y" * 10_000: 1})}, "unknown request parameter 'yyy"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_parameter_beside_the_inputs_is_refused(kind: str) -> None:
    beside, message = REFUSED[kind]
    with pytest.raises(RequestError, match=message) as caught:
        read_chat(fake_pb_utils(), Request(beside=beside, prompt=strings(b"Hi")), lambda tensor: tensor)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_request_without_parameters_is_read() -> None:
    for parameters in ("", "{}"):
        assert request_parameters(Request(beside={"parameters": parameters})) == {}


def test_tiling_refuses_parameters_too() -> None:
    """The ensembles hand the parameters of a request to all their models."""
    model = TilingModel(fake_pb_utils())
    values = {"image_type": "TYPE_FP32", "tile_size": 56, "max_tiles": 6, "max_pixels": 99, "max_bytes": 99}
    entries = {name: {"string_value": str(value)} for name, value in {**values, "max_images": 2}.items()}
    model.initialize({"model_config": json.dumps({"parameters": entries})})
    request = Request(beside={"parameters": '{"max_tiles": 1}'}, image=strings(b"x"), max_tiles=np.array([1], np.int32))
    (response,) = model.execute([request])
    assert "unknown request parameter 'max_tiles'" in response.error().message()


@pytest.fixture
def copy(engine: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine("nvlm-d-tiny"), tmp_path / "engine"))


def edit(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_a_model_opens_the_engine_that_the_server_was_started_for(copy: Path) -> None:
    opened = Engine.open(copy)
    parameters = {"engine": "/elsewhere", "engine_link": str(copy), "engine_fingerprint": opened.fingerprint}
    assert open_engine(parameters).path == copy
    assert open_engine({"engine": str(copy)}).path == copy
    limits = {**opened.limits.model_dump(), "max_tiles": 3}
    edit(copy, limits=limits)
    with pytest.raises(EngineError, match="/elsewhere was replaced while the server started"):
        open_engine(parameters)


def test_the_fingerprint_follows_everything_but_the_verification(copy: Path) -> None:
    opened = Engine.open(copy)
    found = [opened.fingerprint]
    for changes in (
        {"verification": {"passed": True}},
        {"limits": {**opened.limits.model_dump(), "max_slots": 3}},
        {"precision": {"decoder": "int8"}},
        {"checkpoint_digest": "0"},
    ):
        edit(copy, **changes)
        found.append(Engine.open(copy).fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 4
    data = json.loads((copy / MANIFEST).read_text())["files"]["tokenizer.json"]
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b" ")
    assert data["size"] + 1 == (copy / "tokenizer.json").stat().st_size
    with pytest.raises(EngineError):
        Engine.open(copy)


def test_a_record_is_read_back_also_from_a_later_version(copy: Path) -> None:
    record = ServedRecord.of(Engine.open(copy))
    assert ServedRecord.from_json(record.to_json()) == record
    assert ServedRecord.from_json(json.dumps({**json.loads(record.to_json()), "more": 1})) == record
    for text in ("{}", "[]", "x", "NaN"):
        with pytest.raises(ServerError, match="does not read"):
            ServedRecord.from_json(text)
