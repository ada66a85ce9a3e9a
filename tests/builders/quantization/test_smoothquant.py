"""SmoothQuant: the migrated model computes the same, from more even inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nvlm_trt.api import Message
from nvlm_trt.backends.onnxruntime.build import write_graphs
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.builders.engine_build import write_engine
from nvlm_trt.builders.graphs import streamed
from nvlm_trt.builders.graphs.common import Unquantised
from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput
from nvlm_trt.builders.quantization.formats import Recipe
from nvlm_trt.builders.quantization.smoothquant import Factors, MigratedWeights, migrate, migrations
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.model.config import CrossAttentionConfig, NvlmConfig
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.precision import COMPONENTS
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.progress import no_progress
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer

INT8 = dict.fromkeys(COMPONENTS, "int8")
TINY = {architecture: PRESETS[f"nvlm-{architecture.lower()}-tiny"] for architecture in "DXH"}


def uneven_calibration(config: NvlmConfig) -> Calibration:
    """Make channels of very different magnitudes for every layer that can be migrated."""
    rng = np.random.default_rng(0)
    layout = checkpoint_layout(config)
    linears = {}
    for migration in migrations(config):
        channels = np.exp(2 * rng.standard_normal(layout[migration.consumers[0]][1]))
        largest = float(channels.max())
        channels[5] = 0  # never used
        for linear in migration.linears:
            linears[linear] = LinearInput(abs_max=largest, clip=largest / 2, channels=channels.tolist())
    return Calibration(checkpoint_digest="", samples={}, linears=linears)


@pytest.mark.parametrize(
    "config",
    [
        TINY["D"],
        TINY["H"],
        replace(
            TINY["X"],
            vision=replace(TINY["X"].vision, norm_type="layer_norm", qk_norm=False, qkv_bias=True),
            llm=replace(TINY["X"].llm, tie_word_embeddings=True, num_kv_heads=3),
            cross_attention=CrossAttentionConfig(interval=2, qk_norm=True, ffn=False),
        ),
    ],
    ids=["D", "H", "X with other options"],
)
def test_the_migrated_model_computes_the_same(config: NvlmConfig, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    write_random_checkpoint(source, config, seed=0)
    with Checkpoint.open(source) as checkpoint:
        factors, _ = migrate(checkpoint.config, checkpoint, uneven_calibration(config), INT8, alpha=0.5)
    touched = {name for migration in migrations(config) for name in (*migration.producers, *migration.consumers)}
    assert set(factors) == touched
    assert max(factor.max() / factor.min() for each in factors.values() if (factor := each.columns) is not None) > 10
    engine_source = EngineSource(source, {})
    outputs = []
    for name, changes in (("plain", {}), ("migrated", factors)):
        (tmp_path / name).mkdir()
        recipe = Recipe(dict.fromkeys(COMPONENTS, "fp32"), Unquantised(), changes)
        write_stages = partial(write_graphs, engine_source, no_progress)
        write_engine(engine_source, tmp_path / name, recipe, "onnxruntime", (), write_stages)
        outputs.append(stages(tmp_path / name))
    for plain, migrated in zip(*outputs, strict=True):
        assert np.isfinite(migrated).all()
        assert np.abs(migrated - plain).max() <= 1e-5 * max(1, np.abs(plain).max())


def stages(engine_dir: Path) -> list[np.ndarray]:
    """Compute the image tokens of 3 tiles, the logits of a prompt with these tiles, and those of one decoded token."""
    engine = Engine.open(engine_dir)
    edge = engine.config.vision.image_size
    prompt = PromptEncoder(engine.config, Tokenizer.from_directory(engine_dir)).encode([Message("user", "Hello")], [3])
    pixels = np.random.default_rng(1).standard_normal((3, 3, edge, edge), dtype=np.float32)
    with open_backend(engine, threads=1) as backend:
        tokens = backend.encode(pixels)
        image = backend.features(tokens)
        backend.write_cross_kv(0, 0, image)
        embeddings = backend.embeddings([image], 0, prompt.placeholders)
        logits = backend.prefill(0, 0, prompt.input_ids, embeddings, prompt.cross_ranges)
        ranges = np.array([prompt.decode_range], np.int32)
        decoded = backend.decode(np.array([65]), np.array([len(prompt.input_ids)]), ranges)[0].copy()
        return [backend.to_host(tokens), logits, decoded]


def test_inputs_become_more_even(checkpoint: Callable[[str], Path]) -> None:
    before = uneven_calibration(TINY["D"])
    with Checkpoint.open(checkpoint("nvlm-d-tiny")) as source:
        _, after = migrate(source.config, source, before, INT8, alpha=0.5)
    for name, linear in after.linears.items():
        channels = np.array([value for value in linear.channels if value])
        uneven = np.array([value for value in before.linears[name].channels if value])
        assert channels.max() / np.median(channels) < 0.5 * uneven.max() / np.median(uneven)
        assert linear.clip == linear.abs_max == max(linear.channels)


def test_components_that_are_not_int8_stay_as_they_are(checkpoint: Callable[[str], Path]) -> None:
    calibration = uneven_calibration(TINY["X"])
    precisions = dict.fromkeys(COMPONENTS, "fp8") | {"projector": "int8"}
    with Checkpoint.open(checkpoint("nvlm-x-tiny")) as source:
        factors, after = migrate(source.config, source, calibration, precisions, alpha=0.5)
    assert set(factors) == {"mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight"}
    changed = {name for name, linear in after.linears.items() if linear != calibration.linears[name]}
    assert changed == {"mlp1.1"}


def test_some_rows_at_a_time_are_the_rows_of_the_whole(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = uneven_calibration(TINY["H"])
    with Checkpoint.open(checkpoint("nvlm-h-tiny")) as source:
        expected, _ = migrate(source.config, source, calibration, INT8, alpha=0.5)
    monkeypatch.setattr(streamed, "_BLOCK_ELEMENTS", 1000)  # 5 rows of the hidden size
    with Checkpoint.open(checkpoint("nvlm-h-tiny")) as source:
        factors, _ = migrate(source.config, source, calibration, INT8, alpha=0.5)
    assert factors.keys() == expected.keys()
    with Checkpoint.open(checkpoint("nvlm-h-tiny")) as plain, Checkpoint.open(checkpoint("nvlm-h-tiny")) as source:
        migrated = MigratedWeights(source, factors)
        for name, factor in factors.items():
            for ours, theirs in zip(astuple(factor), astuple(expected[name]), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            whole = factor.apply(plain.take(name).load())
            np.testing.assert_array_equal(np.concatenate(list(streamed.blocks_of(migrated.take(name)))), whole)


def test_factors_divide_rows_and_multiply_columns() -> None:
    factors = Factors(rows=np.array([1, 2], np.float32), columns=np.array([1, 10, 100], np.float32))
    np.testing.assert_array_equal(factors.apply(np.full((2, 3), 2, np.float32)), [[2, 20, 200], [1, 10, 100]])
    np.testing.assert_array_equal(Factors(rows=np.array([1, 2], np.float32)).apply(np.ones(2, np.float32)), [1, 0.5])
