"""Keeps the parts of an image token apart in one vector: rotates each word's or letter's embedding in its own way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 7


@dataclass(frozen=True)
class Column:
    """Matrices [hidden, hidden] from embedding to token, for the left or the right of a token's 2 x 2 patches."""

    letter: Tensor
    previous: Tensor  # the letter before the token's letter


class Rotations:
    """Fixed orthogonal matrices. `thing` turns names, colours, places and numbers.

    `left.previous` equals `thing`: a reader looks for the letter just said and for the named colour at once.
    """

    def __init__(self, hidden: int, device: torch.device | None = None) -> None:
        random = torch.Generator().manual_seed(_SEED)
        made = torch.linalg.qr(torch.randn(4, hidden, hidden, generator=random))[0].to(device)
        self.thing, left, right, right_previous = made
        self.left = Column(left, self.thing)
        self.right = Column(right, right_previous)
