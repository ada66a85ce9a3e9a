"""What a build that ends early leaves, what the next build makes of it, and what both refuse."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvlm_trt.backends.onnxruntime.build import OnnxRuntimeSteps
from nvlm_trt.builders import build_identity, engine_build, file_writes, unfinished_build
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.graphs import streamed
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.unfinished_build import UnfinishedBuild, unfinished_folder
from nvlm_trt.engine import JOURNAL, MANIFEST, Engine
from nvlm_trt.errors import CheckpointError, ConfigError, DeviceMemoryError, EngineError, NotFiniteError

Directory = Callable[[str], Path]
PRESET = "nvlm-x-tiny"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(streamed, "_STRIP_BYTES", 1 << 14)
    monkeypatch.setattr(file_writes, "_SYNC_BYTES", 1 << 18)
    monkeypatch.setattr(unfinished_build, "_WORTH_KEEPING", 0)


@pytest.fixture
def whole(engine: Directory) -> dict[str, bytes]:
    """The files of an engine that was built without an interruption."""
    return contents(engine(PRESET))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def build(checkpoint: Path, output: Path, **options: Any) -> tuple[dict[str, float], list[str]]:
    """Build. Return the first share of every stage that progress reports, and the lines for the user."""
    first: dict[str, float] = {}
    told: list[str] = []

    def progress(stage: str, done: float, total: float) -> None:
        first.setdefault(stage, done / total)

    build_engine(checkpoint, output, progress=progress, smoke_test=False, tell=told.append, **options)
    return first, told


def stopped(
    checkpoint: Path, output: Path, error: BaseException, stage: str = "decoder", share: float = 0.5, **options: Any
) -> list[str]:
    """Let a build end with an error when a share of a stage is written. Return the lines for the user."""
    told: list[str] = []

    def progress(description: str, done: float, total: float) -> None:
        if description == stage and done > share * total:
            raise error

    expected = EngineError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        build_engine(checkpoint, output, progress=progress, smoke_test=False, tell=told.append, **options)
    assert not output.exists()
    return told


def interrupted_import() -> EngineError:
    """Makes the error of a library whose import was interrupted, as OpenVINO's is reported."""
    import_error, error = ImportError("initialization failed"), EngineError("OpenVINO cannot be imported")
    import_error.__cause__, error.__context__ = KeyboardInterrupt(), import_error
    return error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(143),
        interrupted_import(),
        OSError(errno.ENOSPC, "full"),
        MemoryError(),
        DeviceMemoryError("GPU"),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C while a library is imported", "disk full", "memory", "GPU memory"],
)
def test_what_is_written_is_kept_if_the_build_may_succeed_later(
    checkpoint: Directory, whole: dict[str, bytes], tmp_path: Path, error: BaseException
) -> None:
    output = tmp_path / "engine"
    (line,) = stopped(checkpoint(PRESET), output, error)
    assert line.startswith("kept 0.0")
    assert f"in {unfinished_folder(output)}; the same command goes on with it, remove the folder" in line
    first, (line,) = build(checkpoint(PRESET), output)
    assert line.startswith(f"going on with {unfinished_folder(output)}, which has 0.0")
    assert first["decoder"] > 0  # the first tensor is finished, and nobody writes it again
    assert contents(output) == whole
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("error", [CheckpointError("NaN"), NotFiniteError("logits"), EngineError("beyond fp16")])
def test_nothing_is_kept_if_the_build_would_fail_again(checkpoint: Directory, tmp_path: Path, error: Exception) -> None:
    assert stopped(checkpoint(PRESET), tmp_path / "engine", error) == []
    assert list(tmp_path.iterdir()) == []


def test_little_is_not_kept(checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished_build, "_WORTH_KEEPING", 1 << 30)
    assert stopped(checkpoint(PRESET), tmp_path / "engine", KeyboardInterrupt()) == []
    assert list(tmp_path.iterdir()) == []


CHANGES = ["limits", "precision", "a touched shard", "another checkpoint", "versions", "code", "tokenizer"]


