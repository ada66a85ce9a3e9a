"""Turns messages and encoded images into a streamed answer: everything that happens to a request in this process."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import ChatRequest, Delta, ImageCount, PromptCount
from nvlm_trt.backends.base import BackendArray, ImageFeatures
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.image.decoder import ImageDecoder
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.image.tiling import choose_grid, image_key, normalise_tiles
from nvlm_trt.lane import AbandonedError, IsOver, Lane, never
from nvlm_trt.prompt.conversation import lift_images, tiles_of_images
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptDraft, PromptEncoder
from nvlm_trt.prompt.image_tokens import count_image_tokens
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.image_cache import ImageCache, ImageCacheMetrics
from nvlm_trt.runtime.opening import open_generator
from nvlm_trt.runtime.request import OnDelta, OnError, Request
from nvlm_trt.runtime.text_generator import GeneratorMetrics, GeneratorOptions, TextGenerator

# Qwen2's tokenizer normalises to NFC, which joins at most this many characters into one.
_NFC_JOINS = 4

# RGB tiles [tiles, 3, E, E] of an image -> image tokens [tiles, T, hidden] on the host or a device
EncodeTiles = Callable[[npt.NDArray[np.uint8]], Any]


@dataclass(frozen=True)
class RuntimeOptions(GeneratorOptions):
    image_cache_bytes: int = 512 << 20
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    encode_workers: int = 1  # images whose tiles are encoded at the same time
    decode_workers: int | None = None  # quick images, and slow ones, that are decoded at the same time; None: by cores


@dataclass(frozen=True)
class _Image:
    """An image of a request: an encoded file, or image tokens [tiles, T, hidden]."""

    data: Any
    max_tiles: int


@dataclass(frozen=True)
class PipelineMetrics:
    generator: GeneratorMetrics
    image_cache: ImageCacheMetrics


class Pipeline:
    """Answers requests with one engine. A context manager: leaving it finishes the submitted requests."""

    def __init__(
        self,
        engine: Engine,
        generator: TextGenerator,
        tokenizer: Tokenizer,
        encode_tiles: EncodeTiles | None = None,
        options: RuntimeOptions | None = None,
    ) -> None:
        """Take over `generator`. `encode_tiles` replaces the vision encoder in this process."""
        self._options = options = options or RuntimeOptions()
        self._engine = engine
        self._generator = generator
        self._prompt_encoder = PromptEncoder(engine.config, tokenizer)
        # a longer text is refused without tokenising it: a character has at least one byte, a token at most
        # `longest_token` bytes
        self._max_characters = _NFC_JOINS * engine.limits.max_seq_len * tokenizer.longest_token
        self._encode_elsewhere = encode_tiles
        self._image_cache = ImageCache(options.image_cache_bytes)
        self._decoder = ImageDecoder(options.image_limits, options.decode_workers)
        self._encoding = Lane(options.encode_workers)
        # A thread for each request that waits for its images, and for each that was cancelled while its tiles are
        # encoded: a request whose images are all cached waits for no other.
        threads = options.max_queue + options.encode_workers
        self._preparing = ThreadPoolExecutor(threads, thread_name_prefix="nvlm-images")

    @classmethod
    def open(
        cls,
        engine_dir: str | os.PathLike[str],
        threads: int | None = None,
        encode_tiles: EncodeTiles | None = None,
        options: RuntimeOptions | None = None,
        device: str | None = None,
    ) -> Pipeline:
        """Load an engine directory. Raises EngineError and ConfigError."""
        engine = Engine.open(os.fspath(engine_dir))
        tokenizer = Tokenizer.from_directory(engine.path)
        generator = open_generator(
            engine, tokenizer, options or RuntimeOptions(), encode_tiles is None, threads, device
        )
        return cls(engine, generator, tokenizer, encode_tiles, options)

    def generate(self, chat: ChatRequest) -> Iterator[Delta]:
        """Stream the answers to one request; the last delta of each has a finish_reason. Closing the iterator cancels
        the request.

        Raises the errors of `submit` and those that `submit` gives to `on_error`."""
        unfinished = chat.sampling.n
        results: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        request = self.submit(chat, results.put, results.put)
        try:
            while True:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                unfinished -= result.finish_reason is not None
                yield result
                if not unfinished:
                    return
        finally:
            request.cancel()

    def submit(self, chat: ChatRequest, on_delta: OnDelta, on_error: OnError, request_id: str | None = None) -> Request:
        """Start one request. Calls `on_delta` and `on_error`, which must be quick, on the generator's thread.

        Raises the errors that are found before an image is decoded: RequestError, QueueFullError, and EngineError for
        an engine that is closed or has failed. Passes later errors to `on_error`, ImageError for example."""
        draft, images, shortest = self._draft(chat)
        request = Request(chat.sampling, on_delta, on_error, request_id)
        if images or chat.sampling.constraint:
            self._generator.submit(request)
            text_tokens = len(shortest.input_ids) - shortest.placeholders
            self._preparing.submit(self._prepare, request, draft, images, text_tokens)
        else:
            request.provide(shortest)
            self._generator.submit(request)
        return request

    def count(self, chat: ChatRequest, is_over: IsOver = never) -> PromptCount:
        """Count the tokens and tiles of a request. Decodes the images and runs no model.

        Raises RequestError and ImageError as an answer to the request does, and AbandonedError soon after `is_over`
        returns True."""
        draft, images, _ = self._draft(chat)
        config, counts = self._engine.config, []
        for index, image in enumerate(images):
            if not isinstance(image.data, bytes):
                raise RequestError("image tokens have no pixels to count tiles of; pass the bytes of a file")
            with _naming(index), self._decoder.turn(is_over) as turn:
                height, width, _ = turn.pixels(image.data).shape
            tile_size = config.vision.image_size
            columns, rows = choose_grid(width, height, tile_size, image.max_tiles)
            tiles = columns * rows + (columns * rows > 1)
            tokens = count_image_tokens(config, tiles, self._prompt_encoder.tag_length)
            counts.append(ImageCount(width, height, columns, rows, tiles, tile_size, *tokens))
        prompt = draft.encode([image.tiles for image in counts])
        self._engine.limits.check_prompt(len(prompt.input_ids), prompt.placeholders)
        self._engine.limits.check_cross_tokens(prompt.cross_tokens)
        return PromptCount(len(prompt.input_ids), prompt.placeholders, prompt.cross_tokens, tuple(counts))

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def healthy(self) -> bool:
        return self._generator.healthy

    def metrics(self) -> PipelineMetrics:
        return PipelineMetrics(self._generator.metrics(), self._image_cache.metrics())

    def import_tokens(self, tokens: Any) -> BackendArray:
        """Copy image tokens [tiles, T, hidden] that were encoded elsewhere, for `ChatRequest.images`."""
        return self._generator.import_tokens(tokens)

    def close(self, drain: bool = True) -> None:
        """Refuse new requests, finish the submitted ones (cancel them unless `drain`), then free the engine."""
        self._generator.finish(drain)
        self._preparing.shutdown(cancel_futures=True)
        self._decoder.close()
        self._generator.close(drain)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.close(drain=exception_type is None)

    def _draft(self, chat: ChatRequest) -> tuple[PromptDraft, list[_Image], EncodedPrompt]:
        """Check a request before its images are decoded. Return the draft of the prompt, the images, and the shortest
        prompt that may come of them."""
        limits = self._engine.limits
        messages, sent = lift_images(chat.messages, chat.images)
        self._options.image_limits.check_count(len(sent))
        if chat.max_tiles is not None:
            limits.check_max_tiles(chat.max_tiles)
        draft = self._prompt_encoder.draft(messages, len(sent))
        images = [
            self._image(image, max_tiles)
            for image, max_tiles in zip(sent, tiles_of_images(messages, len(sent), chat.max_tiles), strict=True)
        ]
        limits.check_characters(draft.characters, self._max_characters)
        shortest = draft.encode([1] * len(images))
        limits.check_prompt(len(shortest.input_ids), shortest.placeholders)
        limits.check_cross_tokens(shortest.cross_tokens)
        return draft, images, shortest

    # --- images ------------------------------------------------------------------------------------------------------

    def _image(self, image: Any, max_tiles: int | None) -> _Image:
        limits = self._engine.limits
        if max_tiles is not None:
            limits.check_max_tiles(max_tiles)
        if isinstance(image, (str, os.PathLike)):
            raise RequestError("an image is named by its path; pass the bytes of the file")
        if not isinstance(image, bytes):
            limits.check_encoded_tiles(len(image))
        return _Image(image, max_tiles or limits.max_tiles)

    def _prepare(self, request: Request, draft: PromptDraft, images: Sequence[_Image], text_tokens: int) -> None:
        """Provide a request with its constraint, prompt and features, unless it is cancelled first. Runs on a thread of
        its own."""
        try:
            if request.sampling.constraint:
                request.grammar = self._generator.compile(request.sampling.constraint, lambda: request.is_over)
            self._encode_images(request, draft, images, text_tokens)
        except AbandonedError:
            return
        except Exception as error:
            request.fail(error)

    def _encode_images(self, request: Request, draft: PromptDraft, images: Sequence[_Image], text_tokens: int) -> None:
        started = time.monotonic()
        features: list[ImageFeatures] = []
        keys = [self._image_key(image) for image in images]
        tiles = [1] * len(images)  # a lower bound where an image is not decoded yet
        cached = 0
        for index, (image, key) in enumerate(zip(images, keys, strict=True)):
            if request.is_over:
                return
            with _naming(index):
                of_image, is_cached = self._features(image, key, request)
            features.append(of_image)
            cached += is_cached
            tiles[index] = of_image.tiles
            # before the next image is encoded: the request may exceed a limit already
            self._check_tokens(tiles, text_tokens)
        prompt = draft.encode(tiles)
        self._engine.limits.check_prompt(len(prompt.input_ids), prompt.placeholders)
        request.provide(prompt, features, cached, time.monotonic() - started, keys)

    def _check_tokens(self, tiles: Sequence[int], text_tokens: int) -> None:
        """Check the limits. The prompt has at least `text_tokens` tokens that are no image placeholders."""
        counts = [count_image_tokens(self._engine.config, n, self._prompt_encoder.tag_length) for n in tiles]
        placeholders, cross_tokens = map(sum, zip(*counts, strict=True))
        self._engine.limits.check_prompt(text_tokens + placeholders, placeholders)
        self._engine.limits.check_cross_tokens(cross_tokens)

    def _image_key(self, image: _Image) -> str | None:
        """Return what an image file has in common with equal ones only. Image tokens have no key."""
        if not isinstance(image.data, bytes):
            return None
        return image_key(image.data, self._engine.config.vision.image_size, image.max_tiles, self._engine.digest)

    def _features(self, image: _Image, key: str | None, request: Request) -> tuple[ImageFeatures, bool]:
        data, max_tiles = image.data, image.max_tiles
        if key is None:
            return self._generator.features(data), False

        def is_over() -> bool:
            return request.is_over

        return self._image_cache.get(key, lambda: self._encode(data, max_tiles, is_over), is_over)

    def _encode(self, data: bytes, max_tiles: int, is_over: IsOver) -> ImageFeatures:
        """Decode, tile and encode an image file. Raises AbandonedError soon after `is_over` returns True, but not while
        the tiles are encoded."""
        with contextlib.ExitStack() as encoding:
            with self._decoder.turn(is_over) as turn:
                tiles = turn.tiles(data, self._engine.config.vision.image_size, max_tiles)  # [tiles, 3, E, E]
                # entered before the decoder's turn ends: decoded images do not pile up before the encoder
                encoding.enter_context(self._encoding.turn(is_over))
            if self._encode_elsewhere is None:
                image_tokens = self._generator.encode(normalise_tiles(tiles))  # [tiles, T, hidden]
            else:
                image_tokens = self._generator.import_tokens(self._encode_elsewhere(tiles))
            return self._generator.features(image_tokens)


@contextlib.contextmanager
def _naming(index: int) -> Iterator[None]:
    """Name the image in an ImageError."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"image {index + 1}: {str(error).removeprefix('image: ')}") from error
