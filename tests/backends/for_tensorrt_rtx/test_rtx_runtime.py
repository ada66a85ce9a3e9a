"""Tests how plans of TensorRT-RTX are loaded and run, without a GPU: every call against the real classes of the
installed bindings, the answers against ONNX Runtime's engine (rtx_machine.py says which parts are played)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_steps import run_steps, three_prompts
from plan_machine import GPU
from rtx_machine import LIMITS, RtxMachine, build_in_fp32, tensorrt_rtx_bindings, trt

from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.tensorrt_rtx.record import record_of
from nvlm_trt.backends.tensorrt_rtx.runtime import driver_version
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.engine import Engine, save_manifest
from nvlm_trt.errors import EngineError

Directory = Callable[[str], Path]
VERSION = tensorrt_rtx_bindings.__version__


@pytest.fixture(scope="module")
def built(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("rtx")
    with RtxMachine().patched(folder / "cache"):
        return build_in_fp32(checkpoint("nvlm-d-tiny"), folder / "engine")


@pytest.fixture
def machine() -> RtxMachine:
    return RtxMachine()


def open_and_close(machine: RtxMachine, engine: Engine, cache: Path, stages: tuple[str, ...] = ("decoder",)) -> None:
    with machine.patched(cache), open_backend(engine, stages):
        pass


def with_record(engine: Engine, folder: Path, **changes: Any) -> Engine:
    """Returns a copy of an engine, in `folder`, with another record."""
    folder.mkdir()
    for file in engine.path.iterdir():
        (folder / file.name).hardlink_to(file)
    (folder / "manifest.json").unlink()
    record = record_of(engine).model_copy(update=changes).model_dump()
    save_manifest(folder, engine.manifest.model_copy(update={"backend_record": record}))
    return Engine.open(folder)


@pytest.mark.parametrize(("architecture", "capturable"), [("d", True), ("x", True), ("h", False)])
def test_answers_as_the_engine_for_onnx_runtime(
    checkpoint: Directory, tmp_path: Path, machine: RtxMachine, architecture: str, capturable: bool
) -> None:
    """Prefill in chunks of 16, decoding of three slots as one batch, a moved slot; recorded as CUDA graphs or not."""
    source = checkpoint(f"nvlm-{architecture}-tiny")
    portable = build_engine(source, tmp_path / "portable", LIMITS, precision="fp32", smoke_test=False)
    given = three_prompts(portable)
    expected = run_steps(portable, given)
    machine.capturable = capturable
    with machine.patched(tmp_path / "cache"):
        answers = run_steps(build_in_fp32(source, tmp_path / "engine"), given)
    assert answers.keys() == expected.keys()
    for name, values in expected.items():
        assert np.isfinite(answers[name]).all(), name
        np.testing.assert_allclose(answers[name], values, rtol=0, atol=1e-4, err_msg=name)
    assert machine.events.count("replay") == (5 if capturable else 0)


def test_a_build_on_a_machine_with_a_gpu_tries_the_plans_there(
    checkpoint: Directory, tmp_path: Path, machine: RtxMachine
) -> None:
    with machine.patched(tmp_path / "cache"):
        engine = build_in_fp32(checkpoint("nvlm-d-tiny"), tmp_path / "engine", smoke_test=True)
    record = record_of(engine)
    assert (record.tried_on, record.form, record.version) == (GPU, "plan", VERSION)
    assert machine.events.count("replay") == 8  # the smoke test's 2 prompts of 4 tokens


def test_asks_whether_a_plan_is_valid_before_reading_it(built: Engine, tmp_path: Path, machine: RtxMachine) -> None:
    machine.validity = (trt.EngineValidity.SUBOPTIMAL, 0)  # runs, and another build would be faster
    open_and_close(machine, built, tmp_path, ("vision_encoder", "decoder"))
    assert machine.events == ["asked", "deserialised"] * 2


@pytest.mark.parametrize(
    ("capability", "diagnostics", "targets", "message"),
    [
        (
            (9, 0),
            ["UNSUPPORTED_CC"],
            [],
            rf"decoder.plan does not run on this GPU \({GPU}, compute capability 9.0\): unsupported cc; it was built "
            r"for 8.0, 8.6, 8.9, 12.0, 12.1; rebuild it with --backend tensorrt, which knows this GPU$",
        ),
        (
            (8, 9),
            ["UNSUPPORTED_CC", "OLD_CUDA_DRIVER"],
            ["sm120"],
            r"capability 8.9\): unsupported cc, old cuda driver; it was built for 12.0; rebuild it with --target sm89$",
        ),
        ((12, 1), [], ["sm86"], r"12.1\): no reason given; it was built for 8.6; rebuild it with --target sm121$"),
    ],
)
def test_an_invalid_plan_is_refused_in_one_line(
    built: Engine,
    tmp_path: Path,
    machine: RtxMachine,
    capability: tuple[int, int],
    diagnostics: list[str],
    targets: list[str],
    message: str,
) -> None:
    given = sum(int(getattr(trt.EngineInvalidityDiagnostics, name)) for name in diagnostics)
    machine.validity, machine.capability = (trt.EngineValidity.INVALID, given), capability
    engine = with_record(built, tmp_path / "engine", targets=targets)
    with pytest.raises(EngineError, match=message) as caught:
        open_and_close(machine, engine, tmp_path)
    assert "\n" not in str(caught.value)
    assert machine.events == ["asked"]


def test_refuses_a_plan_that_cannot_be_read(built: Engine, tmp_path: Path, machine: RtxMachine) -> None:
    machine.deserialize = lambda data: None
    with pytest.raises(EngineError, match=r"decoder.plan cannot be loaded .* rebuild the engine"):
        open_and_close(machine, built, tmp_path)


def test_refuses_another_version(built: Engine, tmp_path: Path, machine: RtxMachine) -> None:
    engine = with_record(built, tmp_path / "engine", version="1.5.0.1")
    expected = (
        rf"TensorRT-RTX 1.5.0.1, this is {VERSION}; rebuild it here, or install tensorrt_rtx_cu13_libs==1.5.0.1 and "
        r"tensorrt_rtx_cu13_bindings==1.5.0.1$"
    )
    with pytest.raises(EngineError, match=expected):
        open_and_close(machine, engine, tmp_path)
    assert machine.events == []


def test_contexts_are_made_from_one_configuration(built: Engine, tmp_path: Path, machine: RtxMachine) -> None:
    with machine.patched(tmp_path), open_backend(built, ["decoder"]) as backend:
        tokens, ranges = np.zeros(1, np.int64), np.zeros((1, 2), np.int32)
        backend.prefill(0, 0, tokens, np.zeros((0, backend.config.llm.hidden_size), np.float32), ranges)
        backend.decode(tokens, tokens + 1, ranges)
    assert len(machine.contexts) == 2  # for prefill, and for the recorded step
    for config in machine.contexts:
        assert config["allocation"] == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert (
            config["dynamic_shapes_kernel_specialization_strategy"]
            == trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        assert config["cuda_graph_strategy"] == trt.CudaGraphStrategy.DISABLED
        assert config["runtime cache"] is config["create_runtime_cache"]()


@pytest.mark.parametrize(
    "aliased",
    [
        {"present_key.0": "past_value.0"},
        {"present_key.0": None},
    ],
    ids=["other", "none"],
)
def test_refuses_caches_that_are_not_updated_in_place(
    built: Engine, tmp_path: Path, machine: RtxMachine, aliased: dict[str, str | None]
) -> None:
    pairs = record_of(built).aliased | aliased
    engine = with_record(built, tmp_path / "engine", aliased={name: pair for name, pair in pairs.items() if pair})
    with pytest.raises(EngineError, match=r"decoder of .* does not update present_key.0 in place as its manifest says"):
        open_and_close(machine, engine, tmp_path)


def test_streams_weights_with_the_automatic_budget(checkpoint: Directory, tmp_path: Path, machine: RtxMachine) -> None:
    with machine.patched(tmp_path / "cache"):
        engine = build_in_fp32(checkpoint("nvlm-d-tiny"), tmp_path / "engine", weight_streaming=True)
        with open_backend(engine, ["decoder"]):
            pass
    assert record_of(engine).weight_streaming
    assert machine.events.count("streaming budget 123") == 1


# --- runtime caches --------------------------------------------------------------------------------------------------


def test_keeps_compiled_kernels_for_the_next_start(built: Engine, tmp_path: Path, machine: RtxMachine) -> None:
    open_and_close(machine, built, tmp_path)
    (file,) = (tmp_path / "nvlm-trt").iterdir()
    digest = built.manifest.files["decoder.plan"].sha256
    assert file.name == f"a-GPU-made-of-paper-driver580.65.06-rtx{VERSION}-{digest[:16]}.kernels"
    assert file.read_bytes() == machine.compiled
    assert machine.offered == []

    machine.compiled = b"more kernels"
    open_and_close(machine, built, tmp_path)
    assert machine.offered == [b"kernels of this GPU"]
    assert file.read_bytes() == b"more kernels"


@pytest.mark.parametrize("change", ["driver", "plan"])
def test_a_cache_belongs_to_one_driver_and_one_plan(
    built: Engine, tmp_path: Path, machine: RtxMachine, change: str
) -> None:
    open_and_close(machine, built, tmp_path)
    if change == "driver":
        machine.driver = "590.1"
        open_and_close(machine, built, tmp_path)
    else:
        open_and_close(machine, built, tmp_path, ("vision_encoder",))
    assert machine.offered == []
    assert len(list((tmp_path / "nvlm-trt").iterdir())) == 2


def test_replaces_a_cache_that_tensorrt_rtx_rejects(built: Engine, tmp_path: Path, machine: RtxMachine) -> None:
    open_and_close(machine, built, tmp_path)
    (file,) = (tmp_path / "nvlm-trt").iterdir()
    file.write_bytes(b"of another GPU")
    machine.takes_caches = False
    open_and_close(machine, built, tmp_path)
    assert machine.offered == [b"of another GPU"]
    assert file.read_bytes() == machine.compiled


@pytest.mark.parametrize("obstacle", ["the folder is a file", "the file is a folder"])
def test_a_cache_that_cannot_be_kept_does_no_harm(
    built: Engine, tmp_path: Path, machine: RtxMachine, obstacle: str
) -> None:
    if obstacle == "the folder is a file":
        (tmp_path / "nvlm-trt").write_text("in the way")
    else:
        open_and_close(machine, built, tmp_path)
        (file,) = (tmp_path / "nvlm-trt").iterdir()
        file.unlink()
        file.mkdir()
    open_and_close(machine, built, tmp_path)
    assert machine.offered == []
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] in (["nvlm-trt"], [])


def test_real_host_memory_is_written_whole(tmp_path: Path) -> None:
    """`IRuntimeCache.serialize` returns an IHostMemory, which this machine cannot make; a builder can."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.mark_output(network.add_identity(network.add_input("x", trt.float32, (2, 2))).get_output(0))
    memory = builder.build_serialized_network(network, builder.create_builder_config())
    assert isinstance(memory, trt.IHostMemory)
    (tmp_path / "file").write_bytes(memoryview(memory))
    assert (tmp_path / "file").stat().st_size == memory.nbytes > 0
    assert (tmp_path / "file").read_bytes().startswith(b"vtrt")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.288.01  Mon Jan  5 2026\nGCC version:", "535.288.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (dvs)", "580.82.07"),
        ("nothing that looks like it", "unknown"),
    ],
)
def test_reads_the_drivers_version(monkeypatch: pytest.MonkeyPatch, text: str, version: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert driver_version() == version


def test_a_machine_without_driver_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert driver_version() == "unknown"
