"""Turns the labels of a tile into the image tokens that say the same in the language model's own words.

Targets are sums of word embeddings. A glyph adds its letter, the letter before it, its place in its string, its colour
and its key; a shape adds its name, colour, place and count. A token covers 2 x 2 patches; both columns hold letters.
A reader that looks for the next letter has just said the letter before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.reference.model import ReferenceModel
from training.labels import GRID, IGNORE, PLANES, values
from training.rotations import Rotations

_SHARED = ("kind", "colour", "word", "line")


class TokenTargets:
    """The targets in the embeddings of one model."""

    def __init__(self, model: ReferenceModel, tokenizer: Tokenizer) -> None:
        embedding = model.language_model.model.embed_tokens.weight.detach().float()
        self._device, hidden = embedding.device, embedding.shape[1]
        self._scale = embedding.norm(dim=-1).mean()

        nothing = torch.zeros(hidden, device=self._device)

        def word(text: str) -> Tensor:
            """Adds the forms of a word in a question, after a space, and in an answer, without one."""
            forms = [text] if len(text) == 1 else [f" {text}", text]
            return self._unit(torch.stack([embedding[tokenizer.encode(form)].mean(0) for form in forms]).sum(0))

        def table(plane: str) -> Tensor:
            """[classes, hidden]; zero for a class without a value"""
            return torch.stack([nothing if value is None else word(str(value)) for value in values(plane)])

        self._rotations = Rotations(hidden, self._device)
        self._tables = {
            "colour": table("colour"),
            "character": table("character"),
            "word": table("word"),
            "line": table("line"),
            "number": table("number"),
            "place": table("place"),
            # an answer's first letter follows the line break after "assistant"
            "previous": torch.stack([word(str(value) or "\n") for value in values("previous")]),
        }
        shown = {"none": None, "word": None, "glyph": None, "blur": "text"}  # words and letters are their own names
        names = [shown.get(str(value), value) for value in values("kind")]
        self._tables["kind"] = torch.stack([nothing if name is None else word(str(name)) for name in names])
        random = torch.Generator().manual_seed(5)
        index = torch.randn(2, PLANES["index"], hidden, generator=random).to(self._device)
        self._index = 0.7 * self._unit(index)  # one table per column
        self._position = 0.5 * self._unit(torch.randn(GRID * GRID // 4, hidden, generator=random).to(self._device))

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [n, GRID, GRID, planes] -> targets [n, T, hidden], whether a token shows anything [n, T]"""
        half = GRID // 2
        # [n, row, 2, column, 2, planes] -> [n, row, column, 2, 2, planes]
        planes = labels.view(-1, half, 2, half, 2, len(PLANES)).permute(0, 1, 3, 2, 4, 5)
        planes = planes.reshape(len(labels), half * half, 4, len(PLANES)).long()
        by_name = dict(zip(PLANES, planes.unbind(-1), strict=True))  # each [n, T, 4]
        total = self._position.expand(len(labels), -1, -1).clone()
        for name, table in self._tables.items():
            part = torch.where((by_name[name] != IGNORE)[..., None], table[by_name[name].clamp(min=0)], 0.0)
            if name in _SHARED:  # each patch has this part; the token adds it once
                part = part / (part.any(-1).sum(-1).clamp(min=1)[..., None, None])
            left, right = self._turns(name)
            total += part[:, :, 0::2].sum(2) @ left.T + part[:, :, 1::2].sum(2) @ right.T
        index = by_name["index"]
        for column in (0, 1):
            part = torch.where((index != IGNORE)[..., None], self._index[column][index.clamp(min=0)], 0.0)
            total += part[:, :, column::2].sum(2)
        return total, (by_name["kind"] > 0).any(-1)

    def _turns(self, plane: str) -> tuple[Tensor, Tensor]:
        """Returns the matrices of a plane for the left and the right column."""
        left, right = self._rotations.left, self._rotations.right
        if plane == "character":
            return left.letter, right.letter
        if plane == "previous":
            return left.previous, right.previous
        return self._rotations.thing, self._rotations.thing

    def _unit(self, x: Tensor) -> Tensor:
        """Scales `x` to the length of an average embedding."""
        return x / x.norm(dim=-1, keepdim=True) * self._scale
