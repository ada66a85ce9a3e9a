"""Tests `nvlm-trt deploy`: a whole folder or none, and a one-line error for every mistake."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error
from deployment_engines import llm_record, write_engine

Directory = Callable[[str], Path]


@pytest.fixture
def split_engine(tmp_path: Path) -> Path:
    """An NVLM-X for eight GPUs."""
    return write_engine(tmp_path / "engines" / "x", "nvlm-x-72b", "tensorrt-llm", "bf16", llm_record(4, 2))


def test_an_engine_that_build_made(run_cli: Run, engine: Directory, tmp_path: Path) -> None:
    output = tmp_path / "deploy"
    command = ("deploy", engine("nvlm-h-tiny"), "--target", "kubernetes", "--output", output)
    status, out, err = run_cli(*command)
    assert (status, out) == (0, "")
    assert "kubectl apply --kustomize" in err
    names = set(os.listdir(output))
    assert names >= {"Dockerfile", "kustomization.yaml", "workload.yaml", "service.yaml", "deployment.json"}
    assert "launch-ranks" not in names
    record = json.loads((output / "deployment.json").read_text())
    assert (record["target"], record["model"], record["backend"]) == ("kubernetes", "nvlm-h-tiny", "onnxruntime")

    assert_one_line_error(run_cli(*command), "exists", "--overwrite")
    status, _, _ = run_cli("deploy", engine("nvlm-h-tiny"), "--target", "slurm", "--output", output, "--overwrite")
    assert status == 0
    assert set(os.listdir(output)) == {"Dockerfile", "serve.sbatch", "deployment.json"}
    assert os.access(output / "serve.sbatch", os.X_OK)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_json_writes_nothing(run_cli: Run, split_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run_cli("deploy", split_engine, "--target", "kubernetes", "--nodes", 2, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out).keys() >= {"workload.yaml", "launch-ranks"}
    assert sorted(tmp_path.rglob("*")) == before


def test_several_nodes_need_keys(run_cli: Run, split_engine: Path, tmp_path: Path) -> None:
    command = ("deploy", split_engine, "--target", "kubernetes", "--output", tmp_path / "deploy", "--nodes")
    _, _, err = run_cli(*command, 2)
    assert "kubectl create secret generic nvlm-x-72b-ssh" in err
    assert "crosses nodes" not in err
    _, _, err = run_cli(*command, 4, "--overwrite")
    assert "tp 4 crosses nodes" in err


def test_nothing_is_written_by_a_deployment_that_cannot_be(run_cli: Run, split_engine: Path, tmp_path: Path) -> None:
    output = tmp_path / "deploy"
    command = ("deploy", split_engine, "--target", "compose", "--output", output, "--nodes", 2)
    assert_one_line_error(run_cli(*command), "compose runs on one machine", "--target kubernetes")
    assert not output.exists()
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    command = ("deploy", split_engine, "--target", "slurm", "--output", output, "--overwrite")
    assert_one_line_error(run_cli(*command), "not a deployment's folder", "choose another --output")
    assert (output / "notes.txt").read_text() == "mine"
    output = tmp_path / "link"
    output.symlink_to(tmp_path / "nowhere")
    assert_one_line_error(run_cli("deploy", split_engine, "--target", "slurm", "--output", output), "exists")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--target", "docker"), ("'docker'", "compose, kubernetes, slurm")),
        (("--target", "slurm", "--nodes", 3), ("8 ranks (tp 4 x pp 2)", "choose --nodes 1, 2, 4 or 8")),
        (("--target", "slurm", "--nodes", 1, "--gpus-per-node", 4), ("choose --nodes 2, 4 or 8",)),
        (("--target", "compose", "--replicas", 2), ("16 GPUs", "the machine has 8", "--gpus-per-node")),
        (("--target", "slurm", "--name", "X"), ("--name 'X'",)),
        (("--target", "slurm", "--image", "a b"), ("--image 'a b'",)),
        (("--target", "kubernetes", "--max-replicas", 1, "--replicas", 2), ("--max-replicas 1 is below",)),
        (("--target", "slurm", "--replicas", 0), ("--replicas",)),
    ],
)
def test_mistakes(run_cli: Run, split_engine: Path, options: tuple[object, ...], fragments: tuple[str, ...]) -> None:
    assert_one_line_error(run_cli("deploy", split_engine, *options), *fragments)


def test_engines_that_cannot_be_served(run_cli: Run, tmp_path: Path) -> None:
    def refusal(name: str, **record: object) -> tuple[int, str, str]:
        engine = write_engine(tmp_path / name, "nvlm-d-72b", "tensorrt-llm", "bf16", llm_record(2, 1, **record))
        if not record:
            (engine / "llm" / "rank1.engine").unlink()
        return run_cli("deploy", engine, "--target", "slurm", "--output", tmp_path / "deploy")

    assert_one_line_error(
        refusal("checkpoint", form="checkpoint"),
        f"run `nvlm-trt build --continue {tmp_path / 'checkpoint'} --output ENGINE`",
        "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3",
    )
    assert_one_line_error(refusal("other", version="1.1.0"), "1.1.0", "1.2.1", "rebuild")
    assert_one_line_error(refusal("missing"), "rank1.engine is missing")
    assert_one_line_error(run_cli("deploy", tmp_path / "nothing", "--target", "slurm"), "not an engine directory")
    assert not (tmp_path / "deploy").exists()
