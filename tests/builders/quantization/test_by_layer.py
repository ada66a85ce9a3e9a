"""Calibration by layer: the scales of the whole model bit for bit, and nothing measured twice after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nvlm_trt.backends.base import FloatArray, RangeArray
from nvlm_trt.backends.onnxruntime import build as onnxruntime_build
from nvlm_trt.backends.onnxruntime.build import write_graphs
from nvlm_trt.backends.onnxruntime.layer_parts import OnnxRuntimeParts
from nvlm_trt.backends.onnxruntime.observing import observe
from nvlm_trt.builders import engine_build
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine, write_engine
from nvlm_trt.builders.quantization import calibration_memory
from nvlm_trt.builders.quantization.by_layer import LlmPart, Part, VisionPart, calibrate_by_layer, parts_of
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import OBSERVING
from nvlm_trt.builders.quantization.observations import Observations
from nvlm_trt.builders.quantization.part_store import PartStore, calibration_folder
from nvlm_trt.builders.quantization.reading import ANSWER_TOKENS, CHUNK, SampleReader
from nvlm_trt.builders.quantization.scale_watch import BLOCK
from nvlm_trt.builders.quantization.torch_parts import TorchParts
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, RequestError
from nvlm_trt.evaluation.samples import Sample, read_samples
from nvlm_trt.progress import no_progress

Directory = Callable[[str], Path]
MODELS = ("nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny")


def several(samples: Path) -> list[Sample]:
    """Return more samples than a block has: text, one image, two images, and a prompt of several runs."""
    questions = read_samples(samples)
    long = dataclasses.replace(questions[0], name="long", prompt="word " * (CHUNK // 4))  # a token is a byte
    copies = [dataclasses.replace(questions[i % 3], name=f"copy {i}", task=str(i)) for i in range(BLOCK)]
    return [*questions, long, *copies]


def of_whole_model(source: EngineSource, directory: Path, samples: Sequence[Sample]) -> Calibration:
    directory.mkdir()
    write_engine(source, directory, OBSERVING, "onnxruntime", (), partial(write_graphs, source, no_progress))
    return observe(directory, samples, no_progress)


def by_layer(source: EngineSource, folder: Path, samples: Sequence[Sample]) -> Calibration:
    return calibrate_by_layer(source, samples, folder, OnnxRuntimeParts(source), no_progress)


@pytest.mark.parametrize("name", MODELS)
def test_gives_the_calibration_of_the_whole_model(
    checkpoint: Directory, samples: Path, tmp_path: Path, name: str
) -> None:
    source = EngineSource(checkpoint(name), {})
    chosen = several(samples)
    whole = of_whole_model(source, tmp_path / "engine", chosen)
    parts = by_layer(source, tmp_path / "work", chosen)
    whole.save(tmp_path / "whole.json")
    parts.save(tmp_path / "parts.json")
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert parts.samples["count"] == len(chosen)


def test_ends_with_the_sample_with_which_the_whole_model_ends(
    checkpoint: Directory, samples: Path, tmp_path: Path
) -> None:
    source = EngineSource(checkpoint("nvlm-h-tiny"), {})
    question = read_samples(samples)[2]
    still = [dataclasses.replace(question, name=str(i)) for i in range(4 * BLOCK)]
    parts = by_layer(source, tmp_path / "work", still)
    assert parts.samples["count"] == 3 * BLOCK
    assert parts == of_whole_model(source, tmp_path / "engine", still)


# --- what a sample is --------------------------------------------------------------------------------------------


def test_a_sample_is_read_to_the_end_of_its_known_answer(checkpoint: Directory, samples: Path) -> None:
    source = EngineSource(checkpoint("nvlm-x-tiny"), {})
    sample = dataclasses.replace(read_samples(samples)[0], answer="12345")
    with SampleReader(source.config, source.limits, source.checkpoint_dir) as reader:
        reading, images = reader.read(sample)
        cut, _ = reader.read(dataclasses.replace(sample, answer="x" * 100))
    assert bytes(reading.input_ids[-5:].tolist()) == b"12345"
    assert len(reading.input_ids) == reading.prompt_tokens + 5
    assert reading.tiles == tuple(len(tiles) for tiles in images)
    everything = reading.cross_ranges[reading.prompt_tokens - 1]
    assert everything[1] > everything[0] == 0
    np.testing.assert_array_equal(reading.cross_ranges[-5:], np.tile(everything, (5, 1)))
    (chunk,) = reading.chunks()
    assert (chunk.start, chunk.stop, chunk.rows) == (0, len(reading.input_ids), 6)
    assert len(cut.input_ids) == cut.prompt_tokens + ANSWER_TOKENS


def test_an_answer_ends_with_the_cache(checkpoint: Directory, samples: Path) -> None:
    source = EngineSource(checkpoint("nvlm-d-tiny"), {})
    with SampleReader(source.config, source.limits, source.checkpoint_dir) as reader:
        sample = dataclasses.replace(read_samples(samples)[2], prompt="y", answer="x" * 100)
        around = reader.read(sample)[0].prompt_tokens - 1
        for room in (1, 5, ANSWER_TOKENS):
            prompt = "y" * (source.limits.max_seq_len - around - room)
            reading, _ = reader.read(dataclasses.replace(sample, prompt=prompt))
            assert len(reading.input_ids) == source.limits.max_seq_len
            chunks = list(reading.chunks())
            assert [chunk.start for chunk in chunks] == [0, CHUNK]
            assert [chunk.rows for chunk in chunks] == [1, room + 1]
        with pytest.raises(RequestError, match=r"calibration sample 3: .*4096"):
            reader.read(dataclasses.replace(sample, prompt="y" * source.limits.max_seq_len))


# --- killed and resumed ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a signal at any place."""


