"""Compares labels with the marks of the drawn page, and targets with word embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_trt.evaluation.tinydocs import TASKS, draw
from nvlm_trt.evaluation.tinydocs.page import TILE
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image, tile_pixels
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.model import ReferenceModel
from training.initialise import initialise
from training.labels import GRID, IGNORE, PATCH, PLANES, page_labels, values
from training.pages import draw_dense_page, page_tiles
from training.rotations import Rotations
from training.targets import TokenTargets
from training.vision_stage import plane_losses

seeds = st.integers(0, 2**32 - 1)
NUMBER = {name: number for number, name in enumerate(PLANES)}


def label(labels, tile, x, y, plane):
    code = labels[tile, int(y // PATCH), int(x // PATCH), NUMBER[plane]]
    return None if code == IGNORE else values(plane)[code]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, task=st.sampled_from(TASKS))
def test_training_tiles_equal_the_products_tiles(seed, task):
    for page in draw("train", task, np.random.default_rng(seed))[0]:
        served = tile_image(load_image(page.png()), TILE, 6)  # normalised [tiles, 3, E, E]
        np.testing.assert_array_equal(page_tiles(page), tile_pixels(served))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, task=st.sampled_from(["ocr", "form", "line", "sum"]))
def test_print_is_labelled_in_its_tile_and_blurred_in_the_thumbnail(seed, task):
    (page,), _ = draw("train", task, np.random.default_rng(seed))
    labels = page_labels(page)
    for mark in page.marks:
        tile = int(mark.y // TILE) * page.columns + int(mark.x // TILE)
        assert label(labels, tile, mark.x % TILE, mark.y % TILE, "kind") == mark.kind
        for plane in ("character", "index", "previous", "word", "line"):
            if getattr(mark, plane) is not None:
                assert label(labels, tile, mark.x % TILE, mark.y % TILE, plane) == getattr(mark, plane)
    kinds = labels[..., NUMBER["kind"]]
    tiles = page.columns * page.rows
    assert np.count_nonzero(kinds[:tiles]) == len(page.marks), "no two marks share a patch"
    if tiles > 1:
        assert {values("kind")[code] for code in kinds[-1].ravel()} <= {"none", "blur"}


@settings(max_examples=60, deadline=None)
@given(seed=seeds, task=st.sampled_from(["shape", "chart"]))
def test_figures_are_labelled_in_the_thumbnail_alone(seed, task):
    (page,), _ = draw("train", task, np.random.default_rng(seed))
    labels = page_labels(page)
    for mark in page.marks:
        x, y = mark.x / page.columns, mark.y / page.rows
        assert label(labels, -1, x, y, "kind") == mark.kind
        assert label(labels, -1, x, y, "colour") == mark.colour
        assert label(labels, -1, x, y, "number") == mark.number
    assert not labels[:-1, ..., NUMBER["kind"]].any()


def test_losses_are_cross_entropies_of_the_labelled_patches():
    random = np.random.default_rng(0)
    labels = torch.from_numpy(
        np.stack([page_labels(draw_dense_page(random, "font_manrope:files/Manrope-Bold.ttf"))[0]])
    )
    logits = {name: torch.randn(GRID * GRID, classes) for name, classes in PLANES.items()}
    losses = plane_losses(logits, labels)
    for number, name in enumerate(PLANES):
        target = labels[..., number].flatten()
        terms, weights = [], []
        for row, code in zip(logits[name].double(), target.tolist(), strict=True):
            if code != IGNORE:
                weights.append(0.3 if name == "kind" and code == 0 else 1.0)
                terms.append(-float(torch.log_softmax(row, 0)[code]) * weights[-1])
        assert float(losses[name]) == pytest.approx(sum(terms) / max(1, sum(weights)), abs=1e-4)


def test_targets_hold_the_names_of_shapes(tokenizer):
    model = ReferenceModel(replace(PRESETS["nvlm-d-tiny"], image_token_id=tokenizer.image_token_id))
    torch.manual_seed(0)
    initialise(model)
    targets = TokenTargets(model, tokenizer)
    random = np.random.default_rng(0)
    pages = [draw("train", "shape", random)[0][0] for _ in range(30)]
    labels = torch.from_numpy(np.stack([page_labels(page)[-1] for page in pages]))
    tokens, shows = targets.of(labels)
    assert torch.isfinite(tokens).all()
    half = 2 * PATCH
    embedding = model.language_model.model.embed_tokens.weight
    names = ["circle", "square", "triangle", "star"]
    known = torch.nn.functional.normalize(torch.stack([embedding[tokenizer.encode(f" {n}")].mean(0) for n in names]))
    right = total = 0
    for index, page in enumerate(pages):
        for mark in page.marks:
            token = int(mark.y / page.rows // half) * (GRID // 2) + int(mark.x / page.columns // half)
            assert shows[index, token]
            total += 1
            right += names[int((known @ Rotations(192).thing.T @ tokens[index, token]).argmax())] == mark.kind
    assert right / total > 0.9  # the rest: two shapes in one token, and chance between sums of words
