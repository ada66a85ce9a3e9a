"""When a calibration may end early: the scales after each block of samples against those of two blocks before."""

from __future__ import annotations

import pytest

from nvlm_trt.builders.quantization.scale_watch import Scales, ScaleWatch

LAYERS = 40
STILL: dict[str, tuple[float, float]] = {f"layer {i}": (8.0, 4.0) for i in range(LAYERS)}


def answers(*looks: Scales) -> list[bool]:
    watch = ScaleWatch()
    return [watch.are_still(scales) for scales in looks]


def with_layers(count: int, abs_max: float = 8.0, clip: float = 4.0) -> Scales:
    return STILL | {f"layer {i}": (abs_max, clip) for i in range(count)}


def test_two_blocks_without_a_change_are_enough() -> None:
    assert answers(STILL, STILL, STILL) == [False, False, True]


@pytest.mark.parametrize(
    ("moved", "still"),
    [
        (with_layers(LAYERS, abs_max=8.15), True),
        (with_layers(LAYERS, abs_max=8.17), False),  # 2 % of 8 is 0.16
        (with_layers(1, abs_max=14.3), True),  # 79 % of one layer are 2 % on average
        (with_layers(1, abs_max=14.5), False),
        (with_layers(1, clip=4.19), True),
        (with_layers(1, clip=4.21), False),
        (with_layers(1, clip=3.79), False),  # a clip may become smaller, too
        (STILL | {"another": (1.0, 1.0)}, False),
    ],
)
def test_what_counts_as_a_change(moved: Scales, still: bool) -> None:
    assert answers(STILL, STILL, moved) == [False, False, still]
    assert answers(STILL, moved, moved) == [False, False, still]
    assert answers(STILL, moved, moved, moved) == [False, False, still, True]


def test_slow_growth_adds_up_over_two_blocks() -> None:
    steps = [with_layers(LAYERS, clip=4 * 1.03**i) for i in range(6)]  # 3 % a block, 6 % in two
    assert answers(*steps) == [False] * 6


def test_inputs_that_stay_zero_do_not_count() -> None:
    zero = STILL | {"unused": (0.0, 0.0)}
    assert answers(zero, zero, zero) == [False, False, True]
    assert answers(zero, zero, STILL | {"unused": (1.0, 1.0)}) == [False, False, False]
