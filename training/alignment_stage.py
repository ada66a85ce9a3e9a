"""Stage 3: the projector learns to put into each image token the word embeddings of what the token shows.

The language model already answers such questions about words; after this it meets pictures in its own terms. Targets
are sums: of a glyph its letter, its place in its string, its colour and its key; of a shape its name, colour, place and
how many there are. A token covers 2 x 2 patches, so letters of its right column are rotated to stay apart from those
of its left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.tokenizer import Tokenizer
from training.labels import GRID, IGNORE, PLANES, values
from training.loop import Losses, Stage, train

BATCH = 256
_EMPTY_WEIGHT = 0.1  # most tokens show nothing


def train_alignment(
    model: ReferenceModel,
    tokenizer: Tokenizer,
    stage: Stage,
    directory: Path,
    seed: int,
    features: Tensor,
    labels: Tensor,
) -> None:
    """Regress `model.mlp1` on the targets of labels [tiles, GRID, GRID, planes]; nothing else changes."""
    model.requires_grad_(False)
    model.mlp1.requires_grad_(True)
    targets = _Targets(model, tokenizer)
    device = features.device

    def squared_error(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> error [tokens], weight [tokens], targets [tokens, hidden]"""
        wanted, shows = targets.of(labels[rows])
        with torch.autocast(device.type, torch.bfloat16):
            made = model.mlp1(features[rows].float())
        return (made.float() - wanted).square().mean(-1), torch.where(shows, 1.0, _EMPTY_WEIGHT), wanted

    def losses_at(step: int) -> Iterator[Losses]:
        rows = np.random.default_rng([seed, 4, step]).integers(0, len(features), BATCH)
        error, weight, _ = squared_error(torch.from_numpy(rows).to(device))
        yield {"loss": (error * weight).sum() / weight.sum()}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rows = np.random.default_rng([seed, 5]).integers(0, len(features), 2000)
        error, weight, wanted = squared_error(torch.from_numpy(rows).to(device))
        shown = weight == 1
        spread = (wanted[shown] - wanted[shown].mean(0)).square().mean()
        return {"r2": 1 - float(error[shown].mean() / spread)}

    train(model.mlp1, stage, directory, losses_at, evaluate)
    model.requires_grad_(True)


class _Targets:
    """Labels of a tile -> what its image tokens should be."""

    def __init__(self, model: ReferenceModel, tokenizer: Tokenizer) -> None:
        embedding = model.language_model.model.embed_tokens.weight.detach().float()
        self._device, hidden = embedding.device, embedding.shape[1]
        self._scale = embedding.norm(dim=-1).mean()

        def word(text: object) -> Tensor:
            return self._unit(embedding[tokenizer.encode(str(text))].mean(0))

        def table(plane: str, prefix: str = " ") -> Tensor:
            """[classes, hidden]; what means nothing is zero"""
            nothing = torch.zeros(hidden, device=self._device)
            return torch.stack([nothing if v in (None, "none") else word(f"{prefix}{v}") for v in values(plane)])

        random = torch.Generator().manual_seed(5)
        self._turn = torch.linalg.qr(torch.randn(hidden, hidden, generator=random))[0].to(self._device)
        self._tables = {
            "colour": table("colour"),
            "character": table("character", ""),
            "word": table("word"),
            "line": table("line", ""),
            "number": table("number", ""),
            "place": table("place"),
        }
        names = [" text" if value in ("glyph", "blur") else "" if value == "word" else value for value in values("kind")]
        self._tables["kind"] = torch.stack(
            [torch.zeros(hidden, device=self._device) if name in ("none", "") else word(f" {name.strip()}") for name in names]
        )
        index = torch.randn(2, PLANES["index"], hidden, generator=random).to(self._device)
        self._index = self._unit(index)  # apart for the left and the right column
        self._position = 0.5 * self._unit(torch.randn(GRID * GRID // 4, hidden, generator=random).to(self._device))

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[n, GRID, GRID, planes] -> targets [n, T, hidden], whether a token shows anything [n, T]"""
        half = GRID // 2
        planes = labels.view(-1, half, 2, half, 2, len(PLANES)).permute(0, 1, 3, 2, 4, 5)  # [n, row, column, 2, 2, planes]
        planes = planes.reshape(len(labels), half * half, 4, len(PLANES)).long()
        by_name = dict(zip(PLANES, planes.unbind(-1), strict=True))  # each [n, T, 4]
        total = self._position.expand(len(labels), -1, -1).clone()
        right = torch.tensor([False, True, False, True], device=labels.device)
        for name, table in self._tables.items():
            part = torch.where((by_name[name] != IGNORE)[..., None], table[by_name[name].clamp(min=0)], 0.0)
            if name == "character":
                part = torch.where(right[:, None], part @ self._turn, part)
            total += part.sum(2)
        index = by_name["index"]
        place = torch.where(
            right[:, None], self._index[1][index.clamp(min=0)], self._index[0][index.clamp(min=0)]
        )
        total += torch.where((index != IGNORE)[..., None], place, 0.0).sum(2)
        return total, (by_name["kind"] > 0).any(-1)

    def _unit(self, x: Tensor) -> Tensor:
        """Scaled to the length of an average embedding."""
        return x / x.norm(dim=-1, keepdim=True) * self._scale
