"""Compares where heads learn to look with the marks of the drawn pages."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, ask, draw
from nvlm_trt.evaluation.tinydocs.page import TILE
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.tokenizer import THUMBNAIL_TAG
from training.batch import collate
from training.labels import GRID, PATCH, page_labels
from training.language_stage import right_looks
from training.packer import Packer
from training.pointing import LEFT, RIGHT, TEXT, TOKENS, WHOLE, points

LETTERS = ("ocr", "form")


def asked_pages(task, seed):
    """Draws -> pages, questions of the task, labels of all tiles, number of each page's first tile"""
    pages, questions = draw("train", task, np.random.default_rng(seed))
    labels = [page_labels(page) for page in pages]
    firsts = np.cumsum([0, *map(len, labels)])
    return pages, [q for q in questions if q.task == task], np.concatenate(labels), firsts


def place(page, first, mark, in_thumbnail):
    """Finds the token and the column of a mark; tokens are numbered through all tiles."""
    tiles = page.columns * page.rows
    if in_thumbnail and tiles > 1:
        tile, x, y = tiles, mark.x / page.columns, mark.y / page.rows
    else:
        tile = int(mark.y // TILE) * page.columns + int(mark.x // TILE)
        x, y = mark.x % TILE, mark.y % TILE
    row, column = min(int(y // PATCH), GRID - 1), min(int(x // PATCH), GRID - 1)
    return (first + tile) * TOKENS + row // 2 * (GRID // 2) + column // 2, column % 2


@pytest.mark.parametrize("task", LETTERS)
@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_points_of_letters_are_where_they_stand(task, seed):
    (page,), questions, labels, _ = asked_pages(task, seed)
    for question in questions:
        strings = "".join(mark.character or " " for mark in page.marks)
        assert question.answer in strings
        marks = page.marks[strings.index(question.answer) :][: len(question.answer)]
        where = {(p.answer_token, p.head): set(p.tokens.tolist()) for p in points(question, labels)}
        for number, mark in enumerate(marks):
            token, column = place(page, 0, mark, in_thumbnail=False)
            assert where[number, (LEFT, RIGHT)[column]] == {token}


@settings(max_examples=60)
@given(st.sampled_from([task for task in TASKS if task not in LETTERS]), st.integers(0, 2**32 - 1))
def test_points_of_things_are_where_they_stand(task, seed):
    pages, questions, labels, firsts = asked_pages(task, seed)
    for question in questions:
        (found, *_) = points(question, labels)
        assert found.head == WHOLE
        everything = {
            place(page, first, mark, in_thumbnail=task not in ("line", "sum"))[0]
            for page, first in zip(pages, firsts, strict=False)
            for mark in page.marks
        }
        assert len(found.tokens)
        assert set(found.tokens.tolist()) <= everything
        if task in ("chart", "colour", "location"):
            assert len(found.tokens) == 1, "one thing is meant, and it has one place"


@settings(max_examples=60)
@given(st.sampled_from(TEXT_TASKS), st.integers(0, 2**32 - 1))
def test_points_of_text_only_answers_are_their_letters(tokenizer, task, seed):
    question = ask(task, np.random.default_rng(seed))
    packer = Packer(replace(PRESETS["nvlm-d-tiny"], image_token_id=tokenizer.image_token_id), tokenizer)
    sequence = packer.pack((), [ask("copy", np.random.default_rng(1)), question])
    (own,) = np.nonzero(sequence.branch == 2)
    read: dict[int, list[str]] = {}
    for head, query, key, _ in sequence.self_points[np.isin(sequence.self_points[:, 1], own)].tolist():
        assert head == TEXT
        read.setdefault(query, []).append(tokenizer.decode([sequence.ids[key]]))
    answered = [query for query in own if sequence.labels[query] >= 0][:-1]
    if task == "add":
        assert list(read.values()) == [re.findall(r"\d", question.prompt)] * len(question.answer)
    else:
        assert read == {q: [tokenizer.decode([sequence.labels[q]])] for q in answered}, "read where it stands"


@pytest.mark.parametrize("architecture", ["d", "x", "h"])
def test_places_in_the_packed_sequence_are_those_of_the_tokens(architecture, tokenizer):
    config = replace(PRESETS[f"nvlm-{architecture}-tiny"], image_token_id=tokenizer.image_token_id)
    packer = Packer(config, tokenizer)
    sequences, expected = [], {}
    two_images = "line" if architecture == "x" else "pair"  # NVLM-X points differently for pairs, see below
    for number, (task, seed) in enumerate([("ocr", 1), (two_images, 2), ("form", 3), ("colour", 4)]):
        _, questions, labels, firsts = asked_pages(task, seed)
        images = [range(*bounds) for bounds in itertools.pairwise(firsts)]
        sequences.append(packer.pack(images, questions, labels))
        expected[number] = {
            (point.head, token)
            for question in questions
            for point in points(question, labels)
            for token in point.tokens
        }
    batch = collate(sequences)
    tag_length = packer.encoder.tag_length if architecture == "h" else 0
    seen: dict[int, set[tuple[int, int]]] = {number: set() for number in expected}
    for number, sequence in enumerate(sequences):
        image_places = np.flatnonzero(sequence.ids == config.image_token_id).tolist()
        for _, head, query, key, _ in batch.self_points[batch.self_points[:, 0] == number].tolist():
            tile, token = divmod(image_places.index(key), TOKENS)
            seen[number].add((head, sequence.llm_tiles[tile] * TOKENS + token))
            assert sequence.labels[query] >= 0, "only answers look"
        for _, head, _, key, _ in batch.cross_points[batch.cross_points[:, 0] == number].tolist():
            tile, token = divmod(key, tag_length + TOKENS)
            seen[number].add((head, sequence.cross_tiles[tile] * TOKENS + token - tag_length))
    assert seen == expected


def test_nvlm_x_tells_images_apart_by_their_tags(tokenizer):
    packer = Packer(replace(PRESETS["nvlm-x-tiny"], image_token_id=tokenizer.image_token_id), tokenizer)
    _, questions, labels, firsts = asked_pages("pair", 2)
    sequence = packer.pack([range(0, 1), range(1, 2)], questions, labels)
    assert firsts.tolist() == [0, 1, 2]
    assert not len(sequence.cross_points)
    assert len(sequence.self_points) == len(questions) > 0
    for question, (head, _, key, _) in zip(questions, sequence.self_points.tolist(), strict=True):
        first = 0 if question.answer == "first" else TOKENS
        assert head == TEXT
        assert sequence.ranges[key].tolist() == [first, first + TOKENS]
        assert sequence.ids[key] == tokenizer.token_id(THUMBNAIL_TAG)


def test_right_looks_adds_the_weights_of_the_right_keys():
    weights = torch.softmax(torch.randn(2, 3, 4, 5), -1)
    rows = [[0, 2, 1, 0, 0], [0, 2, 1, 3, 0], [1, 0, 3, 4, 2]]  # the first query has two right keys
    expected = [weights[0, 2, 1, 0] + weights[0, 2, 1, 3], weights[1, 0, 3, 4]]
    torch.testing.assert_close(right_looks(weights, torch.tensor(rows)), torch.stack(expected))
