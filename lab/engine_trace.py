"""Traces an engine's image tokens and logits on the way to an answer, and compares two engines' traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nvlm_trt.api import Message
from nvlm_trt.backends.base import BackendArray, StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer

TOKENS = 8  # compared tokens of an answer


@dataclass(frozen=True)
class Trace:
    """Holds what an engine computes on the way to an answer."""

    image_tokens: np.ndarray  # [tiles, T, hidden] of all images
    logits: np.ndarray  # [TOKENS, vocab]


def agreement(reference: Engine, engine: Engine, samples: Sequence[Sample], threads: int) -> dict[str, float]:
    """Runs both engines along the reference's answers and returns the share of equal tokens and the mean cosines."""
    answers = [np.argmax(trace.logits, axis=1) for trace in traces(reference, samples, None, threads)]
    same, image_cosines, logit_cosines = [], [], []
    pairs = zip(traces(reference, samples, answers, threads), traces(engine, samples, answers, threads), strict=True)
    for expected, actual in pairs:
        same.append(np.mean(expected.logits.argmax(1) == actual.logits.argmax(1)))
        logit_cosines.append(cosine(expected.logits, actual.logits))
        if len(expected.image_tokens):
            image_cosines.append(cosine(expected.image_tokens, actual.image_tokens))
    return {
        "token_agreement": float(np.mean(same)),
        "image_token_cosine": float(np.mean(image_cosines)),
        "logit_cosine": float(np.mean(logit_cosines)),
    }


def traces(
    engine: Engine, samples: Sequence[Sample], answers: Sequence[np.ndarray] | None, threads: int
) -> Iterator[Trace]:
    """Yields one trace per sample, along `answers` [TOKENS] each, or greedily for None."""
    with open_backend(engine, threads=threads) as backend:
        prompts = PromptEncoder(engine.config, Tokenizer.from_directory(engine.path))
        for index, sample in enumerate(samples):
            images = [encode(backend, data) for data in sample.images]
            prompt = prompts.encode([Message("user", sample.prompt)], [len(image) for image in images])
            logits = [without_image_placeholder(backend, prefill(backend, prompt, images))]
            ranges = np.array([prompt.decode_range], np.int32)
            for step in range(TOKENS - 1):
                token = answers[index][step] if answers else logits[-1].argmax()
                position = np.array([len(prompt.input_ids) + step])
                logits.append(
                    without_image_placeholder(backend, backend.decode(np.array([token]), position, ranges)[0])
                )
            tokens = (
                np.concatenate([backend.to_host(image) for image in images]) if images else np.zeros((0,), np.float32)
            )
            yield Trace(tokens, np.array(logits))


def encode(backend: StepBackend, data: bytes) -> BackendArray:
    """Encodes one image: [tiles, T, hidden]."""
    return backend.encode(tile_image(load_image(data), backend.config.vision.image_size, backend.limits.max_tiles))


def prefill(backend: StepBackend, prompt: EncodedPrompt, images: Sequence[BackendArray]) -> np.ndarray:
    """Prefills slot 0 with a whole prompt -> logits [vocab]."""
    features, start = [backend.features(tokens) for tokens in images], 0
    for image in features:
        backend.write_cross_kv(0, start, image)
        start += image.cross_tokens
    embeddings = backend.embeddings(features, 0, prompt.placeholders)
    return backend.prefill(0, 0, prompt.input_ids, embeddings, prompt.cross_ranges)


def without_image_placeholder(backend: StepBackend, logits: np.ndarray) -> np.ndarray:
    """Returns a copy in which the image placeholder, which is never sampled, is the least likely."""
    logits = logits.copy()
    logits[backend.config.image_token_id] = logits.min()
    return logits


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
