"""Tests the ONNX Runtime backend on real tiny engines: parity with the reference, slots, limits, broken files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from step_requests import StepRequest, decode

from nvlm_trt.backends.base import ImageFeatures, StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, RequestError
from nvlm_trt.reference.model import ReferenceModel

Directory = Callable[[str], Path]
NAMES = ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"]
NO_RANGE = np.zeros((1, 2), np.int32)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backend(engine: Directory, name: str) -> Iterator[StepBackend]:
    with open_backend(Engine.open(engine(name)), threads=2) as opened:
        yield opened


@pytest.fixture
def exact_backend(exact_engine: Directory, name: str) -> Iterator[StepBackend]:
    with open_backend(Engine.open(exact_engine(name)), threads=2) as opened:
        yield opened


def test_equals_reference(exact_backend: StepBackend, engine: Directory, checkpoint: Directory, name: str) -> None:
    """Image tokens, cross-attention keys and values, prefill logits, and 12 greedy tokens."""
    model = ReferenceModel.from_checkpoint(checkpoint(name))
    request = StepRequest(exact_backend, engine(name), "Compare <image> with <image>.", [3, 1], seed=1)
    pixels = np.random.default_rng(1).standard_normal((3, 3, 56, 56), dtype=np.float32)
    np.testing.assert_allclose(exact_backend.encode(pixels), model.encode(torch.from_numpy(pixels)), rtol=0, atol=2e-5)
    reference_kv = []
    for tiles, image in zip(request.cross_tiles, request.images, strict=True):
        if len(tiles):
            is_h = exact_backend.config.architecture == "H"
            tags = torch.from_numpy(request.encoder.tag_ids(len(tiles))) if is_h else None
            expected = model.cross_kv(torch.from_numpy(tiles), tags)
            reference_kv.append(expected)
            stacked = torch.stack([torch.stack(pair) for pair in expected])
            np.testing.assert_allclose(image.cross_kv, stacked, rtol=0, atol=2e-5)
    joined = [
        (torch.cat([image[j][0] for image in reference_kv], 1), torch.cat([image[j][1] for image in reference_kv], 1))
        for j in range(len(exact_backend.config.cross_layers))
    ]
    llm_tokens = torch.from_numpy(request.embeddings)
    logits = request.prefill(0)
    assert np.isfinite(logits).all()
    expected_logits, _ = model(
        torch.from_numpy(request.prompt.input_ids)[None],
        llm_tokens,
        joined or None,
        torch.from_numpy(request.prompt.cross_ranges)[None],
    )
    np.testing.assert_allclose(logits, expected_logits[0, -1], rtol=0, atol=5e-5)
    assert greedy(exact_backend, request, logits, 12) == model.generate(request.prompt, llm_tokens, joined or None, 12)


def greedy(backend: StepBackend, request: StepRequest, logits: np.ndarray, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        logits = logits.copy()
        logits[backend.config.image_token_id] = -np.inf
        tokens.append(int(logits.argmax()))
        logits = decode(backend, [request], np.array(tokens[-1:]), len(tokens) - 1)[0]
    return tokens


def test_slots_are_independent_of_their_neighbours_bit_for_bit(
    backend: StepBackend, engine: Directory, name: str
) -> None:
    """Prefill in any slot and decode in a batch of three: the logits equal those of the request alone."""
    prompts = [("Hello", []), ("What is <image>?", [3]), ("Compare <image> with <image>.", [1, 5])]
    requests = [StepRequest(backend, engine(name), text, tiles, seed) for seed, (text, tiles) in enumerate(prompts)]
    steps = np.random.default_rng(0).integers(0, 256, (4, 3))
    alone = []
    for slot, request in enumerate(requests):
        logits = [request.prefill(0)]
        logits += [decode(backend, [request], step[slot : slot + 1], i)[0].copy() for i, step in enumerate(steps)]
        alone.append(logits)
    together = [[request.prefill(slot)] for slot, request in enumerate(requests)]
    for i, step in enumerate(steps):
        for logits, row in zip(together, decode(backend, requests, step, i).copy(), strict=True):
            logits.append(row)
    assert np.isfinite(np.array(alone)).all()
    assert np.array_equal(np.array(alone), np.array(together))


def test_prefill_leaves_other_slots_alone(backend: StepBackend, engine: Directory, name: str) -> None:
    first = StepRequest(backend, engine(name), "What is <image>?", [3], seed=0)
    second = StepRequest(backend, engine(name), "And <image>, a longer question about another image?", [5], seed=1)
    first.prefill(0)
    expected = decode(backend, [first], np.array([65]), 0).copy()
    second.prefill(1)
    assert np.array_equal(decode(backend, [first], np.array([65]), 0), expected)


def test_chunked_prefill_equals_whole_prefill(backend: StepBackend, engine: Directory, name: str) -> None:
    request = StepRequest(backend, engine(name), "What is <image> and <image>?", [3, 2], seed=0)
    whole = request.prefill(0)
    np.testing.assert_allclose(request.prefill_chunks(1, 13)[-1], whole, rtol=0, atol=2e-5)


def test_chunks_without_logits_leave_the_same_bits(backend: StepBackend, engine: Directory, name: str) -> None:
    """The last chunk's logits, and the next token's, which read all that the chunks before have cached."""
    request = StepRequest(backend, engine(name), "What is <image> and <image>?", [3, 2], seed=0)
    *others, last = request.prefill_chunks(0, 13)
    assert {len(logits) for logits in others} == {backend.config.llm.vocab_size}
    next_logits = decode(backend, [request], np.array([65]), 0).copy()
    StepRequest(backend, engine(name), "<image><image>", [7, 7], seed=1).prefill(0)
    *others, last_alone = request.prefill_chunks(0, 13, all_logits=False)
    assert {len(logits) for logits in others} == {0}
    assert np.array_equal(last_alone, last)
    assert np.array_equal(decode(backend, [request], np.array([65]), 0), next_logits)


def test_move_slot(backend: StepBackend, engine: Directory, name: str) -> None:
    request = StepRequest(backend, engine(name), "<image><image>", [7, 7], seed=0)
    if backend.config.cross_layers:
        assert request.prompt.cross_tokens > request.length  # different, so that confusing the two fails
    request.prefill(0)
    expected = decode(backend, [request], np.array([65]), 0).copy()
    request.prefill(3)
    StepRequest(backend, engine(name), "<image><image>", [7, 7], seed=1).prefill(0)
    backend.move_slot(3, 0, request.length, request.prompt.cross_tokens)
    assert np.array_equal(decode(backend, [request], np.array([65]), 0), expected)


def test_move_slot_leaves_the_source_as_it_was(backend: StepBackend, engine: Directory, name: str) -> None:
    """The answers of one request continue copies of one prefill."""
    request = StepRequest(backend, engine(name), "What is <image>?", [3], seed=0)
    request.prefill(0)
    alone = [decode(backend, [request], np.array([token]), 0)[0].copy() for token in (65, 66, 67)]
    request.prefill(0)
    for target in (1, 2):
        backend.move_slot(0, target, request.length, request.prompt.cross_tokens)
    assert np.array_equal(decode(backend, [request] * 3, np.array([65, 66, 67]), 0), np.array(alone))


def test_swap_slots(backend: StepBackend, engine: Directory, name: str) -> None:
    """Two slots of different lengths exchange all that their next tokens depend on."""
    requests = [StepRequest(backend, engine(name), "What is " + "<image>" * n, [7] * n, seed=n) for n in (2, 1)]
    tokens = np.array([65, 66])
    for slot, request in enumerate(requests):
        request.prefill(slot)
    expected = decode(backend, requests, tokens, 0).copy()
    for slot, request in enumerate(requests):
        request.prefill(slot)
    longer = requests[0]
    backend.swap_slots(0, 1, longer.length, longer.prompt.cross_tokens)
    assert np.array_equal(decode(backend, requests[::-1], tokens[::-1], 0), expected[::-1])


@pytest.mark.parametrize("name", NAMES[1:])
def test_text_only_is_bit_identical_to_the_llm_without_cross_attention(
    backend: StepBackend, engine: Directory, name: str
) -> None:
    """Checkpoints of one seed share their LLM, so the D engine is the X or H engine's LLM alone."""
    with open_backend(Engine.open(engine("nvlm-d-tiny")), ("decoder",), threads=1) as llm_alone:
        for text in ("Hello", "A longer text that spans several words, twice as long as the first."):
            request = StepRequest(backend, engine(name), text, [], seed=0)
            logits = request.prefill(0)
            prompt = request.prompt
            expected = llm_alone.prefill(0, 0, prompt.input_ids, request.embeddings, prompt.cross_ranges)
            assert np.array_equal(logits, expected)
            for step in range(3):
                token, position = np.array([int(logits.argmax())]), np.array([request.length + step])
                logits = backend.decode(token, position, NO_RANGE)[0].copy()
                assert np.isfinite(logits).all()
                assert np.array_equal(logits, llm_alone.decode(token, position, NO_RANGE)[0])


