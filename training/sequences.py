"""Scenes and texts -> packed sequences: many questions share one prefix, and none sees another.

The prefix is everything up to the question (system message and pictures). Each question with its answer is a branch
that attends to the prefix and itself, at the positions it would have alone; so a branch computes exactly what a
request of its own would.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nvlm_trt.api import Message
from nvlm_trt.evaluation.tinydocs import TEXT_TASKS
from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import MESSAGE_END, THUMBNAIL_TAG, Tokenizer, tile_tag
from training.labels import Labels
from training.pointing import TEXT, TOKENS, Point, points, text_points

NOT_ANSWERED = -100
# [n, 4]: head, query's place, key's place, and a number that is the same for all keys that will do for one query
Points = npt.NDArray[np.int64]
_PLACEHOLDER = "?"


@dataclass(frozen=True)
class Prefix:
    """What stands before every question about pictures of these tile counts, and after it."""

    ids: npt.NDArray[np.int64]
    ranges: npt.NDArray[np.int32]
    tail: npt.NDArray[np.int64]  # from the question's end to where the answer begins
    cross_tokens: int


@dataclass(frozen=True)
class PackedSequence:
    """One packed sequence, not yet padded. `llm_tiles` and `cross_tiles` are rows of the pool of tiles."""

    ids: npt.NDArray[np.int64]  # [S]
    positions: npt.NDArray[np.int64]  # [S]
    branch: npt.NDArray[np.int64]  # [S], 0 is the prefix
    ranges: npt.NDArray[np.int32]  # [S, 2]
    labels: npt.NDArray[np.int64]  # [S], the next token where it is part of an answer
    weights: npt.NDArray[np.float32]  # [S]
    llm_tiles: tuple[int, ...]
    cross_tiles: tuple[int, ...]  # tile rows
    cross_tags: tuple[int, ...]  # for each of them its number in its picture, from 0
    self_points: Points  # keys are places in the sequence
    cross_points: Points  # keys are cross-attended tokens


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens, R tiles in the LLM's sequences and up to C cross-attended tiles in each."""

    ids: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    attention: Tensor  # [B, 1, S, S]: 0 or -inf
    llm_tiles: Tensor  # [R]
    cross_tiles: Tensor  # [B, C], padded with 0
    cross_tags: Tensor  # [B, C], from 0
    cross_ranges: Tensor  # [B, S, 2]
    labels: Tensor  # [B, S]
    weights: Tensor  # [B, S]
    answers: Tensor  # [B, S]: which answer of the batch a label belongs to
    self_points: Tensor  # [n, 5]: sequence, then as in a packed sequence
    cross_points: Tensor  # [n, 5]

    def to(self, device: torch.device) -> Batch:
        return Batch(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


class Packer:
    """Packs for one model. `tags` False leaves the tile tags out; `thumbnail_only` leaves the regular tiles out."""

    def __init__(
        self, config: NvlmConfig, tokenizer: Tokenizer, tags: bool = True, thumbnail_only: bool = False
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(config, tokenizer)
        self.thumbnail_only = thumbnail_only
        self._tags = tags
        self._end = tokenizer.token_id(MESSAGE_END)
        numbered = [tile_tag(number) for number in range(1, config.max_tiles + 1)]
        tag_tokens = [tokenizer.token_id(name) for name in (*numbered, THUMBNAIL_TAG)]
        self._tag_tokens = [token for token in tag_tokens if token is not None]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one packer lives as long as the training
    def prefix(self, tiles_per_image: tuple[int, ...]) -> Prefix:
        prompt = self.encoder.encode([Message("user", _PLACEHOLDER)], tiles_per_image)
        (mark,) = np.flatnonzero(prompt.input_ids == self.tokenizer.encode(_PLACEHOLDER)[0])
        ids, ranges = prompt.input_ids[:mark], prompt.cross_ranges[:mark]
        if not self._tags:
            kept = ~np.isin(ids, self._tag_tokens)
            ids, ranges = ids[kept], ranges[kept]
        return Prefix(ids, ranges, prompt.input_ids[mark + 1 :], prompt.cross_tokens)

    @functools.lru_cache(maxsize=200_000)  # noqa: B019
    def text_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def pack(
        self, pictures: Sequence[range], questions: Sequence[Question], labels: Labels | None = None
    ) -> PackedSequence:
        """With labels, of all tiles of the pool, comes where each token of an answer is read from; of a text-only
        answer it does without."""
        pointed: list[tuple[int, Point]] = []  # a token's place in the sequence, and where it looks
        if self.thumbnail_only:
            pictures = [range(tiles.stop - 1, tiles.stop) for tiles in pictures]
        prefix = self.prefix(tuple(map(len, pictures)))
        start = len(prefix.ids)
        ids, positions, branch = [prefix.ids], [np.arange(start)], [np.zeros(start, np.int64)]
        targets, weights = [np.full(start, NOT_ANSWERED)], [np.zeros(start, np.float32)]
        start_of_branch = start
        if labels is not None and pictures:
            labels = np.concatenate([labels[tiles.start : tiles.stop] for tiles in pictures])
        for number, question in enumerate(questions, start=1):
            asked = np.concatenate([self.text_ids(question.prompt), prefix.tail]).astype(np.int64)
            answer = np.array([*self.text_ids(question.answer), self._end], np.int64)
            whole = np.concatenate([asked, answer])[:-1]
            label = np.full(len(whole), NOT_ANSWERED)
            label[len(asked) - 1 :] = answer
            ids.append(whole)
            positions.append(np.arange(start, start + len(whole)))
            branch.append(np.full(len(whole), number))
            targets.append(label)
            found = []
            if question.task in TEXT_TASKS:
                for point in text_points(question, lambda text: len(self.text_ids(text))):
                    found.append(Point(point.answer_token, point.head, point.tokens + start_of_branch))
            elif labels is not None:
                found = points(question, labels)
                if question.task in ("pair", "tile") and self.config.architecture == "X":
                    found = [self._tag(point, prefix) for point in found]
            pointed += [(start_of_branch + len(asked) - 1 + point.answer_token, point) for point in found]
            start_of_branch += len(whole)
            # between a weight for each answer and one for each token
            weights.append(np.where(label != NOT_ANSWERED, len(answer) ** -0.5, 0.0).astype(np.float32))
        everything = np.array([[0, prefix.cross_tokens]], np.int32)
        total = sum(map(len, ids))
        ranges = np.concatenate([prefix.ranges, everything.repeat(total - start, 0)])
        llm_tiles, cross_tiles, cross_tags = self._split(pictures)
        self_points, cross_points = self._points(pointed, prefix, pictures)
        return PackedSequence(
            np.concatenate(ids), np.concatenate(positions), np.concatenate(branch), ranges, np.concatenate(targets),
            np.concatenate(weights), tuple(llm_tiles), tuple(cross_tiles), tuple(cross_tags), self_points, cross_points,
        )  # fmt: skip

    def _split(self, pictures: Sequence[range]) -> tuple[list[int], list[int], list[int]]:
        """Tiles in the LLM's sequence, cross-attended tiles, and of these their numbers in their pictures."""
        llm_tiles: list[int] = []
        cross_tiles: list[int] = []
        cross_tags: list[int] = []
        for tiles in pictures:
            in_llm, in_cross = split_tiles(self.config.architecture, len(tiles))
            llm_tiles += tiles[in_llm]
            cross_tiles += tiles[in_cross]
            cross_tags += range(len(tiles))[in_cross]
        return llm_tiles, cross_tiles, cross_tags

    def _tag(self, point: Point, prefix: Prefix) -> Point:
        """Cross-attended tokens do not say of which picture or tile they are; the tag that reads them does."""
        start = point.tokens[0] // TOKENS * TOKENS
        tag = np.flatnonzero((prefix.ranges == (start, start + TOKENS)).all(-1))[:1]
        return Point(point.answer_token, TEXT, tag)

    def _points(
        self, pointed: list[tuple[int, Point]], prefix: Prefix, pictures: Sequence[range]
    ) -> tuple[Points, Points]:
        """Of the sequence and of the cross-attended tokens: the places of image tokens."""
        places = self._places(tuple(map(len, pictures)))
        parts: tuple[list[Points], list[Points]] = ([], [])
        for number, (query, point) in enumerate(pointed):
            found = [point.tokens] if point.head == TEXT else [place[point.tokens] for place in places]
            for part, keys in zip(parts, found, strict=False):
                keys = keys[keys >= 0]
                part.append(np.stack(np.broadcast_arrays(point.head, query, keys, number), -1).astype(np.int64))
        empty = np.zeros((0, 4), np.int64)
        return np.concatenate([empty, *parts[0]]), np.concatenate([empty, *parts[1]])

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def _places(self, tiles_per_image: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For every image token of the pictures its place in the sequence and among the cross-attended, or -1."""
        total = sum(tiles_per_image)
        in_sequence = np.full((total, TOKENS), -1)
        crossed = np.full((total, TOKENS), -1)
        (free,) = np.nonzero(self.prefix(tiles_per_image).ids == self.config.image_token_id)
        pitch = TOKENS + (self.encoder.tag_length if self.config.architecture == "H" else 0)
        bounds = itertools.pairwise(itertools.accumulate(tiles_per_image, initial=0))
        llm_tiles, cross_tiles, _ = self._split([range(*pair) for pair in bounds])
        in_sequence[llm_tiles] = free.reshape(len(llm_tiles), TOKENS)
        crossed[cross_tiles] = (np.arange(1, len(cross_tiles) + 1)[:, None] * pitch - TOKENS) + np.arange(TOKENS)
        return in_sequence.ravel(), crossed.ravel()


def collate(sequences: Sequence[PackedSequence]) -> Batch:
    count, length = len(sequences), max(len(s.ids) for s in sequences)
    tiles = max(len(s.cross_tiles) for s in sequences)
    ids = np.zeros((count, length), np.int64)
    positions = np.zeros((count, length), np.int64)
    branch = np.full((count, length), -1)
    ranges = np.zeros((count, length, 2), np.int64)
    labels = np.full((count, length), NOT_ANSWERED)
    weights = np.zeros((count, length), np.float32)
    cross_tiles = np.zeros((count, tiles), np.int64)
    cross_tags = np.zeros((count, tiles), np.int64)
    for row, s in enumerate(sequences):
        n = len(s.ids)
        ids[row, :n], positions[row, :n], branch[row, :n] = s.ids, s.positions, s.branch
        ranges[row, :n], labels[row, :n], weights[row, :n] = s.ranges, s.labels, s.weights
        cross_tiles[row, : len(s.cross_tiles)] = s.cross_tiles
        cross_tags[row, : len(s.cross_tags)] = s.cross_tags
    causal = np.tri(length, dtype=bool)
    seen = (branch[:, None] == 0) | (branch[:, None] == branch[..., None])  # [B, query, key]
    seen = (seen & causal) | np.eye(length, dtype=bool)  # padding sees itself: a row of -inf would be NaN
    attention = np.where(seen, 0.0, -np.inf).astype(np.float32)[:, None]
    answers = np.cumsum([0, *(s.branch.max() for s in sequences)])[:-1, None] + branch - 1
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(attention).to(torch.bfloat16),
        torch.tensor([tile for s in sequences for tile in s.llm_tiles], dtype=torch.int64),
        torch.from_numpy(cross_tiles),
        torch.from_numpy(cross_tags),
        torch.from_numpy(ranges),
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        torch.from_numpy(answers),
        _batch_points([s.self_points for s in sequences]),
        _batch_points([s.cross_points for s in sequences]),
    )


def _batch_points(parts: Sequence[Points]) -> Tensor:
    rows, offset = [], 0
    for sequence, part in enumerate(parts):
        row = np.column_stack([np.full(len(part), sequence), part])
        row[:, 4] += offset
        offset = max(offset, int(row[:, 4].max(initial=-1)) + 1)
        rows.append(row)
    return torch.from_numpy(np.concatenate(rows))
