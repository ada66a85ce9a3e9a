"""Tests builds of engines: the published files, refused inputs, and that a failed build leaves nothing."""

from __future__ import annotations

import errno
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from nvlm_trt.builders import smoke_test
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.builders.graphs import streamed
from nvlm_trt.builders.graphs.common import Unquantised, WeightFormat
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import GroupQueryAttention
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights
from nvlm_trt.builders.quantization.calibration import LinearInput
from nvlm_trt.builders.quantization.fp8 import Fp8
from nvlm_trt.builders.quantization.int8 import Int8
from nvlm_trt.builders.quantization.weight_only import WeightOnly
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.checkpoint.writer import write_checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import CheckpointError, EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, Shapes, checkpoint_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.limits import default_limits

Directory = Callable[[str], Path]
WAYS = {"whole": 1 << 40, "by layer": 0}  # how a smoke test runs: bytes of free memory


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_publishes_a_complete_engine(engine: Directory, checkpoint: Directory, name: str) -> None:
    opened = Engine.open(engine(name), full_check=True)
    components = ["vision_encoder", "decoder"] + ["cross_kv"] * (name != "nvlm-d-tiny")
    assert set(opened.manifest.files) == {
        *("config.json", "tokenizer.json", "tokenizer_config.json"),
        *(f"{component}.onnx" for component in components),
        *(f"{component}.onnx.data" for component in components),
    }
    assert opened.manifest.precision == {
        **dict.fromkeys(("vision_encoder", "projector"), "bf16"),
        **dict.fromkeys(["decoder", "lm_head"] + ["cross_attention"] * (name != "nvlm-d-tiny"), "fp32"),
    }
    assert opened.manifest.runtimes == {"vision_encoder": "openvino"}
    assert opened.manifest.calibration is None
    assert opened.manifest.accuracy_gate is None
    assert opened.manifest.model_name == name
    with Checkpoint.open(checkpoint(name)) as source:
        assert opened.config == source.config
        assert opened.manifest.checkpoint_digest == source.digest
    for component in components:
        onnx.checker.check_model(str(opened.path / f"{component}.onnx"))


