"""Says what one step of the language model's training holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mix:
    """The contents of one step. A run begins with pages of one object: finding one of many comes second."""

    scenes: int = 16
    questions: int = 5  # at most, about one scene
    texts: int = 6  # sequences of text-only questions
    text_questions: int = 5  # in each sequence; few, as attention's cost grows with the square of the length
    looking: float = 0.3  # weight of the loss on where attention heads look, added to the loss on answers
    likelier: Mapping[str, float] = field(default_factory=dict)  # task -> factor on how often its pages are drawn

    def most_objects(self, done: float) -> int:
        """Returns the largest number of texts, shapes or bars on a page; `done` is the finished share of the run."""
        return 1 if done < 0.1 else 2 if done < 0.2 else 3 if done < 0.3 else 99
