"""Tests the simulated engine: its clock by hand, its queue against queueing theory, its replicas by definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.backends.table import find_backend
from nvlm_trt.benchmark.metrics import summarize
from nvlm_trt.benchmark.slo import Slo
from nvlm_trt.benchmark.workload import Lengths
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, NvlmError, RequestError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.progress import no_progress
from nvlm_trt.simulation.measurement import measure_steps
from nvlm_trt.simulation.processor import Processor
from nvlm_trt.simulation.replica import Replica
from nvlm_trt.simulation.replicas import GOAL, size_fleet
from nvlm_trt.simulation.step_seconds import Line, MeasuredSteps, Overlap, read_steps
from nvlm_trt.simulation.traffic import WARM_UP, Traffic

SHARED = Overlap(step=2, encode=2)


def design(name: str = "nvlm-d-tiny", slots: int = 4) -> EngineDesign:
    spec = find_backend("onnxruntime")
    limits = EngineLimits(max_slots=slots, max_seq_len=512, max_image_tokens=512, max_tiles=6)
    return EngineDesign(PRESETS[name], limits, spec.precisions.parse("fp32"), spec, 1)


@dataclass(frozen=True)
class ByHand:
    """Steps of round numbers: 0.5 s per tile, 0.01 s per token of a prompt, 0.1 s per decoding step."""

    chunk_size: int = 64
    overlap: Overlap = SHARED

    def encode(self, tiles: int) -> float:
        return 0.5 * tiles

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> float:
        return 0.01 * tokens

    def decode(self, sequences: int, tokens: float, cross_tokens: int) -> float:
        return 0.1


def traffic(text: int, output: int, tiles: int = 0, requests: int = 1) -> Traffic:
    return Traffic(Lengths(text, text), Lengths(output, output), tiles, requests)


# --- the clock ---------------------------------------------------------------------------------------------------


def test_a_step_beside_an_image() -> None:
    """The image takes 0.5 s at half speed, in which a quarter of the step is done."""
    processor, done = Processor(SHARED), []
    processor.encode(0.25, lambda: done.append(processor.now))
    processor.step(1.0)
    assert done == [pytest.approx(0.5)]
    assert processor.now == pytest.approx(1.25)


def test_what_happens_in_the_middle_of_a_step_happens_then() -> None:
    processor, seen = Processor(SHARED), []
    processor.at(0.3, lambda: processor.encode(0.1, lambda: seen.append(processor.now)))
    processor.at(2.0, lambda: seen.append(processor.now))
    processor.step(1.0)
    assert seen == [pytest.approx(0.5)]
    assert processor.now == pytest.approx(1.1)
    assert processor.wait()
    assert seen[1] == pytest.approx(2.0)
    assert not processor.wait()


@given(images=st.lists(st.floats(0.01, 2), max_size=5), steps=st.lists(st.floats(0.01, 2), max_size=5))
def test_sharing_a_device_loses_no_work(images: list[float], steps: list[float]) -> None:
    processor = Processor(SHARED)
    for seconds in images:
        processor.encode(seconds, lambda: None)
    for seconds in steps:
        processor.step(seconds)
    while processor.wait():
        pass
    assert processor.now == pytest.approx(sum(images) + sum(steps))


# --- one replica -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_one_request_takes_its_steps(name: str) -> None:
    """Tokens of an image of 3 tiles in the LLM: 48, none, or one tile's 16."""
    in_llm = {"D": 48, "X": 0, "H": 16}[PRESETS[name].architecture]
    (record,) = Replica(design(name), ByHand()).answer(traffic(100, 5, tiles=3), rate=1)
    assert record.status == "ok"
    assert record.arrivals[0][0] - record.sent == pytest.approx(3 * 0.5 + 0.01 * (100 + in_llm))
    assert [after[0] - before[0] for before, after in zip(record.arrivals, record.arrivals[1:], strict=False)] == [
        pytest.approx(0.1)
    ] * 4
    assert record.tokens == 5


