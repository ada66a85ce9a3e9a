"""Names the state of the checkout's code. Imports Python's own modules only: the GPU check runs on bare machines."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("nvlm_trt", "builders", "plugins", "triton_repo")
SOURCES = (*PRODUCT, "lab")
NOT_SOURCES = ("lab/results",)  # written by --publish


def code_state(root: Path = ROOT) -> dict[str, str]:
    """Returns {"commit": id}, with "changes": digest if sources differ from it; without git {"sources": digest}.

    `root` has to be the top folder of its git repository: a copy inside another repository has no commit."""
    if _git(root, "rev-parse", "--show-prefix") != "":
        return {"sources": sources_digest(root)}
    commit = _git(root, "rev-parse", "HEAD")
    excluded = [f":(exclude){folder}" for folder in NOT_SOURCES]
    changes = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *SOURCES, *excluded)
    if commit is None or changes is None:
        return {"sources": sources_digest(root)}
    return {"commit": commit, "changes": sources_digest(root)} if changes else {"commit": commit}


def sources_digest(root: Path = ROOT, folders: Sequence[str] = SOURCES) -> str:
    """Hashes the names and bytes of all files below `folders`, except results and compiled Python."""
    digest = hashlib.sha256()
    skipped = {root / folder for folder in NOT_SOURCES}
    for folder in folders:
        for directory, names, files in os.walk(root / folder):
            names[:] = sorted(name for name in names if name != "__pycache__" and Path(directory, name) not in skipped)
            for name in sorted(files):
                path = Path(directory, name)
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def described(code: dict[str, str]) -> str:
    """Shortens a code state for a reader: "commit 1234567890 with changes 1234567890"."""
    return " with ".join(f"{kind} {digest[:10]}" for kind, digest in code.items())


def _git(root: Path, *arguments: str) -> str | None:
    """Returns what git prints, None if git is absent or fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
