"""A whole run in small: every stage, cut and resumed, to checkpoints that the product reads."""

from dataclasses import replace

import pytest
import torch

from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.evaluation.tinydocs import generate
from nvlm_trt.reference.model import ReferenceModel
from training import ablation, recipe
from training.loop import load_weights, trained_steps
from training.run import Run


@pytest.fixture
def short(monkeypatch):
    """The recipe with steps that take a second."""
    for name in ("VISION", "LANGUAGE", "ALIGNMENT"):
        monkeypatch.setattr(recipe, name, replace(getattr(recipe, name), steps=2))
    monkeypatch.setattr(recipe, "TUNING", {name: replace(stage, steps=9) for name, stage in recipe.TUNING.items()})
    monkeypatch.setattr(recipe, "DENSE_TILES", 200)
    monkeypatch.setattr(recipe, "SCENES", 200)
    monkeypatch.setattr(recipe, "VALIDATION_SCENES", 20)


def weights(run, stage):
    return load_weights(run.work / stage / "state.safetensors")


def test_a_run_from_nothing_to_checkpoints(tmp_path, short):
    run = Run(tmp_path / "work", torch.device("cpu"))
    run.common_stages()
    for name in recipe.TUNING:
        with pytest.raises(SystemExit, match="not trained to its end"):
            run.export(name, tmp_path / name)
        assert not (tmp_path / name).exists()
        run.tune(name)
        run.export(name, tmp_path / name)

    encoder = {key.removeprefix("encoder."): tensor for key, tensor in weights(run, "vision").items()}
    for name in recipe.TUNING:
        model = ReferenceModel.from_checkpoint(tmp_path / name)
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
        for key, tensor in model.vision_model.state_dict().items():
            assert torch.equal(tensor, encoder[key].bfloat16().float()), f"{key}: frozen after its stage"
        with Checkpoint.open(tmp_path / name) as checkpoint:
            assert checkpoint.config.architecture == name.upper()
            size = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
            assert size < 12e6

    before = {stage: weights(run, stage) for stage in ("vision", "language", "tune-x")}
    run.common_stages()
    run.tune("x")
    for stage, tensors in before.items():
        assert all(torch.equal(tensor, weights(run, stage)[key]) for key, tensor in tensors.items()), "done is done"


def test_variants_of_the_ablation_see_what_they_should(tmp_path, short, monkeypatch):
    monkeypatch.setitem(ablation.STEPS, "x", 8)
    monkeypatch.setattr(ablation, "TRAIN_SCENES", 150)
    monkeypatch.setattr(ablation, "TEST_SCENES", 20)
    run = Run(tmp_path, torch.device("cpu"))
    run.common_stages()
    scores = {variant.name: ablation.train_variant(run, "x", variant) for variant in ablation.VARIANTS}
    assert [set(tasks) for tasks in scores.values()] == [{"form", "ocr", "tile"}] * 3
    states = {v.name: tmp_path / f"ablation-x-{v.name.replace(' ', '-').replace(',', '')}" for v in ablation.VARIANTS}
    assert [trained_steps(state / "state.safetensors") for state in states.values()] == [8, 8, 8]


def test_the_probe_of_the_tags_is_not_among_the_scored_tasks():
    assert {sample.task for sample in generate("test", count=1)}.isdisjoint({"tile"})
