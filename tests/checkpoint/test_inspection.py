"""Tests the inspection of checkpoints: whole ones, and what downloads and exports leave behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sparse_checkpoint import write_sparse_checkpoint

from nvlm_trt.checkpoint.file_state import file_state
from nvlm_trt.checkpoint.inspection import inspect_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import ConfigError, NvlmError
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import PRESETS

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5' * 64}\nsize 4987654321\n"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_sparse_checkpoint(tmp_path / "sharded", PRESETS["nvlm-h-tiny"], shards=3)
    return tmp_path / "sharded"


@pytest.fixture
def copied(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("nvlm-h-tiny"), tmp_path / "copied"))


def the_fault(directory: Path) -> str:
    (fault,) = inspect_checkpoint(directory).faults
    return fault


@pytest.mark.parametrize("name", ["nvlm-d-72b", "nvlm-x-34b", "nvlm-h-72b"])
def test_a_model_of_the_real_size_in_46_shards(tmp_path: Path, name: str) -> None:
    config = PRESETS[name]
    write_sparse_checkpoint(tmp_path / name, config, shards=46)
    found = inspect_checkpoint(tmp_path / name)
    assert found.faults == []
    assert len(found.shards) == 46
    assert all(shard.state == "whole" and shard.nbytes == shard.whole_nbytes for shard in found.shards)
    parameters = sum(int(np.prod(shape, dtype=np.int64)) for shape in checkpoint_layout(config).values())
    assert sum(part.parameters for part in found.parts.values()) == parameters
    assert found.nbytes == 2 * parameters
    assert found.model is not None
    assert (found.model["architecture"], found.model["llm_layers"]) == (config.architecture, config.llm.num_layers)
    assert ("cross_attention" in found.parts) == (config.architecture != "D")
    assert "other" not in found.parts
    assert found.tokenizer is not None
    assert found.tokenizer.chat_template == "tokenizer_config.json"
    assert found.tokenizer.stop_tokens == ["<|endoftext|>", "<|im_end|>"]


def test_the_parts_of_nvlm_d_72b_are_those_of_the_paper(tmp_path: Path) -> None:
    write_sparse_checkpoint(tmp_path / "d", PRESETS["nvlm-d-72b"], shards=1)
    parts = inspect_checkpoint(tmp_path / "d").parts
    assert parts["projector"].parameters == 2 * 12800 + 12800 * 29568 + 29568 * 8192
    assert parts["embedding"].parameters == parts["lm_head"].parameters == 152064 * 8192
    assert parts["vision_encoder"].parameters == pytest.approx(5.5e9, rel=0.02)  # InternViT-6B without its last layers
    assert parts["decoder"].nbytes == {"BF16": 2 * parts["decoder"].parameters}


class TestFilesThatAreNotWhole:
    def test_a_git_lfs_pointer(self, sharded: Path) -> None:
        (sharded / SHARD).write_text(POINTER)
        fault = the_fault(sharded)
        assert SHARD in fault
        assert "Git-LFS pointer to 4.988 GB" in fault
        assert "git lfs pull" in fault
        assert inspect_checkpoint(sharded).missing

    @pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
    def test_a_broken_download(self, sharded: Path, kept: float) -> None:
        size = (sharded / SHARD).stat().st_size
        os.truncate(sharded / SHARD, int(kept * size))
        found = inspect_checkpoint(sharded)
        assert "not a whole safetensors file" in found.faults[0]
        state = {shard.name: shard for shard in found.shards}[SHARD]
        if kept > 0.01:  # the header is there
            assert (state.state, state.whole_nbytes) == ("cut off", size)
            assert found.missing == []
        else:
            assert state.state == "damaged"

    def test_a_missing_shard(self, sharded: Path) -> None:
        (sharded / SHARD).unlink()
        assert "is missing; download" in the_fault(sharded)

    def test_shards_without_their_index(self, sharded: Path) -> None:
        (sharded / INDEX).unlink()
        assert inspect_checkpoint(sharded).faults == []
        (sharded / SHARD).unlink()
        assert f"{SHARD} is missing" in the_fault(sharded)

    def test_two_indexes(self, sharded: Path) -> None:
        shutil.copy(sharded / INDEX, sharded / "model.fp16.safetensors.index.json")
        found = inspect_checkpoint(sharded)
        assert "two indexes" in found.faults[0]
        assert len(found.shards) == 3

    def test_a_folder_of_pickles(self, sharded: Path) -> None:
        for path in [*sharded.glob("*.safetensors"), sharded / INDEX]:
            path.unlink()
        (sharded / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
        assert "pytorch_model-00001-of-00002.bin, a format that can run code" in the_fault(sharded)


@given(
    cut=st.integers(0, 2000),
    garbage=st.binary(max_size=20),
    length=st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
    header=st.one_of(st.none(), st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
        lambda children: st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]), children, max_size=4),
    )),
)  # fmt: skip
def test_no_file_stops_an_inspection(
    tmp_path_factory: pytest.TempPathFactory, cut: int, garbage: bytes, length: int | None, header: object
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"mlp1.1.weight": np.ones((20, 20), np.float32)}, path)
    data = path.read_bytes()
    if header is not None:
        text = json.dumps({"a": header}).encode()
        data = struct.pack("<Q", len(text)) + text + garbage
    if length is not None:
        data = struct.pack("<Q", length) + data[8:]
    path.write_bytes(data[:cut] + garbage)
    state = file_state(path)
    assert (state.fault is None) == (state.kind == "whole")
    assert inspect_checkpoint(path.parent).faults
    with pytest.raises(NvlmError):
        open_like_a_build(path.parent)


class TestTensors:
    def test_missing_unexpected_misshapen_and_of_another_dtype(self, copied: Path) -> None:
        tensors = load_file(copied / "model.safetensors")
        del tensors["mlp1.3.weight"]
        tensors["mlp1.4.weight"] = np.zeros((2, 2), np.float32)
        tensors["mlp1.0.bias"] = np.zeros(3, np.float32)
        tensors["language_model.model.norm.weight"] = np.zeros(192, np.int8)
        tensors["vision_model.embeddings.position_ids"] = np.zeros(3, np.int64)
        save_file(tensors, copied / "model.safetensors")
        found = inspect_checkpoint(copied)
        assert (found.missing, found.unexpected) == (["mlp1.3.weight"], ["mlp1.4.weight"])
        assert found.skipped == ["vision_model.embeddings.position_ids"]
        for fragment, fault in zip(("mlp1.3.weight", "mlp1.4.weight", "[3]", "I8"), found.faults, strict=True):
            assert fragment in fault

    def test_a_tensor_in_two_shards(self, sharded: Path) -> None:
        shutil.copy(sharded / SHARD, sharded / "model-00003-of-00003.safetensors")
        assert any("is in both" in fault for fault in inspect_checkpoint(sharded).faults)


def test_a_folder_that_holds_nothing_and_no_folder(tmp_path: Path) -> None:
    assert len(inspect_checkpoint(tmp_path).faults) == 3  # config, weights, tokenizer
    with pytest.raises(ConfigError, match="not a folder"):
        inspect_checkpoint(tmp_path / "nowhere")


def test_a_tokenizer_of_another_vocabulary(copied: Path) -> None:
    raw = json.loads((copied / "config.json").read_text())
    raw["llm_config"]["vocab_size"] = 260
    raw["image_token_id"] = 259
    (copied / "config.json").write_text(json.dumps(raw))
    assert any("the model's vocab_size is 260" in fault for fault in inspect_checkpoint(copied).faults)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda directory: (directory / "config.json").write_text("[]"),
        lambda directory: (directory / "tokenizer.json").write_text("{"),
        lambda directory: (directory / "model.safetensors").unlink(),
        lambda directory: (directory / "model.safetensors").write_bytes(b"x" * 100),
        lambda directory: (directory / "model.safetensors").rename(directory / "adapter_model.safetensors"),
        lambda directory: (directory / INDEX).write_text("{}"),
        lambda directory: shutil.copy(directory / "model.safetensors", directory / "second.safetensors"),
    ],
)
def test_what_cannot_be_opened_has_a_fault(copied: Path, break_it: Callable[[Path], object]) -> None:
    break_it(copied)
    found = inspect_checkpoint(copied)
    assert found.faults
    assert all("\n" not in fault and ";" in fault for fault in found.faults)
    with pytest.raises(NvlmError):
        open_like_a_build(copied)


def open_like_a_build(directory: Path) -> None:
    from nvlm_trt.builders.source import EngineSource

    with Checkpoint.open(directory):
        EngineSource(directory, {})