def test_refuses_image_embeddings_that_do_not_match(backend: StepBackend, engine: Directory, name: str) -> None:
    tokens = np.zeros((2, backend.config.llm.hidden_size), np.float32)
    ids = np.array([65, backend.config.image_token_id, 66])
    ranges = np.zeros((3, 2), np.int32)
    with pytest.raises(RequestError, match="1 image placeholders in the prompt, 2 image embeddings were given"):
        backend.prefill(0, 0, ids, tokens, ranges)
    with pytest.raises(RequestError, match="1 image placeholders in the prompt, 0 image embeddings were given"):
        backend.decode(ids[1:2], np.array([3]), NO_RANGE)


def test_refuses_more_than_a_slot_holds(backend: StepBackend, name: str) -> None:
    none = np.zeros((0, backend.config.llm.hidden_size), np.float32)
    last = backend.limits.max_seq_len - 1
    with pytest.raises(RequestError, match=f"{last + 2} tokens.*{last + 1}"):
        backend.prefill(0, last, np.array([65, 66]), none, np.zeros((2, 2), np.int32))
    with pytest.raises(RequestError, match="max-seq-len"):
        backend.decode(np.array([65]), np.array([last + 1]), NO_RANGE)
    assert np.isfinite(backend.decode(np.array([65]), np.array([last]), NO_RANGE)).all()
    if backend.config.cross_layers:
        llm = backend.config.llm
        too_long = np.zeros((3, 2, llm.num_kv_heads, backend.limits.max_image_tokens, llm.head_dim), np.float32)
        with pytest.raises(RequestError, match="max-image-tokens"):
            backend.write_cross_kv(0, 1, ImageFeatures(none, too_long, tiles=7))


