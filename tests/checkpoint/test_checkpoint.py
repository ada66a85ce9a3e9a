"""Tests checkpoints: written values are read back, every tensor is taken once, messages name broken files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.checkpoint.writer import write_checkpoint
from nvlm_trt.errors import CheckpointError, ConfigError, EngineError
from nvlm_trt.model.config import LlmConfig, NvlmConfig, VisionConfig
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import PRESETS

CONFIG = NvlmConfig(
    name="test",
    architecture="D",
    vision=VisionConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, image_size=28, patch_size=7),
    llm=LlmConfig(family="qwen2", hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
                  intermediate_size=24, vocab_size=32, rope_theta=1e4),
    image_token_id=3,
)  # fmt: skip
EMBEDDING = "language_model.model.embed_tokens.weight"

Tensors = dict[str, np.ndarray]


def random_tensors(config: NvlmConfig = CONFIG) -> Tensors:
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape).astype(ml_dtypes.bfloat16)
        for name, shape in checkpoint_layout(config).items()
    }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint", CONFIG, random_tensors().items())
    return tmp_path / "checkpoint"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "sharded", CONFIG, random_tensors().items(), shard_bytes=2000)
    return tmp_path / "sharded"


def take_all(checkpoint: Checkpoint) -> Tensors:
    loaded = {name: checkpoint.take(name).load() for name in checkpoint.names}
    checkpoint.finish()
    return loaded


def assert_rows_of_the_whole(checkpoint: Checkpoint, name: str) -> None:
    """Asserts that any rows of a tensor equal those rows of the whole tensor."""
    tensor = checkpoint.take(name)
    whole = tensor.load()
    count = len(whole)
    for start, stop in {(0, count), (0, 1), (count - 1, count), (count // 3, count - count // 4)}:
        rows = tensor.rows(start, stop)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows, whole[start:stop])


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the one weight file with the safetensors package."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def digest(directory: Path) -> str:
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.digest


class TestRoundTrip:
    def test_bfloat16_is_exact(self, written: Path) -> None:
        with Checkpoint.open(written) as checkpoint:
            assert checkpoint.config == CONFIG
            loaded = take_all(checkpoint)
        for name, tensor in random_tensors().items():
            assert loaded[name].dtype == np.float32
            np.testing.assert_array_equal(loaded[name], tensor.astype(np.float32))

    def test_torch_reads_the_same_values(self, written: Path) -> None:
        theirs = load_torch_file(written / "model.safetensors")
        (header_length,) = struct.unpack("<Q", (written / "model.safetensors").read_bytes()[:8])
        assert header_length % 8 == 0  # data is aligned for readers that map it
        with Checkpoint.open(written) as checkpoint:
            ours = take_all(checkpoint)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name].float(), torch.from_numpy(ours[name])) for name in ours)

    @given(
        bits=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=50), dtype=st.sampled_from(["bf16", "f16", "f32"])
    )
    def test_every_bit_pattern_of_every_dtype(
        self, tmp_path_factory: pytest.TempPathFactory, bits: list[int], dtype: str
    ) -> None:
        pattern = np.array(bits, np.uint16)
        values: np.ndarray = {
            "bf16": pattern.view(ml_dtypes.bfloat16),
            "f16": pattern.view(np.float16),
            "f32": (pattern.astype(np.uint32) * 65537).view(np.float32),
        }[dtype]
        directory = tmp_path_factory.mktemp("dtype")
        write_checkpoint(directory / "c", CONFIG, random_tensors().items())
        finite = np.isfinite(values.astype(np.float32))
        if not finite.all():
            edit(directory / "c", lambda tensors: tensors.update({EMBEDDING: np.resize(values, (32, 16))}))
            with Checkpoint.open(directory / "c") as checkpoint, pytest.raises(CheckpointError, match="not finite"):
                checkpoint.take(EMBEDDING).load()
        table = np.resize(np.where(finite, values, values.dtype.type(1)), (32, 16))
        edit(directory / "c", lambda tensors: tensors.update({EMBEDDING: table}))
        with Checkpoint.open(directory / "c") as checkpoint:
            loaded = checkpoint.take(EMBEDDING).load()
        np.testing.assert_array_equal(loaded, table.astype(np.float32))

    def test_float32_is_rounded_to_nearest_even(self, tmp_path: Path) -> None:
        tensors = {name: np.asarray(tensor, np.float32) for name, tensor in random_tensors().items()}
        tensors[EMBEDDING] = np.random.default_rng(1).standard_normal((32, 16), dtype=np.float32)
        write_checkpoint(tmp_path / "c", CONFIG, tensors.items())
        with Checkpoint.open(tmp_path / "c") as checkpoint:
            loaded = checkpoint.take(EMBEDDING).load()
        expected = torch.from_numpy(tensors[EMBEDDING]).bfloat16().float()
        assert torch.equal(torch.from_numpy(loaded), expected)

    def test_tensors_may_come_in_any_order(self, tmp_path: Path, written: Path) -> None:
        write_checkpoint(tmp_path / "reversed", CONFIG, reversed(random_tensors().items()))
        ours, theirs = (path / "model.safetensors" for path in (tmp_path / "reversed", written))
        assert ours.read_bytes() == theirs.read_bytes()

    def test_rows_are_those_of_the_whole(self, written: Path) -> None:
        with Checkpoint.open(written) as checkpoint:
            for name in checkpoint.names:
                assert_rows_of_the_whole(checkpoint, name)

    def test_several_shards(self, sharded: Path, written: Path) -> None:
        shards = sorted(path.name for path in sharded.glob("*.safetensors"))
        assert len(shards) > 3
        assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            assert name in load_file(sharded / file)
        sizes = [tensor.nbytes for file in shards for tensor in load_file(sharded / file).values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        with Checkpoint.open(sharded) as many, Checkpoint.open(written) as one:
            assert all(
                np.array_equal(a, b) for a, b in zip(take_all(many).values(), take_all(one).values(), strict=True)
            )

    def test_reads_that_return_less_than_asked_for(self, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel returns less when it is interrupted or asked for more than 2 GiB."""
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:100]], offset))
        with Checkpoint.open(written) as checkpoint:
            loaded = take_all(checkpoint)
        for name, tensor in random_tensors().items():
            np.testing.assert_array_equal(loaded[name], tensor.astype(np.float32))

    def test_reading_rows_does_not_take_a_tensor(self, written: Path) -> None:
        with Checkpoint.open(written) as checkpoint:
            rows = checkpoint.rows(EMBEDDING, [31, 0, 31])
            table = take_all(checkpoint)[EMBEDDING]
            assert checkpoint.rows(EMBEDDING, []).shape == (0, 16)
        np.testing.assert_array_equal(rows, table[[31, 0, 31]])

    def test_progress_ends_at_the_total(self, tmp_path: Path) -> None:
        steps: list[tuple[float, float]] = []
        tensors = random_tensors().items()
        write_checkpoint(tmp_path / "c", CONFIG, tensors, progress=lambda _, done, total: steps.append((done, total)))
        assert len(steps) == len(tensors)
        assert steps[-1][0] == steps[-1][1] == sum(tensor.nbytes for _, tensor in tensors)


