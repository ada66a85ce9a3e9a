"""An engine that ONNX Runtime runs a layer at a time: the bits of the whole engine, every weight in one piece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from nvlm_trt.backends.layers import ForcedSequence
from nvlm_trt.backends.onnxruntime import layers as layers_module
from nvlm_trt.backends.onnxruntime.graph_cut import cut
from nvlm_trt.backends.opening import open_backend, open_layers
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, RequestError
from nvlm_trt.evaluation.engine_stages import EngineStages
from nvlm_trt.layer_loop import LayerLoop

Directory = Callable[[str], Path]
NAMES = ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"]


def sequences_of(engine: Engine) -> list[ForcedSequence]:
    """Make a prompt of text and image tokens with a longer answer, and one of text alone."""
    config, generator = engine.config, np.random.default_rng(3)
    ids, ranges = generator.integers(0, 256, 40), np.zeros((40, 2), np.int32)
    image_tokens = generator.standard_normal((16, config.llm.hidden_size), dtype=np.float32)
    cross_kv = None
    if config.cross_layers:
        shape = (len(config.cross_layers), 2, config.llm.num_kv_heads, 50, config.llm.head_dim)
        cross_kv = generator.standard_normal(shape, dtype=np.float32)
        ranges[10:] = [3, 50]
    if config.architecture == "X":
        image_tokens = image_tokens[:0]
    ids[8 : 8 + len(image_tokens)] = config.image_token_id
    nothing = np.empty((0, config.llm.hidden_size), np.float32)
    text = ForcedSequence(generator.integers(0, 256, 9), np.zeros((9, 2), np.int32), 9, nothing)
    return [ForcedSequence(ids, ranges, 30, image_tokens, cross_kv), text]


def assert_same_logits(engine: Engine) -> None:
    sequences = sequences_of(engine)
    whole = EngineStages(engine, LayerLoop(), by_layers=False).logits(sequences)
    pieces = EngineStages(engine, LayerLoop(), by_layers=True).logits(sequences)
    for sequence, expected, actual in zip(sequences, whole, pieces, strict=True):
        assert np.isfinite(actual).all()
        assert actual.shape == (len(sequence.input_ids) - sequence.prompt_tokens + 1, engine.config.llm.vocab_size)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_prompt_and_answer(exact_engine: Directory, name: str) -> None:
    assert_same_logits(Engine.open(exact_engine(name)))


@pytest.mark.parametrize("precision", ["int8-weight-only", "int4-weight-only"])
def test_logits_of_quantised_weights(checkpoint: Directory, tmp_path: Path, precision: str) -> None:
    assert_same_logits(build_engine(checkpoint("nvlm-h-tiny"), tmp_path / "engine", precision=precision))


def test_logits_of_weights_that_are_not_repacked(exact_engine: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(exact_engine("nvlm-h-tiny"))
    sequences = sequences_of(engine)
    expected = EngineStages(engine, LayerLoop(), by_layers=False).logits(sequences)
    monkeypatch.setattr(layers_module, "_REPACKED_BYTES", 0)
    for a, b in zip(EngineStages(engine, LayerLoop(), by_layers=True).logits(sequences), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_image_tokens(exact_engine: Directory, name: str) -> None:
    engine = Engine.open(exact_engine(name))
    tiles = np.random.default_rng(1).standard_normal((3, 3, 56, 56), dtype=np.float32)
    with open_backend(engine, ["vision_encoder"]) as backend:
        expected = backend.to_host(backend.encode(tiles))
    np.testing.assert_allclose(open_layers(engine, LayerLoop()).encode(tiles), expected, rtol=0, atol=2e-6)


def test_image_tokens_in_openvino(engine: Directory, exact_engine: Directory) -> None:
    """Rounds to bf16 between the layers, as OpenVINO does within them, and leaves no files."""
    tiles = np.random.default_rng(1).standard_normal((3, 3, 56, 56), dtype=np.float32)
    directory = engine("nvlm-d-tiny")
    before = sorted(directory.parent.iterdir())
    actual = open_layers(Engine.open(directory), LayerLoop()).encode(tiles)
    exact = open_layers(Engine.open(exact_engine("nvlm-d-tiny")), LayerLoop()).encode(tiles)
    assert np.isfinite(actual).all()
    assert np.abs(actual - exact).max() < 2e-2 * np.abs(exact).max()
    assert sorted(directory.parent.iterdir()) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("stage", "result"), [("vision_encoder", "image_tokens"), ("decoder", "logits")])
def test_a_piece_has_the_weights_of_one_layer(exact_engine: Directory, name: str, stage: str, result: str) -> None:
    engine = Engine.open(exact_engine(name))
    config = engine.config
    path = engine.path / f"{stage}.onnx"
    pieces = cut(path, result, ["batch", "tokens", "width"], ["batch", "tokens", "wider"])
    names = [{tensor.name for tensor in piece.model.graph.initializer} for piece in pieces]
    whole = onnx.load(path, load_external_data=False).graph.initializer
    assert set().union(*names) == {tensor.name for tensor in whole}
    layers = config.vision.num_layers if stage == "vision_encoder" else config.llm.num_layers + len(config.cross_layers)
    behind = 2 if stage == "vision_encoder" and config.projector_width else 1  # layers of the projector, or lm_head
    assert len(pieces) == 1 + layers + behind  # embeddings before them
    for of_piece in names:
        of_layers = {n.split(".layers.")[1].split(".")[0] for n in of_piece if ".layers." in n}
        of_blocks = {n.split(".cross_layers.")[1].split(".")[0] for n in of_piece if ".cross_layers." in n}
        assert len(of_layers) + len(of_blocks) <= 1
        assert len({"mlp1.1.weight", "mlp1.3.weight"} & of_piece) <= 1


def test_a_graph_without_names_of_layers_is_refused(exact_engine: Directory, tmp_path: Path) -> None:
    model = onnx.load(exact_engine("nvlm-d-tiny") / "decoder.onnx", load_external_data=False)
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="does not name its layers"):
        cut(tmp_path / "decoder.onnx", "logits", ["batch", "tokens", "width"])


def test_layers_that_share_more_than_the_residual_stream_are_refused(exact_engine: Directory, tmp_path: Path) -> None:
    model = onnx.load(exact_engine("nvlm-d-tiny") / "decoder.onnx", load_external_data=False)
    normed = next(n for n in model.graph.node if n.name.startswith("layers.0/") and n.op_type == "RMSNormalization")
    last = next(n for n in reversed(model.graph.node) if n.name.startswith("layers.3/") and n.op_type == "Add")
    last.input[1] = normed.output[0]
    (tmp_path / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="cannot be cut"):
        cut(tmp_path / "decoder.onnx", "logits", ["batch", "tokens", "width"])


def test_a_sequence_that_the_engine_cannot_hold(exact_engine: Directory) -> None:
    engine = Engine.open(exact_engine("nvlm-d-tiny"))
    tokens = engine.limits.max_seq_len + 1
    nothing = np.empty((0, engine.config.llm.hidden_size), np.float32)
    sequence = ForcedSequence(np.zeros(tokens, np.int64), np.zeros((tokens, 2), np.int32), tokens, nothing)
    with pytest.raises(RequestError, match="the engine holds"):
        open_layers(engine, LayerLoop()).logits([sequence])
