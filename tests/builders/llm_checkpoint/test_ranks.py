"""The ranks of every precision and split compute the oracle's logits: TensorRT-LLM's ranks are played in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rank_simulation import Ranks, Weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from split_models import CONFIGS, PRECISIONS, SPLITS, VARIANTS, VISION, SplitModel, answer
from stages import tiny_config
from torch import Tensor

from nvlm_trt.builders.tensorrt_llm.components import write_tag_embeddings
from nvlm_trt.builders.tensorrt_llm.layout import check_layout, rank_layout
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, check_llm_checkpoint
from nvlm_trt.errors import EngineError
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.reference.model import ReferenceModel

Models = Callable[[str], SplitModel]
TOLERANCE = 1e-9  # of logits up to 4, in float64


def logits_of(directory: Path, model: SplitModel) -> Tensor:
    prompt = model.prompt
    ids = prompt.table_ids(model.config)
    return Ranks.load(directory).logits(ids, prompt.embeddings, prompt.encoder_output, prompt.mask)


def difference(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert got.isfinite().all()
    return float((got - want).abs().max())


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_ranks_compute_the_oracles_logits(
    tmp_path: Path, split_model: Models, architecture: str, precision: str, tp: int, pp: int
) -> None:
    model, mapping = split_model(architecture), Mapping(tp, pp)
    quantization = model.quantization(precision, mapping)
    model.write(tmp_path, quantization, mapping)
    check_llm_checkpoint(tmp_path, model.config)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"} | {
        f"rank{rank}.safetensors" for rank in range(tp * pp)
    }
    for rank in range(tp * pp):
        with safe_open(tmp_path / f"rank{rank}.safetensors", framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()}
        assert found == rank_layout(model.config, mapping, quantization, rank)
    want = model.logits(quantization)
    assert difference(logits_of(tmp_path, model), want) < TOLERANCE
    if quantization.calibration is not None:  # and the quantised model is another one
        assert 1e-2 < difference(want, model.logits()) < 1


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_other_models(tmp_path: Path, split_model: Models, name: str, tp: int, pp: int) -> None:
    model, mapping = split_model(name), Mapping(tp, pp)
    model.write(tmp_path, LlmQuantization(), mapping)
    check_llm_checkpoint(tmp_path, model.config)
    assert difference(logits_of(tmp_path, model), model.logits()) < TOLERANCE


@settings(max_examples=20)
@given(data=st.data())
def test_any_model_and_split(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Heads, widths, layers and blocks as they come, over up to 12 ranks."""

    def draw(*choices: Any) -> Any:
        return data.draw(st.sampled_from(choices))

    tp, pp, kv_heads, shared, layers = (
        draw(1, 2, 3, 4, 6),
        draw(1, 2),
        draw(1, 2, 3, 4),
        draw(1, 2, 3),
        draw(1, 2, 3, 4),
    )
    llm = {
        "family": draw("qwen2", "llama"),
        "hidden_size": draw(24, 40),
        "num_layers": layers,
        "num_heads": kv_heads * shared,
        "num_kv_heads": kv_heads,
        "head_dim": draw(4, 6),
        "intermediate_size": 12 * draw(2, 3),
        "vocab_size": draw(512, 513, 517),
        "tie_word_embeddings": draw(False, True),
    }
    letter = draw("D", "X", "H")
    blocks = (
        {} if letter == "D" else {"interval": draw(1, 2, 3), "ffn": draw(False, True), "qk_norm": draw(False, True)}
    )
    config = tiny_config(letter, vision=VISION, llm=llm, **({"cross_attention": blocks} if blocks else {}))
    mapping = Mapping(tp, pp)
    try:
        check_layout(config, mapping, LlmQuantization())
    except EngineError:
        assume(False)
    folder = tmp_path_factory.mktemp("any")
    model = SplitModel(folder / "checkpoint", config)
    quantization = model.quantization(draw("bf16", "fp8", "int8"), mapping)
    model.write(folder / "ranks", quantization, mapping)
    check_llm_checkpoint(folder / "ranks", model.config)
    assert difference(logits_of(folder / "ranks", model), model.logits(quantization)) < TOLERANCE


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_blocks_may_stay_unquantised(tmp_path: Path, split_model: Models, precision: str) -> None:
    model, mapping = split_model("X"), Mapping(2, 1)
    quantization = model.quantization(precision, mapping, cross="bf16")
    assert quantization.exclude_modules == ("*layers.0.mlp*", "*layers.4.mlp*")
    model.write(tmp_path, quantization, mapping)
    check_llm_checkpoint(tmp_path, model.config)
    want = model.logits(quantization, blocks_ffn=False)
    assert difference(logits_of(tmp_path, model), want) < TOLERANCE
    assert difference(want, model.logits(quantization)) > 1e-3


def test_int8_without_smoothquant(tmp_path: Path, split_model: Models) -> None:
    """Inputs saturate at the calibration's clip; SmoothQuant would have moved the outliers that it cuts."""
    model, mapping = split_model("D"), Mapping(2, 1)
    quantization = model.quantization("int8", mapping, alpha=0)
    assert not quantization.factors
    model.write(tmp_path, quantization, mapping)
    assert difference(logits_of(tmp_path, model), model.logits(quantization)) < TOLERANCE


def test_fp16(tmp_path: Path, split_model: Models) -> None:
    model = split_model("H")
    model.write(tmp_path, LlmQuantization(), Mapping(2, 1), dtype="fp16")
    check_llm_checkpoint(tmp_path, model.config)
    half = ReferenceModel.from_checkpoint(model.checkpoint, torch.float16).double()
    assert difference(logits_of(tmp_path, model), answer(half, model.prompt)) < TOLERANCE


