"""Tests the engine directory: it is published whole or not at all, and checked before it is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.engine import MANIFEST, Engine, publish
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.staging import storage_errors


@pytest.fixture
def copy(tmp_path: Path, engine) -> Path:
    """Copies a real engine, so that a test may damage the copy."""
    return Path(shutil.copytree(engine("nvlm-h-tiny"), tmp_path / "engine"))


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def weights_file(path: Path) -> Path:
    return max((p for p in path.iterdir() if p.name != MANIFEST), key=lambda p: p.stat().st_size)


def test_a_built_engine_opens_and_lists_every_file(copy: Path) -> None:
    engine = Engine.open(copy, full_check=True)
    assert engine.config.architecture == "H"
    assert set(engine.manifest.files) == {p.name for p in copy.iterdir()} - {MANIFEST}


def test_the_digest_follows_weights_and_precision_alone(copy: Path) -> None:
    """The digest is part of image cache keys: another number of slots must not change it."""
    digests = [Engine.open(copy).digest]
    limits = EngineLimits(max_slots=1).model_dump()
    for changes in ({"limits": limits}, {"precision": {"decoder": "int8"}}, {"checkpoint_digest": "0"}):
        edit_manifest(copy, **changes)
        digests.append(Engine.open(copy).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_not_an_engine_directory(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"not an engine directory.*nvlm-trt build"):
        Engine.open(tmp_path)


def test_truncated_file_is_named(copy: Path) -> None:
    victim = weights_file(copy)
    os.truncate(victim, victim.stat().st_size - 1)
    with pytest.raises(EngineError, match=rf"{victim.name} has \d+ bytes, its manifest says \d+.*rebuild"):
        Engine.open(copy)


def test_flipped_byte_is_found(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a small file always, in a large one by a full check."""
    victim = weights_file(copy)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(EngineError, match=rf"{victim.name} does not match the sha256"):
        Engine.open(copy)
    monkeypatch.setattr("nvlm_trt.engine._QUICK_HASH_BYTES", len(data) - 1)
    Engine.open(copy)
    with pytest.raises(EngineError, match=rf"{victim.name} does not match the sha256"):
        Engine.open(copy, full_check=True)


def test_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"tokenizer\.json is missing"):
        Engine.open(copy)


@pytest.mark.parametrize("record", [None, {"version": "11.1.0.33"}])
def test_a_manifest_of_schema_version_1_opens(copy: Path, record: dict[str, str] | None) -> None:
    """It had neither `runtimes` nor `backend_record`, and named the record of one backend by a key of its own."""
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["runtimes"], manifest["backend_record"]
    (copy / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 1, "tensorrt": record}))
    opened = Engine.open(copy)
    assert opened.manifest.backend_record == record
    assert opened.manifest.runtimes == {}


def test_other_schema_version(copy: Path) -> None:
    edit_manifest(copy, schema_version=99)
    with pytest.raises(EngineError, match="schema version 99.*rebuild"):
        Engine.open(copy)


def test_unknown_manifest_key_is_named(copy: Path) -> None:
    edit_manifest(copy, preciison={})
    with pytest.raises(EngineError, match="preciison"):
        Engine.open(copy)


def test_manifest_that_is_not_json(copy: Path) -> None:
    (copy / MANIFEST).write_text("{")
    with pytest.raises(EngineError, match="is not JSON"):
        Engine.open(copy)


def test_engine_of_another_architecture(copy: Path) -> None:
    edit_manifest(copy, architecture="D")
    with pytest.raises(EngineError, match=r"NVLM-D, its config\.json says NVLM-H"):
        Engine.open(copy)


def test_publish_shows_only_a_finished_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publish(target) as staging:
        (staging / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o755  # a server may run as another user
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_publish_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publish(tmp_path / "out") as staging:
        (staging / "half").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_publish_does_not_overwrite_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / MANIFEST).write_text("{}")
    with pytest.raises(EngineError, match="--overwrite"), publish(target):
        pass
    with publish(target, overwrite=True) as staging:
        (staging / "file").write_text("new")
    assert {p.name for p in target.iterdir()} == {"file"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_overwrite_keeps_the_old_engine(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / MANIFEST).write_text("{}")
    with pytest.raises(ValueError), publish(target, overwrite=True):
        raise ValueError
    assert (target / MANIFEST).exists()


def test_publish_never_replaces_a_folder_that_is_not_an_engine(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EngineError, match="not an engine directory"), publish(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "thesis.txt").exists()


def test_disk_full_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="disk full while writing") as caught, storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("is_checked", "message"),
    [(True, "has too little space: the build needs [0-9]+ bytes, [0-9]+ are free"), (False, "disk full while writing")],
    ids=["before it writes", "while it writes"],
)
def test_a_build_on_a_full_disk_leaves_nothing(
    tmp_path: Path, checkpoint, monkeypatch: pytest.MonkeyPatch, is_checked: bool, message: str
) -> None:
    """On a real file system that is too small for the engine, or that others fill after the build has looked."""
    if not is_checked:
        monkeypatch.setattr("nvlm_trt.builders.engine_build.check_disk", lambda *_: None)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(EngineError, match=message):
            build_engine(checkpoint("nvlm-h-tiny"), tmp_path / "engine")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)