class TestEveryTensorIsAccountedFor:
    def test_taken_twice(self, written: Path) -> None:
        with Checkpoint.open(written) as checkpoint:
            checkpoint.take("mlp1.0.weight")
            with pytest.raises(CheckpointError, match=r"mlp1\.0\.weight was taken twice"):
                checkpoint.take("mlp1.0.weight")

    def test_never_taken(self, written: Path) -> None:
        with Checkpoint.open(written) as checkpoint:
            for name in checkpoint.names:
                if name != "mlp1.1.weight":
                    checkpoint.take(name)
            with pytest.raises(CheckpointError, match=r"1 tensors .* mlp1\.1\.weight"):
                checkpoint.finish()

    def test_unknown_name(self, written: Path) -> None:
        with Checkpoint.open(written) as checkpoint, pytest.raises(CheckpointError, match="no_such"):
            checkpoint.take("no_such.weight")

    def test_missing_extra_and_misshapen(self, written: Path) -> None:
        edit(written, lambda tensors: tensors.pop("mlp1.1.weight"))
        with pytest.raises(CheckpointError, match=r"no tensor mlp1\.1\.weight"):
            Checkpoint.open(written)
        edit(written, lambda tensors: tensors.update({"mlp1.1.weight": np.zeros((24, 31), np.float32)}))
        with pytest.raises(CheckpointError, match=r"mlp1\.1\.weight .*\[24, 31\].*\[24, 32\]"):
            Checkpoint.open(written)
        edit(written, lambda tensors: tensors.update({"mlp1.1.weight": np.zeros((24, 32), np.float32)}))
        Checkpoint.open(written).close()
        edit(written, lambda tensors: tensors.update({"mlp1.1.bias": np.zeros(24, np.float32)}))
        with pytest.raises(CheckpointError, match=r"mlp1\.1\.bias"):
            Checkpoint.open(written)

    @pytest.mark.parametrize(
        "name",
        [
            "vision_model.pooler.weight",
            "vision_model.head.probe",
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
            "vision_model.embeddings.position_ids",
        ],
    )
    def test_unused_tensors_of_other_exports_are_skipped(self, written: Path, name: str) -> None:
        edit(written, lambda tensors: tensors.update({name: np.zeros(3, np.int64)}))
        with Checkpoint.open(written) as checkpoint:
            assert name not in checkpoint.names
            take_all(checkpoint)

    def test_a_dtype_that_is_not_a_float_is_named(self, written: Path) -> None:
        edit(written, lambda tensors: tensors.update({"mlp1.1.weight": np.zeros((24, 32), np.int8)}))
        with Checkpoint.open(written) as checkpoint, pytest.raises(CheckpointError, match=r"mlp1\.1\.weight .* I8"):
            checkpoint.take("mlp1.1.weight").load()


