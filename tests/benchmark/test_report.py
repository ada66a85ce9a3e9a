"""Documents, CSV, tables and plots of made-up results."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from results import TARGET, WORKLOAD, document, point

from nvlm_trt.benchmark.load import ClosedLoop, OpenLoop
from nvlm_trt.benchmark.plan import Plan
from nvlm_trt.benchmark.plots import latency_parts_plot, latency_plot
from nvlm_trt.benchmark.point import ClientUse
from nvlm_trt.benchmark.report import Report
from nvlm_trt.benchmark.results_csv import to_csv
from nvlm_trt.benchmark.results_document import read_document
from nvlm_trt.benchmark.runner import Outcome
from nvlm_trt.benchmark.slo import Slo
from nvlm_trt.benchmark.tables import print_results
from nvlm_trt.benchmark.triton_metrics import CounterSnapshot
from nvlm_trt.errors import NvlmError, ServerError


def test_the_file_grows_with_every_load(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report = Report(Plan(TARGET.url, WORKLOAD, [ClosedLoop(1)]), TARGET, Slo(), path, with_records=True)
    report.publish()
    assert read_document(path)["status"] == "running"
    report.add(point(ClosedLoop(1)))
    (entry,) = read_document(path)["points"]
    assert [record["arrivals"][0] for record in entry["records"]] == [[1.0, 1], [11.0, 1], [21.0, 1], [31.0, 1]]
    report.finish(Outcome("failed", ServerError("gone")))
    saved = read_document(path)
    assert (saved["status"], saved["reason"], len(saved["points"])) == ("failed", "gone", 1)
    assert saved["versions"]["nvlm-trt"]
    assert saved["machine"]["cores"] >= 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none" / "results.json"
    report = Report(Plan(TARGET.url, WORKLOAD, [ClosedLoop(1)]), TARGET, Slo(), path, with_records=False)
    with pytest.raises(NvlmError, match="cannot write .*results.json"):
        report.publish()


def test_csv_has_a_row_per_load() -> None:
    results = document(point(ClosedLoop(2)), point(OpenLoop(0.5), tokens=1))
    first, second = csv.DictReader(io.StringIO(to_csv(results)))
    assert (first["mode"], first["concurrency"], first["rate_per_s"]) == ("closed", "2", "")
    assert (second["mode"], second["concurrency"], second["rate_per_s"]) == ("open", "", "0.5")
    assert float(first["ttft_p50_s"]) == 1.0
    assert float(first["stage_decoding_s"]) == pytest.approx(2.1)
    assert second["itl_p50_s"] == "", "answers of one token have none"
    assert to_csv(document()).count("\n") == 1


def test_tables_are_never_cut_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_results(document(point(ClosedLoop(2), slower=123.4), point(OpenLoop(0.5), tokens=1)))
    out = capsys.readouterr().out
    assert "…" not in out
    assert "2 at once" in out
    assert "0.5 /s" in out
    assert "123400" in out  # ms


def test_plots_are_images() -> None:
    results = document(point(ClosedLoop(1)), point(ClosedLoop(2), slower=0.5), point(OpenLoop(0.5), tokens=1))
    for draw in (latency_plot, latency_parts_plot):
        drawn = draw(results)
        assert drawn is not None
        assert Image.open(io.BytesIO(drawn)).format == "PNG"
        assert draw(document()) is None, "nothing measured"


def test_doubtful_measurements_have_caveats() -> None:
    measured = point(ClosedLoop(1))
    assert document(measured)["points"][0]["caveats"] == []
    measured.client = ClientUse(10.0, [3.0, 9.5], 0.1, 2)
    measured.server = CounterSnapshot({}, {"generated_tokens": 99.0})
    for record in measured.records:
        record.due = record.sent - 0.5
        assert record.usage is not None
    measured.status = "complete"
    said = "\n".join(document(measured)["points"][0]["caveats"])
    assert "used 95% of a core" in said
    assert "500 ms behind time" in said
    assert "made 99 tokens and 12 were ours" in said


def test_results_hold_no_nan() -> None:
    json.dumps(document(point(ClosedLoop(1)), point(OpenLoop(2.0), tokens=1)), allow_nan=False)
