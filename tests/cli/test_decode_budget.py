"""Tests that the commands which decode images take their budget from the command line, and tell it in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.bombs import scans
from nvlm_trt.commands.decode_budget import image_limits
from nvlm_trt.errors import ConfigError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.serving import foreground
from nvlm_trt.serving.triton.server import ServerOptions

Run = Callable[..., tuple[int, str, str]]
SLOW = "decoding took more than 0.2 s of CPU time; save it again as a plain PNG or JPEG, or raise --max-decode-seconds"
LARGE = "decoding takes more than 50 MiB of memory; scale it down, or raise --max-decode-memory"


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    path = tmp_path / "bomb.jpg"
    path.write_bytes(scans(count=20_000))
    return path


@pytest.mark.parametrize(
    ("options", "fault"), [(("--max-decode-seconds", "0.2"), SLOW), (("--max-decode-memory", "50"), LARGE)]
)
def test_an_image_over_its_budget_is_one_line(
    run_cli: Run, engine: Callable[[str], Path], bomb: Path, tmp_path: Path, options: tuple[str, ...], fault: str
) -> None:
    status, _, told = run_cli("tiles", bomb, "--output", tmp_path / "tiles.png", *options)
    assert (status, told) == (2, f"error: image {bomb}: {fault}\n")
    status, _, told = run_cli("ask", "What?", "--image", bomb, "--engine", engine("nvlm-d-tiny"), *options)
    assert (status, told) == (2, f"error: image {bomb}: {fault}\n")
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"image": bomb.name, "prompt": "What?", "answer": "A bomb"}) + "\n")
    status, _, told = run_cli("eval", "--engine", engine("nvlm-d-tiny"), "--samples", samples, *options)
    assert (status, told) == (2, f"error: sample 1: {bomb}: {fault}\n")


def test_serve_hands_the_budget_to_the_server(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerOptions] = []
    monkeypatch.setattr(foreground, "run_in_foreground", lambda engine, options: served.append(options) or 0)
    assert run_cli("serve", "engine", "--max-decode-seconds", "7.5", "--max-decode-memory", "100")[0] == 0
    assert run_cli("serve", "engine")[0] == 0
    assert [options.repository.image_limits for options in served] == [
        ImageLimits(max_decode_seconds=7.5, max_decode_memory=100 << 20),
        ImageLimits(),
    ]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(seconds: float) -> None:
    with pytest.raises(ConfigError, match="max_decode_seconds"):
        image_limits(seconds, None)
    with pytest.raises(ConfigError, match="max_decode_memory"):
        image_limits(None, 0)


def test_help_names_the_defaults(run_cli: Run) -> None:
    for command in ("serve", "ask", "tiles", "eval"):
        shown = " ".join(run_cli(command, "--help")[1].split())
        assert f"[{ImageLimits().max_decode_seconds:g}]" in shown
        assert f"[{ImageLimits().max_decode_memory >> 20}]" in shown
