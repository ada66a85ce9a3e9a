"""Tests what is checked before an engine is loaded: its files, the launch, the device; and who serves on which rank."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import load_file, save_file
from test_executor_answers import RECEIPT, Opened, chat, tokens_of
from test_executor_contract import BINDINGS
from tritonclient.grpc import model_config_pb2
from written_engines import rewrite, write_engine_directory

from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.table import find_backend
from nvlm_trt.backends.tensorrt_llm.contract import CONTAINER, VERSION
from nvlm_trt.backends.tensorrt_llm.executor_config import executor_config
from nvlm_trt.backends.tensorrt_llm.launch import Launch
from nvlm_trt.backends.tensorrt_llm.record import TrtLlmRecord
from nvlm_trt.backends.tensorrt_llm.worker import work
from nvlm_trt.engine import Engine, write_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import normalise_tiles, tile_image
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.serving.triton.models.vision_encoder import VisionEncoderModel
from nvlm_trt.serving.triton.repository import RepositoryOptions, placement_of, render_repository

Directory = Callable[[str], Path]
MPI = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"


@pytest.fixture
def copied(written: Directory, tmp_path: Path) -> Callable[[str], Engine]:
    def copy(name: str) -> Engine:
        shutil.copytree(written(name), tmp_path / name)
        return Engine.open(tmp_path / name)

    return copy


def launched(monkeypatch: pytest.MonkeyPatch, size: int, rank: int) -> None:
    for name, value in zip(MPI, (size, rank), strict=True):
        monkeypatch.setenv(name, str(value))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"form": "checkpoint"},
            r"is not built yet; in the container nvcr.*`nvlm-trt build --continue .* --output ENGINE`",
        ),
        ({"version": "1.1.0"}, r"was built by TensorRT-LLM 1\.1\.0, this nvlm-trt runs 1\.2\.1; rebuild it in nvcr"),
        ({"tp": 2}, r"rank1\.engine is missing; rebuild"),
        ({"dtype": "fp16"}, "has dtype bfloat16, the manifest says float16"),
        ({"max_num_tokens": 41}, "has max_num_tokens 40, the manifest promises 41"),
        ({"max_prompt_table": 301}, "max_prompt_embedding_table_size / max_batch_size 300, the manifest promises 301"),
        ({"max_prompt_table": -1}, "does not say what it was built for; rebuild"),
        ({"surplus": 1}, "does not say what it was built for; rebuild"),
    ],
)
def test_an_engine_that_is_not_what_its_manifest_says(
    executors: list[Any], copied: Callable[[str], Engine], record: dict[str, Any], message: str
) -> None:
    engine = rewrite(copied("nvlm-d-tiny"), **record)
    with pytest.raises(EngineError, match=message):
        Pipeline.open(engine.path)
    assert not executors
    if record.get("form") == "checkpoint":
        lines = find_backend("tensorrt-llm").describe(engine)
        assert lines[1].startswith("not built yet: there, run `nvlm-trt build --continue")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "1.2.0"}, r"has version 1\.2\.0, the manifest says 1\.2\.1"),
        ({"max_batch_size": 2}, "has max_batch_size 2, the manifest promises 3"),
        ({"max_seq_len": 511}, "has max_seq_len 511, the manifest promises 512"),
        ({"max_input_len": 1024, "max_num_tokens": 8}, "has max_num_tokens 8, the manifest promises 40"),
        ({"max_input_len": 510}, "has max_input_len 510, the manifest promises 511"),
        ({"max_encoder_input_len": 5}, "has max_encoder_input_len 5, the manifest promises"),
        ({"tp_size": 2}, "has tp_size 2, the manifest says 1"),
        (None, "is not trtllm-build's config"),
    ],
)
def test_engines_of_other_sizes_than_the_manifest_promises(
    executors: list[Any], copied: Callable[[str], Engine], change: dict[str, Any] | None, message: str
) -> None:
    engine = copied("nvlm-x-tiny")
    path = engine.path / "llm" / "config.json"
    built = json.loads(path.read_text())
    for part in (built, built["build_config"], built["pretrained_config"]["mapping"]):
        part.update({key: value for key, value in (change or {}).items() if key in part})
    path.write_text(json.dumps(built) if change else "{}")
    write_manifest(engine.path, engine.manifest)
    with pytest.raises(EngineError, match=message):
        Pipeline.open(engine.path)


def test_an_error_of_the_runtime_is_one_line(
    executors: list[Any], written: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_executor.FakeExecutor.load_error", "\n[TensorRT-LLM][ERROR] out of memory\n1  frame")
    with pytest.raises(EngineError, match=r"cannot load engine \S+ \(\[TensorRT-LLM\]\[ERROR\] out of memory\)$"):
        Pipeline.open(written("nvlm-d-tiny"))


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype", "truncated"])
@pytest.mark.parametrize("file", ["vision_encoder.safetensors", "tag_embeddings.safetensors"])
def test_weights_that_do_not_fit_the_model(
    executors: list[Any], copied: Callable[[str], Engine], file: str, fault: str
) -> None:
    engine = copied("nvlm-h-tiny")
    tensors = load_file(engine.path / file)
    name = next(iter(tensors))
    if fault == "missing":
        del tensors[name]
        tensors["another"] = torch.zeros(1)
    elif fault == "extra":
        tensors["another"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:-1].contiguous() if fault == "shape" else tensors[name].float()
    save_file(tensors, engine.path / file)
    if fault == "truncated":
        (engine.path / file).write_bytes((engine.path / file).read_bytes()[:-1])
    write_manifest(engine.path, engine.manifest)
    wanted = {"missing": f"lacks {name}", "extra": "unknown tensor another", "truncated": "cannot be read"}
    with pytest.raises(EngineError, match=wanted.get(fault, f"{name} is torch")):
        Pipeline.open(engine.path)
    assert not executors


def test_it_needs_a_gpu(written: Directory) -> None:
    """Without the stand-in's device."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="TensorRT-LLM needs an NVIDIA GPU"):
        Pipeline.open(written("nvlm-d-tiny"))
    with pytest.raises(EngineError, match="runs on the device 'cuda', not on 'cpu'"):
        Pipeline.open(written("nvlm-d-tiny"), device="cpu")


