"""Counts of Triton's metrics page, and the latency parts that they give."""

from __future__ import annotations

import pytest
from results import point

from nvlm_trt.benchmark.latency_parts import LatencyParts
from nvlm_trt.benchmark.load import ClosedLoop
from nvlm_trt.benchmark.triton_metrics import CounterSnapshot, ModelTimes, TritonMetrics, parse
from nvlm_trt.errors import ServerError

# a page of tritonserver 2.51, shortened
PAGE = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="vision_encoder",version="1"} 2
nv_inference_request_success{model="nvlm",version="1"} 6
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="nvlm",reason="CANCELED",version="1"} 0
# TYPE nv_inference_count counter
nv_inference_count{model="vision_encoder",version="1"} 8
nv_inference_count{model="nvlm",version="1"} 6
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="vision_encoder",version="1"} 1
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="vision_encoder",version="1"} 66822
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{model="vision_encoder",version="1"} 2203
# TYPE nv_inference_compute_input_duration_us counter
nv_inference_compute_input_duration_us{model="vision_encoder",version="1"} 183
# TYPE nv_inference_compute_infer_duration_us counter
nv_inference_compute_infer_duration_us{model="vision_encoder",version="1"} 64157
# TYPE nv_inference_compute_output_duration_us counter
nv_inference_compute_output_duration_us{model="vision_encoder",version="1"} 268
# TYPE nvlm_image_cache_misses_total counter
nvlm_image_cache_misses_total 2
# TYPE nvlm_generated_tokens_total counter
nvlm_generated_tokens_total 42
# TYPE nvlm_finished_requests_total counter
nvlm_finished_requests_total{reason="cancelled"} 1
nvlm_finished_requests_total{reason="length"} 4
# TYPE nvlm_open_requests gauge
nvlm_open_requests 3
"""


def test_a_page_is_parsed() -> None:
    snapshot = parse(PAGE)
    encoder = snapshot.models["vision_encoder"]
    assert (encoder.requests, encoder.rows, encoder.executions) == (2, 8, 1)
    assert encoder.total_s == pytest.approx(0.066822)
    assert encoder.queue_s == pytest.approx(0.002203)
    assert encoder.compute_s == pytest.approx((183 + 64157 + 268) / 1e6)
    assert encoder.mean_s == pytest.approx(0.033411)
    assert snapshot.counters == {
        "generated_tokens": 42,
        "image_cache_misses": 2,
        "finished_cancelled": 1,
        "finished_length": 4,
    }
    assert snapshot.open_requests == 3


def test_counts_between_two_pages() -> None:
    before = parse(PAGE)
    page = PAGE.replace("tokens_total 42", "tokens_total 50").replace(
        'encoder",version="1"} 8', 'encoder",version="1"} 15'
    )
    difference = parse(page).since(before)
    assert difference is not None
    assert difference.counters["generated_tokens"] == 8
    assert difference.models["vision_encoder"] == ModelTimes(0, 7, 0, 0.0, 0.0, 0.0)
    assert difference.models["vision_encoder"].mean_s == 0.0
    assert before.since(parse(page)) is None, "a server that was started anew"


@pytest.mark.parametrize(
    "page", ["", "<html></html>", "a 1\n", PAGE.replace("nvlm_gen", "x"), PAGE.replace("request_suc", "x")]
)
def test_pages_of_other_servers_are_an_error(page: str) -> None:
    with pytest.raises(ValueError):
        parse(page)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8002", "grpc://127.0.0.1:8001", "http://", "http://x:0/", "http://x:y/"]
)
def test_addresses_of_another_form_are_an_error(url: str) -> None:
    with pytest.raises(ServerError, match="is not http://host:port/metrics"):
        TritonMetrics(url)


def test_an_address_without_server_is_an_error() -> None:
    with pytest.raises(ServerError, match=r"no metrics at http://127.0.0.1:9/metrics \(.*refused.*--metrics-url"):
        TritonMetrics("http://127.0.0.1:9/metrics").read()


def counted(mean: float) -> CounterSnapshot:
    """A server whose tiling takes `mean` seconds and whose encoder takes twice as long."""
    models = {"tiling": ModelTimes(4, 4, 4, 4 * mean, 0, 0), "vision_encoder": ModelTimes(4, 28, 2, 8 * mean, 0, 0)}
    return CounterSnapshot(models, {})


@pytest.mark.parametrize(
    ("server", "tiling", "vision", "other"),
    [
        (None, 0.0, 0.0, 0.3),
        (counted(0.05), 0.05, 0.1, 0.15),
        (counted(0.2), 0.1, 0.2, 0.0),  # Triton says 0.2 + 0.4, but a request waited only 0.3
    ],
)
def test_latency_parts_add_up_to_the_latency(
    server: CounterSnapshot | None, tiling: float, vision: float, other: float
) -> None:
    latency_parts = LatencyParts.of(point(ClosedLoop(1)).records, server)
    assert latency_parts is not None
    parts = latency_parts.to_dict()
    assert parts == pytest.approx(
        {
            "waiting_s": 0.2,
            "tiling_s": tiling,
            "vision_encoder_s": vision,
            "encoding_other_s": other,
            "prefill_s": 0.4,
            "decoding_s": 2.1,
            "outside_s": 0.0,
        }
    )
    assert sum(parts.values()) == pytest.approx(3.0)


def test_no_latency_parts_without_measured_requests() -> None:
    records = point(ClosedLoop(1)).records
    for record in records:
        record.warmup = True
    assert LatencyParts.of(records, None) is None
