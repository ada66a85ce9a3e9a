"""Tests `nvlm-trt eval`: tables, JSON, exit status, and a one-line error for every mistake."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, assert_one_line_error
from safetensors.torch import load_file, save_file

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "receipt.png"

TOTAL = {"image": str(IMAGE), "prompt": "What is the total?", "answer": "23.40", "task": "total", "name": "t"}
TALK = {"prompt": "Say hello.", "answer": "hello", "task": "talk", "name": "h"}


@pytest.fixture
def run(run_cli: Run) -> Run:
    return functools.partial(run_cli, "eval")


@pytest.fixture
def samples(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        path = tmp_path / "set.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def test_the_table_has_tasks_then_means(run: Run, engine, samples) -> None:
    status, out, err = run("--engine", engine("nvlm-h-tiny"), "--samples", samples(TOTAL, TALK), "--metric", "anls")
    assert (status, err) == (0, "")
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert rows[0][0].startswith("nvlm-h-tiny (engine, digest ")
    assert ["total", "image", "anls", "1", "0.000", "0.000 .. 0.793"] in rows
    assert ["talk", "text", "anls", "1", "0.000", "0.000 .. 0.793"] in rows
    assert [row[:2] for row in rows if row[1:2] in (["mean of 1"], ["mean of 2"])] == [
        ["image tasks", "mean of 1"],
        ["text-only tasks", "mean of 1"],
        ["all tasks", "mean of 2"],
    ]


def test_json_is_what_the_file_holds(run: Run, engine, samples, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = ("--engine", engine("nvlm-d-tiny"), "--samples", samples(TOTAL, TALK), "--max-tokens", 4)
    status, out, _ = run(*arguments, "--output", output, "--json")
    results = json.loads(out)
    assert status == 0
    assert results == json.loads(output.read_text())
    assert results["options"] == {"max_tokens": 4, "tolerance": 0.0}
    assert results["samples"]["count"] == 2
    assert [task["task"] for task in results["summary"]["tasks"]] == ["total", "talk"]
    assert [(a["name"], a["expected"], a["score"]) for a in results["answers"]] == [
        ("t", "23.40", 0),
        ("h", "hello", 0),
    ]


def test_min_score_decides_the_exit_status(run: Run, engine, samples) -> None:
    directory = engine("nvlm-d-tiny")
    arguments = ("--engine", directory, "--samples")
    said = json.loads(run(*arguments, samples(TALK), "--json")[1])["answers"][0]["answer"]
    right = TALK | {"answer": said}
    assert run(*arguments, samples(right), "--min-score", 1)[0] == 0
    wrong = TOTAL | {"answer": "never this"}
    assert run(*arguments, samples(right, wrong), "--min-score", 0.5)[0] == 0  # the mean of an image and a text task
    status, _, err = run(*arguments, samples(right, wrong), "--min-score", 0.51)
    assert status == 1
    assert err == "the mean over all tasks is 0.5000, below --min-score 0.51\n"


def test_agree_with_proves_that_engine_and_reference_answer_alike(
    run: Run, engine, checkpoint, samples, tmp_path: Path
) -> None:
    output, path = tmp_path / "engine.json", samples(TOTAL, TALK)
    run("--engine", engine("nvlm-x-tiny"), "--samples", path, "--output", output)
    oracle = ("--reference", checkpoint("nvlm-x-tiny"), "--samples", path, "--agree-with", output)
    status, _, err = run(*oracle)
    assert (status, err) == (0, f"2 of 2 answers equal those in {output}\n")
    results = json.loads(output.read_text())
    results["answers"][1]["answer"] += "!"
    output.write_text(json.dumps(results))
    status, _, err = run(*oracle)
    assert (status, err) == (1, f"1 of 2 answers equal those in {output}\ndifferent: h\n")
    assert_one_line_error(run(*oracle, "--max-tokens", 9), "other options")
    other_set = samples(TOTAL | {"answer": "24.40"}, TALK)
    assert_one_line_error(run(*oracle[:3], other_set, *oracle[4:]), "another sample set")


def test_tasks_and_count_choose_samples(run: Run, engine, samples) -> None:
    lines = [{"prompt": f"{task} {i}", "answer": "x", "task": task} for i in range(3) for task in ("a", "b", "c")]
    arguments = ("--engine", engine("nvlm-d-tiny"), "--samples", samples(*lines), "--max-tokens", 1, "--json")
    results = json.loads(run(*arguments, "--tasks", "c, a", "--count", 2)[1])
    assert [(a["name"], a["task"]) for a in results["answers"]] == [("1", "a"), ("3", "c"), ("4", "a"), ("6", "c")]
    assert_one_line_error(run(*arguments, "--tasks", "a,z"), "no task 'z'", "a, b, c")
    assert_one_line_error(run(*arguments, "--tasks", ","), "names no task")


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("{", ("set.jsonl line 2", "not JSON")),
        ({"prompt": "?"}, ("line 2", "no 'answer'")),
        (TALK | {"colour": "red"}, ("line 2", "unknown key 'colour'")),
        (TALK | {"metric": "bleu"}, ("line 2", "unknown metric 'bleu'")),
        (TALK | {"image": "none.png"}, ("line 2", "none.png")),
        (TALK | {"image": __file__, "name": "python"}, ("sample python", "not a readable")),
        (TOTAL, ("line 2", "the name 't' is that of line 1")),
    ],
)
def test_bad_lines(run: Run, engine, samples, line: Any, fragments: tuple[str, ...]) -> None:
    result = run("--engine", engine("nvlm-d-tiny"), "--samples", samples(TOTAL, line))
    assert_one_line_error(result, *fragments)


def test_bad_sets(run: Run, engine, samples, tmp_path: Path) -> None:
    arguments = ("--engine", engine("nvlm-d-tiny"), "--samples")
    assert_one_line_error(run(*arguments, samples()), "has no samples")
    assert_one_line_error(run(*arguments, tmp_path / "none.jsonl"), "none.jsonl", "No such file")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--metric", "bleu"), "exact, contains, anls, numeric"),
        (("--split", "test"), "--split is for TinyDocs"),
        (("--tolerance", "inf"), "--tolerance"),
        (("--agree-with", "none.json"), "none.json"),
        (("--agree-with", __file__), "is not a results file"),
    ],
)
def test_bad_options(run: Run, engine, samples, options: tuple[object, ...], fragment: str) -> None:
    arguments = ("--engine", engine("nvlm-d-tiny"), "--samples", samples(TALK))
    assert_one_line_error(run(*arguments, *options), fragment)


def test_exactly_one_model(run: Run, engine, checkpoint, samples, tmp_path: Path) -> None:
    path = samples(TALK)
    sources = ("--engine", engine("nvlm-d-tiny"), "--reference", checkpoint("nvlm-d-tiny"))
    assert_one_line_error(run("--samples", path), "--engine", "--url", "--reference")
    assert_one_line_error(run("--samples", path, *sources), "--engine", "--url", "--reference")
    assert_one_line_error(run("--samples", path, "--engine", tmp_path), "not an engine directory")
    assert_one_line_error(run("--samples", path, "--reference", tmp_path), "config.json")


def test_the_reference_with_an_adapter(run: Run, engine, checkpoint, samples, tmp_path: Path) -> None:
    """It answers as the reference of a checkpoint into whose weights the adapter was merged before."""
    source, adapter, merged = checkpoint("nvlm-d-tiny"), tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(source, merged)
    tensors = load_file(source / "model.safetensors")
    down, up = torch.randn(2, 3, 192, generator=torch.Generator().manual_seed(0))
    module = "language_model.model.layers.3.self_attn.o_proj"
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].float() + 2 * up.T @ down
    save_file(tensors, merged / "model.safetensors")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    parts = {"lora_A": down, "lora_B": up.T.contiguous()}
    stored = {f"base_model.model.{module}.{part}.weight": tensor for part, tensor in parts.items()}
    save_file(stored, adapter / "adapter_model.safetensors")
    path = samples(TOTAL, TALK)

    def answers(*options: object) -> list[str]:
        status, out, _ = run("--samples", path, *options, "--json")
        assert status == 0
        return [answer["answer"] for answer in json.loads(out)["answers"]]

    with_adapter = answers("--reference", source, "--lora", adapter)
    assert with_adapter == answers("--reference", merged)
    assert with_adapter != answers("--reference", source)
    refused = run("--samples", path, "--engine", engine("nvlm-d-tiny"), "--lora", adapter)
    assert_one_line_error(refused, "--lora is for --reference")


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:9", "127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_server_that_is_not_there(run: Run, samples, tmp_path: Path, url: str) -> None:
    result = run("--url", url, "--samples", samples(TALK), "--output", tmp_path / "results.json")
    assert_one_line_error(result, url)
    assert not list(tmp_path.glob("results*"))


def test_results_of_something_else(run: Run, engine, samples, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    run("--engine", engine("nvlm-d-tiny"), "--samples", samples(TALK), "--output", output)
    arguments = ("--engine", engine("nvlm-d-tiny"), "--samples", samples(TALK), "--output")
    assert run(*arguments, output)[0] == 0
    assert_one_line_error(run("--engine", engine("nvlm-x-tiny"), *arguments[2:], output), "another model")
    assert_one_line_error(run(*arguments, tmp_path), "is a folder")
    assert_one_line_error(run(*arguments, output / "results.json"), "cannot write")
    samples(TALK, TOTAL)
    assert_one_line_error(run(*arguments, output), "another sample set")


def test_help_shows_an_example(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "Example: nvlm-trt eval" in out


def test_an_interrupted_run_goes_on(engine, samples, tmp_path: Path) -> None:
    """SIGINT to the real command: exit 130, no traceback; the same command then asks only what is missing."""
    output, partial = tmp_path / "results.json", tmp_path / "results.json.partial"
    lines = [{"image": str(IMAGE), "prompt": f"Question {i}?", "answer": "x"} for i in range(120)]
    command = [sys.executable, "-m", "nvlm_trt.cli", "eval", "--engine", engine("nvlm-h-tiny")]
    command += ["--samples", samples(*lines), "--output", output, "--max-tokens", "48"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 10):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.search(r"interrupted \(\d+ of 120 answers are kept in .*; run the same command to go on\)", err)
    kept = partial.read_bytes()
    assert 10 <= kept.count(b"\n") < 121
    subprocess.run(command, check=True, capture_output=True)
    assert not partial.exists()
    answers = {entry["name"]: entry["answer"] for entry in json.loads(output.read_text())["answers"]}
    before = [json.loads(line) for line in kept.splitlines()[1:]]
    assert all(answers[entry["name"]] == entry["answer"] for entry in before)
    assert len(answers) == 120
