"""Calibration: its measurements, its files, and the inputs that it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_linear import NAME, OneWeight, session

from nvlm_trt.backends.onnxruntime.build import write_graphs
from nvlm_trt.backends.onnxruntime.observing import observe as observe_samples
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.builders.engine_build import CALIBRATION_SAMPLES, QuantizationOptions, build_engine, write_engine
from nvlm_trt.builders.graphs.common import FLOAT, StageGraph
from nvlm_trt.builders.quantization.build_samples import document_samples, rounds_of
from nvlm_trt.builders.quantization.calibration import is_calibration, read_calibration
from nvlm_trt.builders.quantization.formats import OBSERVING
from nvlm_trt.builders.quantization.magnitudes import BINS, bin_edges, count, int8_clip
from nvlm_trt.builders.quantization.observer import CHANNELS, COUNTS, Observer
from nvlm_trt.builders.quantization.scale_watch import BLOCK
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, ImageError, RequestError
from nvlm_trt.evaluation.samples import read_samples
from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.precision import component_of
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.progress import no_progress

Directory = Callable[[str], Path]
CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"


# --- magnitudes --------------------------------------------------------------------------------------------------


def observe(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the channels [inputs] and counts [BINS] that an observing graph reports for x [n, inputs]."""
    graph = StageGraph("observed", OneWeight(np.ones((3, x.shape[1]), np.float32)), Observer())
    graph.output(graph.linear(graph.input("x", FLOAT, ["n", x.shape[1]]), NAME), "y", ["n", 3])
    channels, counts, y = session(graph.model()).run([CHANNELS + NAME, COUNTS + NAME, "y"], {"x": x})
    np.testing.assert_allclose(y, np.repeat(x.sum(1, keepdims=True), 3, 1), rtol=1e-4, atol=1e-4)
    return channels, counts


def test_graphs_report_magnitudes() -> None:
    x = np.random.default_rng(0).standard_t(2, (50, 33)).astype(np.float32)
    x[:, 7] = 0
    x[0, 1], x[1, 2] = 1e10, -1e-12  # beyond the first and last bin
    channels, counts = observe(x)
    np.testing.assert_array_equal(channels, np.abs(x).max(0))
    assert counts.sum() == x.size
    # a value at an edge may fall to either side, by the last bit of a logarithm
    assert np.abs(np.cumsum(counts) - np.cumsum(count(x))).max() <= 2
    assert counts[0] >= 51
    assert counts[-1] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_shows(value: float) -> None:
    x = np.ones((4, 5), np.float32)
    x[2, 3] = value
    assert not np.isfinite(observe(x)[0][3])


@given(st.integers(0, 2**32 - 1), st.floats(-15, 15), st.floats(1, 300))
def test_clip_is_positive_and_at_most_the_largest(seed: int, exponent: float, outlier: float) -> None:
    x = np.random.default_rng(seed).standard_normal(1000).astype(np.float32) * np.float32(2.0**exponent)
    x[0] *= np.float32(outlier)
    abs_max = float(np.abs(x).max())
    clip = int8_clip(count(x), abs_max)
    assert 0 < clip <= abs_max

    def error(limit: float) -> float:
        step = limit / 127
        return float(np.square(np.clip(np.rint(x / step), -128, 127) * step - x).sum())

    # a bin stands for all of its numbers, so the choice does not see how far they lie beyond the limit
    beyond = np.abs(x[np.abs(x) > clip]).astype(np.float64)
    edges = bin_edges()
    bins = np.searchsorted(edges, beyond, side="right") - 1
    seen = np.maximum(np.sqrt(edges[bins] * edges[bins + 1]), clip)
    hidden = float((np.square(beyond - clip) - np.square(seen - clip)).sum())
    assert error(clip) <= 1.1 * error(abs_max) + max(hidden, 0)


def test_rare_outliers_are_clipped() -> None:
    x = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    x[0] = 40
    assert 4 < int8_clip(count(x), 40) < 35
    assert len(bin_edges()) == BINS + 1


# --- measuring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_every_linear_layer_is_observed(calibration_file: Directory, name: str) -> None:
    linears = read_calibration(calibration_file(name)).linears
    layout = checkpoint_layout(PRESETS[name])
    weights = [tensor for tensor, shape in layout.items() if len(shape) == 2 and not tensor.endswith("tokens.weight")]
    weights.append("vision_model.embeddings.patch_embedding.weight")
    parts = ("q_proj", "k_proj", "v_proj")
    is_part = [".self_attn." in weight and weight.split(".")[-2] in parts for weight in weights]
    expected = {weight.removesuffix(".weight") for weight, part in zip(weights, is_part, strict=True) if not part}
    expected |= {f"language_model.model.layers.{i}.self_attn.qkv_proj" for i in range(PRESETS[name].llm.num_layers)}
    assert set(linears) == expected
    for linear in linears.values():
        assert 0 < linear.clip <= linear.abs_max == max(linear.channels)
        assert min(linear.channels) >= 0
    gate, up = (f"language_model.model.layers.1.mlp.{part}_proj" for part in ("gate", "up"))
    assert linears[gate] == linears[up]  # one input


