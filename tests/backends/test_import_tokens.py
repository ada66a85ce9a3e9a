"""Tests image tokens from outside: NumPy arrays and DLPack tensors are copied, also in types that NumPy lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.opening import open_backend
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
        arrays = [backend.to_host(backend.encode(noise[:3])), backend.to_host(backend.encode(noise[3:]))]
    answers = []
    with Pipeline.open(opened.path) as pipeline:
        for given in (arrays, [torch.from_numpy(tokens) for tokens in arrays]):
            chat = ChatRequest(
                [Message("user", "<image> or <image>?")],
                [pipeline.import_tokens(tokens) for tokens in given],
                SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1),
            )
            deltas = list(pipeline.generate(chat))
            answers.append([(delta.token_ids, delta.logprobs) for delta in deltas])
            assert deltas[-1].usage is not None
            assert deltas[-1].usage.image_tiles == 7
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_comes_by_dlpack_is_copied(engine: Directory, dtype: torch.dtype) -> None:
    lent = torch.arange(12, dtype=dtype).reshape(3, 2, 2)
    expected = lent.float().numpy().copy()
    with open_backend(Engine.open(engine("nvlm-d-tiny")), ["decoder"]) as backend:
        tokens = backend.to_host(backend.import_tokens(lent))
    lent.zero_()
    assert tokens.dtype == np.float32
    assert np.array_equal(tokens, expected)
