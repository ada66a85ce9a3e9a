"""Tests LoRA adapters against PEFT: what it saves is merged while reading as it merges itself, in float32."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import CheckpointError, ConfigError, NvlmError
from nvlm_trt.evaluation.parity import verify_engine
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.model import ReferenceModel

Directory = Callable[[str], Path]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBEDDING = "language_model.model.embed_tokens.weight"


class Base(nn.Module):
    """The modules of a checkpoint under the names of its tensors."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        reference = ReferenceModel.from_checkpoint(checkpoint)
        self.vision_model, self.mlp1 = reference.vision_model, reference.mlp1
        self.language_model = reference.language_model


def save_adapter(
    base: Path | nn.Module, directory: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, np.ndarray]:
    """Train an adapter of a checkpoint, or of its modules, at random, save it, and let PEFT merge it. Returns PEFT's
    merged weights."""
    modules = base if isinstance(base, nn.Module) else Base(base)
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": DECODER, **options}
    model = get_peft_model(copy.deepcopy(modules), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(dtype)
    model.save_pretrained(directory)
    merged = PeftModel.from_pretrained(modules, directory).merge_and_unload().state_dict()
    return {name: tensor.float().numpy() for name, tensor in merged.items()}


def assert_merged(checkpoint: Path, adapter: Path, theirs: dict[str, np.ndarray]) -> set[str]:
    """Compare every weight, whole and by rows. Returns the names of those that the adapter changes."""
    changed = set()
    with Checkpoint.open(checkpoint) as base, Checkpoint.open(checkpoint, adapter) as merged:
        assert set(merged.names) == set(theirs)
        for name in merged.names:
            weight = merged.take(name)
            ours = weight.load()
            np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=2e-6, err_msg=name)
            if not np.array_equal(ours, base.take(name).load()):
                changed.add(name)
            for start in {0, 1, len(ours) // 2}:
                np.testing.assert_array_equal(weight.rows(start, len(ours)), ours[start:])
        merged.finish()
    return changed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 11, "v_proj": 5}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["down_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["qkv", "fc1", "mlp1.1"]},
        {"target_modules": ["cross_layers.0.attn.o_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_every_weight_is_as_peft_merges_it(checkpoint: Directory, tmp_path: Path, options: dict[str, Any]) -> None:
    source = checkpoint("nvlm-h-tiny")
    theirs = save_adapter(source, tmp_path / "adapter", **options)
    changed = assert_merged(source, tmp_path / "adapter", theirs)
    targets = [*options.get("target_modules", DECODER), *options.get("modules_to_save", [])]
    for target in targets:
        assert any(target in name for name in changed)
    assert all(any(target in name for target in targets) for name in changed)


def test_an_adapter_that_brings_its_own_embeddings(checkpoint: Directory, tmp_path: Path) -> None:
    """PEFT saves the embeddings of a model of transformers beside their update."""
    source, adapter = checkpoint("nvlm-d-tiny"), tmp_path / "adapter"
    theirs = save_adapter(source, adapter, target_modules=["embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    table = torch.randn(theirs[EMBEDDING].shape)
    stored = f"base_model.model.{EMBEDDING.replace('.weight', '.base_layer.weight')}"
    save_file({**tensors, stored: table}, adapter / "adapter_model.safetensors")
    with Checkpoint.open(source) as base:
        update = theirs[EMBEDDING] - base.take(EMBEDDING).load()
    assert assert_merged(source, adapter, {**theirs, EMBEDDING: table.numpy() + update}) == {EMBEDDING}


class TestDummyHeads:
    """nvidia/NVLM-D-72B stores the vision encoder's 25 heads padded to 32; here 4 are padded to 6. PEFT merges into
    what is stored, and the reader cuts the dummy heads off."""

    ATTENTION = "vision_model.encoder.layers.{}.attn"

    @pytest.fixture
    def padded(self, checkpoint: Directory, tmp_path: Path) -> Path:
        directory = Path(shutil.copytree(checkpoint("nvlm-d-tiny"), tmp_path / "padded"))
        tensors = load_file(directory / "model.safetensors")
        for name, tensor in tensors.items():
            match = re.search(r"\.attn\.(qkv|proj|q_norm|k_norm)\.weight", name)
            if match and name.startswith("vision_model."):
                tensors[name] = self.pad(match[1], tensor)
        save_file(tensors, directory / "model.safetensors")
        return directory

    def pad(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        extra = 2 * PRESETS["nvlm-d-tiny"].vision.head_dim
        if part == "qkv":
            parts = [torch.cat([one, torch.zeros(extra, one.shape[1], dtype=one.dtype)]) for one in tensor.chunk(3)]
            return torch.cat(parts)
        return nn.functional.pad(tensor, (0, extra))

    def cut(self, name: str, tensor: np.ndarray) -> np.ndarray:
        width = PRESETS["nvlm-d-tiny"].vision.hidden_size
        if ".attn.qkv." in name:
            return np.concatenate([part[:width] for part in np.split(tensor, 3)])
        return tensor[..., :width] if ".attn." in name and not name.endswith("bias") else tensor

    def base(self, padded: Path) -> nn.Module:
        """The modules as they are stored."""
        base = Base(padded)
        stored = load_file(padded / "model.safetensors")
        for i, layer in enumerate(base.vision_model.encoder.layers):
            for part in ("qkv", "proj", "q_norm", "k_norm"):
                weight = stored[f"{self.ATTENTION.format(i)}.{part}.weight"].float()
                module = getattr(layer.attn, part)
                module.weight = nn.Parameter(weight)
                if weight.ndim == 2:
                    module.out_features, module.in_features = weight.shape
        return base

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["qkv", "fc1"]},
            {"target_modules": ["attn.proj", "fc2"]},
            {"target_modules": ["fc1"], "modules_to_save": ["q_norm", "proj"]},
        ],
        ids=lambda options: "-".join(word for words in options.values() for word in words),
    )
    def test_every_weight_is_as_peft_merges_it(self, padded: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        theirs = save_adapter(self.base(padded), tmp_path / "adapter", **options)
        theirs = {name: self.cut(name, tensor) if "vision_model" in name else tensor for name, tensor in theirs.items()}
        changed = assert_merged(padded, tmp_path / "adapter", theirs)
        targets = [target for targets in options.values() for target in targets]
        for target in targets:
            assert any(target in name for name in changed)
        assert all(any(target in name for target in targets) for name in changed)

    def test_rows_across_the_borders_of_query_key_and_value(self, padded: Path, tmp_path: Path) -> None:
        save_adapter(self.base(padded), tmp_path / "adapter", target_modules=["qkv"])
        width = PRESETS["nvlm-d-tiny"].vision.hidden_size
        with Checkpoint.open(padded, tmp_path / "adapter") as merged:
            weight = merged.take(f"{self.ATTENTION.format(1)}.qkv.weight")
            whole = weight.load()
            for start, stop in ((0, 1), (width - 1, width + 1), (width + 5, 2 * width + 7), (3, 3 * width)):
                np.testing.assert_array_equal(weight.rows(start, stop), whole[start:stop])

    @pytest.mark.parametrize("options", [{}, {"modules_to_save": ["proj"]}], ids=["trained", "replaced"])
    def test_dummy_heads_that_were_trained_are_refused(
        self, padded: Path, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        targets = ["qkv"] if options else ["qkv", "attn.proj"]
        save_adapter(self.base(padded), tmp_path / "adapter", target_modules=targets, **options)
        with (
            Checkpoint.open(padded, tmp_path / "adapter") as merged,
            pytest.raises(
                CheckpointError, match=r"adapter has trained the dummy heads of vision_model.*layers\.0\.attn"
            ),
        ):
            merged.take(f"{self.ATTENTION.format(0)}.proj.weight")


def test_an_adapter_in_bfloat16(checkpoint: Directory, tmp_path: Path) -> None:
    theirs = save_adapter(checkpoint("nvlm-d-tiny"), tmp_path / "adapter", torch.bfloat16)
    assert assert_merged(checkpoint("nvlm-d-tiny"), tmp_path / "adapter", theirs)


def test_an_engine_with_an_adapter(checkpoint: Directory, engine: Directory, tmp_path: Path) -> None:
    source, adapter = checkpoint("nvlm-x-tiny"), tmp_path / "adapter"
    save_adapter(source, adapter, target_modules=["q_proj", "embed_tokens"])
    build_engine(source, tmp_path / "engine", lora=adapter)
    report = verify_engine(tmp_path / "engine", source, tokens=8, lora=adapter)
    assert report.passed
    plain = Engine.open(engine("nvlm-x-tiny")).manifest.checkpoint_digest
    assert Engine.open(tmp_path / "engine").manifest.checkpoint_digest != plain
    with pytest.raises(NvlmError, match="--lora"):
        verify_engine(tmp_path / "engine", source, tokens=8)


def test_the_digest_follows_the_adapter(checkpoint: Directory, tmp_path: Path) -> None:
    source, adapter = checkpoint("nvlm-d-tiny"), tmp_path / "adapter"
    save_adapter(source, adapter, target_modules=["q_proj"])

    def digest() -> str:
        with Checkpoint.open(source, adapter) as opened:
            return opened.digest

    digests = [digest(), digest()]
    edit_config(adapter, lora_alpha=7)
    digests.append(digest())
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    digests.append(digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def edit_config(adapter: Path, **changes: object) -> None:
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**raw, **changes}))


class TestBadAdapters:
    @pytest.fixture
    def adapter(self, checkpoint: Directory, tmp_path: Path) -> Path:
        save_adapter(checkpoint("nvlm-d-tiny"), tmp_path / "adapter", target_modules=["q_proj"])
        return tmp_path / "adapter"

    def open_with(self, checkpoint: Directory, adapter: Path, name: str = "nvlm-d-tiny") -> None:
        with Checkpoint.open(checkpoint(name), adapter) as opened:
            for tensor in opened.names:
                opened.take(tensor).load()

    def test_of_another_base(self, checkpoint: Directory, adapter: Path, tmp_path: Path) -> None:
        save_adapter(checkpoint("nvlm-h-tiny"), tmp_path / "crossed", target_modules=["cross_layers.0.attn.q_proj"])
        with pytest.raises(CheckpointError, match=r"cross_layers\.0\.attn\.q_proj.*another base; name its base"):
            self.open_with(checkpoint, tmp_path / "crossed")
        tensors = load_file(adapter / "adapter_model.safetensors")
        wider = {name: torch.zeros(4, 256) if "lora_A" in name else value for name, value in tensors.items()}
        save_file(wider, adapter / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"of shape \[192, 256\], the checkpoint's has \[192, 192\]"):
            self.open_with(checkpoint, adapter)

    @pytest.mark.parametrize(
        "changes",
        [
            {"use_dora": True},
            {"peft_type": "IA3"},
            {"fan_in_fan_out": True},
            {"lora_bias": True},
            {"init_lora_weights": "pissa_niter_4"},
            {"trainable_token_indices": [1, 2]},
            {"lora_alpha": "much"},
            {"alpha_pattern": {"(": 1}},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_that_do_more_than_lora(self, checkpoint: Directory, adapter: Path, changes: dict[str, object]) -> None:
        edit_config(adapter, **changes)
        with pytest.raises(ConfigError, match=next(iter(changes))):
            self.open_with(checkpoint, adapter)

    def test_with_a_number_that_is_not_finite(self, checkpoint: Directory, adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        next(iter(tensors.values()))[1, 1] = float("nan")
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"lora_A.*\[1, 1\] that is not finite"):
            self.open_with(checkpoint, adapter)

    def test_of_one_half(self, checkpoint: Directory, adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors.pop(next(iter(tensors)))
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="two parts, A and B"):
            self.open_with(checkpoint, adapter)

    def test_that_are_not_there(self, checkpoint: Directory, adapter: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no adapter_config\.json in .*nowhere"):
            self.open_with(checkpoint, tmp_path / "nowhere")
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="a format that can run code"):
            self.open_with(checkpoint, adapter)

    def test_taken_for_a_checkpoint(self, checkpoint: Directory, adapter: Path) -> None:
        for name in ("config.json", "tokenizer.json"):
            (adapter / name).write_bytes((checkpoint("nvlm-d-tiny") / name).read_bytes())
        with pytest.raises(CheckpointError, match="is a LoRA adapter, .*--lora"):
            Checkpoint.open(adapter)
