"""Messages and encoded images in, a streamed answer out: everything that happens to a request in this process."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from nvlm_trt.backends import open_backend
from nvlm_trt.backends.base import Backend, FloatArray
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.image.decoding import ImageLimits, load_image
from nvlm_trt.image.tiling import image_key, tile_image
from nvlm_trt.prompt.encoder import EncodedPrompt, Message, PromptEncoder, split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.generation import Delta, GenerationRequest, Handle, ImageFeatures, OnDelta, OnError
from nvlm_trt.runtime.image_cache import ImageCache, ImageCacheMetrics
from nvlm_trt.runtime.sampling import SamplingParams
from nvlm_trt.runtime.scheduler import SchedulerMetrics

# Normalisation to NFC, which Qwen2's tokenizer does, joins at most this many characters into one.
_NFC_JOINS = 4

EncodeImage = Callable[[bytes, int], FloatArray]  # encoded bytes, max_tiles -> image tokens [n, T, hidden]


@dataclass(frozen=True)
class ChatRequest:
    """A conversation that ends with the user's turn; `<image>` in it marks each image's place."""

    messages: Sequence[Message]
    # PNG, JPEG, ... bytes; or image tokens [n, T, hidden] of an image that the caller has encoded: they are not cached
    images: Sequence[bytes | FloatArray] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tiles: int | None = None  # per image, thumbnail not counted; None: the engine's limit


@dataclass(frozen=True)
class RuntimeOptions:
    max_queue: int = 64  # requests waiting for a slot
    prefill_chunk: int = 256  # prompt tokens between two decoding steps
    image_cache_bytes: int = 512 << 20
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    encode_workers: int = 1  # requests whose images are encoded at once


@dataclass(frozen=True)
class PipelineMetrics:
    scheduler: SchedulerMetrics
    image_cache: ImageCacheMetrics


class Pipeline:
    """One engine, ready to answer. A context manager; leaving it finishes what was submitted."""

    def __init__(
        self,
        engine: Engine,
        backend: Backend,
        tokenizer: Tokenizer,
        encode_image: EncodeImage | None = None,
        options: RuntimeOptions | None = None,
    ) -> None:
        """Takes over `backend`. `encode_image` replaces tiling and encoding in this process."""
        self._options = options or RuntimeOptions()
        self._engine = engine
        self._backend = backend
        self._prompt_encoder = PromptEncoder(engine.config, tokenizer)
        # counted in characters, of which none is less than a byte: text beyond this need not be tokenised to be refused
        self._max_characters = _NFC_JOINS * engine.limits.max_seq_len * tokenizer.longest_token
        self._encode_image = encode_image or self._encode_in_process
        self._image_cache = ImageCache(self._options.image_cache_bytes)
        self._encoders = ThreadPoolExecutor(self._options.encode_workers, thread_name_prefix="nvlm-encoder")
        self._batcher = Batcher(backend, tokenizer, self._options.max_queue, self._options.prefill_chunk)

    @classmethod
    def open(
        cls,
        engine_dir: str | os.PathLike[str],
        threads: int | None = None,
        encode_image: EncodeImage | None = None,
        options: RuntimeOptions | None = None,
        device: str | None = None,
    ) -> Pipeline:
        """Load an engine directory. Raises EngineError and ConfigError."""
        engine = Engine.open(os.fspath(engine_dir))
        tokenizer = Tokenizer.from_directory(engine.path)
        components = ["decoder"]
        components += ["cross_kv"] if engine.config.cross_attention else []
        components += ["vision_encoder"] if encode_image is None else []
        backend = open_backend(engine, components, threads=threads, device=device)
        return cls(engine, backend, tokenizer, encode_image, options)

    def generate(self, request: ChatRequest) -> Iterator[Delta]:
        """Stream one answer, last the delta with a finish_reason. Closing the iterator cancels the request."""
        results: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        handle = self.submit(request, results.put, results.put)
        try:
            while True:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
                if result.finish_reason:
                    return
        finally:
            handle.cancel()

    def submit(
        self, request: ChatRequest, on_delta: OnDelta, on_error: OnError, request_id: str | None = None
    ) -> Handle:
        """Start one answer; `on_delta` and `on_error` are called on the batcher's thread and must be quick.

        Raises at once what can be told before an image is decoded: RequestError, QueueFullError, and EngineError for
        an engine that is closed or has failed. The rest comes to `on_error`, ImageError for example.
        """
        self._check(request)
        # with one tile per image: the shortest that the prompt can be
        prompt = self._encode_prompt(request.messages, [1] * len(request.images))
        if not request.images:
            return self._batcher.submit(GenerationRequest(prompt, request.sampling), on_delta, on_error, request_id)
        prepared: Future[GenerationRequest] = Future()
        handle = self._batcher.submit(prepared, on_delta, on_error, request_id)
        self._encoders.submit(self._prepare, request, prepared)
        return handle

    @property
    def healthy(self) -> bool:
        return self._batcher.healthy

    def metrics(self) -> PipelineMetrics:
        return PipelineMetrics(self._batcher.metrics(), self._image_cache.metrics())

    def close(self, drain: bool = True) -> None:
        """Accept nothing more; finish what was submitted, or cancel it unless `drain`; then free the engine."""
        self._batcher.close(drain)
        self._encoders.shutdown(cancel_futures=True)
        self._backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.close(drain=exception_type is None)

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check(self, request: ChatRequest) -> None:
        images, most = len(request.images), self._options.image_limits.max_images
        if images > most:
            raise RequestError(f"the request has {images} images, at most {most} are allowed; send fewer")
        tiles, most = request.max_tiles, self._engine.limits.max_tiles
        if tiles is not None and not (type(tiles) is int and 1 <= tiles <= most):
            raise RequestError(f"max_tiles = {tiles!r} is not allowed; it is an integer from 1 to {most}")
        most += most > 1  # the thumbnail
        for image in request.images:
            if not isinstance(image, bytes) and not 1 <= len(image) <= most:
                raise RequestError(f"image_tokens of {len(image)} tiles in one image, 1 to {most} are allowed")
        characters = sum(len(message.content) for message in request.messages)
        if characters > self._max_characters:
            raise RequestError(
                f"the prompt has {characters} characters, more than the {self._engine.limits.max_seq_len} tokens that "
                "the engine holds; shorten it, or rebuild with --max-seq-len"
            )

    def _encode_prompt(self, messages: Sequence[Message], tiles_per_image: Sequence[int]) -> EncodedPrompt:
        """Raises RequestError if the engine cannot hold the prompt and one token of an answer."""
        prompt, limits = self._prompt_encoder.encode(messages, tiles_per_image), self._engine.limits
        tokens = len(prompt.input_ids)
        if tokens >= limits.max_seq_len:
            raise RequestError(
                f"the prompt has {tokens} tokens ({prompt.llm_image_tokens} of images), the engine holds "
                f"{limits.max_seq_len} with the answer; shorten it, lower max_tiles, or rebuild with --max-seq-len"
            )
        if prompt.cross_tokens > limits.max_image_tokens:
            raise RequestError(
                f"the images have {prompt.cross_tokens} cross-attended tokens, the engine holds "
                f"{limits.max_image_tokens}; send fewer images, lower max_tiles, or rebuild with --max-image-tokens"
            )
        return prompt

    # --- images, on an encoder's thread ------------------------------------------------------------------------------

    def _prepare(self, request: ChatRequest, prepared: Future[GenerationRequest]) -> None:
        """Settle the future, unless its request is cancelled first."""
        try:
            result = self._encode_images(request, prepared)
        except Exception as error:
            if prepared.set_running_or_notify_cancel():
                prepared.set_exception(error)
        else:
            if prepared.set_running_or_notify_cancel():
                prepared.set_result(result)

    def _encode_images(self, request: ChatRequest, prepared: Future[GenerationRequest]) -> GenerationRequest:
        started = time.monotonic()
        images: list[ImageFeatures] = []
        tiles = [1] * len(request.images)  # a lower bound where an image is not decoded yet
        cached = 0
        for index, image in enumerate(request.images):
            if prepared.cancelled():
                raise CancelledError
            features, is_cached = self._features(image, request.max_tiles or self._engine.limits.max_tiles, index)
            images.append(features)
            cached += is_cached
            tiles[index] = features.tiles
            # before the next image is encoded: the request may be over a limit already
            prompt = self._encode_prompt(request.messages, tiles)
        return GenerationRequest(
            prompt=prompt,
            sampling=request.sampling,
            images=images,
            decode_range=self._prompt_encoder.decode_range(prompt),
            cached_images=cached,
            encode_s=time.monotonic() - started,
        )

    def _features(self, image: bytes | FloatArray, max_tiles: int, index: int) -> tuple[ImageFeatures, bool]:
        if not isinstance(image, bytes):
            return self._features_of_tokens(image), False
        key = image_key(image, self._engine.config.vision.image_size, max_tiles, self._engine.digest)
        try:
            return self._image_cache.get(key, lambda: self._features_of_tokens(self._encode_image(image, max_tiles)))
        except ImageError as error:
            raise ImageError(f"image {index + 1}: {str(error).removeprefix('image: ')}") from error

    def _features_of_tokens(self, tokens: FloatArray) -> ImageFeatures:
        """tokens [n, T, hidden] of one image."""
        in_llm, in_cross = split_tiles(self._engine.config.architecture, len(tokens))
        # a copy: a view would keep the tokens of all tiles in memory for as long as the features are cached
        llm_tokens = tokens[in_llm].reshape(-1, tokens.shape[2]).copy()  # [m, hidden]
        cross_kv = self._backend.cross_kv(tokens[in_cross]) if len(tokens[in_cross]) else None
        return ImageFeatures(llm_tokens, cross_kv, tiles=len(tokens))

    def _encode_in_process(self, data: bytes, max_tiles: int) -> FloatArray:
        image = load_image(data, self._options.image_limits)
        return self._backend.encode(tile_image(image, self._engine.config.vision.image_size, max_tiles))
