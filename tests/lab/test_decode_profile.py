"""The profile covers the step, and its bytes are the weights' bytes, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab.decode_profile import ATTENTION, REST, ROLES, STEP, profile_of_engine, weights_of
from lab.prefill_profile import profile_of_prompt
from nvlm_trt.engine import Engine


def test_profile(engine: Callable[[str], Path]) -> None:
    opened = Engine.open(engine("nvlm-d-tiny"))
    llm = opened.config.llm
    sizes = dict.fromkeys((*ROLES, REST), 0)
    for role, size in weights_of(opened).values():
        sizes[role] += size
    layers = llm.num_layers * 4  # times the bytes of a number
    assert sizes["o"] == layers * llm.hidden_size * llm.num_heads * llm.head_dim
    assert sizes["gate, up"] == 2 * sizes["down"] == 2 * layers * llm.hidden_size * llm.intermediate_size
    assert sizes["lm_head"] == 4 * llm.hidden_size * llm.vocab_size
    assert sizes[REST] == 0

    profile = profile_of_prompt(opened, tokens=20, chunk=8, threads=1)
    assert set(profile) == {STEP, *ROLES, ATTENTION, REST}
    assert all(milliseconds > 0 for milliseconds in profile.values())

    prompt = np.random.default_rng(0).integers(0, 256, (2, 8), dtype=np.int64)
    profile = profile_of_engine(opened, prompt, steps=4, threads=1)
    assert set(profile) == {STEP, *ROLES, ATTENTION, REST}
    assert all(milliseconds > 0 for milliseconds in profile.values())
