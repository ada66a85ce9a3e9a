"""Tests the models of an engine for TensorRT in a real tritonserver on a CPU: bfloat16 by DLPack from `tiling` to
`nvlm`.

A python model with the tensors of its config.pbtxt replaces the plan, and CPU instances replace GPU instances, so image
tokens are in host memory. The rest is rendered as for TensorRT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from live_server import make_image
from tensorrt_engines import for_tensorrt

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.spec import TritonPlacement
from nvlm_trt.engine import Engine
from nvlm_trt.image.tiling import normalise_tiles
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton import server as server_module
from nvlm_trt.serving.triton.repository import RepositoryOptions, placement_of, render_repository
from nvlm_trt.serving.triton.server import TritonServer

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
STAND_IN = """
import torch
import triton_python_backend_utils as pb_utils
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine


class TritonPythonModel:
    def initialize(self, args):
        self.backend = open_backend(Engine.open({engine!r}), ["vision_encoder"], threads=1)

    def execute(self, requests):
        responses = []
        for request in requests:
            pixels = pb_utils.get_input_tensor_by_name(request, "pixel_values").to_dlpack()
            pixels = torch.utils.dlpack.from_dlpack(pixels)
            assert pixels.dtype == torch.bfloat16
            tokens = torch.from_numpy(self.backend.encode(pixels.float().numpy())).to(torch.bfloat16)
            tensor = pb_utils.Tensor.from_dlpack("image_tokens", torch.utils.dlpack.to_dlpack(tokens))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
"""


def render_for_a_cpu(
    engine: Engine, placement: TritonPlacement, directory: Path, drain_descriptor: int, options: RepositoryOptions
) -> None:
    placed = placement_of(for_tensorrt(engine, "bf16"))
    render_repository(engine, placed, directory, drain_descriptor, options)
    for model in ("vision_encoder", "nvlm"):
        config = directory / model / "config.pbtxt"
        text = re.sub(r"kind: KIND_GPU count: 1[^}]*", "kind: KIND_CPU count: 1 ", config.read_text())
        text = re.sub(r"(?m)^optimization .*$", "", text).replace('platform: "tensorrt_plan"', 'backend: "python"')
        config.write_text(text)
    plan = directory / "vision_encoder" / "1" / "model.plan"
    plan.unlink()
    plan.with_name("model.py").write_text(STAND_IN.format(engine=str(engine.path)))


@pytest.fixture(params=["nvlm-d-tiny", "nvlm-h-tiny"])
def served(
    request: pytest.FixtureRequest, exact_engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, TritonServer]]:
    monkeypatch.setattr(server_module, "render_repository", render_for_a_cpu)
    path = exact_engine(request.param)
    with TritonServer(path) as server:
        yield path, server


def rounded(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).to(torch.bfloat16).float().numpy()


def test_answers_are_those_of_tokens_in_bfloat16(served: tuple[Path, TritonServer]) -> None:
    path, server = served
    image = make_image(3, 200, 120)
    chat = ChatRequest([Message("user", "What is this?")], [image], GREEDY)
    opened = Engine.open(path)
    with open_backend(opened, ["vision_encoder"], threads=1) as encoder:

        def encode(tiles: np.ndarray) -> np.ndarray:
            return rounded(encoder.to_host(encoder.encode(rounded(normalise_tiles(tiles)))))

        with Pipeline.open(path, encode_tiles=encode) as pipeline:
            expected = [token for delta in pipeline.generate(chat) for token in delta.token_ids]
    with Client(server.address) as client:
        answers = [client.generate("What is this?", images=[image], sampling=GREEDY) for _ in range(2)]
        text_only = client.generate("Hello", sampling=GREEDY)
    assert [answer.token_ids for answer in answers] == [expected, expected]
    assert answers[1].usage is not None
    assert answers[1].usage.cached_images == 1
    assert len(text_only.token_ids) == 12
