"""Measures the share of exact answers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nvlm_trt.evaluation.tinydocs import TEXT_TASKS
from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.reference.model import ReferenceModel
from training.batch import Batch, collate
from training.forward import decode, device_of, tag_ids
from training.packed_sequence import NOT_ANSWERED
from training.packer import Packer
from training.scene_set import SceneSet
from training.text_sequences import text_sequences


@torch.no_grad()
def text_accuracy(model: ReferenceModel, packer: Packer, count: int) -> dict[str, float]:
    """Returns the share of exact answers by text-only task, of `count` questions each (a multiple of 10)."""
    results = {}
    for number, task in enumerate(TEXT_TASKS):
        sequences = text_sequences(packer, "validation", [number], count // 10, 10, {task: 1.0})
        groups = [sequences[start : start + 10] for start in range(0, len(sequences), 10)]
        right = torch.cat([right_answers(model, collate(group), None, None) for group in groups])
        results[task] = float(right.float().mean())
    return results


@torch.no_grad()
def scene_accuracy(model: ReferenceModel, packer: Packer, scenes: SceneSet) -> dict[str, float]:
    """Returns the share of exact answers by task: each token must be the likeliest after the right tokens before it."""
    tags = tag_ids(packer.encoder, model)
    packed = [(scene.questions, packer.pack(scene.images, scene.questions)) for scene in scenes.scenes]
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
    """Returns for each answer of the batch, in order, whether every token is right."""
    batch = batch.to(device_of(model))
    with torch.autocast(device_of(model).type, torch.bfloat16):
        answered = batch.labels != NOT_ANSWERED
        logits = model.language_model.lm_head(decode(model, batch, features, tags)[answered])
    wrong = logits.argmax(-1) != batch.labels[answered]
    owners = batch.answers[answered]
    return (
        torch.zeros(int(owners.max()) + 1, dtype=torch.int64, device=owners.device).index_add_(0, owners, wrong.long())
        == 0
    )
