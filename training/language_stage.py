"""Stages 2 and 4: the language model learns from texts and spelled pages, then from pictures, the encoder frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_trt.evaluation.tinydocs import TEXT_TASKS, ask
from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.reference.model import ReferenceModel
from training.forward import Looks, decode
from training.labels import Labels
from training.loop import Losses, Stage, train
from training.pages import Scene
from training.sequences import NOT_ANSWERED, Batch, PackedSequence, Packer, collate

_POOL = 8  # batches that are sorted by length together, so that little is padding
TEXT_SHARES = {"copy": 0.3, "reverse": 0.35, "add": 0.35}
_TEXT_SEEDS = {"train": 11, "validation": 12}


@dataclass(frozen=True)
class Mix:
    """What one step holds. A run begins with pages of one object: to find the right one of many comes second."""

    scenes: int = 16
    questions: int = 5  # at most, of a scene
    texts: int = 6  # sequences of text-only questions
    text_questions: int = 5  # in each; few, as attention within a sequence grows with its square
    looking: float = 0.3  # weight of where attention heads look, beside what is answered
    likelier: Mapping[str, float] = field(default_factory=dict)  # how many times, a page with a question of a task

    def most_objects(self, done: float) -> int:
        """Texts, shapes or bars on a page; `done` is the share of the run."""
        return 1 if done < 0.1 else 2 if done < 0.2 else 3 if done < 0.3 else 99


def object_count(scene: Scene) -> int:
    """Every text and bar has a question of its own, and the shapes of a page are those that are counted."""
    shapes = sum(int(question.answer) for question in scene.questions if question.task == "count")
    return shapes or len(scene.questions)


@dataclass(frozen=True)
class SceneSet:
    """Scenes over a pool of tiles: what the frozen encoder makes of each, and what its patches show."""

    scenes: Sequence[Scene]
    features: Tensor  # bfloat16 [tiles, T, 4 * vision width], shuffled
    labels: Labels  # [tiles, GRID, GRID, planes]


def train_language(
    model: ReferenceModel,
    packer: Packer,
    stage: Stage,
    mix: Mix,
    directory: Path,
    seed: int,
    training: SceneSet,
    validation: SceneSet,
) -> None:
    """Train everything but the vision encoder, on scenes with text-only questions blended in."""
    model.vision_model.requires_grad_(False)
    tags = _tag_ids(packer, model)
    batches = _SceneBatches(training, packer, mix, stage.steps, seed)

    def losses_at(step: int) -> Iterator[Losses]:
        texts = collate(text_sequences(packer, "train", [seed, step], mix.texts, mix.text_questions))
        parts = {"text": texts, "image": batches.at(step)}
        total = sum(float(batch.weights.sum()) for batch in parts.values())
        for name, batch in parts.items():
            said, looked = _losses(model, batch, training.features, tags)
            losses = {"loss": said / total, name: (said / batch.weights.sum()).detach()}
            if looked is not None:
                losses["loss"] = losses["loss"] + mix.looking * looked
                losses["looking"] = looked.detach()
            yield losses

    def evaluate() -> dict[str, float]:
        return text_accuracy(model, packer) | scene_accuracy(model, packer, validation)

    train(model, stage, directory, losses_at, evaluate)


def text_sequences(
    packer: Packer, split: str, seed: Sequence[int], count: int, questions: int, shares: dict[str, float] = TEXT_SHARES
) -> list[PackedSequence]:
    random = np.random.default_rng([_TEXT_SEEDS[split], *seed])
    tasks, weights = list(shares), np.array(list(shares.values()))
    chosen = random.choice(len(tasks), (count, questions), p=weights / weights.sum())
    return [packer.pack((), [ask(tasks[task], random) for task in row]) for row in chosen]


class _SceneBatches:
    """The scenes of each step: epochs in random order, sequences of a like length together."""

    def __init__(self, training: SceneSet, packer: Packer, mix: Mix, steps: int, seed: int) -> None:
        self._scenes, self._labels, self._packer = training.scenes, training.labels, packer
        self._mix, self._steps, self._seed = mix, steps, seed
        self._objects = np.array([object_count(scene) for scene in training.scenes])
        self._likelihood = np.array(
            [max(mix.likelier.get(question.task, 1.0) for question in scene.questions) for scene in training.scenes]
        )
        self._pool: tuple[int, list[Batch]] = (-1, [])

    def at(self, step: int) -> Batch:
        number, index = divmod(step, _POOL)
        if self._pool[0] != number:
            self._pool = (number, self._make_pool(number))
        return self._pool[1][index]

    def _make_pool(self, number: int) -> list[Batch]:
        random = np.random.default_rng([self._seed, 3, number])
        allowed = np.flatnonzero(self._objects <= self._mix.most_objects(number * _POOL / self._steps))
        wanted = _POOL * self._mix.scenes
        likelihood = self._likelihood[allowed] / self._likelihood[allowed].sum()
        chosen = random.choice(allowed, wanted, replace=wanted > len(allowed), p=likelihood)
        sequences = []
        for index in chosen:
            scene = self._scenes[index]
            questions = [scene.questions[i] for i in random.permutation(len(scene.questions))[: self._mix.questions]]
            sequences.append(self._packer.pack(scene.pictures, questions, self._labels))
        sequences.sort(key=lambda sequence: len(sequence.ids))
        groups = [sequences[i * self._mix.scenes : (i + 1) * self._mix.scenes] for i in range(_POOL)]
        return [collate(groups[i]) for i in random.permutation(_POOL)]


def _losses(
    model: ReferenceModel, batch: Batch, features: Tensor | None, tags: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy of the answers' tokens, weighted and summed; and the mean of -log of the attention that falls on
    the right tokens, None where nothing is to be looked at."""
    batch = batch.to(_device(model))
    looks = Looks()
    with torch.autocast(_device(model).type, torch.bfloat16):
        hidden = decode(model, batch, features, tags, looks)
        answered = batch.labels != NOT_ANSWERED
        logits = model.language_model.lm_head(hidden[answered])
    losses = F.cross_entropy(logits.float(), batch.labels[answered], reduction="none")
    looked = [
        right_looks(weights, points)
        for weights, points in ((looks.in_sequence, batch.self_points), (looks.in_cross, batch.cross_points))
        if weights is not None and len(points)
    ]
    return (losses * batch.weights[answered]).sum(), -torch.cat(looked).clamp(min=1e-4).log().mean() if looked else None


