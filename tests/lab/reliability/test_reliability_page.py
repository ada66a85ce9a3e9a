"""The page holds the tables of the committed results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab.common import RESULTS
from lab.reliability import chaos, fuzz, page, soak
from lab.reliability.course import Verdict, publish
from lab.reliability.kinds.all_kinds import all_kinds
from nvlm_trt.errors import NvlmError


def test_the_page_holds_the_committed_results(tmp_path: Path) -> None:
    copy = tmp_path / "reliability.md"
    shutil.copy(page.PAGE, copy)
    page.write_page(copy)
    assert copy.read_text(encoding="utf-8") == page.PAGE.read_text(encoding="utf-8")
    for name in ("fuzz", "chaos", "soak"):
        assert all(mark in copy.read_text(encoding="utf-8") for mark in page.marks(name))


def test_a_run_that_is_not_complete_is_not_published() -> None:
    with pytest.raises(NvlmError, match="is not written: 3 kinds were not run"):
        publish(None, Verdict(missing=["3 kinds were not run"]), chaos.RESULT)
    assert {fuzz.RESULT, chaos.RESULT, soak.RESULT} == {
        f"reliability_{name}.json" for name in ("fuzz", "chaos", "soak")
    }


def test_the_page_names_kinds_that_exist() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert '--only "guard killed"' in text
    assert "guard killed" in all_kinds()
    assert RESULTS.is_dir()
