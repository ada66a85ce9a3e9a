from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nvlm_trt.serving.triton.server_folder import ServerFolder

MAKE = """
import sys, tempfile
from nvlm_trt.serving.triton.server_folder import ServerFolder
tempfile.tempdir = sys.argv[1]
folder = ServerFolder.make()
print(folder.path, folder.shm_prefix, flush=True)
input()
"""


def test_the_folder_of_a_killed_server_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    path, prefix = process.stdout.readline().split()
    region = Path("/dev/shm") / f"{prefix}region"
    region.touch()
    alive = ServerFolder.make()
    assert Path(path).exists()
    process.kill()
    process.communicate()
    last = ServerFolder.make()
    assert not Path(path).exists()
    assert not region.exists()
    assert alive.path.exists()
    for folder in (alive, last):
        folder.remove()
    assert os.listdir(tmp_path) == []
