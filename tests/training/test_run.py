"""Runs every stage in small, cut and resumed, up to checkpoints that the product reads."""

from dataclasses import replace

import pytest
import torch

from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.evaluation.tinydocs import generate
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.reference.model import ReferenceModel
from training import ablation
from training.mix import Mix
from training.recipe import RECIPE
from training.run import Run
from training.state import load_weights, trained_steps


def small(config: NvlmConfig) -> NvlmConfig:
    """The same model with fewer and narrower layers."""
    vision = replace(config.vision, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    llm = replace(config.llm, hidden_size=48, num_layers=4, intermediate_size=96, head_dim=0)
    return replace(config, vision=vision, llm=llm)


MIX = Mix(scenes=2, questions=2, texts=1, text_questions=2)
# the recipe with stages of a second; the 9 steps of tuning need a second pool of batches
SHORT = replace(
    RECIPE,
    models={name: small(config) for name, config in RECIPE.models.items()},
    tokenizer_rounds=20,
    dense_tiles=40,
    scenes=40,
    validation_scenes=20,
    text_questions=10,
    vision=replace(RECIPE.vision, steps=2),
    vision_batch=8,
    language=replace(RECIPE.language, steps=2),
    language_mix=MIX,
    alignment=replace(RECIPE.alignment, steps=2),
    alignment_batch=8,
    alignment_checks=40,
    tuning={name: replace(schedule, steps=9) for name, schedule in RECIPE.tuning.items()},
    tuning_mix=replace(MIX, likelier=RECIPE.tuning_mix.likelier),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The batches are too small for more threads to gain anything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose common stages are done."""
    run = Run(tmp_path_factory.mktemp("run") / "work", torch.device("cpu"), SHORT)
    run.common_stages()
    return run


def weights(run, stage):
    return load_weights(run.work / stage / "state.safetensors")


def test_a_run_from_nothing_to_checkpoints(tmp_path, run):
    for name in SHORT.tuning:
        with pytest.raises(SystemExit, match="not trained to its end"):
            run.export(name, tmp_path / name)
        assert not (tmp_path / name).exists()
        run.tune(name)
        run.export(name, tmp_path / name)

    encoder = {key.removeprefix("encoder."): tensor for key, tensor in weights(run, "vision").items()}
    for name in SHORT.tuning:
        model = ReferenceModel.from_checkpoint(tmp_path / name)
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
        for key, tensor in model.vision_model.state_dict().items():
            assert torch.equal(tensor, encoder[key].bfloat16().float()), f"{key}: frozen after its stage"
        with Checkpoint.open(tmp_path / name) as checkpoint:
            assert checkpoint.config.architecture == name.upper()
            size = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
            assert size < 12e6
            assert size - (tmp_path / name / "model.safetensors").stat().st_size < 0.2e6

    before = {stage: weights(run, stage) for stage in ("vision", "language", "tune-x")}
    run.common_stages()
    run.tune("x")
    for stage, tensors in before.items():
        assert all(torch.equal(tensor, weights(run, stage)[key]) for key, tensor in tensors.items()), "done is done"


def test_checkpoints_of_the_recipe_are_small(tmp_path):
    """A bfloat16 parameter has 2 bytes; the checkpoint's other files have less than 0.2 MB."""
    run = Run(tmp_path, torch.device("cpu"), replace(RECIPE, tokenizer_rounds=1))
    for name in RECIPE.tuning:
        assert 2 * sum(tensor.numel() for tensor in run.new_model(name).state_dict().values()) < 12e6 - 0.2e6


def test_variants_of_the_ablation_train_and_score_their_tasks(run):
    sizes = ablation.Sizes(steps={"x": 8}, train_scenes=40, test_scenes=20, mix=MIX)
    scores = {variant.name: ablation.train_variant(run, "x", variant, sizes) for variant in ablation.VARIANTS}
    assert [set(tasks) for tasks in scores.values()] == [{"form", "ocr", "tile"}] * 3
    states = {v.name: run.work / f"ablation-x-{v.name.replace(' ', '-').replace(',', '')}" for v in ablation.VARIANTS}
    assert [trained_steps(state / "state.safetensors") for state in states.values()] == [8, 8, 8]


def test_the_probe_of_the_tags_is_not_among_the_scored_tasks():
    assert {sample.task for sample in generate("test", count=1)}.isdisjoint({"tile"})