class TestDummyHeads:
    """nvidia/NVLM-D-72B pads the vision encoder's 25 heads to 32; here 2 heads are padded to 5."""

    PADDING = 3 * CONFIG.vision.head_dim

    def pad(self, tensors: Tensors, fill: float = 0.0) -> None:
        """`fill` is what dummy heads hold in q, k and the norms, which cannot reach the output."""
        width, extra = CONFIG.vision.hidden_size, self.PADDING
        layer = "vision_model.encoder.layers.0.attn"
        qkv = tensors[f"{layer}.qkv.weight"].reshape(3, width, width)
        padded = np.pad(qkv, ((0, 0), (0, extra), (0, 0)), constant_values=fill)
        padded[2, width:] = 0
        tensors[f"{layer}.qkv.weight"] = padded.reshape(-1, width)
        for norm in ("q_norm", "k_norm"):
            name = f"{layer}.{norm}.weight"
            tensors[name] = np.pad(tensors[name], (0, extra), constant_values=fill)
        name = f"{layer}.proj.weight"
        tensors[name] = np.pad(tensors[name], ((0, 0), (0, extra)), constant_values=fill)

    @pytest.mark.parametrize("fill", [0.0, 1.0])
    def test_they_are_cut_off(self, written: Path, fill: float) -> None:
        with Checkpoint.open(written) as checkpoint:
            expected = take_all(checkpoint)
        edit(written, lambda tensors: self.pad(tensors, fill))
        with Checkpoint.open(written) as checkpoint:
            loaded = take_all(checkpoint)
        for name, tensor in expected.items():
            assert loaded[name].flags.c_contiguous
            np.testing.assert_array_equal(loaded[name], tensor)

    def test_rows_are_those_of_the_whole(self, written: Path) -> None:
        edit(written, self.pad)
        with Checkpoint.open(written) as checkpoint:
            for name in checkpoint.names:
                assert_rows_of_the_whole(checkpoint, name)

    def test_heads_that_reach_the_output_are_an_error(self, written: Path) -> None:
        def speak(tensors: Tensors) -> None:
            self.pad(tensors, fill=1.0)
            tensors["vision_model.encoder.layers.0.attn.qkv.weight"][-1] = 1

        edit(written, speak)
        with Checkpoint.open(written) as checkpoint, pytest.raises(CheckpointError, match="3 heads beyond"):
            take_all(checkpoint)

    def test_padding_in_one_tensor_alone_is_misshapen(self, written: Path) -> None:
        name = "vision_model.encoder.layers.0.attn.proj.weight"
        edit(written, lambda tensors: tensors.update({name: np.pad(tensors[name], ((0, 0), (0, self.PADDING)))}))
        with pytest.raises(CheckpointError, match=r"attn\.qkv\.weight"):
            Checkpoint.open(written)


