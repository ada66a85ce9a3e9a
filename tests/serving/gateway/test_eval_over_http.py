"""TinyDocs over HTTP scores exactly what `eval --engine` scores, with a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error
from gateway_calls import png
from live_gateway import LiveGateway, open_gateway

from nvlm_trt.evaluation.answerers import EngineAnswerer
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.serving.gateway.auth import ApiKeys
from nvlm_trt.serving.gateway.gateway import GatewayOptions
from nvlm_trt.serving.openai_answerer import KEY_VARIABLE, OpenAiAnswerer

TOKENS = 24


def test_tinydocs(run_cli: Run, reading: LiveGateway, trained: Path, tmp_path: Path) -> None:
    results = tmp_path / "engine.json"
    status, out, _ = run_cli("eval", "--engine", trained, "--count", 3, "--output", results, "--json")
    assert status == 0
    in_process = json.loads(out)
    url = reading.url.removesuffix("/v1")
    status, out, err = run_cli("eval", "--url", url, "--count", 3, "--agree-with", results, "--json")
    assert status == 0, err
    over_http = json.loads(out)
    for part in ("summary", "answers", "samples", "options"):
        assert over_http[part] == in_process[part]
    scores = [answer["score"] for answer in over_http["answers"]]
    assert sum(scores) > 0.8 * len(scores), "a model that cannot read proves little"
    assert over_http["model"]["digest"] == in_process["model"]["digest"]


def test_marks_keep_their_places(reading: LiveGateway, trained: Path) -> None:
    prompts = ["Compare <image> with <image>.", "<image><image>\\<image>?", "Both", "What is <image>?"]
    samples = [Sample(str(i), "t", prompt, "?", (png(1), png(2))[: 1 + (i < 3)]) for i, prompt in enumerate(prompts)]
    samples.append(Sample("text", "t", "\\<image> and <image>", "?"))
    given = []
    for answerer in (OpenAiAnswerer(reading.url, TOKENS), EngineAnswerer(trained, TOKENS)):
        with answerer:
            given.append({sample.name: text for sample, text in answerer.answers(samples)})
    assert given[0] == given[1]
    assert len(set(given[0].values())) > 2


def test_more_at_once_than_are_queued(reading: LiveGateway) -> None:
    samples = [Sample(str(i), "t", f"copy {i}", "?") for i in range(40)]
    at_once, in_turn = ({s.name: t for s, t in OpenAiAnswerer(reading.url, 16, n).answers(samples)} for n in (30, 2))
    assert at_once == in_turn


def test_a_key_comes_from_the_environment(trained: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_gateway(trained, GatewayOptions(keys=ApiKeys(["k"]))) as closed:
        arguments = ("eval", "--url", closed.url, "--count", 1, "--tasks", "copy")
        assert_one_line_error(run_cli(*arguments), "wants an API key; set NVLM_TRT_API_KEY")
        monkeypatch.setenv(KEY_VARIABLE, "k")
        assert run_cli(*arguments)[0] == 0


def test_no_endpoint_there(run_cli: Run, reading: LiveGateway) -> None:
    assert_one_line_error(run_cli("eval", "--url", "http://127.0.0.1:9", "--count", 1), "no server answers at")
    wrong = f"http://127.0.0.1:{reading.port}/elsewhere"
    assert_one_line_error(run_cli("eval", "--url", wrong, "--count", 1), "not found")
