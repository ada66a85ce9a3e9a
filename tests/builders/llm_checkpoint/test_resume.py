"""An interrupted writer goes on where it stopped: the same bytes, and nothing is written twice."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from split_models import MAX_ENCODER_LEN, SplitModel

from nvlm_trt.builders.journal import Journal
from nvlm_trt.builders.tensorrt_llm import rank_files
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm.tensor_file import TensorFile
from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, check_llm_checkpoint, write_llm_checkpoint
from nvlm_trt.engine import JOURNAL
from nvlm_trt.errors import EngineError

Models = Callable[[str], SplitModel]
MAPPING = Mapping(2, 2)


class StoppedError(Exception):
    """Stands for whatever ends a writer."""


@pytest.fixture(autouse=True)
def _every_tensor_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_files, "_SYNC_BYTES", 1)


def write(
    model: SplitModel,
    directory: Path,
    quantization: LlmQuantization,
    stop_at: float = 2,
    stop: Callable[[], None] | None = None,
    mapping: Mapping = MAPPING,
    dtype: str = "bf16",
) -> None:
    """Write the ranks, and stop when a fraction `stop_at` of the bytes is written."""

    def progress(description: str, done: float, total: float) -> None:
        if done / total > stop_at:
            if stop:
                stop()
            raise StoppedError

    write_llm_checkpoint(
        model.checkpoint, model.config, directory, quantization, mapping, MAX_ENCODER_LEN, progress, dtype=dtype
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def written_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the tensors that are written from now on, by file."""
    names: list[str] = []
    write_tensor = TensorFile.write

    def record(self: TensorFile, name: str, first: int, values: object) -> int:
        names.append(f"{self.path.name} {name}")
        return write_tensor(self, name, first, values)

    monkeypatch.setattr(TensorFile, "write", record)
    return names


def finished(directory: Path) -> list[str]:
    """Return what the journal of a directory names, without the checksums."""
    return [line.rpartition(" ")[0] for line in (directory / JOURNAL).read_text().splitlines()[1:]]


def again(done: list[str], written: list[str]) -> set[str]:
    """Return the tensors that were written although the journal called them finished."""
    finished = set()
    for line in done:
        _, stage, name = line.split()
        ranks = (2 * int(stage), 2 * int(stage) + 1)
        finished |= {f"rank{rank}.safetensors {name}{kind}" for rank in ranks for kind in ("", ".weight")}
    return finished & set(written)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.97])
