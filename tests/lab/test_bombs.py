"""Tests that the files which attack a decoder are valid: a decoder that is given time decodes them."""

from __future__ import annotations

import pytest

from lab.bombs import BOMBS, scans
from nvlm_trt.image.decoding import load_image


@pytest.mark.parametrize("image_format", BOMBS)
def test_a_small_bomb_is_an_image(image_format: str) -> None:
    first, second = (BOMBS[image_format](seed, edge=300) for seed in (1, 2))  # type: ignore[call-arg]
    assert first != second
    assert load_image(first).size == (300, 300)
    assert len(first) < 500_000


def test_scans_cost_bytes_by_the_hundred() -> None:
    assert (len(scans(count=1000)) - len(scans(count=0))) / 1000 < 120
