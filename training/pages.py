"""Draws, tiles and labels thousands of pages in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvlm_trt.evaluation.tinydocs import FONTS, Split, draw
from nvlm_trt.evaluation.tinydocs.kinds import KEYS, WORDS, Question
from nvlm_trt.evaluation.tinydocs.page import COLOURS, MAX_TILES, TILE, Page
from nvlm_trt.evaluation.tinydocs.writing import pick, random_code, random_value, write, write_word
from nvlm_trt.image.tiling import tile_image, tile_pixels
from training.labels import GRID, PLANES, Labels, page_labels

Pixels = npt.NDArray[np.uint8]
_CHUNK = 500
Shares = Mapping[str, float]  # task -> share of the pages


@dataclass(frozen=True)
class Scene:
    """Images, as rows of a pool of tiles, and questions about them."""

    images: tuple[range, ...]  # tiles of each image in the pool, thumbnail last
    questions: tuple[Question, ...]


def page_tiles(page: Page) -> Pixels:
    """Tiles a page as the product does -> uint8 [tiles, TILE, TILE, 3], not normalised, thumbnail last."""
    return tile_pixels(tile_image(page.image, TILE, MAX_TILES))


def draw_dense_page(random: np.random.Generator, font: str) -> Page:
    """Draws one tile full of print, which teaches letters fastest."""
    page = Page(1, 1, font, random)
    kind = random.random()
    if kind < 0.2:
        key = str(random.choice(KEYS))
        y = random.uniform(8, 28)
        write_word(random, page, random.uniform(1, 8), y, key)
        write(random, page, random_value(random), 0, y + random.uniform(16.5, 19), None, word=key)
    elif kind < 0.35:
        lines = int(random.integers(2, 5))
        top = random.uniform(0, 2)
        for line, word in enumerate(pick(random, WORDS, lines)):
            if random.random() < 0.85:
                y = top + 14 * (line + 0.5) + random.uniform(-1.5, 0)
                write_word(random, page, random.uniform(0.5, 9), y, word, line=line + 1)
    else:
        for row in range(3):
            colour = str(random.choice(list(COLOURS)))
            text = random_code(random)
            if random.random() < 0.12:
                text = f"{random.integers(10)}+{random.integers(10)}="
            write(random, page, text, 0, 18.5 * row + random.uniform(8, 10.5), colour)
    page.add_noise()
    return page


def dense_tiles(split: Split, seed: int, count: int) -> tuple[Pixels, Labels]:
    """Draws dense pages -> tiles [count, TILE, TILE, 3], labels [count, GRID, GRID, planes]"""
    chunks = [(split, seed, number, min(count, _CHUNK)) for number in range(-(-count // _CHUNK))]
    with multiprocessing.Pool() as pool:
        parts = pool.starmap(_dense_chunk, chunks)
    return np.concatenate([p[0] for p in parts])[:count], np.concatenate([p[1] for p in parts])[:count]


def _dense_chunk(split: Split, seed: int, number: int, count: int) -> tuple[Pixels, Labels]:
    random = np.random.default_rng([seed, 1, number])
    pixels = np.empty((count, TILE, TILE, 3), np.uint8)
    labels = np.empty((count, GRID, GRID, len(PLANES)), np.int8)
    for index in range(count):
        page = draw_dense_page(random, str(random.choice(FONTS[split])))
        pixels[index], labels[index] = page_tiles(page)[0], page_labels(page)[0]
    return pixels, labels


def scenes(split: Split, seed: int, count: int, shares: Shares) -> tuple[Pixels, Labels, list[Scene]]:
    """Draws `count` scenes over one pool of tiles [all, TILE, TILE, 3] with labels [all, GRID, GRID, planes]."""
    chunks = [(split, seed, shares, number, min(count, _CHUNK)) for number in range(-(-count // _CHUNK))]
    with multiprocessing.Pool() as pool:
        parts = pool.starmap(_scene_chunk, chunks)
    merged: list[Scene] = []
    offset = 0
    for pixels, _, part in parts:
        for scene in part:
            images = tuple(range(tiles.start + offset, tiles.stop + offset) for tiles in scene.images)
            merged.append(Scene(images, scene.questions))
        offset += len(pixels)
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), merged[:count]


def _scene_chunk(
    split: Split, seed: int, shares: Shares, number: int, count: int
) -> tuple[Pixels, Labels, list[Scene]]:
    random = np.random.default_rng([seed, 2, number])
    tasks, weights = list(shares), np.array(list(shares.values()))
    pixels, labels = [], []
    made: list[Scene] = []
    offset = 0
    while len(made) < count:
        pages, questions = draw(split, tasks[random.choice(len(tasks), p=weights / weights.sum())], random)
        if not questions:
            continue
        images = []
        for page in pages:
            tiles = page_tiles(page)
            pixels.append(tiles)
            labels.append(page_labels(page))
            images.append(range(offset, offset + len(tiles)))
            offset += len(tiles)
        made.append(Scene(tuple(images), tuple(questions)))
    return np.concatenate(pixels), np.concatenate(labels), made
