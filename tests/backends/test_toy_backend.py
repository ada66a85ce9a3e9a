"""Tests a backend from outside the package, added to the table: build, open, answer, plan, and place in Triton.

Nothing in the package knows the backend's name. Each decision of the backend shows in the package's behaviour."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures, IntArray, RangeArray, embedding_rows
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.spec import BackendSpec, MemoryModel, OpenOptions, TritonPlacement
from nvlm_trt.backends.table import added_backend, backend_names, find_backend
from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import Recipe, WeightForm
from nvlm_trt.engine import Engine, save_manifest
from nvlm_trt.errors import EngineError, ServerError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.model.precision import PrecisionTable
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions
from nvlm_trt.serving.triton.repository import RepositoryOptions, check_backend, placement_of, render_repository

Directory = Callable[[str], Path]
RunCli = Callable[..., tuple[int, str, str]]
ABACUS = "abacus"
ANSWER = "abacus"  # to every question, byte by byte


class AbacusBackend:
    """Implements `StepBackend` for NVLM-D: after n generated tokens it is sure of letter n of ANSWER."""

    def __init__(self, engine: Engine, stages: Collection[str]) -> None:
        self.config, self.limits = engine.config, engine.limits
        self.stages = set(stages)
        beads = json.loads((engine.path / "beads.json").read_text())
        assert beads["rows"] == engine.limits.max_slots
        self._prompt_lengths = [0] * beads["rows"]
        self.chunks: list[int] = []

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        return np.repeat(pixel_values.mean((1, 2, 3))[:, None, None], self.config.tokens_per_tile, 1)

    def import_tokens(self, tokens: Any) -> BackendArray:
        return np.array(tokens)

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        in_llm, _ = split_tiles(self.config.architecture, len(image_tokens))
        return ImageFeatures(np.asarray(image_tokens)[in_llm].reshape(-1, 1), None, len(image_tokens))

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        assert features.cross_kv is None

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> BackendArray:
        return np.concatenate([np.zeros((0, 1), np.float32), *embedding_rows(images, start, stop)])

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        assert np.count_nonzero(input_ids == self.config.image_token_id) == len(embeddings)
        self.chunks.append(len(input_ids))
        self._prompt_lengths[slot] = position + len(input_ids)
        return self._logits(0)

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        generated = positions - np.array(self._prompt_lengths[: len(positions)])
        return np.stack([self._logits(int(n) + 1) for n in generated])

    def score_tokens(self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray) -> None: ...

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        self._prompt_lengths[target] = self._prompt_lengths[source]

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        lengths = self._prompt_lengths
        lengths[first], lengths[second] = lengths[second], lengths[first]

    def to_host(self, array: BackendArray) -> FloatArray:
        return np.asarray(array, np.float32)

    def close(self) -> None: ...

    def __enter__(self) -> AbacusBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def _logits(self, letter: int) -> FloatArray:
        logits = np.zeros(self.config.llm.vocab_size, np.float32)
        logits[ord(ANSWER[letter]) if letter < len(ANSWER) else 258] = 9  # 258: <|im_end|> of the byte tokenizer
        return logits


class AbacusSteps:
    """Implements `BuildSteps`: a file with the number of rows."""

    tools: Sequence[str] = ("numpy",)
    weight_form = WeightForm.ONNXRUNTIME
    trial: BuildSteps | None = None

    def __init__(self, job: BuildJob) -> None:
        self._job = job

    def unquantised(self, precisions: Mapping[str, str]) -> str:
        return "fp16"

    def write_stages(self, directory: Path, recipe: Recipe) -> dict[str, Any] | None:
        beads = {"rows": self._job.source.limits.max_slots}
        (directory / "beads.json").write_text(json.dumps(beads))
        return {"wood": self._job.options["wood"]}

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        raise AssertionError("an abacus computes in fp16")


def open_abacus(engine: Engine, stages: Collection[str], options: OpenOptions) -> AbacusBackend:
    return AbacusBackend(engine, stages)


SPEC = BackendSpec(
    name=ABACUS,
    summary="abacus (by hand)",
    device="hand",
    precisions=PrecisionTable(ABACUS, default="fp16", names={"fp16": ("fp16",) * 5}),
    prefill_chunk=7,
    memory=MemoryModel(device="host", encode_tiles=1),
    probe=lambda: "a wooden frame",
    build=AbacusSteps,
    open=open_abacus,
    build_options={"wood": "beech"},
    placement=lambda engine: TritonPlacement(
        image_type="TYPE_FP16", max_tiles=3, needs_backend="wood", remedy="serve it in a workshop"
    ),
)


@pytest.fixture
def spec() -> Iterator[BackendSpec]:
    with added_backend(SPEC):
        yield SPEC


@pytest.fixture
def built(spec: BackendSpec, checkpoint: Directory, tmp_path: Path) -> Engine:
    options = {"wood": "oak"}
    return build_engine(
        checkpoint("nvlm-d-tiny"), tmp_path / "engine", {"max_slots": 2}, backend=ABACUS, options=options
    )


def test_it_is_in_the_table_only_while_it_is_added() -> None:
    assert ABACUS not in backend_names()
    with added_backend(SPEC):
        assert find_backend(ABACUS) is SPEC
    with pytest.raises(EngineError, match=r"backend 'abacus' is not one of: onnxruntime, tensorrt"):
        find_backend(ABACUS)


def test_build(built: Engine) -> None:
    manifest = built.manifest
    assert (manifest.backend, set(manifest.precision.values())) == (ABACUS, {"fp16"})
    assert manifest.backend_record == {"wood": "oak"}
    assert manifest.tool_versions.keys() == {"nvlm-trt", "numpy"}
    assert {"beads.json", "config.json", "tokenizer.json"} <= manifest.files.keys()
    assert "decoder.onnx" not in manifest.files


def test_open_and_ask(built: Engine) -> None:
    """Through slots, batcher, chunks, sampling and text: an answer about an image."""
    noise = np.random.default_rng(0).standard_normal((3, 3, 56, 56), dtype=np.float32)
    with open_backend(built) as backend:
        assert isinstance(backend, AbacusBackend)
        assert backend.stages == {"vision_encoder", "decoder"}
    opened: list[AbacusBackend] = []

    def remembered(engine: Engine, stages: Collection[str], options: OpenOptions) -> AbacusBackend:
        opened.append(open_abacus(engine, stages, options))
        return opened[-1]

    renamed = dataclasses.replace(SPEC, name="abacus2", open=remembered)
    save_manifest(built.path, built.manifest.model_copy(update={"backend": "abacus2"}))
    with added_backend(renamed), Pipeline.open(built.path, options=RuntimeOptions(max_queue=4)) as pipeline:
        images = [pipeline.import_tokens(opened[0].encode(noise))]
        chat = ChatRequest([Message("user", "What counts?")], images, SamplingParams(max_tokens=20))
        deltas = list(pipeline.generate(chat))
    assert "".join(delta.text for delta in deltas) == ANSWER
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.image_tiles == 3
    assert max(opened[0].chunks) == SPEC.prefill_chunk


def test_ask_from_the_command_line(built: Engine, run_cli: RunCli) -> None:
    status, out, err = run_cli("ask", "What counts?", "--image", "docs/images/receipt.png", "--engine", built.path)
    assert (status, out.strip()) == (0, ANSWER), err


def test_a_request_for_another_device_or_an_unknown_option_is_refused(built: Engine, run_cli: RunCli) -> None:
    with pytest.raises(EngineError, match="runs on the device 'hand', not on 'cuda'"):
        open_backend(built, device="cuda")
    arguments = ("--checkpoint", "nowhere", "--output", built.path.with_name("other"), "--backend", ABACUS)
    status, _, err = run_cli("build", *arguments, "--strip-weights")
    assert status == 2
    assert "--strip-weights belongs to the backend tensorrt, not to abacus; leave it out" in err
    status, _, err = run_cli("build", *arguments, "--precision", "int8")
    assert status == 2
    assert "precision 'int8' is not one of fp16" in err


def test_plan(spec: BackendSpec, run_cli: RunCli) -> None:
    status, out, _ = run_cli("plan", "--preset", "nvlm-d-tiny", "--backend", ABACUS, "--max-slots", "2", "--json")
    assert status == 0
    plan = json.loads(out)
    status, portable, _ = run_cli(
        "plan", "--preset", "nvlm-d-tiny", "--precision", "fp32", "--max-slots", "2", "--json"
    )
    assert status == 0
    assert (plan["backend"], set(plan["precision"].values())) == (ABACUS, {"fp16"})
    ours, theirs = plan["memory"], json.loads(portable)["memory"]
    assert ours["self_cache"] * 2 == theirs["self_cache"]  # 2 bytes instead of 4
    # half a tile's share, in half the bytes: one tile is encoded at once, there two
    assert ours["stages"]["vision_encoder"]["activations"] * 4 == theirs["stages"]["vision_encoder"]["activations"]
    assert ours["host_building"] == 0


def test_triton_repository(built: Engine, tmp_path: Path) -> None:
    placement = placement_of(built)
    render_repository(built, placement, tmp_path / "models", 7, RepositoryOptions())
    configs = {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for folder in (tmp_path / "models").iterdir()
    }
    assert configs["vision_encoder"].max_batch_size == 3
    assert configs["tiling"].output[0].data_type == model_config_pb2.TYPE_FP16
    (tmp_path / "python").mkdir()
    with pytest.raises(ServerError, match="needs Triton's backend wood.* serve it in a workshop"):
        check_backend(built, placement, tmp_path)
    (tmp_path / "wood").mkdir()
    check_backend(built, placement, tmp_path)


def test_a_stage_may_have_a_runtime_of_its_own(
    spec: BackendSpec, exact_engine: Directory, checkpoint: Directory, tmp_path: Path
) -> None:
    """Image tokens of ONNX Runtime's vision encoder reach the abacus, which has no vision encoder and counts them."""
    built = build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", {"max_slots": 2}, backend=ABACUS)
    sighted = Engine.open(exact_engine("nvlm-d-tiny"))
    for name in ("vision_encoder.onnx", "vision_encoder.onnx.data"):
        (built.path / name).write_bytes((sighted.path / name).read_bytes())
    built.manifest.runtimes = {"vision_encoder": "onnxruntime"}
    save_manifest(built.path, built.manifest)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 56, 56), dtype=np.float32)
    with open_backend(sighted, ["vision_encoder"]) as alone:
        expected = alone.to_host(alone.encode(pixels))
    with open_backend(Engine.open(built.path)) as both:
        assert np.array_equal(both.to_host(both.encode(pixels)), expected)
        assert both.features(both.encode(pixels)).tiles == 2
    assert placement_of(Engine.open(built.path)) == TritonPlacement()  # where the vision encoder runs


def test_a_stage_that_cannot_be_opened_closes_the_one_before(built: Engine) -> None:
    closed: list[str] = []

    class Watched(AbacusBackend):
        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: Any) -> None:
            closed.append(",".join(self.stages))

    def fail(*_: Any) -> AbacusBackend:
        raise ZeroDivisionError

    broken = dataclasses.replace(SPEC, name="broken", open=fail)
    watched = dataclasses.replace(SPEC, name="watched", open=lambda engine, stages, _: Watched(engine, stages))
    built.manifest.backend, built.manifest.runtimes = "broken", {"vision_encoder": "watched"}
    save_manifest(built.path, built.manifest)
    with added_backend(broken), added_backend(watched), pytest.raises(ZeroDivisionError):
        open_backend(Engine.open(built.path))
    assert closed == ["vision_encoder"]
