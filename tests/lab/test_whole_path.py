"""A short run of lab.whole_path: the product and transformers answer in processes of their own and do the same work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import whole_path
from lab.origin import Origin
from lab.rounds import Rounds
from lab.whole_path import PICTURE, RESULT, check_work, speed_of, ttft_of
from nvlm_trt.model.presets import find_preset

OURS, THEIRS = "nvlm-trt fp32", "transformers bf16 sdpa/dynamic"
SHORT = "--preset nvlm-d-tiny --precisions fp32 --modes sdpa/dynamic --text-tokens 8 16 --answer-tokens 3 --rounds 1"


def test_whole_paths_are_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = whole_path.options().parse_args(["--work", str(tmp_path), "--threads", "1", *SHORT.split()])
    written = tmp_path / "results" / RESULT
    for _ in range(2):  # the second run finds every round
        whole_path.measure(arguments, Rounds(written, Origin.here({})))
    run = json.loads(written.read_text())
    assert set(run["rounds"]) == {OURS, THEIRS}
    for metrics in run["rounds"].values():
        assert {ttft_of(8), ttft_of(16), speed_of(8), speed_of(16)} <= set(metrics)
        assert all(value > 0 for values in metrics.values() for value in values)
    parts = [run["rounds"][OURS][f"{part} s, 8 text tokens"][0] for part in ("vision encoder", "prefill")]
    assert sum(parts) < run["rounds"][OURS][ttft_of(8)][0]
    assert run["read"][OURS] == run["read"][THEIRS]
    assert run["read"][OURS]["8"]["image_tokens"] == 7 * 16
    assert len(run["notes"]) == 4
    assert all("does not exist" in note for note in run["notes"])
    assert (written.parent / PICTURE).read_bytes().startswith(b"\x89PNG")
    output = capfd.readouterr()
    assert f"{ttft_of(16)}: {OURS} / {THEIRS} = " in output.out
    assert "1 of 1 rounds are there" in output.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_tokens": 6 * 16}, "96 image tokens, not 112"),
        ({"prompt_tokens": 112 + 16}, "128 tokens in the prompt"),
        ({"prompt_tokens": 112 + 16 + 129}, "257 tokens in the prompt"),
        ({"tokens": [1, 2]}, "2 tokens in the answer"),
    ],
)
def test_less_work_is_an_error(changed: dict[str, Any], message: str) -> None:
    answer = {"image_tokens": 112, "prompt_tokens": 112 + 16 + 70, "tokens": [1, 2, 3]}
    check_work(answer, 16, 3, find_preset("nvlm-d-tiny"))
    with pytest.raises(AssertionError, match=message):
        check_work(answer | changed, 16, 3, find_preset("nvlm-d-tiny"))


def test_publish_copies_the_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(arguments: object, rounds: Rounds) -> None:
        rounds.run({"toy": lambda: {"toys/s": 1.0}}, 1)
        rounds.report()
        (tmp_path / "results" / PICTURE).write_bytes(b"a plot")

    for folder in ("RESULTS", "PICTURES"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(f"lab.common.{folder}", tmp_path / folder)
    monkeypatch.setattr(sys, "argv", ["lab/toy.py", "--work", str(tmp_path), "--publish"])
    whole_path.run(whole_path.options(), measure, RESULT, picture=PICTURE)
    assert (tmp_path / "PICTURES" / PICTURE).read_bytes() == b"a plot"
    assert (tmp_path / "RESULTS" / RESULT).exists()
