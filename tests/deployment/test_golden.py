"""Compares what is rendered with the files in golden/, and the files with published schemas."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from custom_resources import LEADER_WORKER_SET, SCALED_OBJECT
from golden import FOLDER, golden_files

MANIFESTS = sorted(FOLDER.glob("*/kubernetes/*.yaml"))
SCRIPTS = [path for path in sorted(FOLDER.glob("*/*/*")) if path.read_text().startswith("#!")]
COMPOSE = json.loads((files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json").read_text())
KUBERNETES = ("1.31", kubernetes_validate.latest_version())
OWN = {"LeaderWorkerSet": LEADER_WORKER_SET, "ScaledObject": SCALED_OBJECT}


def named(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def test_golden_files_are_what_is_rendered() -> None:
    """Fails after any change: `python tests/deployment/golden.py` writes the files anew, git shows what differs."""
    there = {named(path): path.read_text() for path in FOLDER.rglob("*") if path.is_file()}
    rendered = golden_files()
    assert there.keys() == rendered.keys()
    for name, content in rendered.items():
        assert there[name] == content, name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/compose/compose.yaml")), ids=named)
def test_compose_files_fit_the_compose_specification(path: Path) -> None:
    jsonschema.validate(load(path), COMPOSE)
    wrong = load(path)
    next(iter(wrong["services"].values()))["shm_sise"] = "1g"
    with pytest.raises(jsonschema.ValidationError, match="shm_sise"):
        jsonschema.validate(wrong, COMPOSE)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_manifests_fit_their_schemas(path: Path, version: str) -> None:
    document = load(path)
    if document["kind"] == "Kustomization":
        assert document["resources"] == [name for name in document["resources"] if (path.parent / name).is_file()]
    elif document["kind"] in OWN:
        jsonschema.validate(document, OWN[document["kind"]])
    else:
        kubernetes_validate.validate(document, version, strict=True)
    for template in pod_templates(document):
        in_a_resource = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(in_a_resource, version, strict=True)
        template["spec"]["containers"][0]["commands"] = []
        with pytest.raises(kubernetes_validate.ValidationError, match="commands"):
            kubernetes_validate.validate(in_a_resource, version, strict=True)


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    group = document.get("spec", {}).get("leaderWorkerTemplate", {})
    found = [group.get("leaderTemplate"), group.get("workerTemplate"), document.get("spec", {}).get("template")]
    return [template for template in found if template]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", sorted({path.parent for path in MANIFESTS}), ids=named)
def test_kubectl_builds_the_kustomization(folder: Path) -> None:
    """All that kubectl does without a cluster."""
    result = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    built = {document["kind"]: document for document in yaml.safe_load_all(result.stdout)}
    listed = [load(folder / name) for name in load(folder / "kustomization.yaml")["resources"]]
    assert built == {document["kind"]: document for document in listed}


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_scripts_are_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
