"""Every number that a command takes has bounds: beyond them, one line says which option is wrong."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from command_line import Run, assert_one_line_error

from nvlm_trt.cli import app

Directory = Callable[[str], Path]
IMAGE = Path(__file__).parents[2] / "docs" / "images" / "receipt.png"
NUMBERS: tuple[object, ...] = (int, float, int | None, float | None)

# what else a command needs, so that nothing but the number is wrong
SERVER = ["--url", "grpc://127.0.0.1:9"]
OTHERS = {
    "init-checkpoint": ["--preset", "nvlm-d-tiny", "OUTPUT"],
    "build": ["--checkpoint", "CHECKPOINT", "--output", "OUTPUT"],
    "build calibration_samples": ["--precision", "int8"],
    "build smoothquant_alpha": ["--precision", "int8"],
    "build gate_samples": ["--precision", "int8"],
    "build max_accuracy_drop": ["--precision", "int8"],
    "plan": ["--preset", "nvlm-x-tiny"],
    "plan bandwidth": ["--tflops", "1"],
    "plan tflops": ["--bandwidth", "1"],
    "plan tp": ["--backend", "tensorrt-llm"],
    "plan pp": ["--backend", "tensorrt-llm"],
    "plan memory_share": ["--backend", "tensorrt-llm"],
    "deploy": ["ENGINE", "--target", "compose", "--output", "OUTPUT"],
    "verify": ["ENGINE", "--checkpoint", "CHECKPOINT"],
    "serve": ["ENGINE"],
    "gateway": ["--engine", "ENGINE"],
    "ask": ["Hello", "--engine", "ENGINE"],
    "ask max_tiles": ["--image", str(IMAGE)],
    "tiles": [str(IMAGE), "--output", "OUTPUT.png"],
    "eval": ["--engine", "ENGINE"],
    "tinydocs": ["--output", "OUTPUT"],
    "bench": SERVER,
}


def commands(group: typer.Typer) -> Iterator[tuple[str, Callable[..., object]]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield command.name or command.callback.__name__, command.callback
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        callback = sub.typer_instance.registered_callback
        assert callback is not None
        assert callback.callback is not None
        yield sub.name or "", callback.callback


def numeric_options() -> list[tuple[str, str, bool]]:
    """Lists (command, parameter, whether it is an int)."""
    options = []
    for name, function in commands(app):
        for parameter, annotation in inspect.get_annotations(function, eval_str=True).items():
            base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
            if base in NUMBERS:
                options.append((name, parameter, base in (int, int | None)))
    return options


OPTIONS = numeric_options()


def test_the_options_are_found() -> None:
    assert len(OPTIONS) > 35
    assert {name for name, _, _ in OPTIONS} == {key for key in OTHERS if " " not in key}


@pytest.mark.parametrize("value", ["1e30", "-1e30", "nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "parameter", "whole"), OPTIONS)
def test_a_number_out_of_bounds_is_one_line(
    run_cli: Run,
    checkpoint: Directory,
    engine: Directory,
    tmp_path: Path,
    command: str,
    parameter: str,
    whole: bool,
    value: str,
) -> None:
    if whole and value.endswith("1e30"):
        value = str(int(float(value)))
    arguments = [*OTHERS[command], *OTHERS.get(f"{command} {parameter}", [])]
    real = {"CHECKPOINT": checkpoint("nvlm-x-tiny"), "ENGINE": engine("nvlm-x-tiny"), "OUTPUT": tmp_path / "out"}
    real["OUTPUT.png"] = tmp_path / "out.png"
    option = "--" + parameter.replace("_", "-")
    result = run_cli(command, *(real.get(argument, argument) for argument in arguments), f"{option}={value}")
    assert_one_line_error(result)
    names = (option, parameter, parameter.replace("_", " "))
    assert any(name in result[2] for name in names), result[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--bandwidth", "nan", "--tflops", "1"), ("--bandwidth", "above 0")),
        (("--bandwidth", "1", "--tflops", "inf"), ("--tflops",)),
        (("--bandwidth", "1e-300", "--tflops", "1"), ("--bandwidth",)),
        (("--text-tokens", "100000000"), ("--text-tokens",)),
        (("--text-tokens", "4096"), ("4096 tokens in the LLM", "would hold 4096", "--context")),
        (("--text-tokens", "100", "--max-seq-len", "100", "--tiles", "0"), ("100 with the answer", "--text-tokens")),
        (("--preset", "nvlm-d-tiny", "--text-tokens", "4090", "--tiles", "7"), ("7 tiles", "would hold 4096")),
        (("--tiles", "7", "--max-image-tokens", "64"), ("7 tiles", "would hold 64", "--max-image-tokens")),
        (("--max-slots", "100000000"), ("--max-slots",)),
    ],
)
def test_a_plan_of_what_cannot_be(run_cli: Run, options: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    assert_one_line_error(run_cli("plan", "--preset", "nvlm-x-tiny", *options), *fragments)


def test_a_plan_without_tiles_takes_as_many_as_fit(run_cli: Run) -> None:
    command = ("plan", "--preset", "nvlm-d-tiny", "--json", "--max-seq-len")
    assert json.loads(run_cli(*command, 4096)[1])["prompt"] == {"text_tokens": 128, "tiles": 7}
    status, out, _ = run_cli(*command, 128 + 3 * 16 + 1)
    assert status == 0
    assert json.loads(out)["prompt"]["tiles"] == 3


def test_a_wrong_option_is_one_line(run_cli: Run) -> None:
    assert_one_line_error(run_cli("plan", "--nope"), "--nope", "plan --help`")
    assert_one_line_error(run_cli("plam"), "plam", "--help`")
    assert_one_line_error(run_cli("build"), "--output", "build --help`")
    assert_one_line_error(run_cli("plan", "--text-tokens", "many"), "--text-tokens")


def test_without_arguments_the_help_is_shown(run_cli: Run) -> None:
    status, out, err = run_cli()
    assert status == 2
    assert "Usage:" in out + err
    assert "init-checkpoint" in out + err


def test_too_little_memory_is_one_line(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("nvlm_trt.planner.memory.plan_engine", fail)
    assert_one_line_error(run_cli("plan", "--preset", "nvlm-x-tiny"), "out of memory", "9 TiB", "nvlm-trt plan")
