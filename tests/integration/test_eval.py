"""Tests `nvlm-trt eval --url` against a real tritonserver, also against one that dies in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from live_server import MAX_QUEUE, ServerByName, make_image, wait_until

from nvlm_trt.errors import ServerError
from nvlm_trt.evaluation.accuracy import agreement
from nvlm_trt.evaluation.answerers import Answerer, EngineAnswerer
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.serving.server_answerer import ServerAnswerer
from nvlm_trt.serving.triton.server import TritonServer

TOKENS = 24


def samples(count: int) -> list[Sample]:
    """Every third without an image, every third with two."""
    made = []
    for i in range(count):
        images = tuple(make_image(seed) for seed in range(i, i + i % 3))
        made.append(Sample(f"sample {i}", "task", f"What is this, {i}?", "noise", images))
    return made


def answers(answerer: Answerer, asked: list[Sample]) -> dict[str, str]:
    with answerer:
        return {sample.name: text for sample, text in answerer.answers(asked)}


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_a_server_answers_as_its_engine_does(served: ServerByName, engine: Callable[[str], Path], name: str) -> None:
    through_triton, in_process = ServerAnswerer(served(name).address, TOKENS), EngineAnswerer(engine(name), TOKENS)
    assert through_triton.identity.source == "server"
    assert through_triton.identity.name == name
    assert through_triton.identity.digest == in_process.identity.digest
    ours, theirs = answers(through_triton, samples(12)), answers(in_process, samples(12))
    assert len(set(ours.values())) > 6, "answers that hardly differ prove little"
    assert agreement(ours, theirs).differing == ()


def test_more_requests_at_once_than_the_server_queues(served: ServerByName) -> None:
    address = served("nvlm-d-tiny").address
    asked = [Sample(f"sample {i}", "task", f"Count to {i}", "noise") for i in range(60)]
    assert 8 + MAX_QUEUE < 40
    at_once = answers(ServerAnswerer(address, max_tokens=64, concurrency=40), asked)
    assert at_once == answers(ServerAnswerer(address, max_tokens=64, concurrency=4), asked)
    assert len(at_once) == 60


def test_a_server_that_dies_in_the_middle_loses_nothing(engine: Callable[[str], Path], tmp_path: Path) -> None:
    """Exit 2 and one line; the same command on the restarted server, at another port, asks only what is missing."""
    total = 80
    lines = []
    for i in range(total):
        (tmp_path / f"{i}.png").write_bytes(make_image(i))
        lines.append(json.dumps({"image": f"{i}.png", "prompt": f"What is this, {i}?", "answer": "noise"}))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    output, partial = tmp_path / "results.json", tmp_path / "results.json.partial"

    def run_eval(address: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "nvlm_trt.cli", "eval", "--url", address, "--samples", tmp_path / "set.jsonl"]
        command += ["--output", output, "--max-tokens", "200", "--concurrency", "3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    def kill_in_the_middle(server: TritonServer) -> None:
        wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 10, "ten answers", seconds=60)
        server.kill()

    with TritonServer(engine("nvlm-h-tiny")) as server:
        killer = threading.Thread(target=kill_in_the_middle, args=(server,))
        killer.start()
        status, err = run_eval(server.address)
        killer.join()
    assert status == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    assert 10 <= len(kept) < total
    assert f"{len(kept)} of {total} answers are kept in {partial}" in err
    assert_refused_without_a_server(run_eval(server.address), partial)
    with TritonServer(engine("nvlm-h-tiny")) as server:
        status, err = run_eval(server.address)
    assert status == 0, err
    final = {entry["name"]: entry["answer"] for entry in json.loads(output.read_text())["answers"]}
    assert len(final) == total
    assert all(final[entry["name"]] == entry["answer"] for entry in kept)


def assert_refused_without_a_server(result: tuple[int, str], partial: Path) -> None:
    status, err = result
    assert status == 2
    assert "no server answers at" in err
    assert partial.exists()


def test_a_server_of_something_else(served: ServerByName) -> None:
    """The HTTP port speaks no gRPC."""
    server = served("nvlm-d-tiny")
    address = server.metrics_address.removeprefix("http://").removesuffix("/metrics")
    with pytest.raises(ServerError, match="no server answers"):
        ServerAnswerer(f"grpc://{address}", TOKENS)
