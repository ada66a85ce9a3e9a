"""The files of a graph: the bytes that onnx_ir itself writes, and on the disk before the journal says so."""

from __future__ import annotations

import errno
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from stages import ArrayTensor

from nvlm_trt.builders import data_file, file_writes
from nvlm_trt.builders.file_writes import BackgroundSync
from nvlm_trt.builders.graphs import streamed
from nvlm_trt.builders.graphs.common import Unquantised, WeightFormat
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import GroupQueryAttention
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.blocked_weights import BlockedWeights
from nvlm_trt.builders.quantization.weight_only import WeightOnly
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.progress import Bytes


class Weights:
    """Implements `WeightSource` with random numbers, the same for a name at every call."""

    def __init__(self, config: NvlmConfig) -> None:
        self._shapes = checkpoint_layout(config)

    def take(self, name: str) -> ArrayTensor:
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return ArrayTensor(random.standard_normal(self._shapes[name], np.float32))


def decoder(weight_format: WeightFormat) -> ir.Model:
    tiny = PRESETS["nvlm-d-tiny"]
    config = replace(tiny, image_token_id=259, llm=replace(tiny.llm, num_layers=1, vocab_size=2048))
    return decoder_graph(config, Weights(config), EngineLimits(max_seq_len=64), weight_format, GroupQueryAttention)


@pytest.mark.parametrize("weight_format", [Unquantised(), WeightOnly(4), BlockedWeights(4)])
def test_writes_what_onnx_ir_writes(tmp_path: Path, weight_format: WeightFormat) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    model, reported = decoder(weight_format), []
    save_model(model, ours / "decoder.onnx", lambda *report: reported.append(report))
    # page-aligned above a megabyte, which the embedding table has here
    ir.save(model, theirs / "decoder.onnx", external_data="decoder.onnx.data", alignment=4096)
    for name in ("decoder.onnx", "decoder.onnx.data"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    offsets = data_file.DataFile(ours / "x", [value.const_value for value in model.graph.initializers.values()]).offsets
    assert any(offset % 4096 for offset in offsets)
    size = (ours / "decoder.onnx.data").stat().st_size
    assert reported[-1] == ("decoder", size, size)
    assert isinstance(reported[-1][2], Bytes)
    done = [done for _, done, _ in reported]
    assert done == sorted(done)


class Recorder:
    """Stands for an unfinished build, and checks that the disk has all that is noted."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def reached(self, path: Path) -> str | None:
        return None

    def note(self, path: Path, position: str) -> None:
        assert Recorder.is_safe
        self.noted.append(position)

    is_safe = False


def test_data_is_safe_before_the_journal_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was synced, in whatever order the disk likes."""
    monkeypatch.setattr(streamed, "_BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(file_writes, "_SYNC_BYTES", 1 << 16)
    real, sync = os.fdatasync, BackgroundSync._sync

    def synced(descriptor: int) -> None:
        real(descriptor)
        Recorder.is_safe = True

    def one_sync(self: BackgroundSync, position: str) -> None:
        Recorder.is_safe = False
        sync(self, position)

    monkeypatch.setattr(file_writes.os, "fdatasync", synced)
    monkeypatch.setattr(BackgroundSync, "_sync", one_sync)
    build = Recorder()
    save_model(decoder(Unquantised()), tmp_path / "decoder.onnx", lambda *_: None, build)  # type: ignore[arg-type]
    assert len(build.noted) > 10
    assert any(not position.endswith(" 0") for position in build.noted)


def test_a_disk_that_fails_while_it_syncs_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_writes, "_SYNC_BYTES", 1 << 16)

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_writes.os, "fdatasync", failing)
    build = Recorder()
    with pytest.raises(OSError, match="Input/output error"):
        save_model(decoder(Unquantised()), tmp_path / "decoder.onnx", lambda *_: None, build)  # type: ignore[arg-type]
    assert build.noted == []
