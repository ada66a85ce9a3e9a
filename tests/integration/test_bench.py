"""Runs `nvlm-trt bench` against a real tritonserver, also one that dies in the middle. Tests no times."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from live_server import MAX_QUEUE, ServerByName, metric, wait_until, wait_until_idle

from nvlm_trt.benchmark.results_document import read_document
from nvlm_trt.serving.triton.server import TritonServer

REQUESTS, TOKENS = 10, 12
SLOTS = 8
COMMAND = [sys.executable, "-m", "nvlm_trt.cli", "bench"]
SMALL = [
    "--prompt-tokens",
    "5:40",
    "--output-tokens",
    str(TOKENS),
    "--image-size",
    "120x80",
    "--requests",
    str(REQUESTS),
]
ENDLESS = ["--output-tokens", "3000", "--image-size", "120x80", "--requests", "40"]


@pytest.fixture
def server(served: ServerByName) -> Iterator[TritonServer]:
    server = served("nvlm-h-tiny")
    wait_until_idle(server)
    yield server
    wait_until_idle(server)


def addresses(server: TritonServer) -> list[str]:
    return ["--url", server.address, "--metrics-url", server.metrics_address]


def bench(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def measured(server: TritonServer, *arguments: object) -> dict[str, Any]:
    status, out, err = bench(*addresses(server), "--json", *arguments)
    assert status == 0, err
    return json.loads(out)


def assert_adds_up(point: dict[str, Any], warmup: int, tokens: int = TOKENS) -> None:
    """Compares the numbers of requests and tokens that were asked for, received and counted by the server."""
    metrics, counters = point["metrics"], point["server"]["counters"]
    assert point["status"] == "complete"
    assert (metrics["requests"], metrics["ok"]) == (REQUESTS, REQUESTS)
    assert [metrics[name] for name in ("rejected", "failed", "refused", "cancelled")] == [0, 0, 0, 0]
    assert point["errors"] == []
    assert metrics["output_tokens"] == REQUESTS * tokens
    assert counters["finished_length"] == REQUESTS + warmup
    assert counters["generated_tokens"] == (REQUESTS + warmup) * tokens
    assert counters["finished_cancelled"] == counters["finished_error"] == counters["late_tokens"] == 0


def test_counts_add_up_and_new_images_are_new(server: TritonServer, tmp_path: Path) -> None:
    output, table, plots = tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "plots"
    files = ("--output", output, "--csv", table, "--plots", plots, "--records", "--processes", 2)
    slo = ("--slo-ttft", 1e6)
    results = measured(server, *SMALL, "--concurrency", "1,3", "--rate", "20", "--warmup", 4, *slo, *files)
    assert results == read_document(output)
    assert [point["load"] for point in results["points"]] == [
        {"mode": "closed", "concurrency": 1},
        {"mode": "closed", "concurrency": 3},
        {"mode": "open", "rate": 20.0},
    ]
    for point in results["points"]:
        assert_adds_up(point, warmup=4)
        metrics, server_counted = point["metrics"], point["server"]
        assert (metrics["images"], metrics["cached_images"]) == (REQUESTS, 0)
        assert server_counted["counters"]["image_cache_misses"] == REQUESTS + 4
        assert server_counted["counters"]["image_cache_hits"] == 0
        assert metrics["tiles"] == 7 * REQUESTS  # 3:2 is six tiles and the thumbnail
        assert server_counted["models"]["vision_encoder"]["rows"] == 7 * (REQUESTS + 4)
        assert server_counted["models"]["tiling"]["requests"] == REQUESTS + 4
        assert metrics["slo_met"] == 1.0
        assert len(point["client"]["load_cpu_s"]) == 2
        assert sum(point["stages"].values()) == pytest.approx(metrics["e2e_s"]["mean"], rel=1e-6)
        assert min(point["stages"].values()) > -0.001
        assert_records(point["records"])
    assert results["server"]["model"] == "nvlm-h-tiny"
    assert table.read_text().count("\n") == 4
    assert {path.name for path in plots.iterdir()} == {"latency.png", "stages.png"}


def assert_records(records: list[dict[str, Any]]) -> None:
    assert sorted(record["index"] for record in records) == list(range(REQUESTS + 4))
    assert [record["warmup"] for record in sorted(records, key=lambda r: r["index"])] == [True] * 4 + [False] * REQUESTS
    # the chat's format and the thumbnail are the same in every prompt: only the text's tokens differ
    lengths = {record["usage"]["prompt_tokens"] for record in records}
    assert max(lengths) - min(lengths) <= 35
    for record in records:
        times = [record["sent"], *(when for when, _ in record["arrivals"]), record["ended"]]
        assert times == sorted(times)
        assert record["sent"] >= (record["due"] or 0.0)
        assert sum(tokens for _, tokens in record["arrivals"]) == record["asked_tokens"] == TOKENS


def test_repeated_images_are_cached(server: TritonServer) -> None:
    options = ("--concurrency", "2", "--images", 2, "--repeat-images", "--warmup", 3)
    (point,) = measured(server, *SMALL, *options, "--image-size", "90x80")["points"]
    assert_adds_up(point, warmup=3)
    assert (point["metrics"]["images"], point["metrics"]["cached_images"]) == (2 * REQUESTS, 2 * REQUESTS)
    assert point["server"]["counters"]["image_cache_misses"] == 2, "in the warm-up"
    assert point["server"]["counters"]["image_cache_hits"] == 2 * (REQUESTS + 3) - 2
    assert point["caveats"] == []


def test_text_only_without_metrics_and_with_a_table(server: TritonServer, tmp_path: Path) -> None:
    options = ("--images", 0, "--prompt-tokens", 20, "--concurrency", 2, "--output", tmp_path / "a.json")
    status, out, err = bench("--url", server.address, *SMALL, *options)
    assert status == 0, err
    assert err.startswith("note: without the server's own metrics")
    assert re.search(r"2 at once +10 ", out)
    (point,) = read_document(tmp_path / "a.json")["points"]
    assert point["server"] is None
    assert point["metrics"]["prompt_tokens_mean"] == pytest.approx(20 + prompt_overhead(server))
    status, out, err = bench("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert (status, err) == (0, "")


def prompt_overhead(server: TritonServer) -> int:
    """Tokens of the chat's format: all but one of a prompt with a text of one byte, which is one token here."""
    from nvlm_trt.serving.client import Client

    with Client(server.address) as client:
        usage = client.generate("x", sampling={"max_tokens": 1}).usage
    assert usage is not None
    return usage.prompt_tokens - 1