def test_text_alone_passes_the_blocks(tmp_path: Path, split_model: Models) -> None:
    """A text-only request carries one row of zeros and a mask without a True."""
    model = split_model("X")
    model.write(tmp_path, LlmQuantization(), Mapping(2, 2))
    ids = model.prompt.ids
    features, mask = torch.zeros(1, model.config.llm.hidden_size), torch.zeros(len(ids), 1, dtype=torch.bool)
    text_only = answer(model.reference, replace(model.prompt, encoder_output=None, ranges=None))
    assert difference(Ranks.load(tmp_path).logits(ids, None, features, mask), text_only) < TOLERANCE


def test_tag_embeddings_stand_before_their_tiles(tmp_path: Path, split_model: Models) -> None:
    """The cross-attended tokens that an executor makes from features and tag_embeddings are the oracle's."""
    model = split_model("H")
    write_tag_embeddings(model.checkpoint, model.config, tmp_path / "tags.safetensors", "bf16")
    tags = load_file(tmp_path / "tags.safetensors")["tag_embeddings"]  # [max_tiles, tag_length, hidden]
    tiles = torch.randn(3, 4, model.config.llm.hidden_size, dtype=torch.float64)
    tokens = torch.cat([tags[:3].double(), tiles], 1).flatten(0, 1)
    ids = PromptEncoder(model.config, Tokenizer.from_directory(model.checkpoint)).tag_ids(3)
    expected = model.reference.cross_kv(tiles, torch.from_numpy(ids))
    for (key, value), block in zip(expected, model.reference.language_model.cross_layers, strict=True):
        torch.testing.assert_close(block.attn.key_value(tokens), (key, value))


# --- negative controls: a simulation that cannot fail proves nothing -------------------------------------------------


def swap(one: str, other: str) -> Callable[[Weights], None]:
    def change(rank: Weights) -> None:
        for name in [name for name in rank if f".{one}." in name]:
            partner = name.replace(f".{one}.", f".{other}.")
            rank[name], rank[partner] = rank[partner], rank[name]

    return change


def shift_rows(part: str, rows: int) -> Callable[[Weights], None]:
    def change(rank: Weights) -> None:
        for name in [name for name in rank if name.endswith(part)]:
            rank[name] = rank[name].roll(rows, 0)

    return change


def swap_layers(rank: Weights) -> None:
    """Layer 0, a block, and layer 1 change places."""
    moved = {name: value for name, value in rank.items() if ".layers.0." in name or ".layers.1." in name}
    for name in moved:
        del rank[name]
    for name, value in moved.items():
        rank[name.replace(".layers.0.", ".layers.#.").replace(".layers.1.", ".layers.0.").replace("#", "1")] = value


def scale_of(part: str, factor: float) -> Callable[[Weights], None]:
    def change(rank: Weights) -> None:
        for name in [name for name in rank if name.endswith(part)]:
            rank[name] = rank[name] * factor

    return change


CONTROLS = {
    "fc and gate": ("D", "bf16", swap("fc", "gate")),
    "another key/value head": ("D", "bf16", shift_rows("attention.qkv.weight", 32)),
    "another row of the vocabulary": ("D", "bf16", shift_rows("lm_head.weight", 1)),
    "another column of dense": ("X", "bf16", lambda rank: rank.update(
        {name: value.roll(1, 1) for name, value in rank.items() if name.endswith("cross_attention.dense.weight")}
    )),
    "gates": ("H", "bf16", scale_of("gate_attn", 0.5)),
    "gates of the FFN": ("H", "bf16", scale_of("gate_ffwd", 0.5)),
    "scale of weights": ("X", "fp8", scale_of("mlp.fc.weights_scaling_factor", 1.1)),
    "scale of inputs": ("X", "fp8", scale_of("mlp.proj.activation_scaling_factor", 0.5)),
    "scales of rows": ("X", "int8", shift_rows("attention.qkv.weights_scaling_factor", 1)),
    "scales of channels": ("X", "int8", scale_of("attention.dense.prequant_scaling_factor", 1.1)),
}  # fmt: skip


@pytest.mark.parametrize("control", list(CONTROLS))
def test_a_wrong_rank_shows(tmp_path: Path, split_model: Models, control: str) -> None:
    """One rank of two is wrong."""
    architecture, precision, change = CONTROLS[control]
    model, mapping = split_model(architecture), Mapping(2, 1)
    quantization = model.quantization(precision, mapping)
    model.write(tmp_path, quantization, mapping)
    path = tmp_path / "rank1.safetensors"
    rank = load_file(path)
    change(rank)
    save_file({name: value.contiguous() for name, value in rank.items()}, path)
    try:
        got = logits_of(tmp_path, model)
    except AssertionError:  # the ranks do not agree
        return
    assert difference(got, model.logits(quantization)) > 1e-3


def test_a_block_at_another_place_shows(tmp_path: Path, split_model: Models) -> None:
    """The block runs after layer 0 of the LLM instead of before it."""
    model = split_model("X")
    model.write(tmp_path, LlmQuantization(), Mapping())
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace('"cross_attention_layers": [\n    0,', '"cross_attention_layers": [\n    1,')
    )
    rank = load_file(tmp_path / "rank0.safetensors")
    swap_layers(rank)
    save_file(rank, tmp_path / "rank0.safetensors")
    assert difference(logits_of(tmp_path, model), model.logits()) > 1e-3