def write_observing(directory: Path, checkpoint: Path, limits: dict[str, int]) -> Path:
    source = EngineSource(checkpoint, limits)
    write_engine(source, directory, OBSERVING, "onnxruntime", (), partial(write_graphs, source, no_progress))
    return directory


@pytest.fixture(scope="module")
def observing_engine(tmp_path_factory: pytest.TempPathFactory, checkpoint: Directory) -> Path:
    return write_observing(tmp_path_factory.mktemp("observing"), checkpoint("nvlm-x-tiny"), {})


def test_an_observing_engine_answers_as_any(observing_engine: Path, engine: Directory) -> None:
    logits = []
    for path in (observing_engine, engine("nvlm-x-tiny")):
        with open_backend(Engine.open(path), ("decoder",), threads=1) as backend:
            no_image = backend.embeddings([], 0, 0)
            logits.append(backend.prefill(0, 0, np.arange(40), no_image, np.zeros((40, 2), np.int32)))
    observing, plain = logits
    np.testing.assert_allclose(observing, plain, rtol=0, atol=1e-5)


def test_text_alone_never_reaches_cross_attention(observing_engine: Path, samples: Path) -> None:
    text_only = [sample for sample in read_samples(samples) if not sample.images]
    calibration = observe_samples(observing_engine, text_only, no_progress)
    assert {component_of(name) for name in calibration.linears} == {"decoder", "lm_head"}
    with pytest.raises(EngineError, match="cross_layers.0.attn.q_proj, which its samples never reached.*about images"):
        calibration.of("language_model.cross_layers.0.attn.q_proj.weight", 192)


@pytest.fixture(scope="module")
def one_slot_engine(tmp_path_factory: pytest.TempPathFactory, checkpoint: Directory) -> Path:
    """An observing engine of NVLM-H, where an image of one tile is not cross-attended."""
    return write_observing(tmp_path_factory.mktemp("one slot"), checkpoint("nvlm-h-tiny"), {"max_slots": 1})


def test_a_calibration_does_not_depend_on_order(one_slot_engine: Path) -> None:
    chosen = document_samples("train", 26, no_progress)
    forwards = observe_samples(one_slot_engine, chosen, no_progress)
    assert observe_samples(one_slot_engine, chosen[::-1], no_progress).linears == forwards.linears


def test_ends_when_the_scales_are_still(one_slot_engine: Path, samples: Path) -> None:
    question = read_samples(samples)[0]
    same = [dataclasses.replace(question, name=str(i)) for i in range(64)]
    seen: list[tuple[float, float]] = []
    few = observe_samples(one_slot_engine, same, lambda what, done, of: seen.append((done, of)))
    assert (few.samples["count"], few.samples["of"]) == (3 * BLOCK, 64)
    assert seen[-1] == (3 * BLOCK, 3 * BLOCK)
    assert few.linears.keys() == observe_samples(one_slot_engine, same[:1], no_progress).linears.keys()


def test_samples_that_go_on_to_move_the_scales_are_all_read(one_slot_engine: Path, samples: Path) -> None:
    text, image = read_samples(samples)[2], read_samples(samples)[0]
    # one task per sample, so that they are read in this order
    same = [dataclasses.replace(text, name=str(i), task=str(i)) for i in range(4 * BLOCK)]
    same[2 * BLOCK] = dataclasses.replace(image, name=str(2 * BLOCK), task=str(2 * BLOCK))
    calibration = observe_samples(one_slot_engine, same, no_progress)
    assert calibration.samples["count"] == 4 * BLOCK


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_trained_models_are_calibrated_on_all_samples(tmp_path: Path, name: str) -> None:
    engine = write_observing(tmp_path, CHECKPOINTS / name, {})
    calibration = observe_samples(engine, document_samples("train", CALIBRATION_SAMPLES, no_progress), no_progress)
    assert calibration.samples["count"] == CALIBRATION_SAMPLES


