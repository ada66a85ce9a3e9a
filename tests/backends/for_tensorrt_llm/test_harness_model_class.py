"""Tests the model class without TensorRT-LLM: what it imports, and its calls against the signatures we wrote down."""

from __future__ import annotations

import ast
import sys

import pytest
from harness_signatures import METHODS, SIGNATURES, Signature, functions, members
from harness_source import MODEL_CLASS

TREE = ast.parse(MODEL_CLASS.read_text(encoding="utf-8"))
IMPORTS = [node for node in ast.walk(TREE) if isinstance(node, ast.Import | ast.ImportFrom)]
FUNCTIONS = {module: dict(functions(text)) for module, text in SIGNATURES.items()}
MEMBERS = {name: found for text in SIGNATURES.values() for name, found in members(text)}


def imported() -> dict[str, str]:
    """Return name -> module of what the model class imports from TensorRT-LLM."""
    return {
        alias.name: node.module
        for node in IMPORTS
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorrt")
        for alias in node.names
    }


def test_it_imports_only_what_the_container_has() -> None:
    """trtllm-build loads the file by its path: nvlm-trt need not be installed there."""
    allowed = {*sys.stdlib_module_names, "tensorrt", "tensorrt_llm"}
    for node in IMPORTS:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert not isinstance(node, ast.ImportFrom) or node.level == 0
        assert {name.split(".")[0] for name in names} <= allowed, ast.unparse(node)


def test_every_imported_name_is_in_the_list() -> None:
    known = {(name, module) for module, found in FUNCTIONS.items() for name in found}
    known |= {(name, module) for module, text in SIGNATURES.items() for name, _ in members(text)}
    assert set(imported().items()) == known


def test_calls_fit_the_signatures() -> None:
    assert problems(TREE) == []


@pytest.mark.parametrize(
    ("ours", "wrong"),
    [
        ("op_and(mask, columns < own)", "op_and(mask)"),
        ("qk_layernorm=config", "qk_layer_norm=config"),
        ("use_cache=use_cache,\n            kv_cache_params", "use_cache=use_cache,\n            kv_params"),
        ("skip_attn=cross.skip", "skip=cross.skip"),
        ("LayerNormType.RmsNorm", "LayerNormType.RMSNorm"),
        ("self.mapping.prev_pp_rank()", "self.mapping.previous_pp_rank()"),
        ("mark_output(", "mark_outputs("),
        ("max_seq_len=max_seq_len,", "max_sequence_len=max_seq_len,"),
        ("branches.add_output(skipped, self._ffn(given))", "branches.add_output(skipped)"),
    ],
)
def test_wrong_calls_are_found(ours: str, wrong: str) -> None:
    source = MODEL_CLASS.read_text(encoding="utf-8")
    assert ours in source
    assert problems(ast.parse(source.replace(ours, wrong)))


def problems(tree: ast.Module) -> list[str]:
    """Say which calls and members of a model class do not fit the lists."""
    found = []
    signatures = {name: FUNCTIONS[module][name] for name, module in imported().items() if name in FUNCTIONS[module]}
    methods = {name: signature for text in METHODS.values() for name, signature in functions(text) if name != "forward"}
    layers = {
        "self.cross_attention": forward("tensorrt_llm.layers", "Attention"),
        "layer": forward("tensorrt_llm.models.qwen.model", "QWenDecoderLayer"),
    }
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr not in MEMBERS.get(ast.unparse(node.value), [node.attr]):
            found.append(f"{ast.unparse(node)} is not in the list")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        signature = signatures.get(called)
        if called in layers and not (called == "layer" and len(node.args) > 1):  # a gated block is our own
            signature = layers[called]
        elif isinstance(node.func, ast.Attribute):
            name = node.func.attr
            signature = methods.get(name)
            on_our_own = ast.unparse(node.func.value) in ("self", "declare") or called.startswith("super().__init__")
            if signature is None and not on_our_own and name not in own and name not in _BUILTIN_METHODS:
                found.append(f"line {node.lineno}: {called} is not in the list")
        if signature and (problem := signature.problem(node)):
            found.append(f"line {node.lineno}: {called} {problem}")
    return found


# methods of dict, set, list, and of layers that are called by their attribute
_BUILTIN_METHODS = {
    *("append", "count", "fromkeys", "items", "join", "keys", "parameters", "signature", "update", "ceil"),
    *("input_layernorm", "post_layernorm", "mlp", "ln_f", "lm_head", "vocab_embedding", "transformer"),
}


def forward(module: str, name: str) -> Signature:
    return dict(functions(METHODS[module, name]))["forward"]