class TestBrokenFiles:
    @pytest.mark.parametrize("kept", [0, 7, 8, 50, -1])
    def test_truncated(self, written: Path, kept: int) -> None:
        path = written / "model.safetensors"
        os.truncate(path, kept % path.stat().st_size)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(written)

    @pytest.mark.parametrize(
        "corrupt",
        [
            lambda header: b"{" * len(header),
            lambda header: header.replace(b'"BF16"', b'"XF16"'),
            lambda header: header.replace(b'"shape":[16', b'"shape":[17', 1),
            lambda header: header.replace(b'"data_offsets":[0,', b'"data_offsets":[2,', 1),
            lambda header: header.replace(b'"data_offsets"', b'"data_offset_"', 1),
        ],
    )
    def test_corrupt_header(self, written: Path, corrupt: Callable[[bytes], bytes]) -> None:
        path = written / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = corrupt(data[8 : 8 + length])
        assert header != data[8 : 8 + length]
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(written)

    @pytest.mark.parametrize("length", [0, 1 << 40, (1 << 64) - 1])
    def test_absurd_header_length(self, written: Path, length: int) -> None:
        path = written / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(written)

    def test_a_file_that_shrinks_while_open(self, written: Path) -> None:
        with Checkpoint.open(written) as checkpoint:
            os.truncate(written / "model.safetensors", 5000)
            with pytest.raises(CheckpointError, match="shorter"):
                take_all(checkpoint)

    def test_absent_shard(self, sharded: Path) -> None:
        shard = sorted(sharded.glob("*.safetensors"))[2]
        shard.unlink()
        with pytest.raises(CheckpointError, match=shard.name):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
    def test_malformed_index(self, sharded: Path, text: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", "shards/model.safetensors", "..", ""])
    def test_an_index_does_not_leave_its_directory(self, sharded: Path, place: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(CheckpointError, match="beside"):
            Checkpoint.open(sharded)

    def test_two_indexes(self, sharded: Path) -> None:
        shutil.copy(sharded / "model.safetensors.index.json", sharded / "other.safetensors.index.json")
        with pytest.raises(CheckpointError, match="two indexes"):
            Checkpoint.open(sharded)

    def test_a_git_lfs_pointer(self, written: Path) -> None:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n"
        (written / "model.safetensors").write_text(pointer)
        with pytest.raises(CheckpointError, match=r"Git-LFS pointer to 0\.123 GB, .*git lfs pull"):
            Checkpoint.open(written)

    def test_shards_without_an_index(self, sharded: Path) -> None:
        expected = digest(sharded)
        (sharded / "model.safetensors.index.json").unlink()
        assert digest(sharded) == expected
        shutil.copy(next(sharded.glob("*.safetensors")), sharded / "spare.safetensors")
        with pytest.raises(CheckpointError, match="without an index that says which belong together"):
            Checkpoint.open(sharded)

    def test_one_file_of_another_name(self, written: Path) -> None:
        expected = digest(written)
        (written / "model.safetensors").rename(written / "diffusion_pytorch_model.safetensors")
        assert digest(written) == expected

    def test_a_tensor_in_two_shards(self, sharded: Path) -> None:
        first, second, *_ = sorted(sharded.glob("*.safetensors"))
        save_file(load_file(first) | load_file(second), second)
        with pytest.raises(CheckpointError, match="in both"):
            Checkpoint.open(sharded)

    def test_no_weights_and_two_sets_of_weights(self, sharded: Path, written: Path) -> None:
        shutil.copy(written / "model.safetensors", sharded)
        with pytest.raises(CheckpointError, match="both"):
            Checkpoint.open(sharded)
        (written / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="neither"):
            Checkpoint.open(written)

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"config\.json"):
            Checkpoint.open(tmp_path / "nowhere")


class TestWriting:
    @pytest.fixture
    def parent(self, tmp_path: Path) -> Path:
        """Returns a folder, and asserts at the end that it is empty: a failed write leaves nothing."""
        parent = tmp_path / "parent"
        parent.mkdir()
        return parent

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop(EMBEDDING), "not given"),
            (lambda tensors: tensors.update(other=np.zeros(3)), "other is not in the layout"),
            (lambda tensors: tensors.update({EMBEDDING: np.zeros((2, 16))}), "shape"),
        ],
    )
    def test_tensors_that_are_not_the_layouts(
        self, parent: Path, change: Callable[[Tensors], object], message: str
    ) -> None:
        tensors = random_tensors()
        change(tensors)
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(parent / "c", CONFIG, tensors.items())
        assert not list(parent.iterdir())

    def test_a_tensor_that_comes_twice(self, parent: Path) -> None:
        twice = [*random_tensors().items(), (EMBEDDING, random_tensors()[EMBEDDING])]
        with pytest.raises(CheckpointError, match="comes twice"):
            write_checkpoint(parent / "c", CONFIG, twice)
        assert not list(parent.iterdir())

    def test_an_interrupt_leaves_nothing(self, parent: Path) -> None:
        def interrupted() -> Iterator[tuple[str, np.ndarray]]:
            yield from list(random_tensors().items())[:10]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(parent / "c", CONFIG, interrupted())
        assert not list(parent.iterdir())

    def test_a_full_disk_leaves_nothing(self, parent: Path) -> None:
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", parent], capture_output=True)
        if mount.returncode:
            pytest.skip("mounting a small file system needs root")
        try:
            with pytest.raises(EngineError, match="disk full"):
                init_checkpoint(parent / "c", "nvlm-d-tiny", seed=0)
            assert not list(parent.iterdir())
        finally:
            subprocess.run(["umount", parent], check=True)

    def test_an_existing_checkpoint_is_replaced_only_when_asked(self, written: Path) -> None:
        before = digest(written)
        tensors = {name: tensor + 1 for name, tensor in random_tensors().items()}
        with pytest.raises(CheckpointError, match="exists"):
            write_checkpoint(written, CONFIG, tensors.items())
        assert digest(written) == before
        write_checkpoint(written, CONFIG, tensors.items(), overwrite=True)
        assert digest(written) != before
        assert [path.name for path in written.parent.iterdir()] == ["checkpoint"]

    def test_a_failed_overwrite_keeps_the_old_checkpoint(self, written: Path) -> None:
        before = digest(written)
        with pytest.raises(CheckpointError):
            write_checkpoint(written, CONFIG, [], overwrite=True)
        assert digest(written) == before

    def test_a_directory_that_is_not_a_checkpoint_is_kept(self, parent: Path) -> None:
        (parent / "thesis.tex").write_text("ten years of work")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            write_checkpoint(parent, CONFIG, random_tensors().items(), overwrite=True)
        assert (parent / "thesis.tex").exists()


