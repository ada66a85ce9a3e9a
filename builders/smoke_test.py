"""Tests every engine before it is published: generates tokens from a line of text and from an image."""

from __future__ import annotations

import contextlib
import queue

import numpy as np

from nvlm_trt.api import Delta, Message, SamplingParams
from nvlm_trt.backends.base import FloatArray, StepBackend
from nvlm_trt.backends.opening import backend_of, open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.opening import open_generator
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.text_generator import GeneratorOptions, TextGenerator

_TOKENS = 4


class SmokeTest:
    """Holds two prompts, one with an image and one without, both within the limits of the engine to test."""

    def __init__(self, prompts: PromptEncoder, limits: EngineLimits, config: NvlmConfig) -> None:
        """Encode the prompts. Raises EngineError if `limits` leave no room for an image of one tile."""
        self._prompts = [_encode(prompts, 0)]
        for tiles in (3, 1) if limits.max_tiles > 1 else (1,):
            prompt = _encode(prompts, tiles)
            needs = len(prompt.input_ids) + _TOKENS
            if needs <= limits.max_seq_len and prompt.cross_tokens <= limits.max_image_tokens:
                self._tiles = tiles
                self._prompts.append(prompt)
                return
        raise EngineError(
            f"an image of one tile needs max_seq_len {needs} and max_image_tokens {prompt.cross_tokens}, the engine "
            f"would have {limits.max_seq_len} and {limits.max_image_tokens}; choose larger limits"
        )

    def run(self, engine: Engine) -> None:
        """Run both prompts. Raises EngineError if a stage returns numbers that are not finite."""
        edge = engine.config.vision.image_size
        noise = np.random.default_rng(0).standard_normal((self._tiles, 3, edge, edge), dtype=np.float32)
        inputs = list(zip(self._prompts, (noise[:0], noise), strict=True))
        if backend_of(engine).open_generator is not None:
            generator = open_generator(engine, Tokenizer.from_directory(engine.path), GeneratorOptions())
            with contextlib.closing(generator):
                for prompt, pixel_values in inputs:
                    _answer(generator, prompt, pixel_values)
            return
        with open_backend(engine) as backend:
            for prompt, pixel_values in inputs:
                _generate(backend, prompt, pixel_values, _remedy(engine))


def _encode(prompts: PromptEncoder, tiles: int) -> EncodedPrompt:
    return prompts.encode([Message("user", "Hello")], [tiles] if tiles else [])


def _answer(generator: TextGenerator, prompt: EncodedPrompt, pixel_values: FloatArray) -> None:
    """Let a generator answer; pixel_values [tiles, 3, E, E] of one image, or no tiles."""
    images = [generator.features(generator.encode(pixel_values))] if len(pixel_values) else []
    results: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
    request = Request(SamplingParams(max_tokens=_TOKENS, ignore_eos=True), results.put, results.put)
    request.provide(prompt, images)
    generator.submit(request)
    while True:
        result = results.get()
        if isinstance(result, Exception):
            raise EngineError(f"smoke test: {result}") from result
        if result.finish_reason:
            return


def _generate(backend: StepBackend, prompt: EncodedPrompt, pixel_values: FloatArray, remedy: str) -> None:
    """Generate greedy tokens; pixel_values [tiles, 3, E, E] of one image, or no tiles. `remedy`: for numbers that are
    not finite."""
    config, images = backend.config, []
    if len(pixel_values):
        image_tokens = backend.encode(pixel_values)
        _check_finite("image tokens", backend.to_host(image_tokens), remedy)
        images = [backend.features(image_tokens)]
        if images[0].cross_kv is not None:
            _check_finite("cross-attention keys and values", backend.to_host(images[0].cross_kv), remedy)
        backend.write_cross_kv(0, 0, images[0])
    embeddings = backend.embeddings(images, 0, prompt.placeholders)
    logits = backend.prefill(0, 0, prompt.input_ids, embeddings, prompt.cross_ranges)
    ranges = np.array([prompt.decode_range], np.int32)
    for position in range(len(prompt.input_ids), len(prompt.input_ids) + _TOKENS):
        _check_finite("logits", logits, remedy)
        logits[config.image_token_id] = -np.inf
        logits = backend.decode(np.array([logits.argmax()]), np.array([position]), ranges)[0]
    _check_finite("logits", logits, remedy)


def _check_finite(what: str, values: FloatArray, remedy: str) -> None:
    if not np.isfinite(values).all():
        raise EngineError(f"smoke test: {what} are not finite; {remedy}")


def _remedy(engine: Engine) -> str:
    """Say what to do about numbers that are not finite."""
    if "fp16" in engine.manifest.precision.values():
        return "fp16 ends at 65504, so choose bf16 with --precision, or check the checkpoint's weights"
    return "check the checkpoint's weights"