def test_goes_on(tmp_path: Path, split_model: Models, monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    model = split_model("X")
    quantization = model.quantization("int8", MAPPING)
    write(model, tmp_path / "whole", quantization)
    directory = tmp_path / "interrupted"
    with pytest.raises(StoppedError):
        write(model, directory, quantization, fraction)
    with pytest.raises(EngineError, match="is not finished"):
        check_llm_checkpoint(directory, model.config)
    assert not (directory / "config.json").exists()
    done = finished(directory)
    assert bool(done) == (fraction > 0)
    with (directory / JOURNAL).open("a") as journal:
        journal.write("stage 1 lm_head.weight")  # killed before the end of the line
    names = written_names(monkeypatch)
    seen: list[float] = []
    write_llm_checkpoint(
        model.checkpoint, model.config, directory, quantization, MAPPING, MAX_ENCODER_LEN,
        lambda _, done, total: seen.append(done / total),
    )  # fmt: skip
    assert contents(directory) == contents(tmp_path / "whole")
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert not again(done, names)


KILLED = """
import os, signal, sys
from pathlib import Path
from nvlm_trt.builders.tensorrt_llm import rank_files
from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, Mapping, write_llm_checkpoint
from nvlm_trt.model.hf_config import read_config

def progress(description, done, total):
    if done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)

rank_files._SYNC_BYTES = 100_000
checkpoint, directory, length = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
write_llm_checkpoint(checkpoint, read_config(checkpoint), directory, LlmQuantization(), Mapping(2, 2), length, progress)
"""


def test_a_killed_writer_goes_on(tmp_path: Path, split_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = split_model("H")
    write(model, tmp_path / "whole", LlmQuantization())
    directory = tmp_path / "killed"
    arguments = [str(model.checkpoint), str(directory), str(MAX_ENCODER_LEN)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, cwd=Path(__file__).parents[3])
    assert killed.returncode == -signal.SIGKILL
    done = finished(directory)
    assert done
    names = written_names(monkeypatch)
    write(model, directory, LlmQuantization())
    assert contents(directory) == contents(tmp_path / "whole")
    assert names
    assert not again(done, names)


@pytest.mark.parametrize(
    "change", ["precision", "split", "dtype", "scales", "weights", "a missing file", "a shorter file"]
)
def test_starts_anew_for_anything_else(
    tmp_path: Path, split_model: Models, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model, mapping, dtype = split_model("D"), MAPPING, "bf16"
    quantization = model.quantization("fp8", mapping)
    directory = tmp_path / "interrupted"
    with pytest.raises(StoppedError):
        write(model, directory, quantization, 0.6)
    if change == "precision":
        quantization = LlmQuantization()
    elif change == "split":
        mapping = Mapping(1, 2)
    elif change == "dtype":
        dtype = "fp16"
    elif change == "weights":
        model = split_model("D")
        other = tmp_path / "other"
        other.mkdir()
        for path in model.checkpoint.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        with (other / "model.safetensors").open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x00\x3f")
        copy = object.__new__(SplitModel)
        copy.__dict__ |= {**model.__dict__, "checkpoint": other}
        model = copy
    elif change == "scales":
        assert quantization.calibration is not None
        calibration = quantization.calibration.model_copy(deep=True)
        next(iter(calibration.linears.values())).abs_max *= 1.01
        quantization = LlmQuantization("FP8", "FP8", calibration=calibration)
    elif change == "a missing file":
        (directory / "rank1.safetensors").unlink()
    else:
        os.truncate(directory / "rank1.safetensors", 10_000)
    write_it = partial(write, model, quantization=quantization, mapping=mapping, dtype=dtype)
    write_it(directory=tmp_path / "whole")
    names = written_names(monkeypatch)
    write_it(directory=directory)
    assert contents(directory) == contents(tmp_path / "whole")
    assert "rank0.safetensors transformer.vocab_embedding.weight" in names


def test_data_is_safe_before_the_journal_names_it(
    tmp_path: Path, split_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was synced, in whatever order the disk likes."""
    unsafe: set[Path] = set()
    write_tensor, sync, add = TensorFile.write, TensorFile.sync, Journal.add

    def written(self: TensorFile, *arguments: object) -> int:
        unsafe.add(self.path)
        return write_tensor(self, *arguments)

    def synced(self: TensorFile) -> None:
        sync(self)
        unsafe.discard(self.path)

    def added(self: Journal, names: list[str]) -> None:
        assert not unsafe
        add(self, names)

    monkeypatch.setattr(TensorFile, "write", written)
    monkeypatch.setattr(TensorFile, "sync", synced)
    monkeypatch.setattr(Journal, "add", added)
    write(split_model("D"), tmp_path / "ranks", LlmQuantization())


def test_a_finished_directory_is_written_anew(tmp_path: Path, split_model: Models) -> None:
    """Ranks of a larger split do not stay behind."""
    model = split_model("D")
    write(model, tmp_path / "twice", LlmQuantization(), mapping=Mapping(4, 1))
    write(model, tmp_path / "twice", LlmQuantization(), mapping=Mapping(2, 1))
    write(model, tmp_path / "once", LlmQuantization(), mapping=Mapping(2, 1))
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_a_full_disk_is_one_line(tmp_path: Path, split_model: Models) -> None:
    model = split_model("D")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(EngineError, match="disk full while writing"):
            write(model, tmp_path / "full", LlmQuantization())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write(model, tmp_path / "full", LlmQuantization())
    check_llm_checkpoint(tmp_path / "full", model.config)


def test_an_unusable_journal_is_ignored(tmp_path: Path, split_model: Models) -> None:
    model = split_model("D")
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / JOURNAL).write_bytes(b"\xff\xfe")
    model.write(directory, LlmQuantization(), Mapping())
    check_llm_checkpoint(directory, model.config)
