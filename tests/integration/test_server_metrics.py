"""The metrics page of a real server follows its requests, and holds every metric that the dashboard shows."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard import dashboard_metrics
from live_server import ENDLESS, MAX_QUEUE, make_image, wait_until, wait_until_idle
from prometheus_client.parser import text_string_to_metric_families

from nvlm_trt.api import Answer, Usage
from nvlm_trt.errors import QueueFullError, RequestError
from nvlm_trt.serving.client import AsyncClient, Client
from nvlm_trt.serving.triton.models.error_reason import REASONS
from nvlm_trt.serving.triton.models.histograms import HISTOGRAMS
from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer

DOCS = Path(__file__).parents[2] / "docs"
SLOTS = 8
Series = dict[tuple[str, str], float]  # (name, value of the label, if there is one) -> value


@pytest.fixture(scope="module")
def server(engine: Callable[[str], Path]) -> Iterator[TritonServer]:
    """A server of its own: the tests of others, which cancel and fail, count on theirs."""
    options = ServerOptions(repository=RepositoryOptions(max_queue=MAX_QUEUE))
    with TritonServer(engine("nvlm-d-tiny"), options) as server:
        yield server


def read(server: TritonServer) -> Series:
    wait_until_idle(server)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_address) as response:
        page = response.read().decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("nvlm_")
    }


def ended(series: Series) -> float:
    names = ("nvlm_finished_requests_total", "nvlm_refused_requests_total")
    return sum(value for (name, _), value in series.items() if name in names)


def growth(server: TritonServer, before: Series, requests: int) -> Series:
    """Returns what has changed once `requests` have ended."""
    wait_until(lambda: ended(read(server)) - ended(before) >= requests, "all requests are counted")
    page, last = read(server), before
    while page != last:  # observations follow a little later
        page, last = read(server), page
    return {key: value - before[key] for key, value in page.items() if value != before[key]}


def usage_of(answer: Answer) -> Usage:
    assert answer.usage is not None
    return answer.usage


def test_histograms_follow_the_requests(server: TritonServer) -> None:
    before = read(server)
    with Client(server.address) as client:
        sampling = {"max_tokens": 10, "ignore_eos": True}
        answers = [client.generate("Hi " * n, sampling=sampling) for n in (1, 2, 3)]
        images = [make_image(seed, 200, 60) for seed in (501, 502)]
        answers.append(client.generate("Compare", images=images, sampling=sampling, max_tiles=2))
        answers.append(client.generate("One", sampling={"max_tokens": 1, "ignore_eos": True}))
    usages = [usage_of(answer) for answer in answers]
    grown = growth(server, before, 5)
    counts = {key[0].removesuffix("_count"): value for key, value in grown.items() if key[0].endswith("_count")}
    tokens = sum(len(answer.token_ids) for answer in answers)
    assert counts == {
        **dict.fromkeys((histogram.name for histogram in HISTOGRAMS), 5),
        "nvlm_inter_token_latency_seconds": tokens - 5,
    }
    sums = {key[0].removesuffix("_sum"): value for key, value in grown.items() if key[0].endswith("_sum")}
    assert sums["nvlm_request_prompt_tokens"] == sum(usage.prompt_tokens for usage in usages)
    assert sums["nvlm_request_image_tiles"] == sum(usage.image_tiles for usage in usages) == 6
    assert sums["nvlm_request_queue_time_seconds"] == pytest.approx(sum(usage.queue_s for usage in usages))
    # the histograms' times begin a little earlier, when the request arrives
    for name, of_usages in (
        ("nvlm_time_to_first_token_seconds", sum(usage.ttft_s or 0.0 for usage in usages)),
        ("nvlm_e2e_request_latency_seconds", sum(usage.total_s for usage in usages)),
    ):
        assert of_usages <= sums[name] < of_usages + 0.5
    together = sums["nvlm_time_to_first_token_seconds"] + sums["nvlm_inter_token_latency_seconds"]
    assert together == pytest.approx(sums["nvlm_e2e_request_latency_seconds"])
    assert grown["nvlm_finished_requests_total", "length"] == 5
    tiles = [grown.get(("nvlm_request_image_tiles_bucket", bound), 0.0) for bound in ("0", "4", "7", "+Inf")]
    assert tiles == [4, 4, 5, 5]
    assert not any(name.startswith(("nvlm_refused", "nvlm_failed")) for name, _ in grown)


REFUSED: dict[str, dict[str, Any]] = {
    "too_large": {"prompt": "word " * 3000},
    "bad_parameter": {"prompt": "Hi", "sampling": {"heat": 1}},
    "bad_request": {"prompt": ""},
    "bad_image": {"prompt": "Hi", "images": [b"iVBORw0KGgo"]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_are_counted_by_reason(reason: str, server: TritonServer) -> None:
    before = read(server)
    with Client(server.address) as client:
        for _ in range(3):
            with pytest.raises(RequestError):
                client.generate(**REFUSED[reason])
    assert growth(server, before, 3) == {("nvlm_refused_requests_total", reason): 3}


def test_failures_are_counted_by_reason(server: TritonServer) -> None:
    before = read(server)
    with Client(server.address) as client, pytest.raises(RequestError, match="image 1: not a readable"):
        client.generate("Hi", images=[b"this is text"])
    assert growth(server, before, 1) == {
        ("nvlm_failed_requests_total", "bad_image"): 1,
        ("nvlm_finished_requests_total", "error"): 1,
        ("nvlm_image_cache_misses_total", ""): 1,
    }


def test_a_full_queue_and_cancelled_requests(server: TritonServer) -> None:
    before = read(server)

    async def overload() -> None:
        async with AsyncClient(server.address) as client:
            streams = [client.stream("Go on", sampling=ENDLESS) for _ in range(SLOTS)]
            for stream in streams:
                await anext(stream)
            waiting = {asyncio.ensure_future(client.generate("Go on", sampling=ENDLESS)) for _ in range(MAX_QUEUE + 2)}
            while len(waiting) > MAX_QUEUE:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=20)
                assert done
                assert all(isinstance(task.exception(), QueueFullError) for task in done)
            for task in waiting:
                task.cancel()
            for stream in streams:
                await stream.aclose()

    asyncio.run(overload())
    grown = growth(server, before, SLOTS + MAX_QUEUE + 2)
    assert grown["nvlm_refused_requests_total", "queue_full"] == 2
    assert grown["nvlm_finished_requests_total", "cancelled"] == SLOTS + MAX_QUEUE
    # a request that waits may get a slot when another is cancelled
    assert SLOTS <= grown["nvlm_time_to_first_token_seconds_count", ""] <= SLOTS + MAX_QUEUE
    assert ("nvlm_e2e_request_latency_seconds_count", "") not in grown


def test_the_page_and_its_documentation_have_the_same_metrics(server: TritonServer) -> None:
    table = (DOCS / "triton.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(nvlm_\w+)", table.split("| metric |")[1].split("\n\n")[0]))
    assert {family_of(name) for name, _ in read(server)} == documented
    reasons = {label for name, label in read(server) if name == "nvlm_refused_requests_total"}
    assert reasons == set(REASONS)
    assert all(f"`{reason}`" in table for reason in reasons)


def test_every_metric_of_the_dashboard_is_on_the_page(server: TritonServer) -> None:
    dashboard = json.loads((DOCS / "grafana_dashboard.json").read_text())
    shown = dashboard_metrics(dashboard)
    page = {name for name, _ in read(server)}
    assert shown <= page
    # the dashboard shows all of them
    assert {family_of(name) for name in page} == {family_of(name) for name in shown}


def family_of(name: str) -> str:
    """Returns the metric of a series of the page."""
    return next((h.name for h in HISTOGRAMS if re.fullmatch(rf"{h.name}_(bucket|sum|count)", name)), name)
