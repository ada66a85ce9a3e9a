"""Tests tile sheets: drawn pixels against Pillow's own resize and crop, layout, and refused arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from nvlm_trt.errors import RequestError
from nvlm_trt.image.tile_sheet import Box, SheetLayout, draw_tile_sheet, layout_sheet
from nvlm_trt.image.tiling import tile_count, tile_image, tile_pixels

# image size, tile size, max tiles -> grid, written down here and not computed
GRIDS = [
    ((504, 336), 56, 6, (3, 2)),
    ((504, 336), 448, 6, (3, 2)),
    ((336, 504), 56, 6, (2, 3)),
    ((1200, 200), 56, 6, (6, 1)),
    ((100, 900), 56, 6, (1, 6)),
    ((300, 300), 56, 6, (2, 2)),
    ((800, 400), 100, 6, (2, 1)),
    ((60, 60), 200, 6, (1, 1)),
    ((500, 300), 56, 1, (1, 1)),
    ((700, 500), 40, 12, (4, 3)),
]
grids = pytest.mark.parametrize(("size", "tile_size", "max_tiles", "grid"), GRIDS)


def noise(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pillows_tiles(image: Image.Image, tile_size: int, grid: tuple[int, int]) -> list[Image.Image]:
    columns, rows = grid
    canvas = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    tiles = [
        canvas.crop((i * tile_size, j * tile_size, (i + 1) * tile_size, (j + 1) * tile_size))
        for j in range(rows)
        for i in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles


def blocks(tile: Image.Image, times: int) -> np.ndarray:
    """Enlarges every pixel to a square of times x times, without Pillow's resize."""
    return np.asarray(tile).repeat(times, axis=0).repeat(times, axis=1)


