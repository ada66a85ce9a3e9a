"""Image tokens that are kept on disk: the same as the engine's own, encoded once, within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nvlm_trt.backends.opening import open_backend
from nvlm_trt.builders.quantization.encoded_images import EncodedImages
from nvlm_trt.engine import Engine
from nvlm_trt.image.tiling import normalise_tiles

Directory = Callable[[str], Path]
NAME = "nvlm-h-tiny"


def tiles(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 56, 56), np.uint8)


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A folder without an engine: nothing can be encoded there."""
    return tmp_path / "no engine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokens").mkdir()
    return tmp_path / "tokens"


def test_tokens_are_those_of_the_engine_whether_kept_or_not(engine: Directory, folder: Path, nowhere: Path) -> None:
    images = [tiles(1), tiles(7), tiles(1, seed=1)]
    with open_backend(Engine.open(engine(NAME))) as backend:
        expected = [backend.to_host(backend.encode(normalise_tiles(each))) for each in images]
    with EncodedImages(engine(NAME), folder) as first:
        for each, tokens in zip(images, expected, strict=True):
            np.testing.assert_array_equal(first.encode(each), tokens)
        assert first.complete
    with EncodedImages(nowhere, folder) as second:  # has no vision encoder
        for each, tokens in zip(images, expected, strict=True):
            kept = second.encode(each)
            assert kept.dtype == tokens.dtype
            np.testing.assert_array_equal(kept, tokens)


def test_may_be_entered_again(engine: Directory, folder: Path) -> None:
    images = EncodedImages(engine(NAME), folder, capacity=0)
    with images:
        first = images.encode(tiles(1))
    with images:
        np.testing.assert_array_equal(images.encode(tiles(1)), first)


def test_keeps_no_more_than_its_capacity(engine: Directory, folder: Path) -> None:
    with EncodedImages(engine(NAME), folder, capacity=0) as images:
        one_tile = images.encode(tiles(1))
    assert list(folder.iterdir()) == []
    with EncodedImages(engine(NAME), folder, capacity=3 * one_tile.nbytes) as images:
        for seed in range(5):
            np.testing.assert_array_equal(images.encode(tiles(2, seed)), images.encode(tiles(2, seed)))
        assert not images.complete
    (kept,) = folder.iterdir()
    assert kept.stat().st_size < 3 * one_tile.nbytes


def test_goes_on_where_nothing_can_be_written(engine: Directory, folder: Path) -> None:
    with EncodedImages(engine(NAME), folder / "missing") as images:
        np.testing.assert_array_equal(images.encode(tiles(1)), images.encode(tiles(1)))
        assert not images.complete
