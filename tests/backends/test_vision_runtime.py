"""The runtime of the vision encoder on the CPU: OpenVINO where it is faster, ONNX Runtime in its place elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.onnxruntime import cpu
from nvlm_trt.backends.onnxruntime.vision_runtime import runtimes_of
from nvlm_trt.backends.opening import open_backend, runtimes_here
from nvlm_trt.backends.openvino import NAME as OPENVINO
from nvlm_trt.backends.openvino.encoder import ENCODE_TILES, OpenVinoEncoder
from nvlm_trt.backends.table import find_backend
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.engine import Engine, save_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.reference.model import ReferenceModel

Directory = Callable[[str], Path]

PRESETS = ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"]
EDGE = 56
SHARE = 2e-2  # of the largest image token: twice what rounding every result to bf16 changes
real_version = importlib.metadata.version
needs_bf16 = pytest.mark.skipif(not cpu.multiplies_bf16(), reason="this CPU has no instructions for bf16")


def pixels(tiles: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((tiles, 3, EDGE, EDGE), dtype=np.float32)


def encoded(directory: Path, pixel_values: FloatArray) -> FloatArray:
    with open_backend(Engine.open(directory), ["vision_encoder"]) as backend:
        return backend.to_host(backend.encode(pixel_values))


@pytest.fixture(scope="module")
def int8(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose vision encoder and projector multiply 8-bit integers."""
    output = tmp_path_factory.mktemp("int8") / "engine"
    options = QuantizationOptions(calibration_samples=2, gate=None)
    precision = "vision_encoder=int8,projector=int8"
    build_engine(checkpoint("nvlm-d-tiny"), output, precision=precision, quantization=options)
    return output


@pytest.fixture(scope="module")
def encoders(engine: Directory, int8: Path) -> dict[str, OpenVinoEncoder]:
    folders = {**{name: engine(name) for name in PRESETS}, "int8": int8}
    return {name: OpenVinoEncoder(folder / "vision_encoder.onnx", 2) for name, folder in folders.items()}


@pytest.mark.parametrize("name", [*PRESETS, "int8"])
@settings(max_examples=25, deadline=None)
@given(others=st.lists(st.integers(0, 2**32 - 1), max_size=2 * ENCODE_TILES), place=st.integers(0, 2 * ENCODE_TILES))
def test_a_tile_keeps_its_bits_among_any_others(
    encoders: dict[str, OpenVinoEncoder], name: str, others: list[int], place: int
) -> None:
    tile = pixels(1)
    before, after = others[:place], others[place:]
    batch = np.concatenate([*(pixels(1, seed) for seed in before), tile, *(pixels(1, seed) for seed in after)])
    alone = encoders[name].encode(tile)
    assert alone.any()
    assert np.array_equal(encoders[name].encode(batch)[len(before)], alone[0])


@needs_bf16
@pytest.mark.parametrize("name", PRESETS)
def test_bf16_is_near_the_reference(checkpoint: Directory, engine: Directory, name: str) -> None:
    import torch

    values = pixels(7)
    with torch.inference_mode():
        expected = ReferenceModel.from_checkpoint(checkpoint(name)).encode(torch.from_numpy(values)).numpy()
    difference = np.abs(encoded(engine(name), values) - expected).max() / np.abs(expected).max()
    assert 1e-6 < difference < SHARE  # fp32 would be nearer


@needs_bf16
def test_the_default_engine_names_the_runtime_and_opens_with_it(engine: Directory) -> None:
    opened = Engine.open(engine("nvlm-h-tiny"))
    assert opened.manifest.runtimes == {"vision_encoder": "openvino"}
    runs = runtimes_here(opened)
    assert runs["vision_encoder"] == f"OpenVINO {real_version('openvino')} in bf16"
    assert runs["decoder"].startswith("ONNX Runtime")


@pytest.mark.parametrize(
    ("precision", "runtimes"),
    [
        (None, {"vision_encoder": OPENVINO}),
        ("int8,vision_encoder=int8", {"vision_encoder": OPENVINO}),
        ("fp32", {}),
        ("projector=fp32", {}),
        ("vision_encoder=fp8", {}),
        ("vision_encoder=int4-weight-only", {}),
    ],
)
def test_the_precision_chooses_the_runtime(precision: str | None, runtimes: dict[str, str]) -> None:
    assert runtimes_of(find_backend("onnxruntime").precisions.parse(precision)) == runtimes


def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "openvino":
            raise importlib.metadata.PackageNotFoundError(package)
        return real_version(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


def _too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2024.6.0" if name == "openvino" else "1")


def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = cpu.flags() - {"avx512_bf16", "amx_bf16"}
    monkeypatch.setattr(cpu, "flags", lambda: flags)


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        (_missing, "OpenVINO is not installed; pip install 'openvino>=2026.4'"),
        (_too_old, "OpenVINO 2024.6.0 is too old; pip install 'openvino>=2026.4'"),
        (_no_bf16, "this CPU has no instructions for bf16"),
    ],
)
def test_onnx_runtime_runs_the_same_file_in_its_place(
    engine: Directory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    values = pixels(3)
    plain = tmp_path / "engine"
    shutil.copytree(engine("nvlm-d-tiny"), plain)
    opened = Engine.open(plain)
    opened.manifest.runtimes = {}
    save_manifest(plain, opened.manifest)
    expected = encoded(plain, values)
    lacking(monkeypatch)
    assert np.array_equal(encoded(engine("nvlm-d-tiny"), values), expected)
    summary = runtimes_here(Engine.open(engine("nvlm-d-tiny")))["vision_encoder"]
    assert summary.startswith("ONNX Runtime ")
    assert summary.endswith(f" in fp32; {reason}") or reason.startswith("this CPU")
    assert "\n" not in summary


def test_an_engine_of_an_unknown_runtime_is_refused(engine: Directory, tmp_path: Path) -> None:
    shutil.copytree(engine("nvlm-d-tiny"), tmp_path / "engine")
    opened = Engine.open(tmp_path / "engine")
    opened.manifest.runtimes = {"vision_encoder": "abacus"}
    save_manifest(tmp_path / "engine", opened.manifest)
    with pytest.raises(EngineError, match="'abacus', which this nvlm-trt does not have; rebuild"):
        open_backend(Engine.open(tmp_path / "engine"))


@pytest.mark.parametrize("content", [b"", b"no ONNX file"])
def test_a_file_that_openvino_does_not_load_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "vision_encoder.onnx"
    file.write_bytes(content)
    with pytest.raises(EngineError, match="cannot be loaded by OpenVINO .*; rebuild the engine") as raised:
        OpenVinoEncoder(file, 1)
    assert "\n" not in str(raised.value)


def test_loading_openvino_reports_nothing_to_its_vendor(tmp_path: Path) -> None:
    """The converter of OpenVINO sends an event when it is imported, and keeps an identifier in the home directory."""
    code = (
        "import json, sys\n"
        "from nvlm_trt.backends.openvino.runtime import load\n"
        "assert load().Core().available_devices\n"
        "print(json.dumps([name for name in sys.modules if 'telemetry' in name or 'ovc' in name.split('.')]))\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == []
