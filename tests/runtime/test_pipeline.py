"""Tests the pipeline with real tiny engines, from encoded images to the last delta."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from nvlm_trt.api import ChatRequest, Delta, ImagePart, Message, SamplingParams, TextPart, Usage, merge_answers
from nvlm_trt.backends.base import BackendArray, FloatArray
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, ImageError, NvlmError, ParameterError, QueueFullError, RequestError
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import normalise_tiles
from nvlm_trt.lane import AbandonedError
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.reference.preprocess import reference_tiles
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions
from nvlm_trt.runtime.sampling import answer_seed

DirectoryByName = Callable[[str], Path]
ALL = [pytest.param(f"nvlm-{letter}-tiny", id=letter.upper()) for letter in "dxh"]
LONG = SamplingParams(max_tokens=3000, ignore_eos=True)
WAIT = 60.0  # seconds until a test gives up


def make_image(seed: int, width: int = 160, height: int = 90) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def chat(
    text: str, *images: bytes | FloatArray, sampling: SamplingParams | None = None, max_tiles: int | None = None
) -> ChatRequest:
    return ChatRequest([Message("user", text)], images, sampling or SamplingParams(max_tokens=12), max_tiles)


class CountingEncoder:
    """Encodes as the pipeline does by itself, and counts the images."""

    def __init__(self, directory: Path) -> None:
        self._backend = open_backend(Engine.open(directory), ["vision_encoder"], threads=1)
        self.calls = 0
        self.before: Callable[[], None] = lambda: None

    def __call__(self, tiles: npt.NDArray[np.uint8]) -> BackendArray:
        self.calls += 1
        self.before()
        return self._backend.encode(normalise_tiles(tiles))


@pytest.fixture(scope="module")
def encoder(engine: DirectoryByName) -> CountingEncoder:
    return CountingEncoder(engine("nvlm-h-tiny"))


@pytest.fixture
def pipeline(engine: DirectoryByName, encoder: CountingEncoder) -> Iterator[Pipeline]:
    """NVLM-H, 8 slots, with a queue of three that tests can fill."""
    encoder.calls, encoder.before = 0, lambda: None
    engine_dir = engine("nvlm-h-tiny")
    with Pipeline.open(engine_dir, threads=1, encode_tiles=encoder, options=RuntimeOptions(max_queue=3)) as opened:
        yield opened


def answer(pipeline: Pipeline, request: ChatRequest) -> tuple[list[int], str, Usage]:
    deltas = list(pipeline.generate(request))
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    usage = deltas[-1].usage
    assert usage is not None
    tokens = [token_id for delta in deltas for token_id in delta.token_ids]
    assert usage.completion_tokens == len(tokens)
    return tokens, "".join(delta.text for delta in deltas), usage


class Listener:
    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.error: Exception | None = None
        self.started, self.done = threading.Event(), threading.Event()

    def on_delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.started.set()
        if delta.finish_reason:
            self.done.set()

    def on_error(self, error: Exception) -> None:
        self.error = error
        self.done.set()


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_neighbours_do_not_change_an_answer(engine: DirectoryByName, name: str) -> None:
    """8 requests with different images, lengths and seeds, greedy and sampled, beside neighbours that are cancelled."""
    requests = [
        chat(
            "What is written here? " * (1 + 5 * (seed % 3)),
            *(make_image(10 * seed + i, width=60 + 50 * seed) for i in range(seed % 3)),
            sampling=SamplingParams(
                max_tokens=10 + 3 * seed, temperature=(seed % 2) * 1.2, top_p=0.95, seed=seed, ignore_eos=True
            ),
        )
        for seed in range(8)
    ]
    # no cache: every image is encoded both times
    options = RuntimeOptions(image_cache_bytes=0, prefill_chunk=32, encode_workers=2)
    with Pipeline.open(engine(name), threads=1, options=options) as pipeline:
        alone = [answer(pipeline, request) for request in requests]
        for _ in range(2):
            noise = [Listener() for _ in range(4)]
            handles = [pipeline.submit(chat("noise " * 20, sampling=LONG), n.on_delta, n.on_error) for n in noise]
            with ThreadPoolExecutor(len(requests)) as pool:
                futures = [pool.submit(answer, pipeline, request) for request in requests]
                for listener, handle in zip(noise, handles, strict=True):
                    assert listener.started.wait(WAIT)
                    handle.cancel()
                together = [future.result(WAIT) for future in futures]
            assert [tokens for tokens, _, _ in together] == [tokens for tokens, _, _ in alone]
            assert [text for _, text, _ in together] == [text for _, text, _ in alone]
        assert pipeline.metrics().generator.free_slots == 8


@pytest.mark.parametrize("name", ALL)
def test_chunks_of_the_prompt_do_not_change_an_answer(engine: DirectoryByName, name: str) -> None:
    request = chat("First <image>, then <image>: compare them.", make_image(1), make_image(2, 90, 200))
    answers = []
    for chunk in (7, 64, 4096):
        with Pipeline.open(engine(name), threads=1, options=RuntimeOptions(prefill_chunk=chunk)) as pipeline:
            answers.append(answer(pipeline, request)[0])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("name", ALL)
def test_logprobs_are_the_references(exact_engine: DirectoryByName, checkpoint: DirectoryByName, name: str) -> None:
    """Compares every sampled token of an answer about two images with the reference's forward of the whole sequence."""
    model = ReferenceModel.from_checkpoint(checkpoint(name))
    config = model.config
    images = [make_image(1), make_image(2, 90, 200)]
    messages = [Message("user", "Compare <image> and <image>.")]
    sampling = SamplingParams(max_tokens=8, temperature=1, seed=3, logprobs=3, ignore_eos=True)
    with Pipeline.open(exact_engine(name), threads=1, options=RuntimeOptions(prefill_chunk=50)) as pipeline:
        deltas = list(pipeline.generate(ChatRequest(messages, images, sampling)))

    encoder = PromptEncoder(config, Tokenizer.from_directory(exact_engine(name)))
    tiles = [reference_tiles(load_image(data), config.vision.image_size, config.max_tiles) for data in images]
    prompt = encoder.encode(messages, [len(each) for each in tiles])
    answer_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    llm_tokens, cross_kv = [], []
    for tokens in (model.encode(each) for each in tiles):
        in_llm, in_cross = split_tiles(config.architecture, len(tokens))
        llm_tokens.append(tokens[in_llm].flatten(0, 1))
        tags = torch.from_numpy(encoder.tag_ids(len(tokens[in_cross]))) if config.architecture == "H" else None
        cross_kv.append(model.cross_kv(tokens[in_cross], tags) if config.cross_layers else [])
    # [kv_heads, C, head_dim] of each block, one image behind the other
    memory = [
        tuple(torch.cat(pair, dim=1) for pair in zip(*blocks, strict=True)) for blocks in zip(*cross_kv, strict=True)
    ]
    input_ids = torch.tensor([[*prompt.input_ids.tolist(), *answer_ids]])
    ranges = torch.tensor([[*prompt.cross_ranges.tolist(), *[[0, prompt.cross_tokens]] * len(answer_ids)]])
    logits, _ = model(input_ids, torch.cat(llm_tokens), memory or None, ranges if memory else None)
    expected = torch.log_softmax(logits[0, len(prompt.input_ids) - 1 : -1], dim=-1)  # [answer, vocab]
    for row, delta in zip(expected, deltas, strict=True):
        assert np.isfinite(delta.logprobs[0].logprob)
        assert delta.logprobs[0].logprob == pytest.approx(float(row[delta.token_ids[0]]), abs=2e-4)
        assert [token.token_id for token in delta.logprobs[0].top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("name", ALL)
def test_an_answer_depends_on_each_image_and_on_their_order(engine: DirectoryByName, name: str) -> None:
    red, noise = make_image(1), make_image(2, 90, 200)
    with Pipeline.open(engine(name), threads=1) as pipeline:
        logprobs = SamplingParams(max_tokens=1, logprobs=20)
        tops = []
        for images in ((red, noise), (noise, red), (red, red)):
            deltas = list(pipeline.generate(chat("Compare <image> and <image>.", *images, sampling=logprobs)))
            tops.append([token.logprob for token in deltas[0].logprobs[0].top])
    assert np.isfinite(tops).all()
    assert np.abs(np.subtract(tops[0], tops[1])).max() > 1e-6
    assert np.abs(np.subtract(tops[0], tops[2])).max() > 1e-6


@pytest.mark.parametrize("name", ALL)
def test_answer_i_of_n_is_that_of_a_request_with_its_seed_bit_for_bit(engine: DirectoryByName, name: str) -> None:
    """The logprobs are compared, which show a difference in the last bit of a logit. The answers have neighbours, end
    at different times, and are drawn with all parameters that look at earlier tokens."""
    common: dict[str, Any] = {
        "temperature": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    }
    common |= {"logit_bias": {65: 2, 66: -100}, "min_tokens": 4, "logprobs": 20, "max_tokens": 25}
    images = make_image(1), make_image(2, 50, 150)
    options = RuntimeOptions(prefill_chunk=32)
    with Pipeline.open(engine(name), threads=1, options=options) as pipeline:
        several = chat("Compare <image> and <image>.", *images, sampling=SamplingParams(seed=3, n=5, **common))
        single = [
            chat("Compare <image> and <image>.", *images, sampling=SamplingParams(seed=answer_seed(3, i), **common))
            for i in range(5)
        ]
        alone = [merge_answers(list(pipeline.generate(request)))[0] for request in single]
        noise = Listener()
        handle = pipeline.submit(chat("noise", sampling=LONG), noise.on_delta, noise.on_error)
        brief = pipeline.submit(chat("noise", sampling=SamplingParams(9, ignore_eos=True)), print, print)
        together = list(pipeline.generate(several))
        handle.cancel()
        assert brief.is_over
        again = list(pipeline.generate(several))
        greedy = chat("Hello", sampling=SamplingParams(12, n=3))
        first, *others = merge_answers(list(pipeline.generate(greedy)))
        assert pipeline.metrics().generator.free_slots == 8
    for deltas in (together, again):
        answers = merge_answers(deltas)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
        assert [answer.logprobs for answer in answers] == [answer.logprobs for answer in alone]
        assert [answer.text for answer in answers] == [answer.text for answer in alone]
        assert len({tuple(answer.token_ids) for answer in answers}) == 5
        *before, last = deltas
        assert all(delta.usage is None for delta in before)
        assert last.usage is not None
        assert last.usage.completion_tokens == sum(len(answer.token_ids) for answer in answers)
        assert alone[0].usage is not None
        assert last.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert [other.token_ids for other in others] == [first.token_ids] * 2


def test_logprobs_name_tokens_and_their_bytes(engine: DirectoryByName, pipeline: Pipeline) -> None:
    """A temperature of 100 draws bytes that are parts of characters, bytes that are no text, and special tokens."""
    tokenizer = Tokenizer.from_directory(engine("nvlm-h-tiny"))
    sampling = SamplingParams(400, temperature=100, seed=4, ignore_eos=True, logprobs=20)
    (whole,) = merge_answers(list(pipeline.generate(chat("Say something.", sampling=sampling))))
    assert b"".join(item.utf8 for item in whole.logprobs).decode(errors="replace") == whole.text
    shown = [token for item in whole.logprobs for token in (item, *item.top)]
    special = [token for token in shown if not token.utf8]
    assert {token.text for token in special} >= {"<|im_end|>", ""}  # the preset has fewer tokens than logits
    assert all(tokenizer.token_id(token.text) == token.token_id for token in special if token.text)
    partial = [token for token in shown if token.text == "\N{REPLACEMENT CHARACTER}"]
    assert partial
    assert all(len(token.utf8) == 1 and token.utf8 >= b"\x80" for token in partial)


@pytest.mark.parametrize("with_image", [False, True])
def test_parameters_that_the_engine_cannot_follow_are_refused_before_an_image_is_encoded(
    pipeline: Pipeline, encoder: CountingEncoder, with_image: bool
) -> None:
    images = (make_image(1),) if with_image else ()
    for sampling, words in (
        (SamplingParams(n=9), "n = 9 is not allowed; it is an integer from 1 to 8"),
        (SamplingParams(logit_bias={512: 1}), "the token id 512, which is unknown; ids are from 0 to 511"),
        (SamplingParams(logit_bias=dict.fromkeys(range(512), -100)), "bans every token"),
    ):
        with pytest.raises(ParameterError, match=words):
            next(pipeline.generate(chat("What?", *images, sampling=sampling)))
    assert encoder.calls == 0
    assert pipeline.metrics().generator.queued == 0


def test_min_tokens_outlasts_stop_ids_and_stop_strings(pipeline: Pipeline) -> None:
    """An end of text that is nearly certain, and a stop string in every character."""
    _, _, usage = answer(pipeline, chat("Say.", sampling=SamplingParams(30, logit_bias={256: 100, 258: 100})))
    assert usage.completion_tokens == 1
    for stop in ((), tuple("abcdefghijklmnop")):
        biases = {256: 100, 258: 100} if not stop else dict.fromkeys(map(ord, stop), 100)
        sampling = SamplingParams(30, logit_bias=biases, min_tokens=7, stop=stop)
        *_, last = deltas = list(pipeline.generate(chat("Say.", sampling=sampling)))
        assert (len(deltas), last.finish_reason) == (8, "stop")


def test_the_text_is_that_of_the_tokens(engine: DirectoryByName, pipeline: Pipeline) -> None:
    sampling = SamplingParams(max_tokens=200, temperature=2, seed=4, ignore_eos=True)
    tokens, text, usage = answer(pipeline, chat("Say something.", sampling=sampling))
    assert len(tokens) == usage.completion_tokens == 200
    assert text == Tokenizer.from_directory(engine("nvlm-h-tiny")).decode(tokens)
    cut = SamplingParams(max_tokens=200, temperature=2, seed=4, ignore_eos=True, stop=(text[20:22],))
    assert answer(pipeline, chat("Say something.", sampling=cut))[1] == text[: text.index(text[20:22])]


def test_the_image_token_is_never_generated(engine: DirectoryByName, pipeline: Pipeline) -> None:
    image_token_id = Tokenizer.from_directory(engine("nvlm-h-tiny")).image_token_id
    sampling = SamplingParams(max_tokens=1500, temperature=100, seed=0, ignore_eos=True)
    tokens, _, _ = answer(pipeline, chat("Anything.", sampling=sampling))
    assert image_token_id not in tokens
    assert len(set(tokens)) > 400  # of 512


def test_max_tokens_is_cut_at_what_the_engine_holds(pipeline: Pipeline) -> None:
    *_, last = pipeline.generate(chat("x" * 4000, sampling=SamplingParams(max_tokens=10_000, ignore_eos=True)))
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.usage.prompt_tokens + last.usage.completion_tokens == 4096


# --- the image cache -------------------------------------------------------------------------------------------------


def test_a_known_image_is_not_encoded_again(pipeline: Pipeline, encoder: CountingEncoder) -> None:
    image, other = make_image(1), make_image(2)
    first, _, usage = answer(pipeline, chat("What is it?", image))
    assert (encoder.calls, usage.cached_images) == (1, 0)
    again, _, usage = answer(pipeline, chat("What is it?", image))
    assert (encoder.calls, usage.cached_images) == (1, 1)
    assert again == first
    _, _, usage = answer(pipeline, chat("Compare.", image, other, image))
    assert (encoder.calls, usage.cached_images) == (2, 2)
    answer(pipeline, chat("What is it?", image, max_tiles=1))
    assert encoder.calls == 3
    metrics = pipeline.metrics().image_cache
    assert (metrics.hits, metrics.misses, metrics.images) == (3, 3, 3)


def test_usage_counts_tiles_and_tokens(engine: DirectoryByName, pipeline: Pipeline) -> None:
    config = Engine.open(engine("nvlm-h-tiny")).config
    tokens, _, usage = answer(pipeline, chat("Look.", make_image(1, 112, 56), make_image(2, 56, 56)))
    assert usage.image_tiles == 3 + 1  # 2 x 1 and a thumbnail; one tile alone
    assert usage.cross_tokens == 2 * config.cross_tokens_per_tile(tag_length=1)
    assert usage.prompt_tokens > 2 * config.tokens_per_tile
    assert usage.completion_tokens == len(tokens)
    assert usage.ttft_s is not None
    assert 0 < usage.encode_s <= usage.queue_s <= usage.ttft_s <= usage.total_s


# --- cancelling and closing ------------------------------------------------------------------------------------------


def test_closing_the_iterator_frees_the_slot(pipeline: Pipeline) -> None:
    stream = pipeline.generate(chat("Go on.", sampling=LONG))
    next(stream)
    assert pipeline.metrics().generator.free_slots == 7
    stream.close()
    answer(pipeline, chat("Next."))  # at least one step later
    assert pipeline.metrics().generator.free_slots == 8
    assert pipeline.metrics().generator.requests_finished["cancelled"] == 1


def test_a_cancelled_request_gets_no_more_than_the_step_in_progress(pipeline: Pipeline) -> None:
    listener = Listener()
    tokens_at_cancel = []
    submitted = threading.Event()

    def on_delta(delta: Delta) -> None:
        assert submitted.wait(WAIT)
        listener.on_delta(delta)
        if len(listener.deltas) == 5:
            handle.cancel()
            tokens_at_cancel.append(pipeline.metrics().generator.tokens_generated)

    handle = pipeline.submit(chat("Go on.", sampling=LONG), on_delta, listener.on_error, request_id="a")
    submitted.set()
    assert listener.done.wait(WAIT)
    assert listener.deltas[-1].finish_reason == "cancelled"
    assert len(listener.deltas) == 6
    assert pipeline.metrics().generator.tokens_generated == tokens_at_cancel[0]
    assert pipeline.metrics().generator.free_slots == 8


def test_cancelling_stops_between_images(pipeline: Pipeline, encoder: CountingEncoder) -> None:
    encoding, cancelled = threading.Event(), threading.Event()

    def wait() -> None:
        encoding.set()
        assert cancelled.wait(WAIT)

    encoder.before = wait
    listener = Listener()
    handle = pipeline.submit(chat("Compare.", make_image(1), make_image(2)), listener.on_delta, listener.on_error)
    assert encoding.wait(WAIT)
    handle.cancel()
    assert listener.done.wait(WAIT)
    assert [delta.finish_reason for delta in listener.deltas] == ["cancelled"]
    cancelled.set()
    pipeline.close()
    assert encoder.calls == 1


def test_decoding_goes_on_while_an_image_is_encoded(pipeline: Pipeline, encoder: CountingEncoder) -> None:
    may_end = threading.Event()
    encoder.before = lambda: assert_true(may_end.wait(WAIT))
    listener = Listener()
    pipeline.submit(chat("Look.", make_image(1)), listener.on_delta, listener.on_error)
    tokens, _, _ = answer(pipeline, chat("Meanwhile.", sampling=SamplingParams(max_tokens=20, ignore_eos=True)))
    assert len(tokens) == 20
    assert not listener.started.is_set()
    may_end.set()
    assert listener.done.wait(WAIT)
    assert listener.error is None


def assert_true(value: bool) -> None:
    assert value


def test_closing_drains_and_then_refuses(engine: DirectoryByName) -> None:
    pipeline = Pipeline.open(engine("nvlm-h-tiny"), threads=1)
    listeners = [Listener() for _ in range(3)]
    for seed, listener in enumerate(listeners):
        pipeline.submit(chat("Look.", make_image(seed)), listener.on_delta, listener.on_error)
    pipeline.close()
    assert all(listener.deltas[-1].finish_reason in ("stop", "length") for listener in listeners)
    with pytest.raises(EngineError, match="closed"):
        answer(pipeline, chat("Too late."))


def test_an_error_inside_with_cancels_what_runs(engine: DirectoryByName) -> None:
    listener = Listener()
    with pytest.raises(KeyboardInterrupt), Pipeline.open(engine("nvlm-h-tiny"), threads=1) as pipeline:
        pipeline.submit(chat("Go on.", sampling=LONG), listener.on_delta, listener.on_error)
        assert listener.started.wait(WAIT)
        raise KeyboardInterrupt
    assert listener.deltas[-1].finish_reason == "cancelled"


# --- bad input: a one-line error, and the pipeline lives on ----------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (chat("x" * 5000), RequestError, r"the prompt has 50\d\d tokens \(0 of images\), the engine holds 4096"),
        (chat("x" * 20_000), RequestError, r"the prompt has 20000 characters, more than the 4096 tokens"),
        (chat("x", np.zeros((0, 16, 192), np.float32)), RequestError, r"image_tokens of 0 tiles .* 1 to 7"),
        (chat("x", np.zeros((8, 16, 192), np.float32)), RequestError, r"image_tokens of 8 tiles .* 1 to 7"),
        (chat("x", *[b"?"] * 40), RequestError, r"40 images, at most 16"),
        (chat("x", make_image(1), max_tiles=0), RequestError, r"max_tiles = 0 .* from 1 to 6"),
        (chat("x", make_image(1), max_tiles=7), RequestError, r"max_tiles = 7 .* from 1 to 6"),
        (chat("x", make_image(1), max_tiles=True), RequestError, r"max_tiles = True"),
        (chat("x", make_image(1), max_tiles=1.5), RequestError, r"max_tiles = 1.5"),  # type: ignore[arg-type]
        (chat(""), RequestError, r"empty|no text"),
        (ChatRequest([]), RequestError, r"."),
        (chat("<image> <image>", make_image(1)), RequestError, r"2 .*1|1 .*2"),
        (chat("x", b"not an image"), ImageError, r"^image 1: .*; convert it to PNG or JPEG"),
        (chat("x", make_image(1), b""), ImageError, r"^image 2: 0 bytes"),
        (chat("x", make_image(1)[:2000]), ImageError, r"^image 1: truncated"),
        (
            chat("x", *(make_image(i, 168, 112) for i in range(6))),
            RequestError,
            r"510 cross-attended tokens, the engine holds 408",
        ),
    ],
)
def test_a_bad_request_is_a_one_line_error(
    pipeline: Pipeline, request_: ChatRequest, error: type[NvlmError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        list(pipeline.generate(request_))
    assert "\n" not in str(caught.value)
    assert pipeline.healthy
    assert answer(pipeline, chat("Still there?"))[0]
    assert pipeline.metrics().generator.free_slots == 8


def test_too_many_image_tokens_are_found_before_all_images_are_encoded(
    pipeline: Pipeline, encoder: CountingEncoder
) -> None:
    with pytest.raises(RequestError, match="send fewer images"):
        list(pipeline.generate(chat("x", *(make_image(i, 168, 112) for i in range(16)))))
    assert encoder.calls == 5  # 102 tokens each, 408 fit


def test_an_encoder_that_fails_fails_its_request_only(pipeline: Pipeline, encoder: CountingEncoder) -> None:
    def fail() -> None:
        raise ValueError("no such model")

    encoder.before = fail
    with pytest.raises(ValueError, match="no such model"):
        list(pipeline.generate(chat("x", make_image(1))))
    encoder.before = lambda: None
    assert answer(pipeline, chat("x", make_image(1)))[2].cached_images == 0


def test_a_full_queue_refuses_before_anything_is_encoded(pipeline: Pipeline, encoder: CountingEncoder) -> None:
    may_end = threading.Event()
    encoder.before = lambda: assert_true(may_end.wait(WAIT))
    listeners = [Listener() for _ in range(3)]
    for seed, listener in enumerate(listeners):
        pipeline.submit(chat("x", make_image(seed)), listener.on_delta, listener.on_error)
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        list(pipeline.generate(chat("x", make_image(9))))
    may_end.set()
    assert all(listener.done.wait(WAIT) and listener.error is None for listener in listeners)
    assert encoder.calls == 3


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_what_is_counted_is_what_is_answered(engine: DirectoryByName, name: str) -> None:
    """Images of all grids, some with tiles of their own number; nothing is generated by counting."""
    sizes = [(60, 60), (200, 60), (60, 200), (300, 200)]
    with Pipeline.open(engine(name), threads=1) as pipeline:
        for own in (None, 1, 2, 4):
            parts = [ImagePart(make_image(i, *size), own if i % 2 else None) for i, size in enumerate(sizes[:3])]
            chat_request = ChatRequest([Message("user", [TextPart("A"), *parts])], (), SamplingParams(1), max_tiles=3)
            before = pipeline.metrics().generator.tokens_generated
            count = pipeline.count(chat_request)
            assert pipeline.metrics().generator.tokens_generated == before
            usage = list(pipeline.generate(chat_request))[-1].usage
            assert usage is not None
            assert (count.prompt_tokens, count.cross_tokens) == (usage.prompt_tokens, usage.cross_tokens)
            assert count.image_tokens == usage.image_tokens == sum(image.image_tokens for image in count.images)
            assert sum(image.tiles for image in count.images) == usage.image_tiles
            assert [(image.width, image.height) for image in count.images] == sizes[:3]
            assert count.images[1].columns * count.images[1].rows <= (own or 3)


def test_tiles_of_an_image_are_checked(engine: DirectoryByName) -> None:
    with Pipeline.open(engine("nvlm-d-tiny"), threads=1) as pipeline:
        for tiles in (0, 7, True, 1.0):
            request = ChatRequest([Message("user", [ImagePart(make_image(1), tiles)])])
            for ask in (pipeline.count, lambda request: next(pipeline.generate(request))):
                with pytest.raises(ParameterError, match="max_tiles = "):
                    ask(request)


def test_an_image_that_is_counted_is_named(engine: DirectoryByName) -> None:
    with Pipeline.open(engine("nvlm-d-tiny"), threads=1) as pipeline:
        with pytest.raises(ImageError, match=r"^image 2: "):
            pipeline.count(chat("Compare", make_image(1), make_image(2)[:100]))
        with pytest.raises(AbandonedError):
            pipeline.count(chat("Compare", make_image(1, 3000, 3000)), lambda: True)
