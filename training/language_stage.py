"""Trains the language model: on texts and spelled pages (stage 2), then on images with a frozen encoder (stage 4)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_trt.reference.model import ReferenceModel
from training.accuracy import scene_accuracy, text_accuracy
from training.batch import Batch, collate
from training.forward import Looks, decode, device_of, tag_ids
from training.loop import Losses, train
from training.mix import Mix
from training.packed_sequence import NOT_ANSWERED
from training.packer import Packer
from training.pages import Scene
from training.scene_set import SceneSet
from training.schedule import Schedule
from training.text_sequences import text_sequences

_POOL = 8  # batches whose sequences are sorted by length together, so that little is padding


def object_count(scene: Scene) -> int:
    """Counts a scene's objects: shapes by the answers of `count` questions; texts and bars have a question each."""
    shapes = sum(int(question.answer) for question in scene.questions if question.task == "count")
    return shapes or len(scene.questions)


def train_language(
    model: ReferenceModel,
    packer: Packer,
    schedule: Schedule,
    mix: Mix,
    directory: Path,
    seed: int,
    training: SceneSet,
    validation: SceneSet,
    text_questions: int,
) -> None:
    """Trains everything but the vision encoder, on scenes with text-only questions blended in.

    Each evaluation asks the questions of `validation`, and `text_questions` of each text-only task.
    """
    model.vision_model.requires_grad_(False)
    tags = tag_ids(packer.encoder, model)
    batches = _SceneBatches(training, packer, mix, schedule.steps, seed)

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
        return text_accuracy(model, packer, text_questions) | scene_accuracy(model, packer, validation)

    train(model, schedule, directory, losses_at, evaluate)


class _SceneBatches:
    """The scenes of each step, drawn in pools whose sequences are sorted by length."""

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
            sequences.append(self._packer.pack(scene.images, questions, self._labels))
        sequences.sort(key=lambda sequence: len(sequence.ids))
        groups = [sequences[i * self._mix.scenes : (i + 1) * self._mix.scenes] for i in range(_POOL)]
        return [collate(groups[i]) for i in random.permutation(_POOL)]


def _losses(
    model: ReferenceModel, batch: Batch, features: Tensor | None, tags: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns two losses: the weighted sum of the cross entropy of the answers' tokens, and the mean of -log of the
    attention on the right tokens (None if the batch has no points).
    """
    batch = batch.to(device_of(model))
    looks = Looks()
    with torch.autocast(device_of(model).type, torch.bfloat16):
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
    """Attention [B, heads, S, keys], points [n, 5] -> each query's attention on its right keys [queries]"""
    sequence, head, query, key, number = points.unbind(1)
    right = torch.zeros(int(number[-1]) + 1, device=weights.device)
    right = right.index_add(0, number, weights[sequence, head, query, key].float())
    return right[torch.unique(number)]