def test_default_limits_hold_four_images_of_the_most_tiles() -> None:
    small = {architecture: PRESETS[f"nvlm-{architecture}-small"] for architecture in "dxh"}
    assert default_limits(small["d"], 0) == EngineLimits(max_slots=8, max_seq_len=4096, max_image_tokens=0, max_tiles=6)
    assert default_limits(small["x"], 0).max_image_tokens == 4 * 7 * 256
    assert default_limits(small["h"], 5).max_image_tokens == 4 * 6 * (256 + 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_slots": 0}, "max_slots"),
        ({"max_seq_len": 4097}, "4096 positions"),
        ({"max_tiles": 7}, "max_tiles 7"),
        ({"max_image_tokens": 0}, "max_image_tokens"),
        ({"max_slot": 1}, "max_slot"),
        ({"max_image_tokens": 15}, "an image of one tile needs max_seq_len .* and max_image_tokens 16"),
        ({"max_seq_len": 32}, "an image of one tile needs max_seq_len"),
    ],
)
def test_refuses_limits(checkpoint: Directory, tmp_path: Path, overrides: dict[str, int], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        build_engine(checkpoint("nvlm-x-tiny"), tmp_path / "engine", overrides)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_limits_shape_the_graph(checkpoint: Directory, tmp_path: Path) -> None:
    overrides = {"max_slots": 2, "max_seq_len": 256, "max_image_tokens": 64}
    limits = build_engine(checkpoint("nvlm-x-tiny"), tmp_path / "engine", overrides).limits
    assert limits == EngineLimits(max_slots=2, max_seq_len=256, max_image_tokens=64, max_tiles=6)
    graph = onnx.load(tmp_path / "engine" / "decoder.onnx", load_external_data=False).graph
    (cache,) = [value for value in graph.input if value.name == "past_key.0"]
    assert cache.type.tensor_type.shape.dim[2].dim_value == 256


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_builds_with_room_for_one_tile_only(checkpoint: Directory, tmp_path: Path, name: str) -> None:
    overrides = {"max_image_tokens": 0 if name == "nvlm-d-tiny" else 17, "max_tiles": 1}
    assert build_engine(checkpoint(name), tmp_path / "engine", overrides).limits.max_tiles == 1


def test_tied_embeddings_are_stored_once(checkpoint: Directory, tmp_path: Path) -> None:
    llm = replace(PRESETS["nvlm-d-tiny"].llm, tie_word_embeddings=True)
    source = copy_checkpoint(checkpoint("nvlm-d-tiny"), tmp_path / "checkpoint", lambda name, values: values, llm=llm)
    engine = build_engine(source, tmp_path / "engine")
    with Checkpoint.open(source) as opened:
        weights = sum(np.prod(opened.take(name).shape) for name in opened.names if name.startswith("language_model"))
    size = engine.manifest.files["decoder.onnx.data"].size
    rope = 2 * engine.limits.max_seq_len * engine.config.llm.head_dim / 2
    assert weights + rope <= size / 4 < (weights + rope) * 1.01


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
    ids=["interrupt", "disk full"],
)
def test_failure_while_writing_leaves_nothing(checkpoint: Directory, tmp_path: Path, error: BaseException) -> None:
    def progress(description: str, done: float, total: float) -> None:
        if description == "decoder" and done > total / 2:
            raise error

    expected: type[BaseException] = EngineError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", progress=progress)
    assert isinstance(caught.value, KeyboardInterrupt) or "disk full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("victim", "what"),
    [
        ("vision_model.encoder.layers.3.mlp.fc1.weight", "image tokens"),
        ("language_model.cross_layers.1.attn.k_proj.weight", "cross-attention keys and values"),
        ("language_model.model.layers.3.mlp.down_proj.weight", "logits"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_smoke_test_refuses_weights_that_are_not_finite(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, what: str, way: str
) -> None:
    monkeypatch.setattr(smoke_test, "available_memory", lambda: WAYS[way])

    def poisoned(name: str, values: np.ndarray) -> np.ndarray:
        return values / np.abs(values).max() * 3e38 if name == victim else values  # finite, unlike their sums

    source = copy_checkpoint(checkpoint("nvlm-h-tiny"), tmp_path / "checkpoint", poisoned)
    with pytest.raises(EngineError, match=f"{what} are not finite"):
        build_engine(source, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("name", "precision", "way"),
    [
        *((f"nvlm-{architecture}-tiny", "bf16", "by layer") for architecture in "dxh"),
        *(("nvlm-h-tiny", precision, "by layer") for precision in ("fp32", "int8-weight-only")),
        ("nvlm-h-tiny", "bf16", "whole"),
    ],
)
def test_smoke_test_runs_an_engine_a_layer_at_a_time_if_the_memory_does_not_hold_it(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str, way: str
) -> None:
    monkeypatch.setattr(smoke_test, "available_memory", lambda: WAYS[way])
    layers: dict[str, float] = {}

    def progress(stage: str, done: float, total: float) -> None:
        if stage.startswith("smoke test"):
            assert done <= total
            layers[stage] = done

    opened = build_engine(checkpoint(name), tmp_path / "engine", progress=progress, precision=precision)
    config = opened.config
    expected = {"smoke test": 1.0}
    if way == "by layer":
        expected |= {"smoke test: vision encoder": config.vision.num_layers + 2 + (name != "nvlm-x-tiny")}
        expected |= {"smoke test: decoder": config.llm.num_layers + len(config.cross_layers) + 2}
        expected |= {"smoke test: keys and values": 1.0} if name != "nvlm-d-tiny" else {}
    assert layers == expected
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_smoke_test_never_generates_the_image_token(checkpoint: Directory, tmp_path: Path) -> None:
    """The decoder would replace a generated placeholder by an image embedding, and there is none."""
    with Checkpoint.open(checkpoint("nvlm-d-tiny")) as opened:
        image_token = opened.config.image_token_id

    def favour_image_token(name: str, values: np.ndarray) -> np.ndarray:
        if name == "language_model.lm_head.weight":
            values[:] = -values[image_token]
            values[image_token] *= -1
        return values

    source = copy_checkpoint(checkpoint("nvlm-d-tiny"), tmp_path / "checkpoint", favour_image_token)
    build_engine(source, tmp_path / "engine")


def test_a_tensor_that_no_graph_reads_fails_the_build(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens when a tensor is added to the layout and not to the graphs."""
    name = "language_model.model.layers.0.self_attn.sinks"

    def extended(config: NvlmConfig) -> Shapes:
        return checkpoint_layout(config) | {name: (6,)}

    shutil.copytree(checkpoint("nvlm-x-tiny"), tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    save_file(load_file(weights) | {name: np.ones(6, np.float32)}, weights)
    for module in ("reader", "accounting"):
        monkeypatch.setattr(f"nvlm_trt.checkpoint.{module}.checkpoint_layout", extended)
    with pytest.raises(CheckpointError, match=f"1 tensors .* never used, the first is {name}"):
        build_engine(tmp_path / "checkpoint", tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_keeps_an_existing_engine_unless_told(checkpoint: Directory, engine: Directory, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    shutil.copytree(engine("nvlm-d-tiny"), output)
    with pytest.raises(EngineError, match="--overwrite"):
        build_engine(checkpoint("nvlm-x-tiny"), output)
    assert Engine.open(output).config.architecture == "D"
    assert build_engine(checkpoint("nvlm-x-tiny"), output, overwrite=True).config.architecture == "X"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_reports_progress_of_every_component(checkpoint: Directory, tmp_path: Path) -> None:
    reported: dict[str, tuple[float, float]] = {}

    def progress(description: str, done: float, total: float) -> None:
        assert 0 <= done <= total
        reported[description] = (done, total)

    build_engine(checkpoint("nvlm-x-tiny"), tmp_path / "engine", progress=progress)
    assert list(reported) == ["vision_encoder", "cross_kv", "decoder", "hashing", "smoke test"]
    assert all(done == total for done, total in reported.values())


class MadeOnDemand:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.ones((stop - start, *self.shape[1:]), np.float32)


class WeightsOnDemand:
    """Implements `WeightSource` without any file: makes the weights when they are read."""

    def __init__(self, config: NvlmConfig) -> None:
        self.shapes = checkpoint_layout(config)

    def take(self, name: str) -> MadeOnDemand:
        return MadeOnDemand(self.shapes[name])


class OneForAll:
    """Replaces the calibration of that model."""

    def of(self, weight: str, inputs: int) -> LinearInput:
        return LinearInput(abs_max=1, clip=1, channels=[1] * inputs)


@pytest.mark.parametrize(
    "weight_format", [Unquantised(), Int8(OneForAll()), WeightOnly(4)], ids=["fp32", "int8", "int4-weight-only"]
)
def test_memory_does_not_grow_with_the_model(tmp_path: Path, weight_format: WeightFormat) -> None:
    """Saving holds a few tensors at a time, from a file of more than a hundred in fp32."""
    tiny = PRESETS["nvlm-d-tiny"]
    layers = 40 if isinstance(weight_format, Unquantised) else 12  # of 9 tensors; searching scales takes its time
    config = replace(tiny, image_token_id=259, llm=replace(tiny.llm, num_layers=layers))
    weights = WeightsOnDemand(config)
    largest = 4 * max(
        int(np.prod(shape)) for name, shape in weights.shapes.items() if name.startswith("language_model")
    )
    model = decoder_graph(config, weights, EngineLimits(max_seq_len=64), weight_format, attention=GroupQueryAttention)
    tracemalloc.start()
    save_model(model, tmp_path / "decoder.onnx", lambda *_: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if isinstance(weight_format, Unquantised):
        assert (tmp_path / "decoder.onnx.data").stat().st_size > 100 * largest
    # rounding takes a few more than reading, on the rows that it looks at
    assert peak < (8 if isinstance(weight_format, Unquantised) else 16) * largest


@pytest.mark.parametrize(
    "weight_format",
    [
        Unquantised(),
        Int8(OneForAll()),
        Fp8(OneForAll(), fold_weights=True),
        WeightOnly(8),
        WeightOnly(4),
        BlockedWeights(8),
        BlockedWeights(4),
    ],
    ids=["fp32", "int8", "fp8", "int8-weight-only", "int4-weight-only", "int8 blocks", "int4 blocks"],
)
def test_memory_does_not_grow_with_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat
) -> None:
    """A vocabulary whose embedding and lm_head have 25 MB of float32 each, in blocks of a quarter of a megabyte."""
    monkeypatch.setattr(streamed, "_BLOCK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(streamed, "_STRIP_BYTES", 1 << 18)
    tiny = PRESETS["nvlm-d-tiny"]
    config = replace(tiny, image_token_id=259, llm=replace(tiny.llm, num_layers=1, vocab_size=1 << 15))
    weights = WeightsOnDemand(config)
    table = 4 * int(np.prod(weights.shapes[EMBEDDING]))
    model = decoder_graph(config, weights, EngineLimits(max_seq_len=64), weight_format, attention=GroupQueryAttention)
    tracemalloc.start()
    save_model(model, tmp_path / "decoder.onnx", lambda *_: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "decoder.onnx.data").stat().st_size > table
    assert peak < table / 5  # a 32nd of it are the scales of a weight-only lm_head


def copy_checkpoint(source: Path, target: Path, edit: Callable[[str, np.ndarray], np.ndarray], **changes: Any) -> Path:
    """Copies a checkpoint with edited tensors and config fields, without tensors that the new config does not need."""
    with Checkpoint.open(source) as checkpoint:
        config = replace(checkpoint.config, **changes)
        kept = [name for name in checkpoint.names if name in checkpoint_layout(config)]
        tensors = ((name, edit(name, checkpoint.take(name).load())) for name in kept)
        files = [source / "tokenizer.json", source / "tokenizer_config.json"]
        write_checkpoint(target, config, tensors, files=files)
    return target
