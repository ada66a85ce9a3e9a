"""Renders the deployments whose files are in golden/. Run this file to write them anew after a change on purpose."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
sys.path.insert(0, str(Path(__file__).parents[1]))

from deployment_engines import llm_record, write_engine  # noqa: E402

from nvlm_trt.deployment.deployed_engine import DeployedEngine  # noqa: E402
from nvlm_trt.deployment.deployment import Deployment  # noqa: E402
from nvlm_trt.deployment.files import TARGETS, render  # noqa: E402
from nvlm_trt.deployment.options import DeployOptions  # noqa: E402
from nvlm_trt.engine import Engine  # noqa: E402
from nvlm_trt.errors import EngineError  # noqa: E402

_VERSION = "0.1.0"


def _deployments(work: Path) -> Iterator[tuple[str, Deployment]]:
    """Yields an NVLM-D on one GPU, an NVLM-X on eight GPUs of two nodes, and an engine on a CPU."""
    llm = "tensorrt-llm"
    cases = {
        "nvlm-d-72b-one-gpu": (("nvlm-d-72b", llm, "bf16", llm_record(1, 1)), DeployOptions(), 160e9),
        "nvlm-x-72b-two-nodes": (
            ("nvlm-x-72b", llm, "bf16", llm_record(4, 2)),
            DeployOptions(replicas=2, max_replicas=3, nodes=2, image="registry.example/nvlm:1"),
            180e9,
        ),
        "nvlm-h-tiny-cpu": (("nvlm-h-tiny", "onnxruntime", "fp32", None), DeployOptions(), 20e6),
    }
    for name, (arguments, options, nbytes) in cases.items():
        engine = DeployedEngine.of(Engine.open(write_engine(work / name, *arguments)))
        # what a test's engine has not: its place, and its files
        path = Path("/srv/engines") / engine.model
        engine = dataclasses.replace(engine, path=path, nbytes=int(nbytes), fingerprint="0" * 64)
        yield name, Deployment.of(engine, options, _VERSION)


def golden_files() -> dict[str, str]:
    """Renders every case for every target that can run it: path below golden/ -> content."""
    files = {}
    with tempfile.TemporaryDirectory() as work:
        for name, deployment in _deployments(Path(work)):
            for target in TARGETS:
                try:
                    rendered = render(deployment, target)
                except EngineError:  # compose, for two nodes
                    continue
                files |= {f"{name}/{target}/{file}": content for file, content in rendered.items()}
    return files


if __name__ == "__main__":
    files = golden_files()
    shutil.rmtree(FOLDER, ignore_errors=True)
    for path, content in files.items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(content, encoding="utf-8")