class CountedPart:
    """Counts the runs of a part of either model, and ends the calibration after some."""

    def __init__(self, opened: Any, part: Part, runtime: CountedParts) -> None:
        self._opened, self._part, self._runtime = opened, part, runtime

    def encode(self, x: FloatArray) -> FloatArray:
        self._runtime.count(self._part)
        return self._opened.encode(x)

    def read_images(self, images: Sequence[FloatArray]) -> None:
        self._opened.read_images(images)

    def step(self, x: FloatArray, position: int, cross_ranges: RangeArray) -> FloatArray:
        self._runtime.count(self._part)
        return self._opened.step(x, position, cross_ranges)

    def observed(self) -> Observations:
        return self._opened.observed()


class CountedParts:
    def __init__(self, source: EngineSource, most: int | None = None) -> None:
        self._parts, self._most = OnnxRuntimeParts(source), most
        self.runs: list[str] = []

    @property
    def name(self) -> str:
        return self._parts.name

    @contextlib.contextmanager
    def open_vision(self, part: Part, folder: Path) -> Iterator[VisionPart]:
        with self._parts.open_vision(part, folder) as opened:
            yield CountedPart(opened, part, self)

    @contextlib.contextmanager
    def open_llm(self, part: Part, folder: Path) -> Iterator[LlmPart]:
        with self._parts.open_llm(part, folder) as opened:
            yield CountedPart(opened, part, self)

    def count(self, part: Part) -> None:
        if len(self.runs) == self._most:
            raise Killed
        self.runs.append(str(part))


def test_a_killed_calibration_goes_on_with_the_block_that_it_was_at(
    checkpoint: Directory, samples: Path, tmp_path: Path
) -> None:
    source = EngineSource(checkpoint("nvlm-x-tiny"), {})
    chosen = several(samples)
    whole = CountedParts(source)
    expected = calibrate_by_layer(source, chosen, tmp_path / "whole", whole, no_progress)
    images = 2 * BLOCK  # of a block, at most: no part runs more often over one
    work, runtimes = tmp_path / "work", []
    while True:
        runtimes.append(CountedParts(source, most=images + 5))
        with contextlib.suppress(Killed):
            resumed = calibrate_by_layer(source, chosen, work, runtimes[-1], no_progress)
            break
    assert resumed == expected
    kills, runs = len(runtimes) - 1, sum(len(runtime.runs) for runtime in runtimes)
    assert kills > 5
    assert len(whole.runs) < runs <= len(whole.runs) + kills * images
    assert not [path.name for path in work.iterdir() if path.suffix in (".npz", ".f32", ".onnx")]
    again = CountedParts(source, most=0)
    assert calibrate_by_layer(source, chosen, work, again, no_progress) == expected


