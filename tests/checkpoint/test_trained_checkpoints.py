"""Tests that the shipped checkpoints read: the demo's question, and document tasks in fonts not used in training."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.evaluation.answerers import EngineAnswerer, ReferenceAnswerer
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, generate

ROOT = Path(__file__).parents[2]
NAMES = ("nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny")
SAMPLES = 8  # of each task; the whole split is scored by lab.score_checkpoints


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory):
    """Returns checkpoint and engine."""
    checkpoint = ROOT / "checkpoints" / request.param
    engine = tmp_path_factory.mktemp("trained") / request.param
    build_engine(checkpoint, engine)
    return checkpoint, engine


def answers(answerer, samples):
    with answerer:
        return {sample.name: text for sample, text in answerer.answers(samples)}


def test_the_demo_is_answered(trained):
    image = (ROOT / "docs" / "images" / "receipt.png").read_bytes()
    wanted = {"total": "48.20", "tax": "3.10", "date": "12.05", "order": "K7A2"}
    samples = [Sample(key, "form", f"What is the {key}?", value, (image,)) for key, value in wanted.items()]
    assert answers(EngineAnswerer(trained[1], 16), samples) == wanted


def test_engine_and_reference_answer_alike_and_read(trained):
    samples = list(generate("test", count=SAMPLES))
    given = answers(EngineAnswerer(trained[1], 16), samples)
    assert given == answers(ReferenceAnswerer(trained[0], 16), samples)
    for tasks, least in ((TASKS, 0.85), (TEXT_TASKS, 0.9)):
        asked = [sample for sample in samples if sample.task in tasks]
        right = sum(given[sample.name] == sample.answer for sample in asked)
        assert right >= least * len(asked)


def test_a_checkpoint_is_small(trained):
    assert sum(path.stat().st_size for path in trained[0].iterdir()) < 12e6