def test_the_queue_is_that_of_theory() -> None:
    """Prompts that are answered by one token, all alike, are an M/D/1 queue: Pollaczek and Khinchine give the mean."""
    seconds, load = 0.4, 0.6
    requests = Traffic(Lengths(40, 40), Lengths(1, 1), tiles=0, requests=6000)
    replica = Replica(design(slots=8), ByHand(), max_queue=6000)
    metrics = summarize(replica.answer(requests, load / seconds))
    assert metrics.ok == 6000 * (1 - WARM_UP)
    assert metrics.ttft_s is not None
    assert metrics.ttft_s.mean == pytest.approx(seconds * (1 + load / (2 * (1 - load))), 0.07)


def test_requests_decode_together() -> None:
    """A prompt delays the tokens of the others by its chunk; 4 slots answer 4 times as many tokens as one."""
    asked = Traffic(Lengths(10, 10), Lengths(50, 50), tiles=0, requests=40)
    one, four = (summarize(Replica(design(slots=n), ByHand()).answer(asked, 100)) for n in (1, 4))
    assert one.output_tokens_per_s is not None
    assert four.output_tokens_per_s is not None
    assert 3 < four.output_tokens_per_s / one.output_tokens_per_s < 4
    assert four.itl_s is not None
    assert four.itl_s.p50 == pytest.approx(0.1)
    assert four.itl_s.max == pytest.approx(0.2)


def test_a_full_queue_rejects() -> None:
    asked = Traffic(Lengths(10, 10), Lengths(50, 50), tiles=0, requests=40)
    metrics = summarize(Replica(design(), ByHand(), max_queue=3).answer(asked, 100))
    assert metrics.rejected > 0
    assert metrics.ok + metrics.rejected == 40 * (1 - WARM_UP)


def test_a_simulation_repeats_itself() -> None:
    asked = Traffic(Lengths(10, 200), Lengths(5, 50), tiles=2, requests=20)
    first, second = (Replica(design(), ByHand()).answer(asked, 0.5) for _ in range(2))
    assert first == second


def test_a_request_that_does_not_fit() -> None:
    tiny = design()
    with pytest.raises(RequestError, match=r"up to 612 tokens \(112 of its image\), a slot holds 512; raise --context"):
        traffic(400, 100, tiles=7).check(tiny.config, tiny.limits, 1)


# --- replicas ----------------------------------------------------------------------------------------------------


def test_one_replica_less_is_not_enough() -> None:
    asked = Traffic(Lengths(40, 40), Lengths(10, 20), tiles=1, requests=150)
    slo, replica = Slo(ttft=3.0, itl=0.3), Replica(design(), ByHand())
    sizing = size_fleet(replica, asked, rate=4.0, slo=slo, progress=no_progress)
    assert sizing.replicas > 1
    assert sizing.metrics.slo_met is not None
    assert sizing.metrics.slo_met >= GOAL
    again = summarize(replica.answer(asked, 4.0 / (sizing.replicas - 1)), slo)
    assert sizing.fewer == again
    assert again.slo_met is not None
    assert again.slo_met < GOAL


def test_an_slo_that_an_idle_engine_misses() -> None:
    with pytest.raises(NvlmError, match="an idle one has TTFT 1060 ms of 500; choose a faster --gpu"):
        size_fleet(Replica(design(), ByHand()), traffic(40, 5, 1, 30), 4.0, Slo(ttft=0.5), no_progress)


# --- measured times ----------------------------------------------------------------------------------------------

MEASURED = MeasuredSteps(
    engine="nvlm-d-tiny",
    machine="a processor",
    chunk_size=64,
    encoder=Line(base=0.1, slope=0.2),
    prompt=Line(base=0.01, slope=0.001),
    cached=1e-6,
    token={1: Line(base=0.01, slope=1e-5), 4: Line(base=0.02, slope=3e-5)},
    overlap=Overlap(step=1.5, encode=1.2),
)