def test_other_samples_begin_anew(checkpoint: Directory, samples: Path, tmp_path: Path) -> None:
    source = EngineSource(checkpoint("nvlm-d-tiny"), {})
    questions = read_samples(samples)
    with pytest.raises(Killed):
        calibrate_by_layer(source, questions, tmp_path, CountedParts(source, most=30), no_progress)
    assert list(tmp_path.glob("*.npz"))
    assert by_layer(source, tmp_path, questions[:1]).samples["count"] == 1
    other_limits = EngineSource(checkpoint("nvlm-d-tiny"), {"max_seq_len": 2048})
    runtime = CountedParts(other_limits)
    calibrate_by_layer(other_limits, questions[:1], tmp_path, runtime, no_progress)
    assert set(runtime.runs) == {str(part) for part in parts_of(source.config)}


KILLED_BUILD = """
import os, signal, sys
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.part_store import PartStore
from pathlib import Path

checkpoint, samples, output, most = sys.argv[1:]
add, added = PartStore.add, []

def kill(self, part, block, observations):
    if len(added) == int(most):
        os.kill(os.getpid(), signal.SIGKILL)
    added.append(part)
    add(self, part, block, observations)

PartStore.add = kill
options = QuantizationOptions(Path(samples), calibrate_by="layer", gate=None)
build_engine(checkpoint, output, precision="int8", quantization=options)
print(len(added))
"""


def test_a_killed_build_keeps_what_it_has_calibrated(checkpoint: Directory, samples: Path, tmp_path: Path) -> None:
    def build(most: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED_BUILD, checkpoint("nvlm-h-tiny"), samples, tmp_path / "engine", most]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)

    parts = len(parts_of(EngineSource(checkpoint("nvlm-h-tiny"), {}).config))
    assert build(9).returncode == -signal.SIGKILL
    assert calibration_folder(tmp_path / "engine").is_dir()
    finished = build(parts)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == parts - 9
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    options = QuantizationOptions(samples, calibrate_by="model", gate=None)
    other = build_engine(checkpoint("nvlm-h-tiny"), tmp_path / "other", precision="int8", quantization=options)
    assert Engine.open(tmp_path / "engine").manifest.files == other.manifest.files


def test_a_finished_calibration_stays_until_an_engine_is_published(
    checkpoint: Directory, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantizationOptions(samples, calibrate_by="layer", gate=None)
    build = partial(
        build_engine, checkpoint("nvlm-d-tiny"), tmp_path / "engine", precision="int8", quantization=options
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("nvlm_trt.builders.engine_build.SmokeTest.run", lambda *_: (_ for _ in ()).throw(Killed()))
        build()
    assert [path.name for path in tmp_path.iterdir()] == [calibration_folder(tmp_path / "engine").name]
    assert not list(tmp_path.glob("*/*.npz"))
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeParts, "open_vision", None)
        build()
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


# --- PyTorch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_pytorch_measures_the_same_apart_from_rounding(
    checkpoint: Directory, samples: Path, tmp_path: Path, name: str
) -> None:
    source = EngineSource(checkpoint(name), {})
    chosen = several(samples)[:5]
    expected = by_layer(source, tmp_path / "onnxruntime", chosen).linears
    parts, threads = TorchParts(source, "cpu"), torch.get_num_threads()  # a GPU runs the same code
    torch.set_num_threads(1)  # little work for two
    try:
        linears = calibrate_by_layer(source, chosen, tmp_path / "torch", parts, no_progress).linears
    finally:
        torch.set_num_threads(threads)
    assert linears.keys() == expected.keys()
    for layer, linear in linears.items():
        np.testing.assert_allclose(linear.channels, expected[layer].channels, rtol=1e-3, atol=1e-4, err_msg=layer)
        assert linear.abs_max == pytest.approx(expected[layer].abs_max, rel=1e-3)
        assert linear.clip == pytest.approx(expected[layer].clip, rel=0.05)  # an edge of the same bin, or of the next


