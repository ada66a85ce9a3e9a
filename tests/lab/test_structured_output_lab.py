"""A short run of lab.structured_output: the neighbours of constraints keep their answers, and all is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab import structured_output
from lab.origin import Origin
from lab.rounds import Rounds
from lab.structured_output import BOUND, FREE, INTER_TOKEN, ITSELF, REFUSED
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer

SHORT = "--preset nvlm-d-tiny --precision fp32 --rounds 2 --concurrency 4 --output-tokens 8 --prompt-tokens 40"


def small_tokenizer(directory: Path) -> Tokenizer:
    """Stands for the large one, which takes seconds to prepare."""
    write_byte_tokenizer(directory, 6)
    return Tokenizer.from_directory(directory)


def test_all_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(structured_output, "large_tokenizer", lambda: small_tokenizer(tmp_path))
    arguments = structured_output.options().parse_args(["--work", str(tmp_path), "--threads", "1", *SHORT.split()])
    written = tmp_path / "run.json"
    structured_output.measure(arguments, Rounds(written, Origin.here({}, structured_output.PACKAGES)))
    rounds = json.loads(written.read_text())["rounds"]
    assert set(rounds) == {ITSELF, FREE, BOUND, REFUSED}
    for metrics in rounds.values():
        assert all(value > 0 for values in metrics.values() for value in values)
        assert {len(values) for values in metrics.values()} == {2}
    assert {"mask us", "compile ms", "greedy step us", "greedy step, bound us"} <= set(rounds[ITSELF])
    assert f"{INTER_TOKEN}: {BOUND} / {FREE} = " in capfd.readouterr().out