def test_lines_between_measurements() -> None:
    assert MEASURED.encode(3) == pytest.approx(0.7)
    assert MEASURED.chunk(50, 100, 0) == pytest.approx(0.01 + 0.05 + 5e-3)
    assert MEASURED.decode(1, 100, 0) == pytest.approx(0.011)
    assert MEASURED.decode(2, 100, 0) == pytest.approx(0.011 + (0.023 - 0.011) / 3)
    assert MEASURED.decode(8, 100, 0) == pytest.approx(0.046)


def test_step_times_are_read_and_used(run_cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text(MEASURED.model_dump_json())
    assert read_steps(path) == MEASURED
    command = ("plan", "--preset", "nvlm-d-tiny", "--fleet", 8, "--tiles", 1, "--output-tokens", 4)
    status, out, _ = run_cli(*command, "--step-times", path, "--json")
    assert status == 0
    replicas = json.loads(out)["replicas"]
    assert replicas["step_times"] == "measured, nvlm-d-tiny on a processor"
    assert replicas["needed"] >= 3  # a replica encodes at most 1 / 0.3 images per second
    assert replicas["with_one_less"]["slo_met"] < 0.95 <= replicas["metrics_of_one"]["slo_met"]
    _, out, _ = run_cli(*command, "--step-times", path)
    assert f"8 requests/s need {replicas['needed']} replicas for TTFT 2000 ms and 100 ms per token in 95%" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the step times"),
        ("{", "are not JSON"),
        ('{"chunk_size": NaN}', "are not JSON"),
        (json.dumps({**MEASURED.model_dump(), "chunk_size": 0}), "chunk_size = 0"),
        (json.dumps({**MEASURED.model_dump(), "extra": 0}), "extra: unknown key"),
        (json.dumps({**MEASURED.model_dump(), "token": {}}), "token has no times"),
    ],
)
def test_damaged_step_times(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "steps.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EngineError, match=message):
        read_steps(path)


def test_replicas_of_a_gpu(run_cli: Run) -> None:
    command = ("plan", "--preset", "nvlm-d-72b", "--backend", "tensorrt-llm", "--gpu", "h100", "--gpus", 4)
    status, out, _ = run_cli(*command, "--precision", "fp8", "--fleet", 5, "--output-tokens", 8, "--json")
    assert status == 0
    replicas = json.loads(out)["replicas"]
    assert replicas["gpus"] == 4 * replicas["needed"]
    assert replicas["step_times"] == "planned"


def test_mistakes(run_cli: Run) -> None:
    command = ("plan", "--preset", "nvlm-d-tiny", "--fleet")
    assert_one_line_error(run_cli(*command, 5), "--fleet needs step times", "--step-times FILE")
    rates = ("--bandwidth", 20, "--tflops", 1)
    assert_one_line_error(run_cli(*command, 0, *rates), "requests per second is not possible")
    assert_one_line_error(run_cli(*command, 5, *rates, "--slo-ttft", 0), "--slo-ttft and --slo-itl", "above 0")


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-h-tiny"])
def test_an_engine_is_measured(engine: Callable[[str], Path], name: str) -> None:
    """What times are right, only a quiet machine can tell (lab.fleet_simulation)."""
    opened = Engine.open(engine(name))
    steps = measure_steps(opened, tag_length=1, tiles=2)
    assert steps.engine == name
    assert MeasuredSteps.model_validate_json(steps.model_dump_json()) == steps
    assert max(steps.token) == opened.limits.max_slots
    assert steps.encode(2) > 0
    assert steps.chunk(10, 0, 0) > 0
    assert all(steps.decode(count, 50, 0) > 0 for count in range(1, opened.limits.max_slots + 1))
    (record,) = Replica(EngineDesign.of(opened, 1), steps).answer(traffic(20, 5, 2), 1)
    assert record.status == "ok"