def test_pytorch_names_the_layer_whose_inputs_are_not_finite(overflowing: Path, samples: Path, tmp_path: Path) -> None:
    source = EngineSource(overflowing, {})
    with pytest.raises(EngineError, match=r"inputs of .*layers\.2\.mlp\.down_proj are not finite"):
        calibrate_by_layer(source, read_samples(samples), tmp_path, TorchParts(source, "cpu"), no_progress)


def test_a_calibration_on_a_gpu_needs_one(checkpoint: Directory, samples: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = QuantizationOptions(samples, calibrate_by="layer-on-gpu", gate=None)
    with pytest.raises(EngineError, match="PyTorch sees no GPU.*--calibrate-by layer"):
        build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", precision="int8", quantization=options)


# --- choices and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "way"), [(1 << 40, "model"), (40 << 20, "layer")])
def test_by_default_a_model_that_does_not_fit_is_calibrated_by_layer(
    checkpoint: Directory, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, way: str
) -> None:
    used = []
    monkeypatch.setattr(calibration_memory, "available_memory", lambda: free)
    for name, function in (("layer", "calibrate_by_layer"), ("model", "observe")):
        original = getattr(onnxruntime_build, function)
        note = lambda *arguments, name=name, original=original: used.append(name) or original(*arguments)  # noqa: E731
        monkeypatch.setattr(onnxruntime_build, function, note)
    options = QuantizationOptions(samples, gate=None)
    build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", precision="fp8", quantization=options)
    assert used == [way]


def test_a_killed_calibration_is_finished_even_if_the_memory_now_holds_the_model(
    checkpoint: Directory, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of disk space knows it, too: no engine to calibrate with is going to be written."""
    planned = []

    def disk_of_build(*arguments: Any, calibrates: bool, **others: Any) -> int:
        planned.append(calibrates)
        return 0

    def build() -> None:
        build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", precision="fp8", quantization=options)

    options = QuantizationOptions(samples, gate=None)
    monkeypatch.setattr(calibration_memory, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(engine_build, "disk_of_build", disk_of_build)
    calibration_folder(tmp_path / "engine").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime_build, "observe", None)
        build()
    shutil.rmtree(tmp_path / "engine")
    build()
    assert planned == [False, True]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(EngineError, match="--calibrate-by sample is not one of layer, layer-on-gpu, model"):
        QuantizationOptions(calibrate_by="sample")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def overflowing(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose third layer multiplies numbers that are finite to infinity."""
    directory = tmp_path_factory.mktemp("overflowing")
    for path in checkpoint("nvlm-d-tiny").iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
            continue
        weights = load_file(path)
        for part in ("gate", "up"):
            name = f"language_model.model.layers.2.mlp.{part}_proj.weight"
            if name in weights:
                weights[name] = (weights[name].astype(np.float32) * 1e25).astype(weights[name].dtype)
        save_file(weights, directory / path.name)
    return directory


@pytest.mark.parametrize("way", [by_layer, of_whole_model])
def test_names_the_layer_whose_inputs_are_not_finite(
    overflowing: Path, samples: Path, tmp_path: Path, way: Callable[..., Calibration]
) -> None:
    source, questions = EngineSource(overflowing, {}), read_samples(samples)
    arguments = (source, tmp_path / "work", questions)
    with pytest.raises(EngineError, match=r"inputs of .*layers\.2\.mlp\.down_proj are not finite") as caught:
        way(*arguments)
    assert "\n" not in str(caught.value)


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    with PartStore(tmp_path, {"a": 1}), pytest.raises(EngineError, match="is used by another build.*--output"):
        PartStore(tmp_path, {"a": 1})
    PartStore(tmp_path, {"a": 1}).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"^cannot write .*file/folder \(Not a directory\)"):
        PartStore(tmp_path / "file" / "folder", {})


def test_activations_that_were_cut_are_named(tmp_path: Path) -> None:
    with PartStore(tmp_path, {}) as store:
        with store.new_activations("head", 0) as file:
            file.write(np.ones(5, np.float32).data)
        with store.activations("head", 0) as activations:
            np.testing.assert_array_equal(activations.next((2, 2)), np.ones((2, 2)))
            with pytest.raises(EngineError, match=r"head\.0\.f32 is too short; remove .*start the build again"):
                activations.next((2,))
