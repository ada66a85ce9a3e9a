"""The last step of every build: generate from a line of text and from an image before anyone is served."""

from __future__ import annotations

import numpy as np

from nvlm_trt.backends import open_backend
from nvlm_trt.backends.base import Backend, FloatArray
from nvlm_trt.engine import Engine, EngineLimits
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import EncodedPrompt, Message, PromptEncoder, split_tiles

_TOKENS = 4


class SmokeTest:
    """A prompt without and one with an image, sized to the limits of the engine that they will try."""

    def __init__(self, prompts: PromptEncoder, limits: EngineLimits, config: NvlmConfig) -> None:
        """Raises EngineError when `limits` leave no room for an image of one tile."""
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
        """Raises EngineError when a stage answers with numbers that are not finite."""
        edge = engine.config.vision.image_size
        noise = np.random.default_rng(0).standard_normal((self._tiles, 3, edge, edge), dtype=np.float32)
        with open_backend(engine) as backend:
            for prompt, pixel_values in zip(self._prompts, (noise[:0], noise), strict=True):
                _generate(backend, prompt, pixel_values)


def _encode(prompts: PromptEncoder, tiles: int) -> EncodedPrompt:
    return prompts.encode([Message("user", "Hello")], [tiles] if tiles else [])


def _generate(backend: Backend, prompt: EncodedPrompt, pixel_values: FloatArray) -> None:
    """Greedy tokens of one request; pixel_values [tiles, 3, E, E] of its one image, or no tiles."""
    config = backend.config
    image_tokens = backend.encode(pixel_values)
    _check_finite("image tokens", image_tokens)
    in_llm, in_cross = split_tiles(config.architecture, len(pixel_values))
    if prompt.cross_tokens:
        cross_kv = backend.cross_kv(image_tokens[in_cross])
        _check_finite("cross-attention keys and values", cross_kv)
        backend.write_cross_kv(0, 0, cross_kv)
    llm_tokens = image_tokens[in_llm].reshape(-1, config.llm.hidden_size)
    logits = backend.prefill(0, 0, prompt.input_ids, llm_tokens, prompt.cross_ranges)
    ranges = np.array([PromptEncoder.decode_range(prompt)], np.int32)
    for position in range(len(prompt.input_ids), len(prompt.input_ids) + _TOKENS):
        _check_finite("logits", logits)
        logits[config.image_token_id] = -np.inf
        logits = backend.decode(np.array([logits.argmax()]), np.array([position]), ranges)[0]
    _check_finite("logits", logits)


def _check_finite(what: str, values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise EngineError(f"smoke test: {what} are not finite; check the checkpoint's weights")
