"""gpu_check's part for TensorRT-RTX without a GPU: engines and plans are built for real, and what needs a GPU says so.

A refusal is played, and so is a GPU for the calls of the runtime; the numbers are those of ONNX Runtime."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'nvlm-trt[tensorrt-rtx]'")
pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")

from rtx_paper_gpu import Here, Machine

from lab.gpu_check import report, rtx, rtx_checks, rtx_engines, rtx_kernels, rtx_numbers, rtx_plans
from lab.gpu_check.record import MEASURED, NOT_RUN, PASSED, WRONG, Check, NotAvailableError, Record, perform
from nvlm_trt.backends.tensorrt_rtx.record import record_of
from nvlm_trt.engine import Engine

MODEL, PRECISION = "nvlm-h-tiny", "bf16"


@pytest.fixture
def machine(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    for name, value in (("XDG_CACHE_HOME", str(tmp_path / "cache")), ("CUDA_CACHE_DISABLE", "0")):
        monkeypatch.setenv(name, value)  # checks change them
    engine = Engine.open(engines / f"{MODEL}-{PRECISION}")
    with Machine(record_of(engine), engine.config).patched() as patched:
        yield patched


def checks_of(engines: Path | None, path: Path, minutes: float = rtx.MINUTES) -> list[Check]:
    """Run the section in this process."""
    record = Record(path)
    perform(rtx.SECTION, rtx.trials(engines, minutes, Here()), record, float("inf"))
    return record.read()


# --- the section -----------------------------------------------------------------------------------------------------


def test_without_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (check,) = checks_of(None, tmp_path / "checks")
    assert check.status == NOT_RUN
    assert check.note == "TensorRT-RTX is not installed: pip install 'nvlm-trt[tensorrt-rtx]'"


def test_without_a_gpu_nothing_runs_and_every_check_says_why(engines: Path, tmp_path: Path) -> None:
    checks = checks_of(engines, tmp_path / "checks")
    assert {check.status for check in checks} == {NOT_RUN}
    notes = {check.name: check.note for check in checks}
    assert notes["numbers of nvlm-d-tiny, fp8"] == "this engine was not built"
    assert notes["first start of nvlm-h-tiny, bf16"].startswith("torch sees no GPU")
    assert [name for name in notes if "engine was not" not in notes[name]] == [
        "a plan for the default GPUs",
        "a plan for sm80",
        "a plan for this GPU alone",
        "a small plan, loaded whatever its header says",
        "plans of nvlm-h-tiny, bf16",
        "numbers of nvlm-h-tiny, bf16",
        "first start of nvlm-h-tiny, bf16",
        "next start of nvlm-h-tiny, bf16, with the runtime cache",
        "CUDA graph of decoding, nvlm-h-tiny, bf16",
        "W8A8 int8 product",
        "refitted weight of a constant",
        "refitted weight of a convolution",
        *(f"masked attention: {shape}" for shape in rtx_kernels.CROSS),
    ]
    every = {f"numbers of {model}, {name}" for model in rtx_engines.MODELS for name in rtx_numbers.TOLERANCES}
    assert every <= set(notes)


def test_a_refusal_is_a_result_and_the_rest_is_not_run(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = rtx_plans.Validity("INVALID", ["unsupported cc"], "")
    for module in (rtx_kernels, rtx_plans):
        monkeypatch.setattr(module, "require_gpu", lambda: None)
        monkeypatch.setattr(module, "validity", lambda plan: refused)
    checks = checks_of(engines, tmp_path / "checks")
    default, sm80, alone, small, *others = checks
    for check in (default, sm80):
        assert (check.status, check.values) == (MEASURED, {"validity": "INVALID", "diagnostics": "unsupported cc"})
    assert alone.values["validity"] == "not built"  # there is no GPU to build for
    assert (small.status, small.values["loads"]) == (MEASURED, False)
    assert {(check.status, check.note) for check in others} == {(NOT_RUN, "plan refused: unsupported cc")}
    made = {"machine": {}, "command": "", "date": "", "seconds": 1.0, "checks": [vars(check) for check in checks]}
    page = report.page(made)
    assert "## TensorRT-RTX" in page
    assert "| a plan for sm80 | measured | INVALID | unsupported cc |" in page


def test_engines_for_another_target_are_asked_for_too(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "engines" / "x"
    other.mkdir(parents=True)
    manifest = json.loads((engines / f"{MODEL}-{PRECISION}" / "manifest.json").read_text())
    manifest["backend_record"]["targets"] = ["sm89"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert rtx.targets_of(engines) == rtx.targets_of(None) == ()
    assert rtx.targets_of(tmp_path / "engines") == ("sm89",)
    assert "a plan for sm89" in [name for name, _ in rtx.trials(tmp_path / "engines", caller=Here())]


def test_missing_packages_of_a_build_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "BUILDERS", ("numpy", "no_such_package"))
    by_name = {check.name: check.note for check in checks_of(None, tmp_path / "checks")}
    assert by_name["engines"].startswith("building engines needs no_such_package; build them where")
    assert by_name["numbers of nvlm-d-tiny, bf16"].startswith("there are no engines")


@pytest.mark.parametrize("builds", [True, False])
def test_engines_are_built_on_the_machine(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: bool
) -> None:
    python = tmp_path / "python"
    works, fails = f'cp -r {engines} "$3"; echo "one: 1 MB in 1 s"', "echo one: no such operator; exit 1"
    python.write_text(f"#!/bin/sh\n{works if builds else fails}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    by_name = {check.name: check for check in checks_of(None, tmp_path / "checks")}
    if builds:
        assert (by_name["engines"].status, by_name["engines"].values["engines"]) == (PASSED, 1)
        assert by_name["numbers of nvlm-h-tiny, bf16"].note.startswith("torch sees no GPU")
    else:
        assert by_name["engines"].note.startswith("no engine could be built here (one: no such operator); build them")
        assert by_name["numbers of nvlm-h-tiny, bf16"].note.startswith("there are no engines")


def test_the_time_of_the_part_ends(engines: Path, tmp_path: Path) -> None:
    by_name = {check.name: check.note for check in checks_of(engines, tmp_path / "checks", minutes=0)}
    assert by_name["numbers of nvlm-h-tiny, bf16"] == "the time of these checks was up: half of 0 minutes"
    assert by_name["W8A8 int8 product"] == "the 0 minutes of this part were up"


# --- engines on a GPU made of paper ----------------------------------------------------------------------------------


def test_plans_load_and_their_aliases_are_compared(engines: Path, machine: Machine) -> None:
    result = rtx_checks.loads(engines, MODEL, PRECISION)
    assert (result.status, result.values["plans"], result.values["aliases"]) == (PASSED, 3, 12)
    del machine.aliased["present_key.1"]
    result = rtx_checks.loads(engines, MODEL, PRECISION)
    assert (result.status, result.values["aliases"], result.values["of the manifest's"]) == (WRONG, 11, 12)
    assert result.note == "present_key.1 is not an alias in both"


def test_numbers_run_through_the_product(engines: Path, machine: Machine) -> None:
    result = rtx_checks.numbers(engines, MODEL, PRECISION)
    assert (result.status, result.values["logits, worst"]) == (WRONG, 1.0)  # all logits are zeros
    assert machine.runs.count("run") > machine.runs.count("replay") == len(rtx_numbers.DECODED)


def test_a_plan_of_another_gpu_is_not_run(engines: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_plans, "validity", lambda plan: rtx_plans.Validity("INVALID", ["unsupported cc"], ""))
    with pytest.raises(NotAvailableError, match="plan refused: invalid; unsupported cc"):
        rtx_checks.numbers(engines, MODEL, PRECISION)


def test_the_first_call_leaves_a_cache_for_the_next(engines: Path, machine: Machine, tmp_path: Path) -> None:
    first = rtx_checks.first_call(engines, MODEL, PRECISION, tmp_path / "cache")
    assert (first.status, first.values["cache MB"]) == (MEASURED, 3 * len(b"kernels") / 1e6)
    assert b"kernels" not in machine.runs
    rtx_checks.first_call(engines, MODEL, PRECISION, tmp_path / "cache")
    assert machine.runs.count(b"kernels") == 3  # read by the second start


def test_a_recorded_step_and_one_that_cannot_be_recorded(engines: Path, machine: Machine) -> None:
    machine.capturable = False
    result = rtx_checks.capture(engines, MODEL, PRECISION)
    assert (result.status, result.note) == (MEASURED, "the plan gives no graph")
    machine.capturable = True
    result = rtx_checks.capture(engines, MODEL, PRECISION)
    assert (result.values["capturable at first"], result.values["after a run"]) == (False, True)
    assert (result.status, result.values["equal logits"]) == (PASSED, True)
    machine.spared = 1  # stays NaN
    assert rtx_checks.capture(engines, MODEL, PRECISION).status == WRONG


def test_a_package_that_is_missing_is_named(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvlm_trt.engine", None)
    with pytest.raises(NotAvailableError, match="nvlm_trt.engine.*scripts/pack_rtx.sh"):
        rtx_checks.numbers(engines, MODEL, PRECISION)


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_directory_without_engines_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lab.gpu_check.__main__ import main

    assert main(["--only", "rtx", "--rtx-engines", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --rtx-engines {tmp_path} has no engines; ")


def test_a_build_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "engines", ignore_errors=True)
    arguments = [str(tmp_path / "engines"), "--model", "nvlm-d-tiny", "--precision", "fp8", "--target", "sm80"]
    assert rtx_engines.main([*arguments, "--jobs", "1"]) == 1
    assert "nvlm-d-tiny, fp8: EngineError: --target sm80" in capsys.readouterr().out
    assert not list((tmp_path / "engines").glob("*.npz"))


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "none"))  # restores the path afterwards
    rtx_engines.name_package(tmp_path, "toy-package")
    assert importlib.metadata.version("toy-package") == "0+checkout"
    rtx_engines.name_package(tmp_path, "toy-package")  # is named already
