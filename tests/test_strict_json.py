"""JSON that is written or read here has no NaN and no infinity."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nvlm_trt import strict_json
from nvlm_trt.benchmark.results_document import read_document
from nvlm_trt.errors import EngineError, RequestError
from nvlm_trt.evaluation.parity_report import ParityReport
from nvlm_trt.serving.chat_tensors import parse_sampling
from nvlm_trt.serving.grpc_messages import infer_request

ROOT = Path(__file__).parents[1]
FOLDERS = ("nvlm_trt", "builders", "plugins", "triton_repo", "lab", "training", "scripts")


def calls() -> Iterator[tuple[str, ast.Call]]:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if (ROOT / "lab" / "reliability") in path.parents:
                continue  # it sends wrong JSON on purpose
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_everything_that_writes_json_refuses_nan() -> None:
    found = dict(calls())
    assert len(found) > 30
    strict = [ast.unparse(call) for call in found.values() if "allow_nan=False" in ast.unparse(call)]
    loose = [place for place, call in found.items() if "allow_nan=False" not in ast.unparse(call)]
    assert strict
    assert loose == []


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e400", "[-1e999]"])
def test_numbers_that_json_lacks_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a JSON number|beyond the range"):
        strict_json.loads(text)
    with pytest.raises(RequestError, match="not JSON"):
        parse_sampling(text.encode())


def test_other_numbers_are_read_as_json_does() -> None:
    for text in ("1e308", "-0.0", "5e-324", "1e-400", "12", '{"a": [1.5, true, null]}'):
        assert strict_json.loads(text) == json.loads(text)


def test_a_client_names_the_parameter() -> None:
    with pytest.raises(RequestError, match="temperature = nan is not allowed"):
        infer_request("Hi", sampling={"temperature": float("nan")})
    with pytest.raises(RequestError, match="messages cannot be sent as JSON"):
        infer_request(messages=[{"role": "user", "content": float("inf")}])


def test_results_with_nan_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"kind": "nvlm-trt bench", "schema_version": 1, "x": NaN}')
    with pytest.raises(RequestError, match="NaN is not a JSON number"):
        read_document(tmp_path / "a.json")


def test_a_manifest_with_nan_is_refused(tmp_path: Path) -> None:
    from nvlm_trt.engine import MANIFEST, Engine

    (tmp_path / MANIFEST).write_text('{"calibration": {"x": Infinity}}')
    with pytest.raises(EngineError, match="is not JSON"):
        Engine.open(tmp_path)


def test_a_difference_that_is_not_finite_is_null() -> None:
    report = ParityReport("t", tolerance=float("inf"))
    report.compare("logits", np.array([np.nan]), np.array([1.0]))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["stages"][0]["max_abs_diff"] is None


def test_an_object_has_at_most_so_many_keys() -> None:
    assert strict_json.loads('{"a": {"b": 1}, "c": [{"d": 2, "e": 3}]}', most_keys=2) == {
        "a": {"b": 1},
        "c": [{"d": 2, "e": 3}],
    }
    with pytest.raises(ValueError, match="an object has 3 keys, at most 2 are allowed"):
        strict_json.loads('[{"a": 1, "b": 2, "a": 3}]', most_keys=2)
