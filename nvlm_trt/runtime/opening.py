"""Opens an engine as a text generator: by the batcher, or by a backend that batches by itself."""

from __future__ import annotations

import functools

from nvlm_trt.backends.opening import backend_of, check_device, open_backend
from nvlm_trt.backends.spec import OpenOptions
from nvlm_trt.engine import Engine
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.text_generator import GeneratorOptions, TextGenerator


def open_generator(
    engine: Engine,
    tokenizer: Tokenizer,
    options: GeneratorOptions,
    encodes_images: bool = True,
    threads: int | None = None,
    device: str | None = None,
) -> TextGenerator:
    """Load an engine, without its vision encoder unless `encodes_images`. Raises EngineError."""
    spec = backend_of(engine)
    if spec.open_generator is not None:
        own = OpenOptions(threads, device)
        check_device(engine, spec, own)
        open_vision = functools.partial(open_backend, engine, ["vision_encoder"], threads) if encodes_images else None
        return spec.open_generator(engine, tokenizer, open_vision, own, options)
    stages = ["cross_kv", "decoder", *(["vision_encoder"] if encodes_images else [])]
    backend = open_backend(engine, stages, threads=threads, device=device)
    chunk = options.prefill_chunk or spec.prefill_chunk
    return Batcher(backend, tokenizer, options.max_queue, chunk, options.reuse_prompts, options.prepare_constraints)
