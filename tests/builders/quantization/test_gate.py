"""The accuracy gate, on the answers of a random fp32 engine, all of which a destroyed engine gets wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend
from nvlm_trt.builders import engine_build
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.build_samples import document_samples
from nvlm_trt.builders.quantization.calibration import read_calibration
from nvlm_trt.builders.quantization.encoded_images import EncodedImages
from nvlm_trt.builders.quantization.examination import Examination
from nvlm_trt.builders.quantization.gate import AccuracyError, GateOptions
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, NotFiniteError, RequestError
from nvlm_trt.evaluation.answerers import EngineAnswerer
from nvlm_trt.evaluation.samples import Sample, read_samples
from nvlm_trt.progress import no_progress
from nvlm_trt.runtime.sampling import Sampler

Directory = Callable[[str], Path]
NAME = "nvlm-x-tiny"


@pytest.fixture(scope="module")
def known_answers(tmp_path_factory: pytest.TempPathFactory, engine: Directory) -> Path:
    """Questions without images, so that the projector does not matter, and the fp32 engine's answers."""
    path = tmp_path_factory.mktemp("known") / "known.jsonl"
    questions = [Sample(str(i), f"task {i}", f"What is {i} + {i}?", "unknown") for i in range(3)]
    with EngineAnswerer(engine(NAME), max_tokens=32) as answerer:
        answers = {sample.name: text for sample, text in answerer.answers(questions)}
    lines = [{"prompt": each.prompt, "answer": answers[each.name], "task": each.task} for each in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def absurd_calibration(tmp_path_factory: pytest.TempPathFactory, calibration_file: Directory) -> Path:
    """A calibration by which the decoder's inputs saturate at a thousandth of their magnitudes."""
    calibration = read_calibration(calibration_file(NAME))
    for name, linear in calibration.linears.items():
        if name.startswith("language_model.model"):
            calibration.linears[name] = linear.model_copy(
                update={"clip": linear.clip / 1000, "abs_max": linear.abs_max / 1000}
            )
    path = tmp_path_factory.mktemp("absurd") / "calibration.json"
    calibration.save(path)
    return path


def build(checkpoint: Directory, output: Path, calibration: Path, gate: GateOptions | None, precision: str) -> Engine:
    options = QuantizationOptions(calibration=calibration, smoothquant_alpha=0, gate=gate)
    return build_engine(checkpoint(NAME), output, precision=precision, quantization=options)


def test_refuses_a_destroyed_engine_and_names_the_component(
    checkpoint: Directory, tmp_path: Path, absurd_calibration: Path, known_answers: Path
) -> None:
    with pytest.raises(AccuracyError, match=r"decoder costs most \(.* in int8\): .*decoder=fp32") as caught:
        gate = GateOptions(known_answers)
        build(checkpoint, tmp_path / "engine", absurd_calibration, gate, "decoder=int8,projector=fp8")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    costs = {cost.component: cost for cost in caught.value.costs}
    assert set(costs) == {"projector", "decoder"}
    assert costs["decoder"].precision == "int8"
    assert costs["decoder"].drop == 100
    assert costs["projector"].drop == 0


def test_publishes_what_keeps_its_accuracy(
    checkpoint: Directory, tmp_path: Path, calibration_file: Directory, known_answers: Path
) -> None:
    gate = GateOptions(known_answers, max_drop=100)
    record = build(checkpoint, tmp_path / "engine", calibration_file(NAME), gate, "int8").manifest.accuracy_gate
    assert record is not None
    assert record["result"] == "passed"
    assert record["fp32_score"] == 1
    assert 0 <= record["score"] <= 1
    assert (record["samples"]["count"], record["samples"]["of"]) == (3, 3)
    assert set(record["tasks"]) == {"task 0", "task 1", "task 2"}
    assert record["max_drop_points"] == 100


def test_publishes_unmeasured_if_told(checkpoint: Directory, tmp_path: Path, absurd_calibration: Path) -> None:
    engine = build(checkpoint, tmp_path / "engine", absurd_calibration, None, "decoder=int8")
    assert engine.manifest.accuracy_gate == {"result": "not measured"}
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_logits_that_are_not_finite_have_the_advice_of_a_build(
    checkpoint: Directory, tmp_path: Path, known_answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(self: Sampler, logits: np.ndarray) -> None:
        raise NotFiniteError("the model produced logits that are not finite; check the engine with `nvlm-trt verify`")

    monkeypatch.setattr(Sampler, "sample", sample)
    options = QuantizationOptions(gate=GateOptions(known_answers))
    with pytest.raises(EngineError, match=r"^accuracy gate \(bf16\): .* not finite; check the checkpoint") as caught:
        build_engine(checkpoint(NAME), tmp_path / "engine", precision="int8-weight-only", quantization=options)
    assert "--output" not in str(caught.value)
    assert "verify" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_says_so_when_fp32_knows_nothing(
    checkpoint: Directory, tmp_path: Path, absurd_calibration: Path, samples: Path
) -> None:
    engine = build(checkpoint, tmp_path / "engine", absurd_calibration, GateOptions(samples, count=1), "decoder=int8")
    record = engine.manifest.accuracy_gate
    assert record is not None
    assert record["result"] == "meaningless"
    assert record["fp32_score"] == 0
    assert record["equal_answers"] == 0
    assert record["samples"]["count"] == 1


# --- ending early ------------------------------------------------------------------------------------------------

ASKED, OF = 64, 128  # scores of 0 leave no doubt after 57 samples


def questions(path: Path, answers: list[str]) -> GateOptions:
    lines = [{"prompt": f"{i} + {i} =", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return GateOptions(path)


def answered(engine_dir: Path, gate: GateOptions) -> GateOptions:
    """Replace the known answers by those of an engine."""
    assert gate.samples is not None
    lines = [json.loads(line) for line in gate.samples.read_text().splitlines()]
    with EngineAnswerer(engine_dir, max_tokens=32) as answerer:
        for sample, text in answerer.answers(read_samples(gate.samples)):
            lines[int(sample.name) - 1]["answer"] = text
    gate.samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return gate


def test_ends_early_when_the_unquantised_engine_knows_nothing(checkpoint: Directory, tmp_path: Path) -> None:
    seen: dict[str, tuple[float, float]] = {}

    def progress(description: str, done: float, total: float) -> None:
        seen[description] = (done, total)

    gate = questions(tmp_path / "gate.jsonl", ["unknown"] * OF)
    engine = build_engine(
        checkpoint(NAME),
        tmp_path / "engine",
        precision="int8-weight-only",
        quantization=QuantizationOptions(gate=gate),
        progress=progress,
    )
    record = engine.manifest.accuracy_gate
    assert record is not None
    assert record["result"] == "meaningless"
    assert (record["samples"]["count"], record["samples"]["of"]) == (ASKED, OF)
    assert (record["equal_answers"] * ASKED).is_integer()
    for which in ("bf16", "quantised"):
        assert seen[f"accuracy gate: {which} answering"] == (ASKED, ASKED)


def test_ends_early_when_the_loss_leaves_no_doubt(
    checkpoint: Directory, engine: Directory, tmp_path: Path, absurd_calibration: Path
) -> None:
    gate = answered(engine(NAME), questions(tmp_path / "gate.jsonl", ["unknown"] * OF))
    asked: list[str] = []
    real = Examination.ask

    def noted(examination: Examination, count: int) -> None:
        real(examination, count)
        asked.append(f"{examination.what} {count}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Examination, "ask", noted)
        with pytest.raises(AccuracyError, match="a loss of 100.00 .* on 32 samples; decoder costs most"):
            build(checkpoint, tmp_path / "engine", absurd_calibration, gate, "decoder=int8,projector=fp8")
    # a destroyed engine needs fewer samples than an eighth; then each component alone, on the same ones
    assert asked == ["bf16 32", "quantised 32", "projector 32", "decoder 32"]


# --- images ------------------------------------------------------------------------------------------------------

TRAINED = Path(__file__).parents[3] / "checkpoints" / "nvlm-h-tiny"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Collects the pixels of every image that a vision encoder gets."""
    seen: list[bytes] = []
    real = OnnxRuntimeBackend.encode

    def noted(backend: OnnxRuntimeBackend, pixel_values: np.ndarray) -> np.ndarray:
        seen.append(pixel_values.tobytes())
        return real(backend, pixel_values)

    monkeypatch.setattr(OnnxRuntimeBackend, "encode", noted)
    return seen


@pytest.mark.parametrize(
    ("precision", "encodings"),
    [("int8-weight-only", 1), ("int8-weight-only,vision_encoder=int8-weight-only", 2)],
    ids=["one encoder", "two encoders"],
)
def test_an_image_is_encoded_once_by_each_vision_encoder(
    tmp_path: Path, encoded: list[bytes], precision: str, encodings: int
) -> None:
    options = QuantizationOptions(gate=GateOptions(count=26))
    engine = build_engine(TRAINED, tmp_path / "engine", precision=precision, quantization=options, smoke_test=False)
    record = engine.manifest.accuracy_gate
    assert record is not None
    assert record["result"] == "passed"
    assert record["fp32_score"] > 0.9
    assert len(encoded) == encodings * len(set(encoded)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_refusal_measures_components_without_encoding_again(
    checkpoint: Directory, engine: Directory, tmp_path: Path, absurd_calibration: Path, encoded: list[bytes]
) -> None:
    image = TRAINED.parents[1] / "docs" / "images" / "receipt.png"
    (tmp_path / "gate.jsonl").write_text(json.dumps({"prompt": "Total?", "answer": "unknown", "image": str(image)}))
    gate = answered(engine(NAME), GateOptions(tmp_path / "gate.jsonl"))
    encoded.clear()
    options = QuantizationOptions(calibration=absurd_calibration, smoothquant_alpha=0, gate=gate)
    with pytest.raises(AccuracyError, match="decoder costs most") as caught:
        build_engine(
            checkpoint(NAME),
            tmp_path / "engine",
            precision="decoder=int8,lm_head=int8-weight-only",
            quantization=options,
            smoke_test=False,
        )
    assert [cost.component for cost in caught.value.costs] == ["decoder", "lm_head"]
    assert len(encoded) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gate.jsonl"]


def test_kept_image_tokens_change_no_answer(tmp_path: Path, engine: Directory) -> None:
    samples = document_samples("validation", 13, no_progress)
    with EngineAnswerer(engine(NAME), max_tokens=8) as answerer:
        own = dict(answerer.answers(samples))
    with EncodedImages(engine(NAME), tmp_path) as images:
        for _ in range(2):  # encoded, then from disk
            with EngineAnswerer(engine(NAME), max_tokens=8, encode_tiles=images.encode) as answerer:
                assert dict(answerer.answers(samples)) == own


def test_bad_samples_end_a_build_before_it_begins(checkpoint: Directory, tmp_path: Path) -> None:
    path = tmp_path / "gate.jsonl"
    path.write_text('{"prompt": "a"}\n')
    begun = []

    def progress(description: str, done: float, total: float) -> None:
        begun.append(description)

    with pytest.raises(RequestError, match="gate.jsonl line 1: no 'answer'"):
        build_engine(
            checkpoint(NAME),
            tmp_path / "engine",
            precision="int8",
            progress=progress,
            quantization=QuantizationOptions(gate=GateOptions(path)),
        )
    assert begun == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("drop", [-1.0, 101.0, float("nan")])
def test_a_drop_that_cannot_be(drop: float) -> None:
    with pytest.raises(EngineError, match="--max-accuracy-drop"):
        GateOptions(max_drop=drop)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_that_cannot_be(alpha: float) -> None:
    with pytest.raises(EngineError, match="--smoothquant-alpha"):
        QuantizationOptions(smoothquant_alpha=alpha)


def test_a_gate_whose_engines_do_not_fit_ends_a_build_before_it_begins(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_build, "available_memory", lambda: 20_000_000)
    options = QuantizationOptions(gate=GateOptions(count=13))
    build = partial(build_engine, checkpoint(NAME), tmp_path / "engine", precision="int8-weight-only")
    with pytest.raises(EngineError, match=r"an engine in bf16, which needs 0\.\d\d GB of memory, .*--no-gate"):
        build(quantization=options)
    assert list(tmp_path.iterdir()) == []
    build(quantization=QuantizationOptions(gate=None))
