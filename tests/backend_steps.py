"""Runs three slots through a backend, to compare backends: prefill, batched decoding, a moved and a copied slot."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvlm_trt.backends.base import ImageFeatures
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine


def three_prompts(engine: Engine) -> dict[str, object]:
    """A text prompt of 5 tokens, one of 37 with an image (three chunks of 16), one of 2."""
    rng, config = np.random.default_rng(0), engine.config
    prompts = [rng.integers(0, 256, length) for length in (5, 37, 2)]
    ranges = [np.zeros((len(prompt), 2), np.int32) for prompt in prompts]
    tokens = config.tokens_per_tile
    if config.cross_layers:
        ranges[1][10:] = [0, tokens]
    else:
        prompts[1][8 : 8 + min(tokens, 20)] = config.image_token_id
    edge = config.vision.image_size
    return {
        "pixels": rng.standard_normal((1, 3, edge, edge), dtype=np.float32),
        "prompts": prompts,
        "ranges": ranges,
        "next": rng.integers(0, 256, 3),
    }


def run_steps(engine: Engine, steps: dict[str, Any]) -> dict[str, np.ndarray]:
    """Prefill three slots, decode them twice as one batch, move a slot, decode two, copy a slot, decode both,
    exchange two slots, decode two."""
    answers: dict[str, np.ndarray] = {}
    with open_backend(engine) as backend:
        tokens: Any = backend.encode(steps["pixels"])
        answers["image tokens"] = backend.to_host(tokens)
        flat = tokens.reshape(-1, backend.config.llm.hidden_size)
        if backend.config.cross_layers:
            cross_kv: Any = backend.cross_kv(tokens)  # type: ignore[attr-defined]  # of the thumbnail, too
            answers["cross kv"] = backend.to_host(cross_kv)
            features = ImageFeatures(flat[:0], cross_kv, len(tokens))
            backend.write_cross_kv(1, 0, features)
        for slot, prompt in enumerate(steps["prompts"]):
            images = flat[: int((prompt == backend.config.image_token_id).sum())]
            ranges = steps["ranges"][slot]
            answers[f"prefill {slot}"] = backend.prefill(slot, 0, prompt, images, ranges)
        lengths = np.array([len(prompt) for prompt in steps["prompts"]])
        last = np.stack([ranges[-1] for ranges in steps["ranges"]])
        for i in range(2):
            answers[f"decode {i}"] = backend.decode(steps["next"], lengths + i, last).copy()
        backend.move_slot(2, 0, int(lengths[2]) + 2, 0)
        moved = np.array([lengths[2], lengths[1]]) + 2
        answers["moved"] = backend.decode(steps["next"][[2, 1]], moved, last[[2, 1]]).copy()
        cross_length = features.cross_tokens if backend.config.cross_layers else 0
        backend.move_slot(1, 0, int(lengths[1]) + 3, cross_length)
        answers["copied"] = backend.decode(steps["next"][[0, 0]], moved[[1, 1]] + 1, last[[1, 1]]).copy()
        backend.swap_slots(0, 2, int(lengths[1]) + 4, cross_length)
        swapped = np.array([lengths[2] + 2, lengths[1] + 4])
        answers["swapped"] = backend.decode(steps["next"][[2, 1]], swapped, last[[2, 1]]).copy()
    return answers
