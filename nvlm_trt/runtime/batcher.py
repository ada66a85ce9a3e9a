"""Makes a text generator of a step backend: one thread runs the engine, and sleeps while there is no work."""

from __future__ import annotations

from typing import Any

from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures, StepBackend
from nvlm_trt.constraint import Constraint
from nvlm_trt.lane import IsOver, never
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.generator_thread import GeneratorThread
from nvlm_trt.runtime.grammar import Grammar, Grammars
from nvlm_trt.runtime.scheduler import Scheduler


class Batcher(GeneratorThread):
    """Implements `TextGenerator`. Calls `on_delta` and `on_error` on the batcher's thread, between two steps."""

    def __init__(
        self,
        backend: StepBackend,
        tokenizer: Tokenizer,
        max_queue: int = 64,
        prefill_chunk: int = 256,
        reuse_prompts: bool = True,
        prepare_constraints: bool = False,
    ) -> None:
        """Take over `backend`. At most `max_queue` requests wait for a slot; at most `prefill_chunk` prompt tokens run
        between two decoding steps. `reuse_prompts`: as in GeneratorOptions; `prepare_constraints`: see
        `Grammars.prepare`."""
        self._backend = backend
        self._grammars = Grammars(tokenizer, backend.config.llm.vocab_size)
        if prepare_constraints:
            self._grammars.prepare()
        scheduler = Scheduler(backend, tokenizer, max_queue, prefill_chunk, reuse_prompts)
        super().__init__(scheduler, "nvlm-batcher")

    def compile(self, constraint: Constraint, is_over: IsOver = never) -> Grammar:
        return self._grammars.compile(constraint, is_over)

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        return self._backend.encode(pixel_values)

    def import_tokens(self, tokens: Any) -> BackendArray:
        return self._backend.import_tokens(tokens)

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        return self._backend.features(image_tokens)

    def close(self, drain: bool = True) -> None:
        """See `TextGenerator.close`."""
        self.finish(drain)
        self._grammars.close()
        self._backend.close()
