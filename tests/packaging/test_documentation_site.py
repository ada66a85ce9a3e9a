"""The site of docs/: it builds, every page can be reached, and a link that leads nowhere fails the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def build(sources: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", sources / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)


def test_it_builds_and_asks_no_other_site_for_anything(sources: Path) -> None:
    result = build(sources)
    assert result.returncode == 0, result.stderr
    pages = list((sources / "site").rglob("index.html"))
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'(?:src|rel="stylesheet" href)="(?:https?:)?//[^"]+"', text) == []


@pytest.mark.parametrize("link", ["[x](nowhere.md)", "[x](triton.md#no-such-heading)", "[x](../README.md)"])
def test_a_link_that_leads_nowhere_fails(sources: Path, link: str) -> None:
    with (sources / "docs" / "doctor.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{link}\n")
    assert build(sources).returncode != 0
