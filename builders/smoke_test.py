"""Tests every engine before it is published: generates tokens from a line of text and from an image.

An engine on the CPU that the free memory does not hold runs the same prompts a layer at a time.
"""

from __future__ import annotations

import contextlib
import queue

import numpy as np

from nvlm_trt.api import Delta, Message, SamplingParams
from nvlm_trt.backends.base import FloatArray, StepBackend
from nvlm_trt.backends.layers import ForcedSequence
from nvlm_trt.backends.opening import backend_of, open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.evaluation.engine_stages import EngineStages, fits
from nvlm_trt.layer_loop import LayerLoop
from nvlm_trt.limits import EngineLimits
from nvlm_trt.machine import available_memory
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.opening import open_generator
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.text_generator import GeneratorOptions, TextGenerator

_NAME = "smoke test"
_TOKENS = 4


class SmokeTest:
    """Holds two prompts, one with an image and one without, both within the limits of the engine to test."""

    def __init__(self, prompts: PromptEncoder, limits: EngineLimits, config: NvlmConfig) -> None:
        """Encode the prompts. Raises EngineError if `limits` leave no room for an image of one tile."""
        self._tag_length = prompts.tag_length
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

    def run(self, engine: Engine, progress: Progress = no_progress) -> None:
        """Run both prompts. Raises EngineError if a stage returns numbers that are not finite."""
        progress(_NAME, 0, 1)
        edge = engine.config.vision.image_size
        noise = np.random.default_rng(0).standard_normal((self._tiles, 3, edge, edge), dtype=np.float32)
        if backend_of(engine).open_generator is not None:
            self._run_generator(engine, noise)
        elif fits(engine, available_memory(), self._tag_length):
            self._run_steps(engine, noise)
        else:
            self._run_by_layers(engine, noise, progress)
        progress(_NAME, 1, 1)

    def _run_generator(self, engine: Engine, noise: FloatArray) -> None:
        generator = open_generator(engine, Tokenizer.from_directory(engine.path), GeneratorOptions())
        with contextlib.closing(generator):
            for prompt, pixel_values in zip(self._prompts, (noise[:0], noise), strict=True):
                _answer(generator, prompt, pixel_values)

    def _run_steps(self, engine: Engine, noise: FloatArray) -> None:
        with open_backend(engine) as backend:
            for prompt, pixel_values in zip(self._prompts, (noise[:0], noise), strict=True):
                _generate(backend, prompt, pixel_values, _remedy(engine))

    def _run_by_layers(self, engine: Engine, noise: FloatArray, progress: Progress) -> None:
        """Run both prompts, each followed by one token that was not generated: a layer runs all tokens before the next
        layer is loaded."""
        loop = LayerLoop(progress=lambda stage, done, total: progress(stage.replace("engine", _NAME), done, total))
        stages, remedy = EngineStages(engine, loop, by_layers=True), _remedy(engine)
        image_tokens = stages.encode(noise)  # [tiles, T, hidden]
        _check_finite("image tokens", image_tokens, remedy)
        in_llm, crossed = split_tiles(engine.config.architecture, self._tiles)
        cross_kv = None
        if len(image_tokens[crossed]):
            cross_kv = stages.cross_kv(image_tokens)  # [cross layers, 2, kv_heads, C, head_dim]
            _check_finite("cross-attention keys and values", cross_kv, remedy)
        text, image = self._prompts
        embeddings = np.ascontiguousarray(image_tokens[in_llm].reshape(-1, image_tokens.shape[-1]))
        # any token may follow: the last of the prompt is no image placeholder
        sequences = [
            ForcedSequence.of(text, [int(text.input_ids[-1])], embeddings[:0]),
            ForcedSequence.of(image, [int(image.input_ids[-1])], embeddings, cross_kv),
        ]
        for logits in stages.logits(sequences):
            _check_finite("logits", logits, remedy)


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
            raise EngineError(f"{_NAME}: {result}") from result
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
        raise EngineError(f"{_NAME}: {what} are not finite; {remedy}")


def _remedy(engine: Engine) -> str:
    """Say what to do about numbers that are not finite."""
    if "fp16" in engine.manifest.precision.values():
        return "fp16 ends at 65504, so choose bf16 with --precision, or check the checkpoint's weights"
    return "check the checkpoint's weights"
