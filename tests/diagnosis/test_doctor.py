"""Tests `nvlm-trt doctor`: the real machine, an engine against it, and what a broken or another machine shows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error

from nvlm_trt.backends.opening import runtimes_here
from nvlm_trt.backends.table import added_backend, backend_names, find_backend
from nvlm_trt.diagnosis import server, software
from nvlm_trt.diagnosis.finding import Finding, Severity, error, exit_status, note, ok, warning
from nvlm_trt.diagnosis.hardware import examine_hardware
from nvlm_trt.engine import MANIFEST, Engine, save_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.serving.triton.install import TritonInstall, find_triton

Directory = Callable[[str], Path]
SECRET = "hf_mpo4Yx0secret"


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def diagnose(run_cli: Run, *arguments: object) -> tuple[int, dict[str, dict]]:
    status, out, _ = run_cli("doctor", *arguments, "--json")
    document = json.loads(out)
    assert document["status"] == status
    return status, {finding["name"]: finding for finding in document["findings"]}


@pytest.fixture
def copied(engine: Directory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine("nvlm-x-tiny"), tmp_path / "engine"))


def test_this_machine(run_cli: Run) -> None:
    status, found = diagnose(run_cli)
    assert status < 2, [finding for finding in found.values() if finding["severity"] == "error"]
    assert {f"backend {name}" for name in backend_names()} <= set(found)
    assert found["python"]["severity"] == found["packages"]["severity"] == "ok"
    assert f"onnxruntime {importlib.metadata.version('onnxruntime')}" in found["packages"]["detail"]
    assert found["processor"]["detail"].split()[0].isdigit()
    for finding in found.values():
        assert "\n" not in finding["detail"] + (finding["remedy"] or "")


def test_text_says_the_same(run_cli: Run) -> None:
    status, found = diagnose(run_cli)
    text_status, out, _ = run_cli("doctor")
    assert text_status == status
    for name, finding in found.items():
        assert f"{finding['severity']:8}{name}: " in out


def test_an_engine_that_runs_here(run_cli: Run, engine: Directory) -> None:
    status, found = diagnose(run_cli, engine("nvlm-x-tiny"))
    assert status < 2
    for stage, runtime in runtimes_here(Engine.open(engine("nvlm-x-tiny"))).items():
        assert found[f"stage {stage}"]["detail"] == runtime
    assert found["built with"]["severity"] == "ok"
    assert found["memory of the engine"]["severity"] == "ok"


class TestEnginesThatDoNot:
    def test_a_damaged_file(self, run_cli: Run, copied: Path) -> None:
        path = next(copied.glob("decoder*.data"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        status, found = diagnose(run_cli, copied)
        assert status == 2
        assert "does not match the sha256" in found["engine"]["detail"]

    def test_no_engine(self, run_cli: Run, tmp_path: Path) -> None:
        status, found = diagnose(run_cli, tmp_path / "nowhere")
        assert status == 2
        assert found["engine"]["remedy"] == "run `nvlm-trt build`"

    def test_a_stage_whose_own_runtime_is_missing(self, run_cli: Run, copied: Path) -> None:
        def missing() -> str:
            raise EngineError("the abacus cannot be found; buy one")

        with added_backend(replace(find_backend("onnxruntime"), name="abacus", probe=missing, runtime_here=None)):
            opened = Engine.open(copied)
            opened.manifest.runtimes = {"vision_encoder": "abacus"}
            save_manifest(copied, opened.manifest)
            status, found = diagnose(run_cli, copied)
        assert status == 2
        assert found["stage vision_encoder"]["detail"] == "the abacus cannot be found"
        assert found["stage vision_encoder"]["remedy"] == "buy one"
        assert found["stage decoder"]["severity"] == "ok"
        assert found["backend abacus"]["severity"] == "note"

    def test_a_backend_that_is_not_known(self, run_cli: Run, copied: Path) -> None:
        raw = json.loads((copied / MANIFEST).read_text())
        (copied / MANIFEST).write_text(json.dumps({**raw, "backend": "slide-rule"}))
        status, found = diagnose(run_cli, copied)
        assert status == 2
        assert "'slide-rule'" in found["stage decoder"]["detail"]

    def test_one_that_is_larger_than_the_memory(self, run_cli: Run, copied: Path) -> None:
        raw = json.loads((copied / MANIFEST).read_text())
        raw["limits"].update(max_slots=1 << 16, max_seq_len=1 << 20)
        (copied / MANIFEST).write_text(json.dumps(raw))
        status, found = diagnose(run_cli, copied)
        assert status == 2
        assert "lower --max-slots" in found["memory of the engine"]["remedy"]

    def test_one_of_other_versions(self, run_cli: Run, copied: Path) -> None:
        opened = Engine.open(copied)
        opened.manifest.tool_versions["onnxruntime"] = "1.0.0"
        save_manifest(copied, opened.manifest)
        _, found = diagnose(run_cli, copied)
        assert found["built with"]["severity"] == "note"
        assert "onnxruntime 1.0.0, here " in found["built with"]["detail"]


class TestPackages:
    def versions(self, monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> dict[str, Finding]:
        real = importlib.metadata.version

        def version(package: str) -> str:
            if changed.get(package, "") is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return changed.get(package) or real(package)

        monkeypatch.setattr(importlib.metadata, "version", version)
        return by_name(software.examine_software())

    def test_one_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.versions(monkeypatch, onnxruntime="1.2.0", onnx="1.2.0")
        assert found["packages"].severity is Severity.ERROR
        assert "onnxruntime 1.2.0 is not >=1.23" in found["packages"].detail
        assert found["extra build"].severity is Severity.WARNING

    def test_one_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.versions(monkeypatch, safetensors=None, fastapi=None)
        assert found["packages"].severity is Severity.ERROR
        assert found["packages"].detail == "safetensors not installed"
        assert found["extra openai"].severity is Severity.NOTE
        assert found["extra openai"].remedy == "pip install 'nvlm-trt[openai]'"


class TestTriton:
    def install(self, root: Path, option: bytes = b"") -> TritonInstall:
        (root / "bin").mkdir(parents=True)
        (root / "bin" / "tritonserver").write_bytes(b"\x7fELF" + option)
        return replace(find_triton(), executable=root / "bin" / "tritonserver")

    def test_before_25_07(self, tmp_path: Path) -> None:
        finding = server.triton_finding(self.install(tmp_path / "old"))
        assert finding.severity is Severity.WARNING
        assert "CVE-2025-23319" in finding.detail
        assert "25.07" in str(finding.remedy)

    def test_since_25_07(self, tmp_path: Path) -> None:
        install = self.install(tmp_path / "new", b"http-max-input-size")
        (tmp_path / "new" / "TRITON_VERSION").write_text("2.60.0\n")
        finding = server.triton_finding(install)
        assert finding.severity is Severity.OK
        assert finding.detail.startswith("tritonserver 2.60.0 at ")

    def test_the_wheels(self) -> None:
        assert server.triton_version(find_triton()).startswith("tritonserver of nvidia-pytriton 0.7")


class TestHardware:
    @pytest.fixture
    def smi(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Finding]]:
        """Puts an nvidia-smi on PATH that runs a line of shell."""

        def examine(line: str) -> dict[str, Finding]:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
            return by_name(examine_hardware())

        return examine

    def test_gpus(self, smi: Callable[[str], dict[str, Finding]]) -> None:
        line = "echo 'NVIDIA H200, 575.57.08, 143771 MiB, 9.0'"
        found = smi(f"{line}; {line}")
        assert found["GPU 1"].detail == "NVIDIA H200, 143771 MiB, compute capability 9.0, driver 575.57.08"
        assert found["GPU 0"].severity is Severity.OK

    def test_a_driver_that_fails(self, smi: Callable[[str], dict[str, Finding]]) -> None:
        found = smi("echo 'Driver/library version mismatch' >&2; exit 18")["GPU"]
        assert found.severity is Severity.WARNING
        assert "Driver/library version mismatch" in found.detail


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setitem(server.PORTS, "HTTP", port)
        found = by_name(server.examine_server())[f"port {port}"]
    assert (found.severity, found.detail) == (Severity.NOTE, "is in use (HTTP)")


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.gettempdir", none)
    found = by_name(server.examine_server())["disk for temporary files"]
    assert found.severity is Severity.ERROR
    assert "TMPDIR" in f"{found.detail} {found.remedy}"


def test_the_exit_status_is_the_greatest_severity() -> None:
    findings = [ok("a", "b"), note("a", "b")]
    assert exit_status([]) == exit_status(findings) == 0
    assert exit_status([*findings, warning("a", "b", "c")]) == 1
    assert exit_status([error("a", "b", "c"), *findings, warning("a", "b", "c")]) == 2


class TestBundle:
    def test_what_it_holds_and_what_it_does_not(
        self, run_cli: Run, engine: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("NVLM_TRT_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "PIP_INDEX_URL"):
            monkeypatch.setenv(name, f"https://user:{SECRET}@host")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        _, _, err = run_cli("doctor", engine("nvlm-h-tiny"), "--bundle", tmp_path / "report.zip")
        assert "report.zip" in err
        with zipfile.ZipFile(tmp_path / "report.zip") as bundle:
            texts = {name: bundle.read(name).decode() for name in bundle.namelist()}
        assert set(texts) == {
            "findings.json", "system.json", "packages.txt", "engine/manifest.json", "engine/config.json",
        }  # fmt: skip
        assert not any(SECRET in text or str(tmp_path) in text for text in texts.values())
        assert json.loads(texts["system.json"])["environment"]["TMPDIR"] == "~/temporary"
        assert json.loads(texts["engine/manifest.json"])["architecture"] == "H"
        assert f"numpy=={importlib.metadata.version('numpy')}" in texts["packages.txt"].splitlines()
        assert socket.gethostname() not in texts["system.json"]
        names = {finding["name"] for finding in json.loads(texts["findings.json"])}
        assert {"python", "engine", "stage decoder"} <= names

    def test_a_name_that_is_taken(self, run_cli: Run, tmp_path: Path) -> None:
        (tmp_path / "report.zip").write_text("mine")
        status, _, err = run_cli("doctor", "--bundle", tmp_path / "report.zip")
        assert status == 2
        assert "report.zip exists" in err
        assert (tmp_path / "report.zip").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["report.zip"]

    def test_a_place_that_cannot_be_written(self, run_cli: Run) -> None:
        status, _, err = run_cli("doctor", "--bundle", "/proc/report.zip")
        assert status == 2
        assert err.count("\n") == 1
        assert "cannot write /proc/report.zip" in err


def test_mistakes(run_cli: Run) -> None:
    assert_one_line_error(run_cli("doctor", "--bundel", "x"), "--bundel")
