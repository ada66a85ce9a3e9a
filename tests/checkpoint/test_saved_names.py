"""Tests checkpoints with the names that transformers, torch.compile and DataParallel give the tensors of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2Model

from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.layout import LM_HEAD, checkpoint_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.model import ReferenceModel

Directory = Callable[[str], Path]
TEXT_MODEL = "language_model.model."


class Parts(nn.Module):
    """What transformers calls the model: everything but the head."""

    def __init__(self, reference: ReferenceModel, config: Qwen2Config) -> None:
        super().__init__()
        self.vision_model, self.mlp1 = reference.vision_model, reference.mlp1
        self.language_model = Qwen2Model(config)


class NestedModel(PreTrainedModel):
    """NVLM-D in the form that transformers has given vision-language models since 4.52: `model.` and `lm_head`."""

    config_class = Qwen2Config
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012  # transformers'

    def __init__(self, config: Qwen2Config, reference: ReferenceModel) -> None:
        super().__init__(config)
        self.model = Parts(reference, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None: ...

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens


def nested_model(checkpoint: Path, tied: bool) -> NestedModel:
    reference = ReferenceModel.from_checkpoint(checkpoint)
    llm = reference.config.llm
    config = Qwen2Config(
        hidden_size=llm.hidden_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        intermediate_size=llm.intermediate_size,
        vocab_size=llm.vocab_size,
        tie_word_embeddings=tied,
    )
    weights = reference.state_dict()
    model = NestedModel(config, reference)
    text = {name.removeprefix(TEXT_MODEL): value for name, value in weights.items() if name.startswith(TEXT_MODEL)}
    model.model.language_model.load_state_dict(text)
    if not tied:
        model.lm_head.load_state_dict({"weight": weights[LM_HEAD]})
    return model


def side_files(checkpoint: Path, directory: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, directory / name)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    with Checkpoint.open(ours) as one, Checkpoint.open(theirs) as other:
        assert one.names == other.names
        for name in one.names:
            np.testing.assert_array_equal(one.take(name).load(), other.take(name).load())
        one.finish()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_transformers_nests_and_saves_in_shards(tmp_path: Path, tied: bool) -> None:
    config = PRESETS["nvlm-d-tiny"]
    source, saved = tmp_path / "source", tmp_path / "saved"
    write_random_checkpoint(source, replace(config, llm=replace(config.llm, tie_word_embeddings=tied)), seed=0)
    nested_model(source, tied).save_pretrained(saved, max_shard_size="4MB")
    names = {name for path in saved.glob("*.safetensors") for name in load_file(path)}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in names
    assert ("lm_head.weight" in names) != tied
    side_files(source, saved)
    assert_same_weights(saved, source)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "data-parallel"])
def test_wrapped_models(checkpoint: Directory, tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    source = checkpoint("nvlm-h-tiny")
    weights = wrap(ReferenceModel.from_checkpoint(source)).state_dict()
    assert not set(weights) & set(checkpoint_layout(PRESETS["nvlm-h-tiny"]))
    tmp_path.joinpath("saved").mkdir()
    save_file(weights, tmp_path / "saved" / "model.safetensors")
    side_files(source, tmp_path / "saved")
    assert_same_weights(tmp_path / "saved", source)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "base_model.model.", "model."])
def test_prefixes_of_the_whole_checkpoint(checkpoint: Directory, tmp_path: Path, prefix: str) -> None:
    source = Path(shutil.copytree(checkpoint("nvlm-x-tiny"), tmp_path / "saved"))
    tensors = load_file(source / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    assert_same_weights(source, checkpoint("nvlm-x-tiny"))
    with Checkpoint.open(source) as one, Checkpoint.open(checkpoint("nvlm-x-tiny")) as other:
        assert one.digest == other.digest


def test_one_weight_under_two_names_is_refused(checkpoint: Directory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("nvlm-x-tiny"), tmp_path / "saved"))
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "model.mlp1.1.weight": tensors["mlp1.1.weight"].clone()}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp1\.1\.weight twice"):
        Checkpoint.open(source)


def test_a_text_model_alone_is_not_taken_for_one_with_images(checkpoint: Directory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("nvlm-d-tiny"), tmp_path / "saved"))
    tensors = load_file(source / "model.safetensors")
    text = {
        name.removeprefix("language_model."): tensor for name, tensor in tensors.items() if "language_model" in name
    }
    save_file(text, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor vision_model"):
        Checkpoint.open(source)