def test_normalisation_is_undone_exactly() -> None:
    """All 256 values in each of the 3 channels, every one of them beside different others."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.stack([values, values.T, values[::-1]], axis=-1)
    pixels = tile_pixels(tile_image(Image.fromarray(rgb), 16, 1))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(pixels[0], rgb)


def test_undoing_the_normalisation_leaves_the_tiles_alone() -> None:
    tiles = tile_image(noise((90, 60)), 56, 6)
    before = tiles.copy()
    tile_pixels(tiles)
    np.testing.assert_array_equal(tiles, before)


@grids
def test_what_is_drawn_is_pillows_resize_and_crop(
    size: tuple[int, int], tile_size: int, max_tiles: int, grid: tuple[int, int]
) -> None:
    image = noise(size)
    layout = layout_sheet(size, tile_size, max_tiles)
    sheet = draw_tile_sheet(image, tile_size, max_tiles)
    assert sheet.mode == "RGB"
    assert sheet.size == layout.size
    assert layout.grid == grid
    want = pillows_tiles(image, tile_size, grid)
    assert len(want) == len(layout.tile_boxes) == len(layout.tags) == tile_count(*size, tile_size, max_tiles)
    for tile, box in zip(want, layout.tile_boxes, strict=True):
        edge = box[2] - box[0]
        assert edge == box[3] - box[1]
        assert edge % tile_size == 0
        assert edge >= 168
        np.testing.assert_array_equal(np.asarray(sheet.crop(box)), blocks(tile, edge // tile_size))
        # a frame of one colour around it, and then the gap
        around = [sheet.getpixel((x, y)) for x in (box[0] - 1, box[2]) for y in (box[1] - 1, box[3])]
        assert len(set(around)) == 1
        assert around[0] != sheet.getpixel((0, 0)) == sheet.getpixel((box[2] + 1, box[1]))


@pytest.mark.parametrize(("tile_size", "edge"), [(1, 168), (56, 168), (100, 200), (167, 334), (168, 168), (448, 448)])
def test_only_small_tiles_are_enlarged(tile_size: int, edge: int) -> None:
    left, _, right, _ = layout_sheet((300, 200), tile_size, 6).tile_boxes[0]
    assert right - left == edge


@grids
def test_tiles_stand_row_by_row_and_the_thumbnail_apart(
    size: tuple[int, int], tile_size: int, max_tiles: int, grid: tuple[int, int]
) -> None:
    columns, rows = grid
    layout = layout_sheet(size, tile_size, max_tiles)
    regular = layout.tile_boxes[: columns * rows]
    lefts, tops = sorted({box[0] for box in regular}), sorted({box[1] for box in regular})
    assert (len(lefts), len(tops)) == grid
    assert [(box[0], box[1]) for box in regular] == [(x, y) for y, x in itertools.product(tops, lefts)]
    if columns * rows > 1:
        edge = regular[0][2] - regular[0][0]
        gap = (lefts + tops)[1] - (lefts + tops)[0] - edge if columns > 1 else tops[1] - tops[0] - edge
        x, y, _, _ = layout.tile_boxes[-1]
        assert max(x - max(box[2] for box in regular), y - max(box[3] for box in regular)) > gap


def test_tags_are_those_of_the_prompt() -> None:
    assert layout_sheet((504, 336), 56, 6).tags == (
        "<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>", "<tile_5>", "<tile_6>", "<tile_global_thumbnail>"
    )  # fmt: skip


@pytest.mark.parametrize(("size", "max_tiles"), [((60, 60), 6), ((900, 300), 1)])
def test_one_tile_is_its_own_thumbnail(size: tuple[int, int], max_tiles: int) -> None:
    layout = layout_sheet(size, 448, max_tiles)
    assert layout.grid == (1, 1)
    assert layout.tags == ("<tile_global_thumbnail>",)
    assert len(layout.tile_boxes) == 1
    assert layout.heading == "1 x 1 grid, 1 tile of 448 px, which is the thumbnail"


@pytest.fixture
def drawn_texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Box]]:
    """Records every text that is drawn from now on, with the box that its glyphs fill."""
    texts: list[tuple[str, Box]] = []
    draw_text: Callable[..., None] = ImageDraw.ImageDraw.text

    def record(self, xy, text, fill, font) -> None:
        left, top, right, bottom = map(int, self.textbbox(xy, text, font))
        texts.append((text, (left, top, right, bottom)))
        draw_text(self, xy, text, fill, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("extreme", [(4, 800), (800, 4), (4, 4), (3000, 2000)])
@pytest.mark.parametrize("tile_size", [3, 56, 448])
def test_nothing_overlaps_or_leaves_the_sheet(
    drawn_texts: list[tuple[str, Box]], extreme: tuple[int, int], tile_size: int
) -> None:
    _assert_apart(extreme, tile_size, 6, drawn_texts)


@grids
def test_every_tile_has_its_label_above_it(
    drawn_texts: list[tuple[str, Box]], size: tuple[int, int], tile_size: int, max_tiles: int, grid: tuple[int, int]
) -> None:
    layout = _assert_apart(size, tile_size, max_tiles, drawn_texts)
    texts = dict(drawn_texts)
    assert [text for text, _ in drawn_texts] == [layout.heading, layout.image_caption, *layout.tags]
    for tag, box in zip(layout.tags, layout.tile_boxes, strict=True):
        assert box[0] <= texts[tag][0]
        assert texts[tag][2] <= box[2]
        assert 0 < box[1] - texts[tag][3] < layout.text_size
    columns, rows = grid
    assert layout.heading.startswith(f"{columns} x {rows} grid, {columns * rows} tile")
    assert f"{size[0]} x {size[1]} px" in layout.image_caption


def _assert_apart(
    size: tuple[int, int], tile_size: int, max_tiles: int, drawn_texts: list[tuple[str, Box]]
) -> SheetLayout:
    layout = layout_sheet(size, tile_size, max_tiles)
    draw_tile_sheet(noise(size), tile_size, max_tiles)
    frames = [(x - 1, y - 1, r + 1, b + 1) for x, y, r, b in (layout.image_box, *layout.tile_boxes)]
    everything = [*frames, *(box for _, box in drawn_texts)]
    assert len(everything) == 2 * len(frames) + 1
    for a, b in itertools.combinations(everything, 2):
        assert not overlap(a, b), (a, b)
    for left, top, right, bottom in everything:
        assert min(left, top) >= 0
        assert right <= layout.size[0]
        assert bottom <= layout.size[1]
    return layout


def test_labels_leave_ink() -> None:
    """The texts that other tests record are really drawn: a label has dark pixels, the place beside it has none."""
    layout = layout_sheet((504, 336), 56, 6)
    sheet = np.asarray(draw_tile_sheet(Image.new("RGB", (504, 336), "white"), 56, 6).convert("L"))
    width = ImageFont.load_default(layout.text_size).getlength("<tile_1>")
    for left, top, right, _ in layout.tile_boxes:
        band = sheet[top - layout.caption_height : top - 1, left:right]
        assert band[:, : int(width)].min() < 160
    first = layout.tile_boxes[0]
    assert sheet[first[1] - layout.caption_height : first[1] - 1, first[0] + int(width) + 4 : first[2]].min() > 220


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((300, 200), (300, 200)), ((1000, 500), (336, 168)), ((20, 10), (160, 80)), ((4, 800), (2, 336))],
)
def test_the_image_is_drawn_as_it_is_unless_it_does_not_fit(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    image = noise(size)
    left, top, right, bottom = box = layout_sheet(size, 56, 6).image_box
    assert (right - left, bottom - top) == drawn
    shown = np.asarray(draw_tile_sheet(image, 56, 6).crop(box))
    if drawn[0] >= size[0]:
        np.testing.assert_array_equal(shown, blocks(image, drawn[0] // size[0]))


def test_the_image_given_is_left_as_it_was() -> None:
    image = noise((90, 60))
    draw_tile_sheet(image, 56, 6)
    assert image.tobytes() == noise((90, 60)).tobytes()


def test_the_same_image_gives_the_same_sheet() -> None:
    assert draw_tile_sheet(noise((90, 60)), 56, 6).tobytes() == draw_tile_sheet(noise((90, 60)), 56, 6).tobytes()


@given(st.integers(4, 4000), st.integers(4, 4000), st.integers(1, 600), st.integers(1, 64))
def test_any_layout_holds_its_boxes(width: int, height: int, tile_size: int, max_tiles: int) -> None:
    layout = layout_sheet((width, height), tile_size, max_tiles)
    for left, top, right, bottom in (layout.image_box, *layout.tile_boxes):
        assert 0 < left < right < layout.size[0]
        assert 0 < top < bottom < layout.size[1]
    for a, b in itertools.combinations((layout.image_box, *layout.tile_boxes), 2):
        assert not overlap(a, b)


@pytest.mark.parametrize(
    ("tile_size", "max_tiles", "message"),
    [
        (0, 6, "tile_size 0 must be at least 1"),
        (-448, 6, "tile_size -448 must be at least 1"),
        (448, 0, "max_tiles 0 must be from 1 to 64"),
        (448, 10**9, "max_tiles 1000000000 must be from 1 to 64"),
        (10**9, 6, "pixels that are drawn"),
        (3025, 6, "7 tiles of 3025 px are more than the 64000000 pixels"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_drawn(tile_size: int, max_tiles: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        layout_sheet((504, 336), tile_size, max_tiles)
    with pytest.raises(RequestError, match=message):
        draw_tile_sheet(Image.new("RGB", (504, 336)), tile_size, max_tiles)
