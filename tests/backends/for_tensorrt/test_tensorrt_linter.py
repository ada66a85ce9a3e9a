"""Graphs that TensorRT's parser would get wrong silently: each is refused with the node's name and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from small_models import NODE, OPSETS, model, node, value

from nvlm_trt.backends.plans.linter import check_graph, lint
from nvlm_trt.errors import EngineError
from nvlm_trt.plugins.gated_cross_attention.onnx_function import gated_cross_attention

PLUGIN = {"plugin_namespace": "nvlm_v1", "plugin_version": "1", "aot": 1}
Q, K = ["B", 4, "S", 32], ["B", 2, 48, 32]


def attention(inputs: str, outputs: str = "y", query: Sequence[int | str] = Q, **attributes: object):
    names = {"q": query, "k": K, "v": K, "m": ["B", 1, "S", 48], "pk": K, "pv": K}
    values = [value(name, shape=shape) for name, shape in names.items()]
    values += [value("n", TensorProto.INT64, ["B"])]
    return model([node("Attention", inputs, outputs, **attributes)], values, [value("y", shape=["B", 4, "S", 32])])


def trt_attention(inputs: str, **attributes: object):
    values = [value(name, shape=shape) for name, shape in {"q": Q, "k": K, "v": K, "m": ["B", 1, "S", 48]}.items()]
    values += [value("n", TensorProto.INT32, ["B"]), value("n64", TensorProto.INT64, ["B"])]
    made = node("TRT_Attention", inputs, domain="nvlm", **attributes)
    return model([made], values, [value("y", shape=["B", 4, "S", 32])])


def cache_update(past: Sequence[int | str] = K, output: str = "y", **attributes: object):
    values = [value("past", shape=past), value("new", shape=Q), value("i", TensorProto.INT32, ["B"])]
    nodes = [node("TRT_KVCacheUpdate", "past new i", "y", domain="nvlm", **attributes)]
    if output != "y":
        nodes.append(node("Identity", "y", output, name="copy"))
    return model(nodes, values, [value(output, shape=past)])


def plugin(**attributes: object):
    return model([node("GatedCrossAttention", "x", domain="nvlm", **attributes)], [value("x")])


def plugin_in_branch():
    made = node("GatedCrossAttention", "x", "z", domain="nvlm", **PLUGIN)
    then = helper.make_graph([made], "then", [], [value("z")])
    other = helper.make_graph([node("Identity", "x", "z", name="pass")], "else", [], [value("z")])
    branch = node("If", "c", name="branch", then_branch=then, else_branch=other)
    return model([branch], [value("c", TensorProto.BOOL, []), value("x")])


def plugin_in_function():
    made = node("GatedCrossAttention", "a", "b", domain="nvlm", **PLUGIN)
    block = helper.make_function("nvlm", "Block", ["a"], ["b"], [made], OPSETS)
    return model([node("Block", "x", domain="nvlm", name="call")], [value("x")], functions=[block])


def quantised(zero: np.ndarray, between: str | None = None):
    """Makes x, quantised and restored, times w; `between` is put before MatMul."""
    nodes = [
        node("QuantizeLinear", "x s zero", "q", name=NODE),
        node("DequantizeLinear", "q s zero", "d", name="restore"),
    ]
    if between:
        nodes.append(node("Cast", "d", "d2", name="cast", to=TensorProto.FLOAT))
    nodes.append(node("MatMul", "d2 w" if between else "d w", name=NODE if between else "product"))
    constants = {"s": np.float32(0.1), "zero": zero, "w": np.ones((3, 2), np.float32)}
    return model(nodes, [value("x")], [value("y", shape=(2, 2))], constants)


def weight_by_cast_and_mul():
    nodes = [
        node("Cast", "w", "c", name="cast", to=TensorProto.FLOAT),
        node("Mul", "c s", "m", name="scale"),
        node("MatMul", "x m"),
    ]
    constants = {"w": np.ones((3, 2), np.int8), "s": np.float32(0.1)}
    return model(nodes, [value("x")], [value("y", shape=(2, 2))], constants)


INT8_ZERO = np.array(0, np.int8)
REFUSED = {
    "nonpad_kv_seqlen": (attention("q k v - - - n"), "nonpad_kv_seqlen is ignored"),
    "is_causal over a cache": (attention("q k v", is_causal=1), "upper left"),
    "mask and is_causal": (attention("q k v m", query=["B", 4, 48, 32], is_causal=1), "exclude each other"),
    "past and present": (attention("q k v - pk pv", "y a b"), "past_key and past_value"),
    "softcap": (attention("q k v", softcap=30.0), "softcap is not built"),
    "causal without kv_lengths": (trt_attention("q k v", causal_kind="lower_right"), "kv_lengths as input 5"),
    "upper_left": (trt_attention("q k v - - n", causal_kind="upper_left"), "upper_left ignores cached tokens"),
    "mask and causal_kind": (trt_attention("q k v m - n", causal_kind="lower_right"), "exclude each other"),
    "kv_lengths in int64": (trt_attention("q k v - - n64", causal_kind="lower_right"), "not INT32"),
    "cache of dynamic length": (cache_update(["B", 2, "L", 32]), "length is not fixed"),
    "cache that is no output": (cache_update(output="z"), "not updated in place"),
    "circular cache": (cache_update(mode="circular"), "linear mode"),
    "cache of another axis": (cache_update(axis=1), "axis 1"),
    "plugin without attributes": (plugin(), "plugin_namespace ''"),
    "plugin without version": (plugin(plugin_namespace="nvlm_v1", aot=1), "plugin_version ''"),
    "plugin in a reserved namespace": (plugin(**{**PLUGIN, "plugin_namespace": "trt"}), "plugin_namespace 'trt'"),
    "plugin in a branch": (plugin_in_branch(), "put the node into the main graph"),
    "plugin in a function": (plugin_in_function(), "put the node into the main graph"),
    "DynamicQuantizeLinear": (
        model([node("DynamicQuantizeLinear", "x", "y a b")], [value("x")], [value("y", TensorProto.UINT8)]),
        "calibrated scale",
    ),
    "asymmetric": (quantised(np.array(3, np.int8)), "asymmetric"),
    "unsigned": (quantised(np.array(0, np.uint8)), "quantised to uint8"),
    "Cast before MatMul": (quantised(INT8_ZERO, "Cast"), "Cast between DequantizeLinear and MatMul"),
    "weight by Cast and Mul": (weight_by_cast_and_mul(), "use DequantizeLinear"),
    "com.microsoft": (model([node("FastGelu", "x", domain="com.microsoft")], [value("x")]), "ONNX Runtime's own"),
}


@pytest.mark.parametrize(("refused", "fragment"), REFUSED.values(), ids=REFUSED)
def test_refuses(refused: onnx.ModelProto, fragment: str) -> None:
    findings = lint(refused)
    assert any(finding.node == NODE and fragment in str(finding) for finding in findings), findings
    assert all(finding.problem and finding.remedy for finding in findings)


ACCEPTED = {
    "attention": attention("q k v m"),
    "causal attention of equal lengths": attention("q k v", query=["B", 4, 48, 32], is_causal=1),
    "TRT_Attention": trt_attention("q k v - - n", causal_kind="lower_right"),
    "cache": cache_update(),
    "plugin": plugin(**PLUGIN),
    "int8": quantised(INT8_ZERO),
}


@pytest.mark.parametrize("accepted", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts(accepted: onnx.ModelProto) -> None:
    assert lint(accepted) == []


def test_a_plugin_that_is_not_available_counts_by_its_function(tmp_path: Path) -> None:
    values = [value("q", shape=Q), value("k", shape=K), value("v", shape=K)]
    values += [value("ranges", TensorProto.INT32, ["B", "S", 2]), value("gate", shape=[1])]
    made = model(
        [node("GatedCrossAttention", "q k v ranges gate", domain="nvlm", **PLUGIN)], values, [value("y", shape=Q)]
    )
    (lacking,) = lint(made, plugins=False)
    assert (lacking.node, "has no function" in lacking.problem) == (NODE, True)
    made.functions.append(ir.to_proto(gated_cross_attention(24)))
    assert lint(made) == []
    findings = lint(made, plugins=False)
    assert all(finding.node.endswith(f" in {NODE}") for finding in findings)
    assert [finding.problem.split("'s output")[0].split()[-1] for finding in findings] == ["Slice", "Slice", "Range"]
    onnx.save(made, tmp_path / "decoder.onnx")
    check_graph(tmp_path / "decoder.onnx")
    with pytest.raises(EngineError, match=f"in {NODE}: the shape of Slice's output depends on the value of"):
        check_graph(tmp_path / "decoder.onnx", plugins=False)


def test_error_names_file_node_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(REFUSED["nonpad_kv_seqlen"][0], path)
    with pytest.raises(EngineError, match=r"decoder.onnx .* the node: nonpad_kv_seqlen .* use TRT_Attention"):
        check_graph(path)


def test_zero_points_in_external_data_are_read(tmp_path: Path) -> None:
    made = quantised(np.array([0, 0, 5], np.int8))
    path = tmp_path / "graph.onnx"
    onnx.save(made, path, save_as_external_data=True, location="graph.onnx.data", size_threshold=0)
    with pytest.raises(EngineError, match="asymmetric"):
        check_graph(path)
