"""`nvlm-trt bench` without a server: one-line errors for everything that a user can get wrong, and `bench compare`."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path

import pytest

from nvlm_trt.benchmark.load import ClosedLoop
from nvlm_trt.benchmark.report import read_document

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))
from command_line import Run, assert_one_line_error
from results import document, point, write

NOBODY = "grpc://127.0.0.1:9"


@pytest.fixture
def run(run_cli: Run) -> Run:
    return functools.partial(run_cli, "bench")


@pytest.mark.parametrize("url", [NOBODY, "127.0.0.1:9", "http://127.0.0.1:9", "grpc://:9", ""])
def test_a_server_that_is_not_there(run: Run, tmp_path: Path, url: str) -> None:
    output = tmp_path / "results.json"
    assert_one_line_error(run("--url", url, "--output", output, "--plots", tmp_path / "plots"), url)
    assert not output.exists()


def test_no_server_is_named(run: Run) -> None:
    assert_one_line_error(run(), "no server is named", "--url grpc://host:port")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--concurrency", "0"), ("--concurrency '0'", "must be positive")),
        (("--concurrency", "1,x"), ("--concurrency '1,x'", "write 1,2,4")),
        (("--concurrency", ""), ("--concurrency ''",)),
        (("--concurrency", "1.5"), ("--concurrency 1.5 is not a whole number",)),
        (("--concurrency", "2,2"), ("named twice",)),
        (("--concurrency", "100"), ("--concurrency 100", "64 requests", "raise --requests")),
        (("--concurrency", "1e5", "--requests", "1000000"), ("concurrency 100000 is not possible",)),
        (("--rate", "-1"), ("--rate '-1'", "must be positive")),
        (("--rate", "nan"), ("--rate 'nan'",)),
        (("--rate", "inf"), ("--rate 'inf'",)),
        (("--rate", "1e9"), ("rate of 1000000000.0 requests per second is not possible",)),
        (("--rate", ",".join(str(n) for n in range(1, 103))), ("102 loads are too many",)),
        (("--prompt-tokens", "0"), ("--prompt-tokens '0'", "write 64")),
        (("--output-tokens", "9:3"), ("--output-tokens '9:3'",)),
        (("--image-size", "big"), ("--image-size 'big'", "write 1344x896")),
        (("--image-size", "10x10,0x3"), ("pictures of 0x3 pixels are not possible",)),
        (("--images", "99"), ("99 pictures per request", "0 to 16")),
        (("--slo-ttft", "0"), ("--slo-ttft 0",)),
        (("--slo-itl", "nan"), ("--slo-itl nan",)),
    ],
)
def test_options_without_sense(run: Run, options: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    """Told before the server is asked for anything."""
    assert_one_line_error(run("--url", NOBODY, *options), *fragments)


def test_outputs_that_are_in_the_way(run: Run, tmp_path: Path) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("precious")
    (tmp_path / "latency.png").write_text("precious")
    new = tmp_path / "new.json"
    for arguments, fragments in (
        (("--output", taken), ("taken.json exists", "--overwrite")),
        (("--csv", taken), ("taken.json exists", "--csv")),
        (("--output", tmp_path), ("is a directory", "--output")),
        (("--output", tmp_path / "none" / "a.json"), ("is not a directory; create it", "--output")),
        (("--plots", taken), ("is not a directory", "--plots")),
        (("--plots", tmp_path), ("latency.png exists", "--overwrite")),
        (("--output", new, "--csv", new), ("same name",)),
    ):
        assert_one_line_error(run("--url", NOBODY, *arguments), *fragments)
    assert taken.read_text() == "precious"
    assert_one_line_error(run("--url", NOBODY, "--output", taken, "--overwrite"), "no server answers")
    assert taken.read_text() == "precious", "nothing is overwritten before there is something to write"


def test_compare_prints_a_table(run: Run, tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", document(point(ClosedLoop(1)), point(ClosedLoop(2))))
    b = write(tmp_path / "b.json", document(point(ClosedLoop(1), slower=0.5), point(ClosedLoop(2))))
    status, out, err = run("compare", a, b)
    assert (status, err) == (0, "")
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert ["1 at once", "TTFT p50, ms", "1000", "500", "0.500", "better"] in rows
    assert ["output tokens, /s", "0.36", "0.73", "2.000", "better"] in rows
    assert ["2 at once", "TTFT p50, ms", "1000", "1000", "1.000", "equal"] in rows


def test_compare_prints_json(run: Run, tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", document(point(ClosedLoop(1))))
    status, out, _ = run("compare", a, a, "--json")
    assert status == 0
    rows = json.loads(out)["rows"]
    assert rows[0] == {
        "load": "1 at once",
        "metric": "ttft_s.p50",
        "better": "lower",
        "a": 1.0,
        "b": 1.0,
        "ratio": 1.0,
        "verdict": "equal",
    }


def test_compare_what_cannot_be_compared(run: Run, tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", document(point(ClosedLoop(1))))
    other = read_document(a)
    other["workload"]["output_tokens"] = "999"
    b = write(tmp_path / "b.json", other)
    assert_one_line_error(run("compare", a, b), "different workloads", "'3' and '999'")
    assert_one_line_error(run("compare", a, tmp_path / "none.json"), "none.json", "No such file")
    assert_one_line_error(run("compare", a, __file__), "test_cli_bench.py", "does not hold results")
    assert_one_line_error(run("--url", NOBODY, "compare", a, a), "--url is for measuring", "bench compare")
    assert_one_line_error(run("--json", "compare", a, a), "--json is for measuring")


@pytest.mark.parametrize("command", [(), ("compare",)])
def test_help_shows_an_example(run: Run, command: tuple[str, ...]) -> None:
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert "Example: nvlm-trt bench" in out