@pytest.mark.parametrize(("ranks", "device", "expected"), [(1, "cuda", None), (1, "cuda:3", [3]), (2, "cuda", None)])
def test_a_named_gpu_is_the_executors(ranks: int, device: str, expected: list[int] | None) -> None:
    config, limits, record = PRESETS["nvlm-x-tiny"], EngineLimits(max_slots=2, max_seq_len=100), record_of_ranks(ranks)
    made: Any = executor_config(BINDINGS, config, limits, record, device)
    if (ranks, device) == (1, "cuda"):
        assert made.parallel_config is None
    else:
        assert made.parallel_config.device_ids == expected
    # 100 tokens take two blocks of 64, 200 cross-attended ones take four
    assert made.kv_cache_config.max_tokens == 2 * 4 * 64
    assert made.kv_cache_config.cross_kv_cache_fraction == pytest.approx(3 * 200 / (3 * 200 + 6 * 100))


def test_no_gpu_is_named_for_several_ranks() -> None:
    limits = EngineLimits(max_slots=2, max_seq_len=100)
    with pytest.raises(EngineError, match="runs on 2 GPUs, one per rank, not on 'cuda:1'; name no device"):
        executor_config(BINDINGS, PRESETS["nvlm-d-tiny"], limits, record_of_ranks(2), "cuda:1")


def record_of_ranks(tp: int) -> TrtLlmRecord:
    return TrtLlmRecord(
        version=VERSION, dtype="bf16", tp=tp, pp=1, form="engine", quantization=None, kv_cache_quantization=None,
        max_prompt_table=0, max_encoder_len=200, max_num_tokens=40, container=CONTAINER,
    )  # fmt: skip


