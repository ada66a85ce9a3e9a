"""Tests what appears whole or not at all: of several writers of one name one wins, and readers never see a gap."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvlm_trt import staging
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint
from nvlm_trt.commands.tinydocs import tinydocs
from nvlm_trt.engine import MANIFEST, publish
from nvlm_trt.errors import EngineError, NvlmError, RequestError
from nvlm_trt.staging import publish_file

WRITERS = 8


@pytest.fixture(params=["exchange", "two renames"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on a file system that exchanges names, and as on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    return str(request.param)


def outcomes(write: Callable[[int], object]) -> Iterator[BaseException | None]:
    """Yields the error of each of WRITERS writers that run at once; None: it says that it has published."""

    def attempt(number: int) -> BaseException | None:
        try:
            write(number)
        except NvlmError as error:
            return error
        return None

    with ThreadPoolExecutor(WRITERS) as pool:
        yield from pool.map(attempt, range(WRITERS))


def engine_writer(target: Path, overwrite: bool, together: threading.Barrier) -> Callable[[int], None]:
    def write(number: int) -> None:
        with publish(target, overwrite) as directory:
            for name in (MANIFEST, "a", "b"):
                (directory / name).write_text(str(number))
            together.wait(30)

    return write


def test_one_of_several_builds_is_published(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    errors = list(outcomes(engine_writer(target, False, threading.Barrier(WRITERS))))
    assert errors.count(None) == 1
    winner = str(errors.index(None))
    assert {file.read_text() for file in target.iterdir()} == {winner}
    assert all("exists; choose another --output or pass --overwrite" in str(e) for e in errors if e is not None)
    assert list(tmp_path.iterdir()) == [target]


def test_a_build_does_not_replace_what_another_has_published(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="exists; choose another --output"), publish(tmp_path / "engine") as late:
        (late / MANIFEST).write_text("late")
        with publish(tmp_path / "engine") as early:
            (early / MANIFEST).write_text("early")
    assert (tmp_path / "engine" / MANIFEST).read_text() == "early"


def test_a_build_does_not_replace_an_empty_folder_that_appeared(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="exists"), publish(tmp_path / "engine"):
        (tmp_path / "engine").mkdir()


def test_a_folder_that_became_something_else_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not an engine directory"), publish(tmp_path / "out", overwrite=True):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_folder_is_kept(tmp_path: Path, kind: str, overwrite: bool) -> None:
    target = tmp_path / "out"
    target.write_text("mine") if kind == "a file" else target.symlink_to("nothing")
    message = "is not an engine directory" if overwrite else "exists"
    with pytest.raises(EngineError, match=message), publish(target, overwrite):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_several_overwrites_all_publish_and_the_last_is_whole(tmp_path: Path, file_system: str) -> None:
    target = tmp_path / "engine"
    target.mkdir()
    (target / MANIFEST).write_text("old")
    assert list(outcomes(engine_writer(target, True, threading.Barrier(WRITERS)))) == [None] * WRITERS
    contents = {file.name: file.read_text() for file in target.iterdir()}
    assert contents.keys() == {MANIFEST, "a", "b"}
    assert len(set(contents.values())) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_an_overwritten_directory_is_never_missing(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    target.mkdir()
    (target / MANIFEST).write_text("old")
    if not staging._exchange(target, Path(make(tmp_path / "other"))):
        pytest.skip("this file system cannot exchange two names")
    (target / MANIFEST).write_text("old")
    stop, missing = multiprocessing.Event(), multiprocessing.Value("i", 0)
    reader = multiprocessing.Process(target=count_missing, args=(target / MANIFEST, stop, missing))
    reader.start()
    for number in range(300):
        with publish(target, overwrite=True) as directory:
            (directory / MANIFEST).write_text(str(number))
    stop.set()
    reader.join(30)
    assert missing.value == 0


def make(directory: Path) -> Path:
    directory.mkdir()
    return directory


def count_missing(path: Path, stop: multiprocessing.synchronize.Event, missing: multiprocessing.Value) -> None:  # type: ignore[valid-type]
    while not stop.is_set():
        missing.value += not path.exists()  # type: ignore[attr-defined]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "engine"
    target.mkdir()
    (target / MANIFEST).write_text("old")
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    real, calls = os.rename, []

    def rename(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr("nvlm_trt.staging.os.rename", rename)
    with pytest.raises(KeyboardInterrupt), publish(target, overwrite=True) as directory:
        (directory / MANIFEST).write_text("new")
    assert (target / MANIFEST).read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_overwriting_a_link_to_an_engine_keeps_what_it_points_to(tmp_path: Path, file_system: str) -> None:
    real = make(tmp_path / "real")
    (real / MANIFEST).write_text("old")
    (tmp_path / "link").symlink_to("real")
    with publish(tmp_path / "link", overwrite=True) as directory:
        (directory / MANIFEST).write_text("new")
    assert (tmp_path / "link" / MANIFEST).read_text() == "new"
    assert (real / MANIFEST).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    with publish(tmp_path / ("é" * 127)):
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_a_build_returns_the_engine_that_it_has_made(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another build with --overwrite may be published at any moment."""

    def replaced(directory: Path, target: Path, refuse: object) -> None:
        os.rename(directory, target)
        (target / MANIFEST).write_text("another engine")

    monkeypatch.setattr(staging, "replace_directory", replaced)
    engine = build_engine(checkpoint("nvlm-d-tiny"), tmp_path / "engine", smoke_test=False)
    assert engine.path == tmp_path / "engine"
    assert engine.config.architecture == "D"


def test_one_of_several_checkpoints_is_written(tmp_path: Path) -> None:
    errors = list(outcomes(lambda number: init_checkpoint(tmp_path / "checkpoint", "nvlm-d-tiny", seed=number)))
    assert errors.count(None) == 1
    assert all("exists; choose another directory" in str(error) for error in errors if error is not None)


def test_tinydocs_does_not_replace_what_appeared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def appears(sample: object, directory: Path) -> dict[str, object]:
        make(tmp_path / "docs")
        return {}

    monkeypatch.setattr("nvlm_trt.commands.tinydocs._write_images", appears)
    with pytest.raises(NvlmError, match="exists; choose another directory"):
        tinydocs(output=tmp_path / "docs", count=1, split="test", tasks="copy", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


@pytest.mark.parametrize("links", [True, False])
def test_one_of_several_files_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr("nvlm_trt.staging.os.link", lambda source, target: os.rmdir(tmp_path / "none"))

    def write(number: int) -> None:
        temporary = tmp_path / f"{number}.tmp"
        temporary.write_text(str(number))
        try:
            publish_file(temporary, tmp_path / "file", overwrite=False)
        except FileExistsError:
            temporary.unlink()
            raise RequestError("exists") from None

    errors = list(outcomes(write))
    assert errors.count(None) == 1
    assert (tmp_path / "file").read_text() == str(errors.index(None))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "new").write_text("new")
    publish_file(tmp_path / "new", tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "new"
