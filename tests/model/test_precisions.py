"""Tests --precision: the meaning of its names, and one-line errors for everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.backends.table import find_backend
from nvlm_trt.errors import EngineError
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.precision import COMPONENTS, component_of, components_of, needs_calibration, quantised_components
from nvlm_trt.model.presets import PRESETS

TABLE = find_backend("onnxruntime").precisions
names = st.sampled_from(sorted(TABLE.names))


def test_the_safe_defaults() -> None:
    assert TABLE.parse("fp32") == dict.fromkeys(COMPONENTS, "fp32")
    assert TABLE.parse(None) == TABLE.parse("bf16")
    for name in set(TABLE.names) - {"fp32"}:
        chosen = TABLE.parse(name)
        assert chosen["decoder"] == ("fp32" if name == "bf16" else name)
        assert chosen["vision_encoder"] == chosen["projector"] == "bf16"
    assert not needs_calibration(TABLE.parse("int4-weight-only"))
    assert needs_calibration(TABLE.parse("vision_encoder=fp8"))
    assert quantised_components(TABLE.parse("lm_head=int8,decoder=fp8")) == ("decoder", "lm_head")


@given(
    st.none() | names,
    st.dictionaries(st.sampled_from(COMPONENTS), names.filter(lambda name: name != "bf16")),
    st.randoms(),
)
def test_a_bare_name_with_exceptions_in_any_order(bare: str | None, chosen: dict[str, str], random) -> None:
    if bare is None and not chosen:
        return
    parts = [f" {component} = {name}" for component, name in chosen.items()] + ([f"{bare} "] if bare else [])
    random.shuffle(parts)
    expected = dict(zip(COMPONENTS, TABLE.names[bare or "bf16"], strict=True)) | chosen
    assert TABLE.parse(",".join(parts)) == expected


@given(st.text(alphabet="dint8=,fp3_ \nelcor-", max_size=30))
def test_anything_else_is_one_line(text: str) -> None:
    try:
        chosen = TABLE.parse(text)
    except EngineError as error:
        message = str(error)
    else:
        message = ""
        assert set(chosen) == set(COMPONENTS)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int7", "'int7' is not one of bf16, fp32, int8, int8-weight-only, int4-weight-only, fp8"),
        ("", "'' is not one of bf16"),
        ("int8,", "'' is not one of bf16"),
        ("decoder=", "'' is not one of bf16"),
        ("fp16", "onnxruntime computes nothing in fp16; choose one of bf16, fp32, int8"),
        ("decoder=bf16", "--precision decoder=bf16: the backend onnxruntime computes decoder in fp32, or quantised"),
        ("fp32,cross_attention=bf16", "computes cross_attention in fp32, or quantised"),
        ("encoder=int8", "'encoder' is not a component; choose from vision_encoder, projector, decoder"),
        ("=int8", "'' is not a component"),
        ("decoder=int8,decoder=fp8", "names decoder twice"),
        ("int8,fp8", "names int8 and fp8 for all components"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        TABLE.parse(text)


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny", "nvlm-h-small"])
def test_every_matrix_of_a_checkpoint_belongs_to_a_component(name: str) -> None:
    config = PRESETS[name]
    used = {
        component_of(tensor)
        for tensor, shape in checkpoint_layout(config).items()
        if len(shape) == 2 or tensor.endswith("patch_embedding.weight")
    }
    assert used == set(components_of(config))