# --- the vision encoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny"])
def test_the_vision_encoder_is_the_reference_in_bf16(
    executors: list[Any], written: Directory, checkpoint: Directory, name: str
) -> None:
    engine = Engine.open(written(name))
    tiles = tile_image(load_image(RECEIPT.read_bytes()), engine.config.vision.image_size, 6)[:2]
    with open_backend(engine, ["vision_encoder"]) as backend:
        tokens = backend.encode(tiles)
        found = torch.from_numpy(backend.to_host(tokens))
    pixels = torch.from_numpy(tiles)
    in_bf16 = ReferenceModel.from_checkpoint(checkpoint(name), torch.bfloat16).encode(pixels.to(torch.bfloat16))
    exact = ReferenceModel.from_checkpoint(checkpoint(name)).encode(pixels)
    assert torch.equal(found, in_bf16.float())
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_single_steps_are_refused(executors: list[Any], written: Directory) -> None:
    """Of a backend that batches by itself, only the vision encoder can be opened."""
    engine = Engine.open(written("nvlm-d-tiny"))
    with pytest.raises(EngineError, match="batches by itself and runs no single steps"):
        open_backend(engine)
    with open_backend(engine, ["vision_encoder"]) as backend:
        for call in (
            lambda: backend.features(torch.zeros(1)),
            lambda: backend.move_slot(0, 1, 2, 3),
            lambda: backend.swap_slots(0, 1, 2, 3),
        ):
            with pytest.raises(EngineError, match="runs no single steps"):
                call()


def test_another_runtime_may_encode_the_images(
    executors: list[Any], copied: Callable[[str], Engine], engine: Directory, opened: Opened
) -> None:
    built = copied("nvlm-d-tiny")
    for name in ("vision_encoder.onnx", "vision_encoder.onnx.data"):
        shutil.copyfile(engine("nvlm-d-tiny") / name, built.path / name)
    built.manifest.runtimes = {"vision_encoder": "onnxruntime"}
    write_manifest(built.path, built.manifest)
    with Pipeline.open(built.path, threads=1) as pipeline:
        deltas = list(pipeline.generate(chat("What?", RECEIPT.read_bytes(), max_tokens=3, ignore_eos=True)))
    assert len(tokens_of(deltas)) == 3
    assert executors[0].received[0].prompt_tuning_config.embedding_table.dtype == torch.bfloat16


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(1, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, Launch(4, 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, Launch(2, 0)),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9"}, Launch(16, 9)),
        ({"SLURM_NTASKS": "8"}, Launch(1, 0)),  # a job that srun did not start
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "SLURM_STEP_NUM_TASKS": "1"}, Launch(2, 1)),
    ],
)
def test_a_launch_is_read_from_the_environment(environment: dict[str, str], expected: Launch) -> None:
    assert Launch.of(environment) == expected


@pytest.mark.parametrize("rank", ["", "two", "4", "-1"])
def test_a_rank_that_is_none(rank: str) -> None:
    with pytest.raises(EngineError, match="are not a rank of a launch; unset both"):
        Launch.of({"PMI_SIZE": "4", "PMI_RANK": rank})


@pytest.mark.parametrize(
    ("tp", "pp", "size", "message"),
    [
        (2, 2, 1, r"was built for 4 ranks \(tp 2 x pp 2\), and 3 of them are missing from this launch; start it as"),
        (2, 2, 3, "and 1 of them are missing"),
        (1, 1, 4, r"was built for 1 ranks .*, and this launch has 4; start it without mpirun"),
        (
            2,
            1,
            4,
            r"was built for 2 ranks .*, and this launch has 4; .*or build one with --tp and --pp whose product is 4",
        ),
    ],
)
def test_an_engine_of_another_world_size(
    executors: list[Any], checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tp: int, pp: int, size: int, message: str,
) -> None:  # fmt: skip
    engine = write_engine_directory(checkpoint("nvlm-d-tiny"), tmp_path / "engine", tp=tp, pp=pp)
    launched(monkeypatch, size, 0)
    with pytest.raises(EngineError, match=message):
        Pipeline.open(engine.path)
    with pytest.raises(EngineError, match=message):
        work(str(engine.path))
    assert not executors


