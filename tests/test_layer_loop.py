"""Layers that were stopped, anywhere, go on there; a damaged file makes them begin anew; results are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.layer_loop import Array, LayerLoop

LAYERS = 5


class Counted:
    """Layers that count their calls: each adds a row to the second array and doubles the first."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[int] = []
        self._stop_at = stop_at

    def run(self, folder: Path | None) -> list[Array]:
        start = [np.array([[1.0, np.nan]], np.float32), np.empty((0, 2), np.int64)]
        return LayerLoop(folder).run(
            "a stage", start, [lambda arrays, i=i: self._layer(i, arrays) for i in range(LAYERS)]
        )

    def _layer(self, index: int, arrays: list[Array]) -> list[Array]:
        if index == self._stop_at:
            raise KeyboardInterrupt
        self.calls.append(index)
        return [arrays[0] * 2, np.concatenate([arrays[1], [[index, -index]]])]


def assert_same(actual: list[Array], expected: list[Array]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)  # takes NaN for equal to NaN


@pytest.mark.parametrize("stop_at", range(LAYERS))
def test_a_stopped_stage_goes_on_behind_its_last_finished_layer(tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        Counted(stop_at).run(tmp_path)
    rest = Counted()
    assert_same(rest.run(tmp_path), Counted().run(None))
    assert rest.calls == list(range(stop_at, LAYERS))


def test_a_finished_stage_runs_no_layer(tmp_path: Path) -> None:
    expected = Counted().run(tmp_path)
    again = Counted()
    assert_same(again.run(tmp_path), expected)
    assert again.calls == []


@given(st.data())
def test_a_damaged_file_is_not_used(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("kept")
    expected = Counted().run(folder)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans(), "cut off"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    assert_same(Counted().run(folder), expected)


def test_progress_names_the_stage_and_begins_where_the_stage_was_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Counted(stop_at=3).run(tmp_path)
    seen: list[tuple[str, float, float]] = []
    loop = LayerLoop(tmp_path, lambda *report: seen.append(report))
    loop.run("a stage", [], [lambda arrays: arrays] * LAYERS)
    assert seen == [("a stage", done, LAYERS) for done in range(3, LAYERS + 1)]