@pytest.mark.parametrize("change", CHANGES)
def test_another_build_starts_anew(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = Path(shutil.copytree(checkpoint(PRESET), tmp_path / "source"))
    output, options = tmp_path / "engine", {}
    stopped(source, output, KeyboardInterrupt())
    if change == "limits":
        options["overrides"] = {"max_seq_len": 512}
    elif change == "precision":
        options["precision"] = "decoder=int4-weight-only"
    elif change == "a touched shard":
        os.utime(source / "model.safetensors", ns=(1, 1))
    elif change == "another checkpoint":
        weights = source / "model.safetensors"
        before = weights.stat()
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "versions":
        monkeypatch.setattr(build_identity, "_NUMBERS", ("numpy",))
    elif change == "code":
        monkeypatch.setattr(build_identity, "_CODE", ("builders",))
    else:
        (source / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text() + "\n")
    first, (line,) = build(source, output, **options)
    assert line.startswith(f"{unfinished_folder(output)} has nothing of this build")
    straight, _ = build(source, tmp_path / "straight", **options)
    assert first == straight
    assert contents(output) == contents(tmp_path / "straight")


def test_shards_that_change_during_the_second_build(checkpoint: Directory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint(PRESET), tmp_path / "source"))
    stopped(source, tmp_path / "engine", KeyboardInterrupt())

    def touch(stage: str, done: float, total: float) -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while the engine was built"):
        build_engine(source, tmp_path / "engine", progress=touch, smoke_test=False)
    assert list(tmp_path.iterdir()) == [source]


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    place = len(data) * 3 // 4
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def zeroed(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def beyond(data: bytes) -> bytes:
    return data + b"engine/decoder.onnx.data 99999 0\n"


@pytest.mark.parametrize("damage", [cut, flipped, zeroed, beyond, lambda data: b"", lambda data: b"\xff\xfe\n" + data])
def test_a_damaged_journal_is_believed_up_to_the_damage(
    checkpoint: Directory, whole: dict[str, bytes], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    output = tmp_path / "engine"
    stopped(checkpoint(PRESET), output, KeyboardInterrupt())
    journal = unfinished_folder(output) / "engine" / JOURNAL
    journal.write_bytes(damage(journal.read_bytes()))
    build(checkpoint(PRESET), output)
    assert contents(output) == whole


@pytest.mark.parametrize("damage", ["shorter", "missing", "a link", "a folder of others"])
def test_files_that_are_not_as_they_were_left_are_written_anew(
    checkpoint: Directory, whole: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "engine"
    stopped(checkpoint(PRESET), output, KeyboardInterrupt())
    file = unfinished_folder(output) / "engine" / "vision_encoder.onnx.data"
    if damage == "shorter":
        os.truncate(file, 1000)
    elif damage == "a folder of others":
        (file.parent / "thesis").mkdir()
        (file.parent / "thesis" / "a.txt").touch()
    else:
        file.unlink()
        if damage == "a link":
            file.symlink_to("nothing")
    build(checkpoint(PRESET), output)
    assert contents(output) == whole


def test_a_second_build_of_the_same_output_is_refused(
    checkpoint: Directory, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output, refused = tmp_path / "engine", []

    def again(stage: str, done: float, total: float) -> None:
        if stage == "cross_kv" and not refused:
            with pytest.raises(EngineError, match=f"another build is writing {output}") as caught:
                build_engine(checkpoint(PRESET), output, smoke_test=False)
            refused.append(caught.value)

    build_engine(checkpoint(PRESET), output, progress=again, smoke_test=False)
    assert refused
    assert contents(output) == whole


def test_a_mistake_does_not_cost_what_is_written(
    checkpoint: Directory, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "engine"
    stopped(checkpoint(PRESET), output, KeyboardInterrupt())
    with pytest.raises(ConfigError, match="no config.json"):
        build(tmp_path / "no checkpoint", output)
    with pytest.raises(EngineError, match="max_slot"):
        build(checkpoint(PRESET), output, overrides={"max_slot": 1})
    first, _ = build(checkpoint(PRESET), output)
    assert first["decoder"] > 0
    assert contents(output) == whole


class Disk:
    def __init__(self, free: int) -> None:
        self.f_bavail, self.f_frsize = free, 1


def test_too_little_disk_is_told_before_anything_is_written(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("nothing is written")

    monkeypatch.setattr("nvlm_trt.planner.disk.os.statvfs", lambda path: Disk(1_000_000))
    monkeypatch.setattr(OnnxRuntimeSteps, "write_stages", unwanted)
    with pytest.raises(EngineError, match=r"needs \d{8} bytes, 1000000 are free; free 0.0\d GB there") as caught:
        build(checkpoint(PRESET), tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_needs_no_more_disk(
    checkpoint: Directory, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    stopped(checkpoint(PRESET), output, KeyboardInterrupt(), share=0.9)
    folder = unfinished_folder(output)
    rest = sum(map(len, whole.values())) - UnfinishedBuild(folder, print).nbytes
    monkeypatch.setattr("nvlm_trt.planner.disk.os.statvfs", lambda path: Disk(rest // 4))
    with pytest.raises(EngineError, match=f"{rest // 4} are free"):
        build(checkpoint(PRESET), output)
    monkeypatch.setattr("nvlm_trt.planner.disk.os.statvfs", lambda path: Disk(rest))
    first, _ = build(checkpoint(PRESET), output)
    assert first["decoder"] > 0
    assert contents(output) == whole


@pytest.mark.parametrize("place", ["/proc/engine", "/dev/null/engine"])
def test_a_place_that_cannot_be_written(checkpoint: Directory, place: str) -> None:
    with pytest.raises(EngineError, match=f"cannot write {place} .*; choose another place"):
        build(checkpoint(PRESET), Path(place))


def test_a_finished_calibration_is_not_measured_again(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def calibrate(self: OnnxRuntimeSteps, samples: object) -> Calibration:
        from lab.build_memory import write_calibration
        from nvlm_trt.builders.quantization.calibration import read_calibration

        measured.append(samples)
        write_calibration(tmp_path / "measured.json", checkpoint(PRESET))
        return read_calibration(tmp_path / "measured.json")

    monkeypatch.setattr(OnnxRuntimeSteps, "calibrate", calibrate)
    monkeypatch.setattr(engine_build, "document_samples", lambda *_: [])
    options: dict[str, Any] = {"precision": "decoder=int8", "quantization": QuantizationOptions(gate=None)}
    build(checkpoint(PRESET), tmp_path / "straight", **options)
    stopped(checkpoint(PRESET), tmp_path / "engine", KeyboardInterrupt(), **options)
    build(checkpoint(PRESET), tmp_path / "engine", **options)
    assert len(measured) == 2
    assert contents(tmp_path / "engine") == contents(tmp_path / "straight")


def test_a_build_that_is_killed_after_the_engine_has_its_name(
    checkpoint: Directory, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is in the engine for a moment, and an older engine in the folder."""
    output, folder = tmp_path / "engine", unfinished_folder(tmp_path / "engine")
    build(checkpoint("nvlm-d-tiny"), output)
    publish, kept = UnfinishedBuild.publish, tmp_path / "kept"

    def killed(self: UnfinishedBuild, output: Path, overwrite: bool) -> None:
        monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        publish(self, output, overwrite)
        monkeypatch.undo()
        os.rename(folder, kept)
        raise KeyboardInterrupt

    monkeypatch.setattr(UnfinishedBuild, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        build(checkpoint(PRESET), output, overwrite=True)
    os.rename(kept, folder)
    assert contents(output).keys() == {*whole, JOURNAL}
    assert Engine.open(output, full_check=True).config.architecture == "X"
    assert Engine.open(folder / "engine").config.architecture == "D"
    with pytest.raises(EngineError, match="exists"):
        build(checkpoint(PRESET), output)
    assert list(tmp_path.iterdir()) == [output]
    build(checkpoint(PRESET), output, overwrite=True)
    assert contents(output) == whole


def test_long_names_have_folders_of_their_own(tmp_path: Path) -> None:
    one, other = (unfinished_folder(tmp_path / ("é" * 60 + end)) for end in "12")
    assert one != other
    assert len(os.fsencode(one.name)) <= 255
    assert unfinished_folder(tmp_path / "engine").name == ".engine.unfinished"


def test_the_manifest_does_not_list_the_journal(engine: Directory) -> None:
    files = Engine.open(engine(PRESET)).manifest.files
    assert JOURNAL not in files
    assert MANIFEST not in files
