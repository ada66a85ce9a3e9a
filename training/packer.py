"""Packs questions about images, or without any, into sequences."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import Message
from nvlm_trt.evaluation.tinydocs import TEXT_TASKS
from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import MESSAGE_END, THUMBNAIL_TAG, Tokenizer, tile_tag
from training.labels import Labels
from training.packed_sequence import NOT_ANSWERED, PackedSequence, Points
from training.pointing import TEXT, TOKENS, Point, points, text_points

_PLACEHOLDER = "?"


@dataclass(frozen=True)
class Prefix:
    """The tokens before and after every question about images of the same tile counts."""

    ids: npt.NDArray[np.int64]
    ranges: npt.NDArray[np.int32]
    tail: npt.NDArray[np.int64]  # from the question's end to where the answer begins
    cross_tokens: int


class Packer:
    """Packs for one model. Without `tags` leaves out the tile tags; with `thumbnail_only` the regular tiles."""

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

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a packer lives as long as its training
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
        self, images: Sequence[range], questions: Sequence[Question], labels: Labels | None = None
    ) -> PackedSequence:
        """Packs questions about images, each a range of tiles in the pool.

        `labels` are those of all tiles of the pool: with them the sequence also says from which tokens each token of an
        answer is read. Text-only answers need no labels for that.
        """
        pointed: list[tuple[int, Point]] = []  # the place of a token in the sequence, and its point
        if self.thumbnail_only:
            images = [range(tiles.stop - 1, tiles.stop) for tiles in images]
        prefix = self.prefix(tuple(map(len, images)))
        start = len(prefix.ids)
        ids, positions, branch = [prefix.ids], [np.arange(start)], [np.zeros(start, np.int64)]
        targets, weights = [np.full(start, NOT_ANSWERED)], [np.zeros(start, np.float32)]
        start_of_branch = start
        if labels is not None and images:
            labels = np.concatenate([labels[tiles.start : tiles.stop] for tiles in images])
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
            # n ** -0.5: halfway between equal weights of answers (1 / n) and equal weights of tokens (1)
            weights.append(np.where(label != NOT_ANSWERED, len(answer) ** -0.5, 0.0).astype(np.float32))
        everything = np.array([[0, prefix.cross_tokens]], np.int32)
        total = sum(map(len, ids))
        ranges = np.concatenate([prefix.ranges, everything.repeat(total - start, 0)])
        llm_tiles, cross_tiles, cross_tags = self._split(images)
        self_points, cross_points = self._points(pointed, prefix, images)
        return PackedSequence(
            np.concatenate(ids), np.concatenate(positions), np.concatenate(branch), ranges, np.concatenate(targets),
            np.concatenate(weights), tuple(llm_tiles), tuple(cross_tiles), tuple(cross_tags), self_points, cross_points,
        )  # fmt: skip

    def _split(self, images: Sequence[range]) -> tuple[list[int], list[int], list[int]]:
        """Returns tiles in the LLM's sequence, cross-attended tiles, and the latter's numbers in their images."""
        llm_tiles: list[int] = []
        cross_tiles: list[int] = []
        cross_tags: list[int] = []
        for tiles in images:
            in_llm, in_cross = split_tiles(self.config.architecture, len(tiles))
            llm_tiles += tiles[in_llm]
            cross_tiles += tiles[in_cross]
            cross_tags += range(len(tiles))[in_cross]
        return llm_tiles, cross_tiles, cross_tags

    def _tag(self, point: Point, prefix: Prefix) -> Point:
        """Points at the tag that reads a tile: the cross-attended tokens do not tell their tile or image."""
        start = point.tokens[0] // TOKENS * TOKENS
        tag = np.flatnonzero((prefix.ranges == (start, start + TOKENS)).all(-1))[:1]
        return Point(point.answer_token, TEXT, tag)

    def _points(
        self, pointed: list[tuple[int, Point]], prefix: Prefix, images: Sequence[range]
    ) -> tuple[Points, Points]:
        """Returns the points whose keys are in the sequence, and those whose keys are cross-attended tokens."""
        places = self._places(tuple(map(len, images)))
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
        """Returns each image token's place in the sequence and among the cross-attended tokens, or -1."""
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
