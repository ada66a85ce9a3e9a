"""Reads and assembles PTX."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}


def entry_parameters(ptx: str) -> str:
    """Return one letter per parameter of the kernel: p for a pointer, i for a 32-bit integer, ? for others."""
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None, ptx[:500]
    return "".join(
        "p" if ".u64 .ptr" in parameter else "i" if ".u32" in parameter else "?"
        for parameter in entry.group(1).split(",")
    )


def assemble(ptx: str, target: str, directory: Path) -> int:
    """Assemble by CUDA's ptxas, or by the ptxas for new GPUs in Triton's wheel. Returns bytes of spilled registers."""
    from triton import knobs

    assembler = shutil.which("ptxas") or knobs.nvidia.ptxas_blackwell.path
    if not Path(assembler).exists():
        pytest.skip("no ptxas on PATH and none in triton's wheel")
    (directory / "kernel.ptx").write_text(ptx)
    command = [assembler, "-v", f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr, done.stderr  # ptxas warns so if each wgmma waits for the one before
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert spilled is not None, done.stderr
    return int(spilled.group(1))
