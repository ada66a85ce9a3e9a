"""DeviceTokens in place of arrays, through the real runtime: on a CPU they are torch tensors in host memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.tensorrt.device_tokens import DeviceTokens
from nvlm_trt.engine import Engine
from nvlm_trt.runtime.pipeline import Pipeline

Directory = Callable[[str], Path]


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_the_runtime_answers_as_with_arrays(engine: Directory, name: str) -> None:
    """Two images of different sizes, whose tokens are sliced, kept, joined, and cut into chunks."""
    opened = Engine.open(engine(name))
    edge = opened.config.vision.image_size
    noise = np.random.default_rng(0).standard_normal((7, 3, edge, edge), dtype=np.float32)
    with open_backend(opened, ["vision_encoder"]) as backend:
        images = [backend.encode(noise[:3]), backend.encode(noise[3:])]
    answers = []
    with Pipeline.open(opened.path) as pipeline:
        for given in (images, [DeviceTokens(torch.from_numpy(tokens)) for tokens in images]):
            chat = ChatRequest(
                [Message("user", "<image> or <image>?")],
                given,  # type: ignore[arg-type]
                SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1),
            )
            deltas = list(pipeline.generate(chat))
            answers.append([(delta.token_ids, delta.logprobs) for delta in deltas])
            assert deltas[-1].usage is not None
            assert deltas[-1].usage.image_tiles == 7
    assert answers[0] == answers[1]


def test_what_comes_by_dlpack_is_copied_in_its_type() -> None:
    lent = torch.arange(12, dtype=torch.bfloat16).reshape(3, 2, 2)
    tokens = DeviceTokens.from_dlpack(torch.utils.dlpack.to_dlpack(lent))
    lent.zero_()
    assert tokens.tensor.dtype == torch.bfloat16
    assert (tokens.shape, len(tokens), tokens.nbytes) == ((3, 2, 2), 3, 24)
    np.testing.assert_array_equal(tokens, np.arange(12, dtype=np.float32).reshape(3, 2, 2))


def test_slices_share_memory_and_copies_do_not() -> None:
    tokens = DeviceTokens(torch.zeros(4, 2, 8))
    view, copy = tokens[1:3].reshape(-1, 8), tokens[1:3].copy()
    tokens.tensor.fill_(1)
    assert view.shape == (4, 8)
    assert np.asarray(view).min() == 1
    assert np.asarray(copy).max() == 0


def test_joined_with_arrays_they_stay_where_and_what_they_are() -> None:
    tokens = DeviceTokens(torch.ones(2, 4, dtype=torch.float16))
    joined = np.concatenate([np.empty((0, 4), np.float32), tokens, np.zeros((1, 4), np.float32)])
    assert isinstance(joined, DeviceTokens)
    assert joined.tensor.dtype == torch.float16
    assert joined.tensor.sum(1).tolist() == [4, 4, 0]
    with pytest.raises(TypeError):
        np.stack([tokens, tokens])
