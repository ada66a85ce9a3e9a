"""The code state of a checkout: its commit, its changes, or a digest of its sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lab.code_state import code_state, described


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@localhost"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one committed source file, and results beside it."""
    root = tmp_path / "checkout"
    for name in ("nvlm_trt/a.py", "lab/results/a.json", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_a_commit_and_its_changes(checkout: Path) -> None:
    clean = code_state(checkout)
    assert set(clean) == {"commit"}
    (checkout / "README.md").write_text("other")
    (checkout / "lab" / "results" / "a.json").write_text("published")
    assert code_state(checkout) == clean, "neither pages nor results are code"
    (checkout / "nvlm_trt" / "a.py").write_text("other")
    first = code_state(checkout)
    assert first["commit"] == clean["commit"]
    (checkout / "nvlm_trt" / "a.py").write_text("once more")
    second = code_state(checkout)
    assert len({first["changes"], second["changes"]}) == 2
    assert described(second) == f"commit {clean['commit'][:10]} with changes {second['changes'][:10]}"
    git(checkout, "commit", "-q", "-a", "-m", "second")
    committed = code_state(checkout)
    assert set(committed) == {"commit"}
    assert committed != clean
    (checkout / "lab" / "new.py").write_text("untracked")
    assert "changes" in code_state(checkout)


def test_without_git_the_sources_are_hashed(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    first = code_state(checkout)
    assert set(first) == {"sources"}
    cache = checkout / "nvlm_trt" / "__pycache__"
    cache.mkdir()
    (cache / "a.pyc").write_text("compiled")
    assert code_state(checkout) == first
    (checkout / "nvlm_trt" / "a.py").rename(checkout / "nvlm_trt" / "b.py")
    assert code_state(checkout) != first


def test_a_copy_inside_another_repository_has_no_commit(checkout: Path) -> None:
    copy = checkout / "copy"
    (copy / "nvlm_trt").mkdir(parents=True)
    (copy / "nvlm_trt" / "a.py").write_text("a")
    assert set(code_state(copy)) == {"sources"}
