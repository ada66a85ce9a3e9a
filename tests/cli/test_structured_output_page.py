"""The commands of docs/structured_output.md answer as the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_line import Run

from nvlm_trt.builders.engine_build import build_engine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "structured_output.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = tmp_path_factory.mktemp("trained") / "nvlm-h-tiny"
    build_engine(ROOT / "checkpoints" / "nvlm-h-tiny", engine)
    return engine


def test_the_commands(run_cli: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (schema,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "total.json").write_text(schema)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ nvlm-trt (.*)\n(.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for command, answer in commands:
        arguments = [str(trained) if part == "engines/h" else part for part in shlex.split(command)]
        assert run_cli(*arguments)[:2] == (0, f"{answer}\n"), command