def test_rank_0_answers_and_the_others_work(
    executors: list[Any], checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = write_engine_directory(checkpoint("nvlm-d-tiny"), tmp_path / "engine", tp=2)
    monkeypatch.setattr("fake_executor.FakeExecutor.world_size", 2)
    launched(monkeypatch, 2, 1)
    with pytest.raises(EngineError, match="rank 1 of this launch serves nobody, rank 0 does; start `python -m"):
        Pipeline.open(engine.path)
    monkeypatch.setattr("fake_executor.FakeExecutor.rank", 1)
    worker = threading.Thread(target=work, args=[str(engine.path)])
    worker.start()
    worker.join(30)
    (on_rank_1,) = executors
    assert on_rank_1.is_shut_down
    launched(monkeypatch, 2, 0)
    monkeypatch.setattr("fake_executor.FakeExecutor.rank", 0)
    with pytest.raises(EngineError, match="rank 0 of this launch answers requests; start `nvlm-trt serve` on it"):
        work(str(engine.path))
    with Pipeline.open(engine.path) as pipeline:
        assert tokens_of(list(pipeline.generate(chat("What?", max_tokens=2, ignore_eos=True))))
    on_rank_0 = executors[1]
    assert vars(on_rank_0.config.kv_cache_config) == vars(on_rank_1.config.kv_cache_config)
    assert on_rank_0.config.parallel_config.communication_mode.name == "LEADER"


def test_a_worker_reports_in_one_line(written: Directory, engine: Directory) -> None:
    for arguments, expected in (
        ([], "usage: python -m nvlm_trt.backends.tensorrt_llm.worker ENGINE"),
        ([str(engine("nvlm-d-tiny"))], "is of the backend onnxruntime; only tensorrt-llm has workers"),
        ([str(written("nvlm-d-tiny"))], "error: rank 0 of this launch answers requests"),
    ):
        command = [sys.executable, "-m", "nvlm_trt.backends.tensorrt_llm.worker", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1


# --- Triton ----------------------------------------------------------------------------------------------------------


def test_triton_runs_both_parts_with_our_python_models(
    executors: list[Any], written: Directory, copied: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine = Engine.open(written("nvlm-h-tiny"))
    render_repository(engine, placement_of(engine), tmp_path / "models", 7, RepositoryOptions())
    configs = {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for folder in (tmp_path / "models").iterdir()
    }
    assert {configs[name].backend for name in ("nvlm", "vision_encoder", "tiling")} == {"python"}
    assert configs["vision_encoder"].output[0].data_type == model_config_pb2.TYPE_FP32
    with pytest.raises(EngineError, match="not built yet"):
        placement_of(rewrite(copied("nvlm-d-tiny"), form="checkpoint"))


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-h-tiny"])
def test_answers_are_the_same_through_tritons_vision_encoder(
    executors: list[Any], written: Directory, opened: Opened, name: str
) -> None:
    """`nvlm` opens the engine without its vision encoder, and gets image tokens as float32 from the other model."""
    values = {"engine": str(written(name)), "threads": "1", "niceness": "0"}
    parameters = {key: {"string_value": value} for key, value in values.items()}
    pb_utils = SimpleNamespace(
        Logger=SimpleNamespace(log_info=lambda text: None),
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request[name]),
        Tensor=lambda name, array: array,
        InferenceResponse=lambda tensors: tensors,
    )
    model = VisionEncoderModel(pb_utils)
    model.initialize({"model_config": json.dumps({"parameters": parameters})})

    def encode(tiles: Any) -> Any:
        ((image_tokens,),) = model.execute([{"pixel_values": normalise_tiles(tiles)}])
        assert image_tokens.dtype == np.float32
        return image_tokens

    request = chat("What is the total?", RECEIPT.read_bytes(), max_tokens=10, ignore_eos=True)
    with Pipeline.open(written(name), encode_tiles=encode) as pipeline:
        apart = tokens_of(list(pipeline.generate(request)))
        with pytest.raises(AssertionError, match="without its vision encoder"):
            pipeline._generator.encode(torch.zeros(1, 3, 56, 56).numpy())
    assert apart == tokens_of(list(opened(name).generate(request)))
    model.finalize()
