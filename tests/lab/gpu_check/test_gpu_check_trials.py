"""gpu_check's trials: their arithmetic by hand, a wrong kernel, and every timed call once on the CPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import interpreted_check
import pytest
import torch

from lab.gpu_check.record import MEASURED, NOT_RUN, PASSED, SLOW, WRONG, Check, NotAvailableError, Record

pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")


def test_a_wrong_result_is_found(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(interpreted_check.spoiled_attention).result() == [WRONG, WRONG, PASSED]


def test_ranges_of_a_prompt() -> None:
    from lab.gpu_check.attention import PREFILL, boolean_mask, make_inputs, prompt_ranges

    ranges = prompt_ranges(PREFILL)[0].tolist()
    assert len(ranges) == 1024
    assert ranges[:16] == [[0, 0]] * 16
    assert ranges[16:21] == [[0, 256]] * 5
    assert ranges[46:51] == [[1536, 1792]] * 5
    assert ranges[51:] == [[0, 1792]] * (1024 - 51)
    small = PREFILL._replace(heads=1, kv_heads=1, head_dim=64, tokens=60)
    mask = boolean_mask(make_inputs(small, prompt_ranges(small), torch.float16, "cpu"))
    assert mask.shape == (1, 1, 60, 1792)
    assert mask[0, 0, [0, 16, 59]].sum(-1).tolist() == [0, 256, 1792]


def test_bytes_and_operations_by_hand() -> None:
    from lab.gpu_check.attention import Shape, full_ranges, make_inputs
    from lab.gpu_check.attention_speed import floating_point_operations, moved_bytes

    shape = Shape(4, 2, 64, batch=2, tokens=3, cross_tokens=100)
    ranges = full_ranges(shape)
    ranges[:, 0] = 0
    inputs = make_inputs(shape, ranges, torch.bfloat16, "cpu")
    # keys and values; query and output; ranges
    assert moved_bytes(inputs) == 2 * 2 * 2 * 2 * 100 * 64 + 2 * 2 * 2 * 4 * 3 * 64 + 2 * 3 * 2 * 4
    assert floating_point_operations(inputs) == 4 * 2 * 2 * 100 * 4 * 64  # two tokens of each sequence read


def test_arrangements_for_torch_are_equivalent() -> None:
    from lab.gpu_check.attention import Shape, boolean_mask, full_ranges, make_inputs, prompt_ranges
    from lab.gpu_check.attention_speed import ARRANGEMENTS

    shape = Shape(6, 2, 64, batch=2, tokens=24, cross_tokens=70)
    for ranges in (full_ranges(shape), prompt_ranges(shape, before=0, tag=2)):
        inputs = make_inputs(shape, ranges, torch.float32, "cpu")
        for mask in (None, boolean_mask(inputs)):
            first, *others = [arrange(inputs, mask).attend(None) for arrange in ARRANGEMENTS.values()]
            for other in others:
                torch.testing.assert_close(other.reshape(first.shape), first)


def test_every_timed_call_works(interpreter: ProcessPoolExecutor, tmp_path: Path) -> None:
    """At small shapes on the CPU, with a made-up time of 20 us."""
    checks = interpreter.submit(interpreted_check.timed_trials, str(tmp_path / "checks")).result()
    by_name = {check.name.split(":")[0] if "time" not in check.name else check.name: check for check in checks}
    assert [check for check in checks if check.status == WRONG] == []
    assert {check.name for check in checks if check.status == NOT_RUN} <= {"time: the same by torchvision"}
    decoding = by_name["decoding one request"]
    assert decoding.status == MEASURED
    assert decoding.values["us"] == pytest.approx(20)
    rate = decoding.values["GB/s"]
    assert isinstance(rate, float)
    assert decoding.values["of the copy's"] == pytest.approx(rate / 4000)
    assert by_name["prefill against torch without a mask"].status == PASSED  # as fast
    masked = by_name["prefill against torch with a mask"]
    assert (masked.status, masked.values["times as fast"]) == (SLOW, pytest.approx(1))
    assert len([check for check in checks if check.section == "tune"]) == 3
    (resampled,) = [check for check in checks if check.name.startswith("time: 24 x 16 to 3 x 2")]
    assert resampled.status == PASSED


def test_best_of_a_sweep(tmp_path: Path) -> None:
    from lab.gpu_check.tune import best

    record = Record(tmp_path / "checks")
    for name, us in (("decoding: a", 5.0), ("decoding: b", 3.0), ("prefill: c", 9.0)):
        record.add(Check("tune", name, MEASURED, {"us": us}, "in place" if name.endswith("a") else ""))
    record.add(Check("tune", "prefill: d", WRONG))
    lines = [" ".join(line.split()) for line in best(record)]
    assert lines == [
        "decoding: of 2 the fastest:",
        "3.0 us b",
        "5.0 us a in place",
        "prefill: of 1 the fastest:",
        "9.0 us c",
    ]


def test_choices_in_place_are_among_the_sweep() -> None:
    from lab.gpu_check.tune import cases
    from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS

    all_cases = cases()
    assert len(set(all_cases)) == len(all_cases)
    for what in ("decoding", "prefill"):
        assert {(what, blocks) for blocks in BLOCKS.values()} <= set(all_cases)


def test_exact_levels_are_pillows() -> None:
    from lab.gpu_check.resample import TiledImage, exact_levels, levels_of, noise, pillow_levels

    for tiling in (
        TiledImage(300, 170, 3, 2, tile=28),
        TiledImage(30, 190, 1, 2, tile=24),
        TiledImage(9, 5, 1, 1, tile=20),
    ):
        image = noise(tiling, "cpu")
        exact = exact_levels(image, tiling)
        assert exact.shape == (
            tiling.columns * tiling.rows + (tiling.columns * tiling.rows > 1),
            3,
            *[tiling[4]] * 2,
        )
        try:
            assert exact.equal(pillow_levels(image, tiling))
        except NotAvailableError as error:
            pytest.skip(str(error))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        assert levels_of((exact.float() / 255 - mean[:, None, None]) / std[:, None, None]).equal(exact)


def test_a_missing_ceiling_is_said(tmp_path: Path) -> None:
    from lab.gpu_check.measure import COPY, ceiling

    with pytest.raises(NotAvailableError, match="was not measured"):
        ceiling(Record(tmp_path / "none"), COPY)
