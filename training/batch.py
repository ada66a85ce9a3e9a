"""Makes one batch of packed sequences, padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from training.packed_sequence import NOT_ANSWERED, PackedSequence, Points


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens, R tiles in the LLM's sequences and up to C cross-attended tiles per sequence."""

    ids: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    attention: Tensor  # [B, 1, S, S]: 0 or -inf
    llm_tiles: Tensor  # [R]
    cross_tiles: Tensor  # [B, C], padded with 0
    cross_tags: Tensor  # [B, C], from 0
    cross_ranges: Tensor  # [B, S, 2]
    labels: Tensor  # [B, S]
    weights: Tensor  # [B, S]
    answers: Tensor  # [B, S]: number of the answer in the batch that a label belongs to
    self_points: Tensor  # [n, 5]: number of the sequence, then the 4 columns of a packed sequence's points
    cross_points: Tensor  # [n, 5]

    def to(self, device: torch.device) -> Batch:
        return Batch(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


def collate(sequences: Sequence[PackedSequence]) -> Batch:
    """Pads the sequences to the length of the longest."""
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
