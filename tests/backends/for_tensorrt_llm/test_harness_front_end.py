"""Tests ranks and model class on TensorRT-LLM's own Python front end, where a copy of it is.

Set NVLM_TRT_TENSORRT_LLM to a source tree or to the folder that an install's tensorrt_llm/ is in. The front end needs
the packages colored and StrEnum beside ours; TensorRT-RTX's builder stands in for TensorRT's, and no GPU is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness_inflight
import harness_loading
import harness_models
import harness_ranks
import numpy as np
import pytest
from child_process import child_process
from harness_source import VARIABLE, import_tensorrt_llm, version
from split_models import CONFIGS, SplitModel
from stages import tiny_config

from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint

SOURCE = os.environ.get(VARIABLE, "")
CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
TOLERANCE = 1e-5  # of the largest logit, in float32
QK_NORM = "X without FFN, with qk-norm"  # a random checkpoint; the others are trained

if not SOURCE:
    pytest.skip(f"set {VARIABLE} to the folder that holds tensorrt_llm/, sources or installed", allow_module_level=True)

Ask = Callable[..., Any]


@contextlib.contextmanager
def importing() -> Iterator[ProcessPoolExecutor]:
    """Yield a process that has imported TensorRT-LLM."""
    with child_process({}) as executor:
        executor.submit(import_tensorrt_llm, Path(SOURCE)).result()
        yield executor


@pytest.fixture(scope="module")
def front_end() -> Iterator[ProcessPoolExecutor]:
    with importing() as executor:
        yield executor


@pytest.fixture
def ask(front_end: ProcessPoolExecutor, tmp_path: Path) -> Ask:
    """`ask(function, name, ...)` calls function(checkpoint of that name, an empty folder, ...) in the front end."""

    def call(function: Callable[..., Any], name: str, *arguments: Any, **keywords: Any) -> Any:
        checkpoint = CHECKPOINTS / f"nvlm-{name.lower()}-tiny"
        if name == QK_NORM:
            checkpoint = tmp_path / "checkpoint"
            cross = {"qk_norm": True, "ffn": False, "interval": 2}
            write_random_checkpoint(checkpoint, tiny_config("X", cross_attention=cross), seed=3)
        return front_end.submit(function, checkpoint, tmp_path / "ranks", *arguments, **keywords).result()

    return call


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        ("D", 1, 1),
        ("D", 2, 2),
        ("X", 1, 1),
        ("X", 2, 1),
        ("X", 1, 3),
        ("H", 1, 1),
        (QK_NORM, 1, 1),
    ],
)
def test_padded_prompts(ask: Ask, name: str, tp: int, pp: int) -> None:
    """Tag ranges, all, none and mixed batches; collectives between ranks are played."""
    difference, largest = ask(harness_models.padded_difference, name, tp, pp)
    print(f"{name} TP{tp} PP{pp}: {difference:.2e} of {largest:.1f}")
    assert difference < TOLERANCE * largest


@pytest.mark.parametrize("name", ["D", "X"])
def test_bfloat16(ask: Ask, name: str) -> None:
    difference, largest = ask(harness_models.padded_difference, name, dtype="bfloat16")
    print(f"{name} bf16: {difference:.2e} of {largest:.1f}")
    assert difference < 0.03 * largest


@pytest.mark.parametrize(
    ("name", "precision", "tp"), [("D", "fp8", 1), ("D", "int8", 2), ("X", "fp8", 2), ("X", "int8", 1)]
)
def test_quantised(front_end: ProcessPoolExecutor, tmp_path: Path, name: str, precision: str, tp: int) -> None:
    """Weights and inputs of the linear layers are those of the oracle that computes with FP8's or INT8's numbers."""
    model, ranks = SplitModel(tmp_path / "checkpoint", CONFIGS[name]), tmp_path / "ranks"
    quantization = model.quantization(precision, Mapping(tp))
    model.write(ranks, quantization, Mapping(tp))
    feeds = harness_models.feeds(model.checkpoint, [as_question(model)], [len(model.prompt.ids)])
    (found,) = front_end.submit(harness_ranks.logits_of, ranks, tp, harness_models.PROMPT_TABLE, feeds).result()
    wanted = model.logits(quantization)[-1].numpy()
    difference, largest = np.abs(found[: len(wanted)] - wanted).max(), np.abs(wanted).max()
    print(f"{name} {precision} TP{tp}: {difference:.2e} of {largest:.1f}")
    assert difference < TOLERANCE * largest
    assert np.abs(wanted - model.logits()[-1].numpy()).max() > 1000 * TOLERANCE * largest  # what FP8 and INT8 change


def as_question(model: SplitModel) -> harness_models.Question:
    prompt, hidden = model.prompt, model.config.llm.hidden_size
    embeddings, features = (
        np.zeros((rows, hidden), np.float32) if tensor is None else tensor.float().numpy()
        for tensor, rows in ((prompt.embeddings, 0), (prompt.encoder_output, 1))
    )
    ranges = np.zeros((len(prompt.ids), 2), np.int64) if prompt.ranges is None else prompt.ranges.numpy()
    return harness_models.Question(prompt.ids.numpy(), embeddings, features, ranges)


@pytest.mark.parametrize(("name", "pp"), [("D", 1), ("X", 1), ("X", 3), ("H", 1), (QK_NORM, 1)])
def test_in_flight_batching(ask: Ask, name: str, pp: int) -> None:
    """The network with the attention plugin, whose kernels are played: chunked prompts beside generation."""
    difference, largest = ask(harness_inflight.inflight_difference, name, pp)
    print(f"{name} PP{pp} in flight: {difference:.2e} of {largest:.1f}")
    assert difference < TOLERANCE * largest


@pytest.mark.parametrize("name", ["X", "H"])
def test_text_passes_the_blocks_bit_for_bit(ask: Ask, name: str) -> None:
    assert ask(harness_models.text_is_untouched, name)


def test_what_cannot_be_built_is_refused(ask: Ask) -> None:
    messages = ask(harness_inflight.refusals_of_builds, "X")
    assert messages.pop("as it should be") == "accepted"
    for what, message in messages.items():
        assert f"NVLM_X cannot be built with {what}" in message, (what, message)


@pytest.mark.parametrize(("name", "tp", "pp"), [("D", 2, 2), ("X", 2, 3), ("H", 1, 1)])
def test_the_writer_writes_what_the_models_ask_for(ask: Ask, name: str, tp: int, pp: int) -> None:
    for asked, written in ask(harness_loading.names_of_parameters, name, tp, pp):
        assert asked == written


@pytest.mark.parametrize("name", ["D", "X"])
def test_damaged_ranks_are_refused(ask: Ask, name: str) -> None:
    """The loader lets lm_head.weight miss, whose place the embedding would take."""
    for what, message in ask(harness_loading.refusals_of_tensors, name).items():
        if what != "missing lm_head.weight":
            assert what.split()[1] in message, (what, message)


def test_the_signatures_are_the_packages(tmp_path: Path) -> None:
    """In a process of its own: the others have replaced the collectives."""
    older = ["tensorrt_llm._utils  get_sm_version is not there"] if version(Path(SOURCE)).startswith("0.") else []
    with importing() as executor:
        checkpoint = CHECKPOINTS / "nvlm-x-tiny"
        assert executor.submit(harness_loading.signature_differences, checkpoint, tmp_path).result() == older


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_gate": True}, "unknown keys: cross_attention_gate"),
        ({"cross_attention_layers": [0, 3]}, "cross_attention_layers|num_kv_heads_per_layer"),
        ({"cross_attention": False}, "cross_attention cannot be"),
        ({"max_encoder_input_len": 0}, "max_encoder_input_len cannot be"),
        ({"num_kv_heads_per_cross_attn_layer": [2] * 9}, "num_kv_heads_per_cross_attn_layer cannot be"),
    ],
)
def test_config_is_checked(ask: Ask, changes: dict[str, Any], message: str) -> None:
    found = ask(harness_loading.refusal_of_config, "X", **changes)
    assert any(part in found for part in message.split("|")), found


def test_config_survives_the_engine(ask: Ask) -> None:
    for name in "XH":
        assert ask(harness_loading.config_survives_the_engine, name)