def right_looks(weights: Tensor, points: Tensor) -> Tensor:
    """Attention [B, heads, S, keys] and points [n, 5] -> for each query the weight that falls on keys that will do."""
    sequence, head, query, key, number = points.unbind(1)
    right = torch.zeros(int(number[-1]) + 1, device=weights.device)
    right = right.index_add(0, number, weights[sequence, head, query, key].float())
    return right[torch.unique(number)]


@torch.no_grad()
def text_accuracy(model: ReferenceModel, packer: Packer, count: int = 200) -> dict[str, float]:
    results = {}
    for number, task in enumerate(TEXT_TASKS):
        sequences = text_sequences(packer, "validation", [number], count // 10, 10, {task: 1.0})
        right = torch.cat([right_answers(model, collate(sequences[i : i + 10]), None, None) for i in (0, 10)])
        results[task] = float(right.float().mean())
    return results


@torch.no_grad()
def scene_accuracy(model: ReferenceModel, packer: Packer, scenes: SceneSet) -> dict[str, float]:
    """Share of exact answers by task, greedy: each token is the likeliest after the right ones before it."""
    tags = _tag_ids(packer, model)
    packed = [(scene.questions, packer.pack(scene.pictures, scene.questions)) for scene in scenes.scenes]
    packed.sort(key=lambda pair: len(pair[1].ids))
    right: dict[str, list[bool]] = {}
    for start in range(0, len(packed), 32):
        part = packed[start : start + 32]
        answers = right_answers(model, collate([sequence for _, sequence in part]), scenes.features, tags)
        asked: list[Question] = [question for questions, _ in part for question in questions]
        for question, is_right in zip(asked, answers.tolist(), strict=True):
            right.setdefault(question.task, []).append(is_right)
    return {task: float(np.mean(values)) for task, values in sorted(right.items())}


def right_answers(model: ReferenceModel, batch: Batch, features: Tensor | None, tags: Tensor | None) -> Tensor:
    """For each answer of the batch in order, whether every token is right."""
    batch = batch.to(_device(model))
    with torch.autocast(_device(model).type, torch.bfloat16):
        answered = batch.labels != NOT_ANSWERED
        logits = model.language_model.lm_head(decode(model, batch, features, tags)[answered])
    wrong = logits.argmax(-1) != batch.labels[answered]
    owners = batch.answers[answered]
    return (
        torch.zeros(int(owners.max()) + 1, dtype=torch.int64, device=owners.device).index_add_(0, owners, wrong.long())
        == 0
    )


def _tag_ids(packer: Packer, model: ReferenceModel) -> Tensor | None:
    """[max tiles, tag_length] for NVLM-H, None for the others."""
    if packer.config.architecture != "H":
        return None
    return torch.from_numpy(packer.encoder.tag_ids(packer.config.max_tiles)).to(_device(model))


def _device(model: ReferenceModel) -> torch.device:
    return model.language_model.model.norm.weight.device
