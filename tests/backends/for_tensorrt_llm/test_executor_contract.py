"""Tests the pinned table: the stand-in refuses what it does not list, and the real package has all that it lists."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from bound_classes import bind, executor_module
from fake_executor import FakeExecutor
from hypothesis import given
from hypothesis import strategies as st
from real_signatures import signatures

from nvlm_trt.api import SamplingParams
from nvlm_trt.backends.tensorrt_llm import contract
from nvlm_trt.backends.tensorrt_llm.runtime import import_bindings, installed_version
from nvlm_trt.backends.tensorrt_llm.sampling_config import check_sampling, sampling_config
from nvlm_trt.errors import EngineError, ParameterError

BINDINGS = contract.Bindings.of(executor_module(FakeExecutor))
VOCAB = 152_064
CLASSES = [
    name for name, one in vars(contract).items() if isinstance(one, type) and one.__module__ == contract.__name__
]


def is_installed() -> bool:
    """Whether the real package is here. Its import takes seconds, so only its files are looked for."""
    try:
        return importlib.util.find_spec("tensorrt_llm.bindings") is not None
    except ImportError:
        return False


# --- binding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: BINDINGS.request([1], 2, sampling_config=BINDINGS.sampling_config(), temperature=1.0),  # type: ignore[call-arg]
        lambda: BINDINGS.sampling_config(5),  # type: ignore[call-arg]
        lambda: BINDINGS.request([np.int64(1)], 2, sampling_config=1, output_config=2),  # type: ignore[arg-type, list-item]
        lambda: BINDINGS.kv_cache_config(max_tokens=1.5),  # type: ignore[arg-type]
        lambda: BINDINGS.prompt_tuning_config(np.zeros((1, 2))),
        lambda: BINDINGS.prompt_tuning_config(torch.zeros(1, 2, dtype=torch.float64)),
        lambda: BINDINGS.prompt_tuning_config(torch.zeros(4, 2).T),
        lambda: bind(contract.Executor.await_responses, None, 5),
    ],
)
def test_the_stand_in_refuses_calls_that_the_table_does_not_have(call: Any) -> None:
    with pytest.raises(TypeError):
        call()


def test_every_class_of_the_table_is_fetched_from_the_bindings() -> None:
    fetched = {field.name for field in dataclasses.fields(contract.Bindings)}
    made_by_us = {name for name in CLASSES if name not in ("Bindings", "Response", "Result")}
    assert {name.lower() for name in made_by_us} == {name.replace("_", "") for name in fetched}


@pytest.mark.skipif(not is_installed(), reason="TensorRT-LLM is not installed (its wheels on public indexes are stubs)")
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "Bindings"])
def test_the_real_package_has_what_the_table_lists(name: str) -> None:
    """Against the signatures that the real bindings state, and their members."""
    import_bindings()
    real = getattr(sys.modules["tensorrt_llm.bindings.executor"], name)
    listed = getattr(contract, name)
    for member in [*vars(listed), *getattr(listed, "__annotations__", {})]:
        if not member.startswith("__"):
            assert hasattr(real, member), f"{name} has no {member}"
    methods = [one for one in vars(listed) if inspect.isfunction(getattr(listed, one))]
    for method in methods:
        wanted = [one for one in inspect.signature(getattr(listed, method)).parameters if one != "self"]
        overloads = signatures(getattr(real, method).__doc__ or "")
        stated = [{one.arg for one in (*overload.args, *overload.kwonlyargs)} for overload in overloads]
        assert any(set(wanted) <= one for one in stated), f"{name}.{method} takes {stated}, not {wanted}"


# --- the installed package -------------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, version: str | None, has_executor: bool = True) -> None:
    package: Any = types.ModuleType("tensorrt_llm")
    package.__path__ = []
    if version:
        package.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt_llm", package)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.bindings", None)
    if has_executor:
        monkeypatch.setitem(sys.modules, "tensorrt_llm.bindings.executor", executor_module(FakeExecutor))


def test_another_version_names_the_pin_and_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "1.3.0rc2")
    with pytest.raises(EngineError, match=r"1\.3\.0rc2 is installed.*1\.2\.1.*tritonserver:26\.07-trtllm-python-py3"):
        import_bindings()


def test_a_stub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(EngineError, match=r"is a stub without code; use the container .*26\.07"):
        installed_version()


def test_a_package_without_its_executor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, contract.VERSION, has_executor=False)
    with pytest.raises(EngineError, match=r"TensorRT-LLM 1\.2\.1 is installed without its executor"):
        import_bindings()


def test_a_class_that_the_bindings_lack_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, contract.VERSION)
    del sys.modules["tensorrt_llm.bindings.executor"].PromptTuningConfig
    monkeypatch.setitem(sys.modules, "tensorrt_llm.bindings", types.ModuleType("tensorrt_llm.bindings"))
    with pytest.raises(EngineError, match="without its executor.*PromptTuningConfig"):
        import_bindings()


@pytest.mark.skipif(is_installed(), reason="TensorRT-LLM is installed")
def test_nothing_installed_names_the_container() -> None:
    from nvlm_trt.backends.table import find_backend

    with pytest.raises(EngineError, match=r"TensorRT-LLM cannot be imported.*nvcr\.io/nvidia/tritonserver:26\.07"):
        find_backend("tensorrt-llm").probe()


# --- sampling --------------------------------------------------------------------------------------------------------


def mapped(**values: Any) -> dict[str, Any]:
    params = SamplingParams(**values)
    check_sampling(params, VOCAB)
    return vars(sampling_config(BINDINGS, params, VOCAB))


def test_greedy_ignores_the_filters() -> None:
    greedy = mapped(top_k=5000, top_p=0.5, min_p=0.5, seed=3)
    assert greedy == mapped()
    assert greedy["top_k"] == 1
    assert [greedy[name] for name in ("top_p", "min_p", "temperature", "seed", "repetition_penalty")] == [None] * 5
    assert mapped(repetition_penalty=1.5)["repetition_penalty"] == 1.5


def test_each_parameter_is_mapped() -> None:
    found = mapped(temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.1, seed=(1 << 64) - 1)
    expected = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": None, "repetition_penalty": 1.1}
    assert found == {**expected, "seed": (1 << 64) - 1}
    assert mapped(temperature=1.0, min_p=0.2)["min_p"] == 0.2


def test_off_is_written_so_that_the_executor_is_not_greedy() -> None:
    for off in (0, VOCAB, 1 << 20):
        found = mapped(temperature=1.0, top_k=off)
        assert (found["top_k"], found["top_p"]) == (0, 1.0)


def test_without_a_seed_every_request_has_another() -> None:
    seeds = {mapped(temperature=1.0)["seed"] for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert mapped(temperature=1.0, seed=0)["seed"] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 1025}, r"top_k = 1025 is not allowed; TensorRT-LLM cuts it to 1024"),
        ({"top_k": VOCAB - 1}, "is not allowed"),
        ({"top_p": 0.9, "min_p": 0.01}, "not allowed together"),
    ],
)
def test_what_the_executor_would_change_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        mapped(temperature=1.0, **values)
    assert mapped(temperature=0.0, **values)["top_k"] == 1  # greedy: the filters change nothing


@pytest.mark.parametrize(
    "values",
    [
        {"n": 2},
        {"presence_penalty": 1},
        {"frequency_penalty": -1},
        {"logit_bias": {5: 1}},
        {"min_tokens": 3},
        {"constraint": {"regex": "a"}},
    ],
)
def test_parameters_that_are_not_passed_on_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=rf"parameter {next(iter(values))} = .* not allowed with engines"):
        check_sampling(SamplingParams(**values), VOCAB)


@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 200_000),
        top_p=st.floats(0.001, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.01, 100),
        seed=st.none() | st.integers(0, (1 << 64) - 1),
    )
)
def test_all_that_is_not_refused_is_mapped_without_change(params: SamplingParams) -> None:
    try:
        check_sampling(params, VOCAB)
    except ParameterError:
        assert params.temperature
        return
    found = vars(sampling_config(BINDINGS, params, VOCAB))
    assert (found["repetition_penalty"] or 1.0) == params.repetition_penalty
    if not params.temperature:
        assert found["top_k"] == 1
        return
    assert found["top_k"] == (params.top_k if params.top_k < VOCAB else 0) <= contract.MAX_TOP_K
    assert (found["top_p"], found["min_p"] or 0.0, found["temperature"]) == (
        params.top_p, params.min_p, params.temperature,
    )  # fmt: skip
