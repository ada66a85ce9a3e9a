"""scripts/pack_rtx.sh with tiny stand-ins for the wheels: pieces, sums, joining, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "pack_rtx.sh"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, check=False)


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """Two wheels: a module, and a library of 2.5 MB that does not compress."""
    noise = np.random.default_rng(0).bytes(2_500_000)
    files = {"bindings": ("toy_rtx/__init__.py", b"version = '1.7'\n"), "libs": ("toy_libs/libtoy.so.1", noise)}
    made = []
    for name, (path, content) in files.items():
        made.append(tmp_path / f"{name}-1-py3-none-any.whl")
        with zipfile.ZipFile(made[-1], "w") as wheel:
            wheel.writestr(path, content)
    return made


def test_pieces_are_joined_on_the_other_machine(wheels: list[Path], tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "to be made" / "site"
    packed = run(SCRIPT, out, *wheels, PIECE_MB="1")
    assert packed.returncode == 0, packed.stderr
    assert "packed 2 wheels into 3 pieces of at most 1 MB" in packed.stdout
    assert "licence terms apply" in packed.stdout
    pieces = sorted(out.glob("rtx.tar.xz.*"))
    assert [piece.stat().st_size <= 1_000_000 for piece in pieces] == [True] * 3
    moved = tmp_path / "moved"
    out.rename(moved)
    unpacked = run(moved / "unpack.sh", target)
    assert (unpacked.returncode, unpacked.stderr) == (0, "")
    assert unpacked.stdout.startswith(f"export PYTHONPATH={target}")
    shown = run(sys.executable, "-S", "-c", "import toy_rtx; print(toy_rtx.version)", PYTHONPATH=str(target))
    assert shown.stdout == "1.7\n"
    with zipfile.ZipFile(wheels[1]) as wheel:
        assert (target / "toy_libs" / "libtoy.so.1").read_bytes() == wheel.read("toy_libs/libtoy.so.1")
    again = run(moved / "unpack.sh", target)
    assert (again.returncode, again.stderr) == (2, f"error: {target} is not empty; name a new folder\n")


@pytest.mark.parametrize("damage", ["changed", "short", "absent"])
def test_a_damaged_piece_is_refused_in_one_line(wheels: list[Path], tmp_path: Path, damage: str) -> None:
    assert run(SCRIPT, tmp_path / "out", *wheels, PIECE_MB="1").returncode == 0
    piece = tmp_path / "out" / "rtx.tar.xz.01"
    content = piece.read_bytes()
    if damage == "absent":
        piece.unlink()
    else:
        piece.write_bytes(content[:-1] if damage == "short" else content[:500] + b"?" + content[501:])
    refused = run(tmp_path / "out" / "unpack.sh", tmp_path / "site")
    what = "is missing" if damage == "absent" else "is damaged (its sha256 is not that of SHA256SUMS)"
    assert (refused.returncode, refused.stderr) == (2, f"error: {piece} {what}; copy it again\n")
    assert list((tmp_path / "site").iterdir()) == []


def test_what_is_refused(wheels: list[Path], tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    fine = tmp_path / "fine"
    for arguments, environment, line in (
        ([], {}, "no folder to write to; use scripts/pack_rtx.sh OUT [WHEEL ...]"),
        ([full], {}, f"{full} is not empty; name a new folder"),
        ([fine], {"PIECE_MB": "61"}, "PIECE_MB=61 is not from 1 to 60"),
        ([fine], {"PYTHON": "/no/python"}, "there is no /no/python; set PYTHON"),
        ([fine, full / "no.whl"], {}, f"there is no wheel {full / 'no.whl'}"),
    ):
        refused = run(SCRIPT, *arguments, **environment)
        assert (refused.returncode, refused.stderr) == (2, f"error: {line}\n")


def test_nothing_is_written_into_a_repository(wheels: list[Path], tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path / "repository"], check=True)
    refused = run(SCRIPT, tmp_path / "repository" / "out", *wheels)
    assert refused.returncode == 2
    assert refused.stderr.endswith("; name a folder outside it\n")
