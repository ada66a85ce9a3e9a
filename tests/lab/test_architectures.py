"""Counts KV bytes by hand, and compares the prefill in chunks with a single one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lab.architectures import contender, encode_prompt, prefill, request_size
from nvlm_trt.backends.base import ImageFeatures
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.prompt.image_tokens import split_tiles

Directories = Callable[[str], Path]


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_request(engine: Directories, name: str) -> None:
    opened = Engine.open(engine(name))
    config = opened.config
    prompt = encode_prompt(opened, text_tokens=40, tiles=3)
    in_llm, in_cross = (len(range(3)[part]) for part in split_tiles(config.architecture, 3))
    assert prompt.placeholders == in_llm * config.tokens_per_tile
    size = request_size(config, prompt)
    # key and value of 2 heads of 32 numbers of 4 bytes, in 6 layers and in 3 gated blocks
    assert size["kv_bytes"] == 2 * 2 * 32 * 4 * (6 * len(prompt.input_ids) + 3 * bool(in_cross) * prompt.cross_tokens)
    with open_backend(opened, ("decoder", "cross_kv"), threads=1) as backend:
        measured = contender(backend, prompt, tiles=3, chunk=16, steps=2)()
        assert all(value > 0 for value in measured.values())
        tokens = np.random.default_rng(0).standard_normal((prompt.placeholders, 192), dtype=np.float32)
        image = ImageFeatures(backend.import_tokens(tokens), None, tiles=3)
        whole = prefill(backend, prompt, image, chunk=4096)
        np.testing.assert_allclose(prefill(backend, prompt, image, chunk=16), whole, atol=1e-3)
