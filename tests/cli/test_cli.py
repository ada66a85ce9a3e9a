"""Tests the command line: answers on stdout, errors of one line with exit status 2, statistics on stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error

from nvlm_trt.terminal import printable

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "receipt.png"


@pytest.fixture
def run(run_cli: Run) -> Run:
    return run_cli


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_ask_streams_an_answer_and_its_statistics(run: Run, engine, name: str) -> None:
    status, out, err = run("ask", "What is the total?", "--image", IMAGE, "--engine", engine(name), "--max-tokens", 8,
                           "--stats")  # fmt: skip
    assert status == 0
    assert out
    assert "7 tiles" in err
    assert "tokens/s" in err


def test_ask_json_is_one_object(run: Run, engine) -> None:
    status, out, _ = run("ask", "hello", "--engine", engine("nvlm-d-tiny"), "--max-tokens", 4, "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["finish_reason"] in ("stop", "length")
    assert 1 <= answer["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_terminal_that_lacks_a_character_gets_the_rest(engine, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "nvlm_trt.cli", "ask", "hello", "--engine", engine("nvlm-d-tiny")]
    command += ["--max-tokens", "200", "--temperature", "100", "--seed", "2", *options]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert (b"\\ufffd" if options else b"?") in result.stdout


def test_sampling_options_reach_the_engine(run: Run, engine) -> None:
    def answer(seed: int) -> str:
        options = ("--temperature", 2.0, "--max-tokens", 12, "--seed", seed, "--json")
        return json.loads(run("ask", "hello", "--engine", engine("nvlm-d-tiny"), *options)[1])["text"]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_several_answers_are_printed_one_after_the_other(run: Run, engine) -> None:
    options = ("--engine", engine("nvlm-d-tiny"), "--temperature", 1.5, "--seed", 4, "--max-tokens", 9)
    options += ("--logit-bias", "10=-100")  # no line breaks in the answers
    several = json.loads(run("ask", "hello", *options, "--n", 3, "--json")[1])
    texts = [answer["text"] for answer in several["answers"]]
    assert len(set(texts)) == 3
    assert several["usage"]["completion_tokens"] == sum(len(answer["token_ids"]) for answer in several["answers"])
    assert json.loads(run("ask", "hello", *options, "--json")[1])["text"] == texts[0]
    status, out, err = run("ask", "hello", *options, "--n", 3, "--stats")
    assert status == 0
    assert out == "".join(f"[{i}/3] {printable(text)}\n" for i, text in enumerate(texts, start=1))
    assert "tokens/s" in err


def test_logprobs_are_reported_beside_the_answer(run: Run, engine) -> None:
    options = ("--engine", engine("nvlm-d-tiny"), "--max-tokens", 6, "--min-tokens", 6, "--logprobs", 2)
    options += ("--logit-bias", "65=100", "--logit-bias", "66=100", "--presence-penalty", 2, "--frequency-penalty", 2)
    answer = json.loads(run("ask", "hello", *options, "--json")[1])
    assert set(answer["text"]) == {"A", "B"}  # the penalties bring in the second
    items = answer["logprobs"]
    assert [(item["token"], item["bytes"]) for item in items] == [(c, [ord(c)]) for c in answer["text"]]
    assert [len(item["top"]) for item in items] == [2] * 6
    _, out, err = run("ask", "hello", *options)
    assert out == answer["text"] + "\n"
    lines = err.splitlines()
    assert len(lines) == 6
    for line, item in zip(lines, items, strict=True):
        assert line.startswith(repr(item["token"]))
        assert f"{item['logprob']:.4f}" in line


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--max-tokens", -1), "max_tokens"),
        (("--n", 0), "n = 0"),
        (("--n", 9), "the slots of the engine"),
        (("--priority", 1 << 31), "priority"),
        (("--min-tokens", 257), "min_tokens = 257"),
        (("--presence-penalty", 2.5), "presence_penalty"),
        (("--frequency-penalty", "nan"), "frequency_penalty"),
        (("--logprobs", 21), "logprobs"),
        (("--logit-bias", "65"), "'65' is not ID=BIAS"),
        (("--logit-bias", "A=1"), "'A=1' is not ID=BIAS"),
        (("--logit-bias", "65=1", "--logit-bias", "65=2"), "65 twice"),
        (("--logit-bias", "65=nan"), "logit_bias"),
        (("--logit-bias", "512=1"), "the token id 512"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", 2), "top_p"),
        (("--max-tiles", 40), "max_tiles"),
        (("--image", "no-such-file.png"), "no-such-file.png"),
        (("--image", __file__), "image"),
    ],
)
def test_bad_requests(run: Run, engine, options: tuple[object, ...], fragment: str) -> None:
    assert_one_line_error(run("ask", "hello", "--engine", engine("nvlm-d-tiny"), *options), fragment)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (IMAGE.read_bytes()[:-300], "truncated or corrupt"),
        (b"<!DOCTYPE html>", "an HTML page, not a readable format"),
        (b"version https://git-lfs.github.com/spec/v1", "`git lfs pull`"),
        (b"", "0 bytes"),
    ],
)
def test_errors_of_images_name_the_file(run: Run, engine, tmp_path: Path, content: bytes, fragment: str) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    ask = ("ask", "hello", "--engine", engine("nvlm-d-tiny"), "--image", IMAGE, "--image", bad)
    assert_one_line_error(run(*ask), str(bad), fragment)
    assert_one_line_error(run("tiles", bad, "--output", tmp_path / "tiles.png"), str(bad), fragment)
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"image": str(bad), "prompt": "a", "answer": "b"}))
    assert_one_line_error(run("eval", "--samples", samples, "--engine", engine("nvlm-d-tiny")), str(bad), fragment)


@pytest.mark.parametrize("command", ["ask", "tiles", "eval"])
def test_device_is_not_read_as_an_image(run: Run, engine, tmp_path: Path, command: str) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"image": "/dev/zero", "prompt": "a", "answer": "b"}))
    arguments = {
        "ask": ("ask", "hello", "--engine", engine("nvlm-d-tiny"), "--image", "/dev/zero"),
        "tiles": ("tiles", "/dev/zero", "--output", tmp_path / "tiles.png"),
        "eval": ("eval", "--samples", samples, "--engine", engine("nvlm-d-tiny")),
    }
    assert_one_line_error(run(*arguments[command]), "/dev/zero")


def test_forty_images(run: Run, engine) -> None:
    images = [argument for _ in range(40) for argument in ("--image", IMAGE)]
    assert_one_line_error(run("ask", "hello", "--engine", engine("nvlm-d-tiny"), *images), "40")


def test_empty_question(run: Run, engine) -> None:
    assert_one_line_error(run("ask", " ", "--engine", engine("nvlm-d-tiny")), "empty")


def test_question_longer_than_the_engine_holds(run: Run, engine) -> None:
    result = run("ask", "word " * 4000, "--engine", engine("nvlm-d-tiny"))
    assert_one_line_error(result, "4096", "tokens")


def test_ask_for_json_that_fits_a_schema(run: Run, engine, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}')
    quotes = ("--logit-bias", f"{ord('}')}=50")  # a random model adds properties of its own
    status, out, _ = run("ask", "hello", "--engine", engine("nvlm-d-tiny"), "--json-schema", schema, *quotes)
    assert status == 0
    assert json.loads(out)["n"] in (1, 22)


def test_ask_for_a_text_of_a_kind(run: Run, engine) -> None:
    engine = engine("nvlm-d-tiny")
    assert re.fullmatch(r"[0-9]{3}\n", run("ask", "hello", "--engine", engine, "--regex", "[0-9]{3}")[1])
    assert run("ask", "hello", "--engine", engine, "--choice", "tea", "--choice", "rice")[1] in ("tea\n", "rice\n")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "is not JSON"),
        ("[]", "constraint.json_schema is not allowed"),
        ('{"type": "text"}', "Invalid type: text"),
        (None, "cannot read"),
        ('{"enum": ["' + "x" * 200_000 + '"]}', "cannot read"),
    ],
)
def test_ask_with_a_schema_that_is_none(run: Run, engine, tmp_path: Path, text: str | None, cause: str) -> None:
    schema = tmp_path / "schema.json"
    if text is not None:
        schema.write_text(text)
    assert_one_line_error(run("ask", "hello", "--engine", engine("nvlm-d-tiny"), "--json-schema", schema), cause)


def test_ask_for_two_things_at_once(run: Run) -> None:
    result = run("ask", "hello", "--url", "grpc://127.0.0.1:9", "--regex", "a", "--choice", "b")
    assert_one_line_error(result, "--regex and --choice both say what the answer must be")


def test_ask_wants_exactly_one_source(run: Run, engine) -> None:
    assert_one_line_error(run("ask", "hello"), "--engine", "--url")
    assert_one_line_error(run("ask", "hello", "--engine", engine("nvlm-d-tiny"), "--url", "grpc://127.0.0.1:1"))


def test_ask_a_server_that_is_not_there(run: Run) -> None:
    assert_one_line_error(run("ask", "hello", "--url", "grpc://127.0.0.1:9"), "127.0.0.1:9")


def test_engine_of_another_kind_of_directory(run: Run, tmp_path: Path) -> None:
    assert_one_line_error(run("ask", "hello", "--engine", tmp_path), "not an engine directory", "nvlm-trt build")


def test_unknown_preset_lists_the_presets(run: Run, tmp_path: Path) -> None:
    result = run("init-checkpoint", "--preset", "nvlm-z-tiny", tmp_path / "out")
    assert_one_line_error(result, "nvlm-z-tiny", "nvlm-d-tiny")


@pytest.mark.parametrize("option", ["--max-slots", "--max-seq-len", "--max-image-tokens"])
def test_build_limits_must_be_positive(run: Run, checkpoint, tmp_path: Path, option: str) -> None:
    result = run("build", "--checkpoint", checkpoint("nvlm-h-tiny"), "--output", tmp_path / "out", option, -1)
    assert_one_line_error(result, option.lstrip("-").replace("-", "_"))
    assert list(tmp_path.iterdir()) == []


def test_build_does_not_overwrite_unless_told(run: Run, checkpoint, engine, tmp_path: Path) -> None:
    target = shutil.copytree(engine("nvlm-d-tiny"), tmp_path / "engine")
    arguments = ("build", "--checkpoint", checkpoint("nvlm-d-tiny"), "--output", target)
    assert_one_line_error(run(*arguments), "--overwrite")
    assert run(*arguments, "--overwrite", "--max-slots", 2)[0] == 0
    assert json.loads((target / "manifest.json").read_text())["limits"]["max_slots"] == 2


def test_unknown_backend(run: Run, checkpoint, tmp_path: Path) -> None:
    arguments = (
        "build",
        "--checkpoint",
        checkpoint("nvlm-d-tiny"),
        "--output",
        tmp_path / "out",
        "--backend",
        "abacus",
    )
    assert_one_line_error(run(*arguments), "abacus", "onnxruntime")


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    """SIGINT in the middle of a real build: exit 130, no traceback, no half-written directory."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "nvlm_trt.cli"]
    checkpoint = tmp_path / "checkpoint"
    subprocess.run([*command, "init-checkpoint", "--preset", "nvlm-h-tiny", checkpoint], check=True, env=environment)
    before = set(tmp_path.iterdir())
    output = tmp_path / "engine"
    process = subprocess.Popen(
        [*command, "build", "--checkpoint", checkpoint, "--output", output],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and set(tmp_path.iterdir()) == before:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert set(tmp_path.iterdir()) == before


def test_every_command_has_help_with_an_example(run: Run) -> None:
    for command in ("init-checkpoint", "build", "verify", "serve", "ask"):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert f"Example: nvlm-trt {command}" in out