@pytest.mark.parametrize("name", NAMES[1:])
def test_refuses_an_image_of_too_many_tiles(backend: StepBackend, name: str) -> None:
    config = backend.config
    tiles = np.zeros((8, config.tokens_per_tile, config.llm.hidden_size), np.float32)
    with pytest.raises(RequestError, match="8 cross-attended tiles"):
        backend.features(np.concatenate([tiles, tiles[:1]]) if config.architecture == "H" else tiles)  # H: a thumbnail


def test_opens_only_what_is_asked_for(engine: Directory) -> None:
    opened = Engine.open(engine("nvlm-x-tiny"))
    edge = opened.config.vision.image_size
    with open_backend(opened, ("vision_encoder",)) as vision:
        assert vision.encode(np.zeros((2, 3, edge, edge), np.float32)).shape == (2, 16, 192)
        with pytest.raises(AssertionError, match="decoder was not opened"):
            vision.decode(np.array([1]), np.array([0]), NO_RANGE)


def test_encodes_more_tiles_than_are_run_at_once(backend: StepBackend, name: str) -> None:
    edge = backend.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((9, 3, edge, edge), dtype=np.float32)
    one_by_one = np.concatenate([backend.encode(tile[None]) for tile in pixels])
    assert np.array_equal(backend.encode(pixels), one_by_one)
    assert backend.encode(pixels[:0]).shape == (0, *one_by_one.shape[1:])


@pytest.mark.parametrize("file", ["decoder.onnx", "decoder.onnx.data", "vision_encoder.onnx", "cross_kv.onnx.data"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "corrupt"])
def test_broken_files_are_one_line(engine: Directory, tmp_path: Path, file: str, damage: str) -> None:
    """A file can be damaged after Engine.open has checked it, or be so large that Engine.open does not hash it."""
    sound = Engine.open(engine("nvlm-x-tiny"))
    shutil.copytree(sound.path, tmp_path / "engine")
    path = tmp_path / "engine" / file
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * 64)
    with pytest.raises(EngineError, match=r"cannot be loaded .*nvlm-trt build") as caught:
        open_backend(replace(sound, path=tmp_path / "engine"))
    assert "\n" not in str(caught.value)
    assert file.split(".")[0] in str(caught.value)


def test_caches_that_do_not_fit_in_memory_are_one_line(engine: Directory) -> None:
    opened = Engine.open(engine("nvlm-d-tiny"))
    limits = opened.limits.model_copy(update={"max_slots": 10**12})
    with pytest.raises(EngineError, match="max-slots"):
        open_backend(replace(opened, manifest=opened.manifest.model_copy(update={"limits": limits})))


def test_refuses_another_backend_or_device(engine: Directory) -> None:
    opened = Engine.open(engine("nvlm-d-tiny"))
    foreign = replace(opened, manifest=opened.manifest.model_copy(update={"backend": "abacus"}))
    with pytest.raises(EngineError, match="'abacus'"):
        open_backend(foreign)
    with pytest.raises(EngineError, match="device"):
        open_backend(opened, device="cuda:0")


def test_features_are_read_only_and_know_their_size(backend: StepBackend, engine: Directory, name: str) -> None:
    (features,) = StepRequest(backend, engine(name), "<image>", [3], seed=0).images
    assert features.nbytes == sum(
        array.nbytes for array in (features.embeddings, features.cross_kv) if array is not None
    )
    for array in (features.embeddings, features.cross_kv):
        if array is not None and array.nbytes:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1  # type: ignore[index]


def test_embeddings_of_several_images_are_rows_one_behind_the_other(backend: StepBackend, name: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.random((rows, backend.config.llm.hidden_size), np.float32) for rows in (3, 0, 2, 4)]
    images = [ImageFeatures(array, None, tiles=1) for array in arrays]
    joined = np.concatenate(arrays)
    for start in range(10):
        for stop in range(start, 10):
            assert np.array_equal(backend.to_host(backend.embeddings(images, start, stop)), joined[start:stop])
