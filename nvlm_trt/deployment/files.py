"""Writes the files of a deployment into a folder, all of them or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from nvlm_trt.deployment.compose import compose_file
from nvlm_trt.deployment.deployment import Deployment
from nvlm_trt.deployment.dockerfile import dockerfile
from nvlm_trt.deployment.kubernetes.manifests import manifests
from nvlm_trt.deployment.launch_script import LAUNCH_SCRIPT, launch_script
from nvlm_trt.deployment.slurm import BATCH_SCRIPT, batch_script
from nvlm_trt.deployment.yaml_file import to_yaml
from nvlm_trt.errors import EngineError
from nvlm_trt.staging import is_replaceable, published_directory

RECORD = "deployment.json"  # says what the folder was rendered from


def _compose(deployment: Deployment) -> dict[str, str]:
    return {"compose.yaml": to_yaml(compose_file(deployment))}


def _kubernetes(deployment: Deployment) -> dict[str, str]:
    return {name: to_yaml(manifest) for name, manifest in manifests(deployment).items()}


def _slurm(deployment: Deployment) -> dict[str, str]:
    return {BATCH_SCRIPT: batch_script(deployment)}


_LAUNCHED = ("compose", "kubernetes")  # containers start their ranks themselves; Slurm's srun does it
TARGETS: Mapping[str, Callable[[Deployment], dict[str, str]]] = {
    "compose": _compose,
    "kubernetes": _kubernetes,
    "slurm": _slurm,
}


def render(deployment: Deployment, target: str) -> dict[str, str]:
    """Return file name -> content. Raises EngineError for what the target cannot run."""
    engine = deployment.engine
    record = {
        "target": target,
        "model": engine.model,
        "backend": engine.backend,
        "engine": engine.fingerprint,
        "nvlm_trt": deployment.version,
        "layout": asdict(deployment.layout),
        "options": asdict(deployment.options),
    }
    launches = engine.ranks > 1 and target in _LAUNCHED
    return {
        "Dockerfile": dockerfile(deployment, launches),
        **({LAUNCH_SCRIPT: launch_script(deployment)} if launches else {}),
        **TARGETS[target](deployment),
        RECORD: json.dumps(record, indent=2, allow_nan=False) + "\n",
    }


def write(files: Mapping[str, str], output: Path, overwrite: bool) -> None:
    """Publish the files as the folder `output`. Raises EngineError if there is one, unless `overwrite` and it is a
    deployment's."""

    def refuse() -> None:
        if not output.exists() and not output.is_symlink():
            return
        if not overwrite:
            raise EngineError(f"{output} exists; choose another --output or pass --overwrite")
        if not is_replaceable(output, RECORD):
            raise EngineError(
                f"{output} is not a deployment's folder, so it is not overwritten; choose another --output"
            )

    with published_directory(output.absolute(), refuse, overwrite) as staging:
        for name, content in files.items():
            (staging / name).write_text(content, encoding="utf-8")
            if content.startswith("#!"):
                (staging / name).chmod(0o755)