def test_a_full_queue_is_counted(server: TritonServer) -> None:
    users = SLOTS + MAX_QUEUE + 4
    options = ("--images", 0, "--concurrency", users, "--requests", 40, "--output-tokens", 100, "--slo-ttft", 1e6)
    (point,) = measured(server, *SMALL, *options)["points"]
    metrics = point["metrics"]
    assert point["status"] == "complete"
    assert metrics["ok"] + metrics["rejected"] == metrics["requests"] == 40
    rejected = sum(error["count"] for error in point["errors"])
    assert rejected >= 4, "warm-up included"
    assert all(error["status"] == "rejected" and "the queue holds" in error["error"] for error in point["errors"])
    assert point["server"]["counters"]["finished_length"] == 40 + users - rejected
    assert metrics["slo_met"] == pytest.approx(metrics["ok"] / 40)


def test_requests_that_the_server_refuses_are_an_error(server: TritonServer, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    for options, fragment in (
        (("--prompt-tokens", 5000), "the engine holds 4096"),
        (("--prompt-tokens", 4000, "--output-tokens", 200), "ask for fewer --output-tokens"),
        (("--max-tiles", 7), "max_tiles = 7 is not allowed"),
    ):
        arguments = (*addresses(server), *SMALL, *options, "--concurrency", 1, "--output", output, "--overwrite")
        status, _, err = bench(*arguments)
        assert status == 2, err
        (error,) = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert error.startswith("error: ")
        assert fragment in error
        assert read_document(output)["status"] == "failed"


def test_addresses_of_other_services_are_an_error(server: TritonServer) -> None:
    http = server.http_address
    for options, fragment in (
        (("--url", http.replace("http", "grpc")), "no server answers"),  # speaks no gRPC
        (("--url", server.address, "--metrics-url", http), f"no metrics at {http} (Not Found)"),
        (("--url", server.address, "--metrics-url", f"{http}/v2"), "does not hold an nvlm-trt server's metrics"),
        (("--url", server.address, "--tokenizer", "/none"), "no tokenizer.json in /none"),
    ):
        status, out, err = bench(*options, *SMALL)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert fragment in err


def start_endless(server: TritonServer, output: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts a benchmark whose answers take long in its own process group, as a shell does."""
    command = [*COMMAND, *addresses(server), "--output", str(output), "--records", *ENDLESS, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_ctrl_c_keeps_the_measurements(server: TritonServer, tmp_path: Path) -> None:
    """Exits with 130, and leaves no request on the server and no load process."""
    output = tmp_path / "a.json"
    finished_before = metric(server, "nvlm_finished_requests_total")
    options = ["--output-tokens", "1:600", "--concurrency", "4", "--warmup", "1", "--requests", "4000"]
    process = start_endless(server, output, *options)
    wait_until(lambda: metric(server, "nvlm_finished_requests_total") - finished_before > 8, "some answers", 60)
    workers = psutil.Process(process.pid).children()
    assert workers
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    results = read_document(output)
    (point,) = results["points"]
    assert (results["status"], point["status"]) == ("interrupted", "interrupted")
    assert point["metrics"]["ok"] >= 4
    cancelled = point["metrics"]["cancelled"]
    assert 1 <= cancelled <= 4, "the requests that were open"
    assert f"interrupted ({point['metrics']['ok']} measured requests are kept in {output})" in err
    assert "4 at once" in out, "the table of what was measured"
    assert sum(record["status"] == "cancelled" for record in point["records"]) == cancelled
    assert point["errors"] == []
    # a request that has just ended may be too late to cancel
    assert point["server"]["counters"]["finished_cancelled"] <= cancelled
    assert point["server"]["counters"]["finished_error"] == 0
    assert metric(server, "nvlm_open_requests") == 0
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_request_that_takes_too_long_has_failed(server: TritonServer) -> None:
    """Cancels it too: the next request finds a free slot, and the fixture finds none in use."""
    options = ["--output-tokens", 3000, "--images", 0, "--concurrency", 2, "--warmup", 0, "--requests", 4]
    (point,) = measured(server, *options, "--timeout", 0.4)["points"]
    assert (point["metrics"]["ok"], point["metrics"]["failed"]) == (0, 4)
    (error,) = point["errors"]
    assert error["error"] == "no end within 0.4 s; a slow server needs a larger --timeout"
    assert point["server"]["counters"]["finished_cancelled"] == 4


def test_a_server_that_hangs_ends_the_benchmark(engine: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    others = psutil.Process().children(recursive=True)
    with TritonServer(engine("nvlm-d-tiny")) as server:
        processes = [each for each in psutil.Process().children(recursive=True) if each not in others]
        process = start_endless(
            server, output, "--concurrency", "2", "--images", "0", "--warmup", "0", "--timeout", "3"
        )
        wait_until(lambda: metric(server, "nvlm_active_slots") == 2, "two requests", 60)
        for each in processes:
            each.suspend()
        _, err = process.communicate(timeout=100)
        for each in processes:
            each.resume()
    assert process.returncode == 2, err
    assert f"error: {server.address} does not answer any more (no end within 3 s;" in err
    assert read_document(output)["points"][0]["metrics"]["failed"] >= 1


def test_a_benchmark_that_is_killed_leaves_no_request(server: TritonServer, tmp_path: Path) -> None:
    process = start_endless(server, tmp_path / "a.json", "--concurrency", "4")
    wait_until(lambda: metric(server, "nvlm_active_slots") == 4, "four requests", 60)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=20)[1]
    wait_until_idle(server)


def test_a_load_process_that_dies_is_an_error(server: TritonServer, tmp_path: Path) -> None:
    process = start_endless(server, tmp_path / "a.json", "--concurrency", "2")
    wait_until(lambda: metric(server, "nvlm_active_slots") == 2, "two requests", 60)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert err.startswith("error: a load process ended with status -9"), err
    assert read_document(tmp_path / "a.json")["status"] == "failed"


def test_a_server_that_dies_in_the_middle_loses_nothing(engine: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "a.json"

    def kill_in_the_second_load(server: TritonServer) -> None:
        wait_until(lambda: output.exists() and len(read_document(output)["points"]) == 1, "the first load", 100)
        done = metric(server, "nvlm_finished_requests_total")
        wait_until(lambda: metric(server, "nvlm_finished_requests_total") - done >= 6, "six answers more", 60)
        server.kill()

    with TritonServer(engine("nvlm-d-tiny")) as server:
        killer = threading.Thread(target=kill_in_the_second_load, args=(server,))
        killer.start()
        options = ("--concurrency", "1,3,2", "--images", 0, "--requests", 30, "--output-tokens", 100)
        status, out, err = bench(*addresses(server), "--output", output, *options)
        killer.join()
        assert status == 2, err
        (error,) = [line for line in err.splitlines() if not line.startswith("note: ")]
        results = read_document(output)
        assert results["status"] == "failed"
        assert [point["status"] for point in results["points"]] == ["complete", "failed"]
        first, second = (point["metrics"] for point in results["points"])
        assert first["ok"] == 30
        assert 2 <= second["ok"] < 30
        assert 1 <= second["failed"] <= 3
        assert error.startswith(f"error: {server.address} does not answer any more")
        assert f"({30 + second['ok']} measured requests are kept in {output})" in error
        assert "1 at once" in out, "the table of what was measured"
        assert_dead_at_start(bench(*addresses(server), "--output", output, "--overwrite"), server.address)
        assert read_document(output) == results, "still there"


def assert_dead_at_start(result: tuple[int, str, str], address: str) -> None:
    status, out, err = result
    assert (status, out) == (2, "")
    assert err == f"error: no server answers at {address}; start one with `nvlm-trt serve`, or check host and port\n"
