"""A build that SIGKILL ends at any moment goes on where it stopped: the same bytes as without an interruption."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_builds import Builds

from lab.build_memory import write_calibration
from nvlm_trt.builders.unfinished_build import unfinished_folder
from nvlm_trt.engine import JOURNAL

Directory = Callable[[str], Path]
EVERYTHING = "int8,vision_encoder=int8,projector=int8,lm_head=int8"
# preset, precision, how many moments
MODELS = [
    ("nvlm-h-tiny", "bf16", 6),
    ("nvlm-x-tiny", "int4-weight-only", 5),
    ("nvlm-d-tiny", EVERYTHING, 5),
]
OUTSIDE = 4  # moments that the clock chooses


@pytest.fixture(scope="module")
def builds() -> Iterator[Builds]:
    with Builds() as builds:
        yield builds


def contents(engine: Path) -> dict[str, bytes]:
    return {str(path.relative_to(engine)): path.read_bytes() for path in engine.rglob("*") if path.is_file()}


def options(checkpoint: Path, precision: str, folder: Path) -> dict[str, Any]:
    if precision != EVERYTHING:
        return {"precision": precision}
    write_calibration(folder / "calibration.json", checkpoint)
    return {"precision": precision, "calibration": str(folder / "calibration.json")}


@pytest.mark.parametrize(("preset", "precision", "moments"), MODELS)
def test_goes_on_after_any_moment(
    checkpoint: Directory, builds: Builds, tmp_path: Path, preset: str, precision: str, moments: int
) -> None:
    source, output = checkpoint(preset), tmp_path / "killed"
    chosen = options(source, precision, tmp_path)
    straight = builds.build(source, tmp_path / "whole", **chosen)
    whole, seed = contents(tmp_path / "whole"), random.Random(20)
    inside_a_tensor = 0
    for moment in sorted(seed.sample(range(1, straight["events"] + 1), moments)):
        assert builds.build(source, output, kill_event=moment, **chosen)["killed"]
        inside_a_tensor += any(not position.endswith(" 0") for position in positions(output))
        again = builds.build(source, output, **chosen)
        assert not again["killed"]
        assert contents(output) == whole, f"killed at {moment} of {straight['events']}"
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["killed", "whole"]
        for path in sorted(output.iterdir()):
            path.unlink()
        output.rmdir()
    assert inside_a_tensor


def test_goes_on_however_often_it_is_killed(checkpoint: Directory, builds: Builds, tmp_path: Path) -> None:
    """One build, killed again and again, always a little later."""
    source, output = checkpoint("nvlm-h-tiny"), tmp_path / "killed"
    builds.build(source, tmp_path / "whole")
    shares = {
        "vision_encoder": (0.3, 0.6, 1),
        "cross_kv": (0.5,),
        "decoder": (0, 0.2, 0.4, 0.6, 0.8),
        "hashing": (0.5,),
    }
    for stage, of_stage in shares.items():
        for share in of_stage:
            assert builds.build(source, output, kill_at=(stage, 0.99 * share))["killed"]
    builds.build(source, output)
    assert contents(output) == contents(tmp_path / "whole")


def test_goes_on_after_a_moment_of_the_clock(checkpoint: Directory, builds: Builds, tmp_path: Path) -> None:
    """Also while the journal is written, a file is hashed, or the folder renamed."""
    source, output = checkpoint("nvlm-x-tiny"), tmp_path / "killed"
    straight = builds.build(source, tmp_path / "whole")
    seed = random.Random(20)
    for _ in range(OUTSIDE):
        builds.build(source, output, kill_after=straight["seconds"] * seed.random(), overwrite=True)
        builds.build(source, output, overwrite=True)
        assert contents(output) == contents(tmp_path / "whole")


def positions(output: Path) -> list[str]:
    """Return the entries of the journal of a killed build, without the checksums."""
    journal = unfinished_folder(output) / "engine" / JOURNAL
    if not journal.exists():
        return []
    head, *entries = (line.rpartition(" ")[0] for line in journal.read_text().splitlines())
    assert json.loads(head)["format"] == 1
    return entries