class TestDigest:
    def test_it_follows_content_not_files(self, written: Path, sharded: Path, tmp_path: Path) -> None:
        assert digest(written) == digest(sharded)
        shutil.copytree(written, tmp_path / "elsewhere")
        assert digest(tmp_path / "elsewhere") == digest(written)

    def test_one_bit_of_data_and_one_key_of_config_change_it_and_the_name_does_not(self, written: Path) -> None:
        digests = {digest(written)}
        path = written / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        digests.add(digest(written))
        raw = json.loads((written / "config.json").read_text())
        raw["name"] = "renamed"
        (written / "config.json").write_text(json.dumps(raw))
        digests.add(digest(written))
        raw["llm_config"]["rope_theta"] = 5e5
        (written / "config.json").write_text(json.dumps(raw))
        digests.add(digest(written))
        assert len(digests) == 3

    def test_a_large_checkpoint_is_sampled(self, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With small blocks instead of 4 GiB: the first and last bytes of every tensor count, some between do not."""
        monkeypatch.setattr("nvlm_trt.checkpoint.reader._FULL_DIGEST_BYTES", 0)
        monkeypatch.setattr("nvlm_trt.checkpoint.reader._SAMPLE_BYTES", 2)
        monkeypatch.setattr("nvlm_trt.checkpoint.reader._SAMPLES", 5)
        tensors = random_tensors()
        digests = []
        for element in [None, 0, -1, 1]:
            changed = {name: tensor.copy() for name, tensor in tensors.items()}
            if element is not None:
                changed[EMBEDDING].reshape(-1)[element] += 1
            write_checkpoint(written, CONFIG, changed.items(), overwrite=True)
            digests.append(digest(written))
        assert len(set(digests[:3])) == 3
        assert digests[3] == digests[0]


class TestInitCheckpoint:
    def test_the_same_seed_gives_the_same_files(self, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
        init_checkpoint(tmp_path / "again", "nvlm-h-tiny", seed=0)
        init_checkpoint(tmp_path / "other", "nvlm-h-tiny", seed=1)
        for path in checkpoint("nvlm-h-tiny").iterdir():
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        assert digest(tmp_path / "other") != digest(tmp_path / "again")

    def test_architectures_share_vision_encoder_and_llm(self, checkpoint: Callable[[str], Path]) -> None:
        d, x, h = (load_file(checkpoint(f"nvlm-{name}-tiny") / "model.safetensors") for name in "dxh")
        assert d.keys() < h.keys()
        for name in d:
            assert np.array_equal(d[name], h[name])
            assert name.startswith("mlp1.") or np.array_equal(d[name], x[name])

    def test_gates_are_open_and_no_tensor_is_constant(self, checkpoint: Callable[[str], Path]) -> None:
        for name, tensor in load_file(checkpoint("nvlm-x-tiny") / "model.safetensors").items():
            values = tensor.astype(np.float32)
            assert np.isfinite(values).all()
            assert values.std() > 0.02 or name.endswith("_gate")
            if name.endswith("_gate"):
                assert 0.29 < abs(values[0]) < 0.91

    @pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
    def test_the_config_is_the_presets(self, checkpoint: Callable[[str], Path], name: str) -> None:
        with Checkpoint.open(checkpoint(name)) as opened:
            assert replace(opened.config, image_token_id=None) == PRESETS[name]
            assert opened.config.image_token_id is not None

    def test_unknown_preset(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="nvlm-d-tiny"):
            init_checkpoint(tmp_path / "c", "nvlm-e-tiny", seed=0)
        assert not list(tmp_path.iterdir())


def test_reading_and_writing_hold_one_tensor(tmp_path: Path) -> None:
    """40 layers: 28 MB of float32 in all, 1 MB in the largest tensor."""
    llm = replace(CONFIG.llm, hidden_size=128, head_dim=64, num_layers=40, intermediate_size=512, vocab_size=2048)
    config = replace(CONFIG, llm=llm)
    layout = checkpoint_layout(config)
    largest = 4 * max(int(np.prod(shape)) for shape in layout.values())
    total = 4 * sum(int(np.prod(shape)) for shape in layout.values())
    assert total > 20 * largest
    tracemalloc.start()
    try:
        write_checkpoint(
            tmp_path / "c", config, ((name, np.zeros(shape, np.float32)) for name, shape in layout.items())
        )
        with Checkpoint.open(tmp_path / "c") as checkpoint:
            for name in checkpoint.names:
                checkpoint.take(name).load()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * largest


def test_reading_rows_and_hashing_hold_a_part_of_a_tensor(tmp_path: Path) -> None:
    config = replace(CONFIG, llm=replace(CONFIG.llm, vocab_size=1 << 21))
    tensors = ((name, np.zeros(shape, ml_dtypes.bfloat16)) for name, shape in checkpoint_layout(config).items())
    write_checkpoint(tmp_path / "c", config, tensors)
    whole = 4 * int(np.prod(checkpoint_layout(config)[EMBEDDING]))
    tracemalloc.start()
    try:
        with Checkpoint.open(tmp_path / "c") as checkpoint:
            assert len(checkpoint.digest) == 64
            assert not checkpoint.take(EMBEDDING).rows(1 << 20, (1 << 20) + 1000).any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < whole / 3


def test_no_torch_is_needed() -> None:
    code = "import sys, nvlm_trt.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