def test_rounds_stand_for_the_whole() -> None:
    chosen = document_samples("validation", 200, no_progress)
    rounds = rounds_of(chosen)
    assert sorted(sample.name for each in rounds for sample in each) == sorted(sample.name for sample in chosen)
    tasks = {sample.task for sample in chosen}
    for each in rounds[:-1]:
        assert {sample.task for sample in each} == tasks
        assert len(each) == len(tasks)
    assert rounds == rounds_of(chosen)
    first = [each[0].name for each in rounds]
    assert first != sorted(first)  # a file may be sorted by difficulty


def test_samples_of_the_document_tasks_are_spread_over_them() -> None:
    chosen = document_samples("train", 20, no_progress)
    assert len(chosen) == len({sample.name for sample in chosen}) == 20
    assert {sample.task for sample in chosen} == {*TASKS, *TEXT_TASKS}
    assert all(sample.name.startswith("train-") for sample in chosen)


# --- files -------------------------------------------------------------------------------------------------------


def test_round_trip_and_reuse(calibration_file: Directory, checkpoint: Directory, tmp_path: Path) -> None:
    source = calibration_file("nvlm-d-tiny")
    calibration = read_calibration(source)
    calibration.save(tmp_path / "copy.json")
    assert is_calibration(tmp_path / "copy.json")
    assert read_calibration(tmp_path / "copy.json") == calibration
    assert (tmp_path / "copy.json").read_bytes() == source.read_bytes()
    recorded = json.loads(source.read_text())["samples"]
    assert (recorded["count"], recorded["of"]) == (3, 3)
    first, second = (Engine.open(path) for path in (source.parent, rebuild(checkpoint, source, tmp_path / "engine")))
    assert first.manifest.files == second.manifest.files
    assert first.digest == second.digest


def rebuild(checkpoint: Directory, calibration: Path, output: Path, name: str = "nvlm-d-tiny") -> Path:
    options = QuantizationOptions(calibration=calibration, gate=None)
    return build_engine(checkpoint(name), output, precision="int8", quantization=options).path


DECODER = "language_model.model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file["linears"][DECODER].update(abs_max=float("nan")), "down_proj.abs_max: .*finite"),
        (lambda file: file["linears"][DECODER].update(clip=0.0), "down_proj.clip: .*greater than 0"),
        (lambda file: file["linears"][DECODER].update(clip=-1.0), "down_proj.clip: .*greater than 0"),
        (lambda file: file["linears"][DECODER]["channels"].__setitem__(3, -1.0), "down_proj.channels.3: "),
        (lambda file: file["linears"].pop(DECODER), "lacks the linear layer .*down_proj"),
        (lambda file: file["linears"][DECODER].update(scale=1.0), "down_proj.scale: Extra"),
        (lambda file: file["linears"][DECODER].update(channels=[1.0]), "down_proj.* has 1 channels, .* 512"),
        (lambda file: file.update(schema_version=2), "schema_version"),
        (lambda file: file.update(checkpoint_digest="abc"), "was measured on another checkpoint"),
    ],
)
def test_refuses(
    calibration_file: Directory,
    checkpoint: Directory,
    tmp_path: Path,
    edit: Callable[[dict], object],
    message: str,
) -> None:
    document = json.loads(calibration_file("nvlm-d-tiny").read_text())
    edit(document)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(document))
    with pytest.raises(EngineError, match=message) as caught:
        rebuild(checkpoint, path, tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_a_calibration_that_was_cut(calibration_file: Directory, checkpoint: Directory, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(calibration_file("nvlm-d-tiny").read_bytes()[:-100])
    with pytest.raises(EngineError, match="Invalid JSON.*calibrate again") as caught:
        rebuild(checkpoint, path, tmp_path / "engine")
    assert "\n" not in str(caught.value)


def test_refuses_a_file_that_is_not_there(checkpoint: Directory, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot read calibration .*none.json.*JSONL"):
        rebuild(checkpoint, tmp_path / "none.json", tmp_path / "engine")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt"', RequestError, "samples.jsonl line 2: not JSON"),
        ('{"prompt": "a", "answer": "b", "image": "none.png"}', RequestError, "line 1: there is no image .*none.png"),
        ('{"prompt": "a", "answer": "b", "image": "samples.jsonl"}', ImageError, "sample 1: .*samples.jsonl"),
        ('{"prompt": "' + "word " * 5000 + '", "answer": "b"}', RequestError, "calibration sample 1: .*4096"),
    ],
    ids=["cut line", "no image", "not an image", "too long"],
)
def test_bad_samples(checkpoint: Directory, tmp_path: Path, line: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(error, match=message) as caught:
        rebuild(checkpoint, path, tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
