"""Names all that the keys and values of a prompt depend on, so that a later prompt can tell which of them it shares."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvlm_trt.backends.base import ImageFeatures
from nvlm_trt.prompt.encoder import EncodedPrompt


@dataclass(frozen=True)
class PromptKey:
    """Identifies a prompt by its whole chunks. Only these are shared: the same chunks give the same bits again, and a
    chunk of another length may not."""

    chunk_size: int  # tokens
    chunks: tuple[bytes, ...]  # a digest per whole chunk, of everything up to the chunk's end
    images: tuple[bytes, ...]
    cross_ends: tuple[int, ...]  # cross-attended tokens of the first 0, 1, 2, ... images

    @property
    def cross_tokens(self) -> int:
        return self.cross_ends[-1]

    def shared_chunks(self, other: PromptKey, most: int) -> int:
        """Count the chunks, at most `most`, with which both prompts begin."""
        most = min(most, len(self.chunks), len(other.chunks))
        return next((n for n in range(most, 0, -1) if self.chunks[n - 1] == other.chunks[n - 1]), 0)

    def shared_images(self, other: PromptKey) -> int:
        """Count the images with which both prompts begin."""
        pairs = zip(self.images, other.images, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def prompt_key(
    prompt: EncodedPrompt,
    images: Sequence[ImageFeatures],
    image_keys: Sequence[str | None],
    placeholder_id: int,
    chunk_size: int,
) -> PromptKey:
    """Make the key of a prompt about `images`. An image whose key is None is like no other image.

    A chunk's keys and values depend on the ids and ranges up to its end, on the images whose embeddings stand there,
    and on the images of which a range there has tokens."""
    digests = tuple(os.urandom(32) if key is None else key.encode() for key in image_keys)
    cross_ends = np.cumsum([0, *(image.cross_tokens for image in images)])
    embedding_ends = np.cumsum([0, *(len(image.embeddings) for image in images)])
    chunks: list[bytes] = []
    running, embeddings, crossed, seen = hashlib.sha256(), 0, 0, 0
    for start in range(0, len(prompt.input_ids) // chunk_size * chunk_size, chunk_size):
        ids = prompt.input_ids[start : start + chunk_size]
        ranges = prompt.cross_ranges[start : start + chunk_size]
        embeddings += int(np.count_nonzero(ids == placeholder_id))
        crossed = max(crossed, int(ranges[:, 1].max()))
        # images come in order, so those that are read up to here are the first of all
        read = int(np.count_nonzero((embedding_ends[:-1] < embeddings) | (cross_ends[:-1] < crossed)))
        running.update(ids.tobytes() + ranges.tobytes() + b"%d:" % (read - seen) + b"".join(digests[seen:read]))
        seen = read
        chunks.append(running.digest())
    return PromptKey(chunk_size, tuple(chunks), digests, tuple(cross_ends.tolist()))
