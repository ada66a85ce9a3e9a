"""Makes decoders that run in this process: the product's engine, and transformers."""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from lab.decoding import Decode
from nvlm_trt.backends.base import StepBackend


def engine_decoder(backend: StepBackend) -> Decode:
    no_image = backend.embeddings([], 0, 0)

    def decode(prompt: np.ndarray, steps: int, banned: int) -> tuple[float, np.ndarray]:
        batch, length = prompt.shape
        no_range = np.zeros((length, 2), np.int32)

        def best(logits: np.ndarray) -> np.ndarray:
            logits[..., banned] = -np.inf
            return logits.argmax(-1)

        answers = [np.array([best(backend.prefill(i, 0, prompt[i], no_image, no_range)) for i in range(batch)])]
        positions = np.full(batch, length, np.int64)
        started = time.perf_counter()
        for _ in range(steps):
            answers.append(best(backend.decode(answers[-1], positions, no_range[:batch])))
            positions += 1
        return time.perf_counter() - started, np.stack(answers, axis=1)

    return decode


def transformers_decoder(model: PreTrainedModel, attention: str, cache_kind: str) -> Decode:
    @torch.inference_mode()
    def decode(prompt: np.ndarray, steps: int, banned: int) -> tuple[float, np.ndarray]:
        model.set_attn_implementation(attention)
        length = prompt.shape[1]
        cache = (
            StaticCache(config=model.config, max_cache_len=length + steps)
            if cache_kind == "static"
            else DynamicCache(config=model.config)
        )

        def step(ids: torch.Tensor) -> torch.Tensor:
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            logits[:, banned] = -torch.inf
            return logits.argmax(-1)

        answers = [step(torch.from_numpy(prompt))]
        started = time.perf_counter()
        for _ in range(steps):
            answers.append(step(answers[-1][:, None]))
        seconds = time.perf_counter() - started
        return seconds, torch.stack(answers, dim=1).numpy()

    return decode
