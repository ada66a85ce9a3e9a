"""Renders the pod that serves an engine."""

from __future__ import annotations

from typing import Any

from nvlm_trt.deployment.deployment import (
    ENGINE_FOLDER,
    GRPC_PORT,
    HTTP_PORT,
    LIVE_PATH,
    METRICS_PORT,
    READY_PATH,
    USER,
    Deployment,
)
from nvlm_trt.deployment.launch_script import KEY_FOLDER, SSH_PORT

# A pod that is to end leaves its Service while it is told to stop, and a server that stops refuses requests at once: so
# the pod waits first, until no new ones come.
_LEAVE_SECONDS = 5
_PROBE_SECONDS = 10
_GIB = 1 << 30
_TMP_SIZE = "2Gi"
_CPUS = 4  # for image decoding and tritonserver beside a GPU; for everything on a CPU


def labels(deployment: Deployment) -> dict[str, str]:
    return {"app.kubernetes.io/name": "nvlm-trt", "app.kubernetes.io/instance": deployment.name}


def pod_template(deployment: Deployment, command: list[str], serves: bool = True) -> dict[str, Any]:
    """Render a pod template. `serves`: False for a pod whose ranks another pod starts."""
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(METRICS_PORT),
        "prometheus.io/path": "/metrics",
    }
    return {
        "metadata": {"labels": labels(deployment), **({"annotations": annotations} if serves else {})},
        "spec": {
            **_placement(deployment),
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": _LEAVE_SECONDS + deployment.stop_seconds,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(deployment, command, serves)],
            "volumes": _volumes(deployment),
        },
    }


def _placement(deployment: Deployment) -> dict[str, Any]:
    """Choose nodes by the labels of NVIDIA's GPU feature discovery, for an engine of one compute capability."""
    capability = deployment.engine.needs.capability
    if not deployment.engine.on_gpu:
        return {}
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if capability is None:
        return {"tolerations": tolerations}
    major, minor = divmod(capability, 10)
    selector = {"nvidia.com/gpu.compute.major": str(major), "nvidia.com/gpu.compute.minor": str(minor)}
    return {"nodeSelector": selector, "tolerations": tolerations}


def _container(deployment: Deployment, command: list[str], serves: bool) -> dict[str, Any]:
    engine = deployment.engine
    requests = {"cpu": str(_CPUS), "memory": f"{engine.host_memory // _GIB}Gi"}
    limits = {"nvidia.com/gpu": str(deployment.gpus_per_node)} if engine.on_gpu else {"cpu": str(_CPUS)}
    mounts = [
        {"name": "engine", "mountPath": ENGINE_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if deployment.layout.nodes > 1:
        mounts.append({"name": "ssh", "mountPath": KEY_FOLDER, "readOnly": True})
    return {
        "name": "server",
        "image": deployment.image,
        "command": command,
        "env": [{"name": "HOME", "value": "/tmp"}],
        **(_serving(deployment) if serves else _waiting()),
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _serving(deployment: Deployment) -> dict[str, Any]:
    def probe(path: str, failures: int) -> dict[str, Any]:
        return {
            "httpGet": {"path": path, "port": "http"},
            "periodSeconds": _PROBE_SECONDS,
            "timeoutSeconds": 5,
            "failureThreshold": failures,
        }

    return {
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT},
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "startupProbe": probe(READY_PATH, -(-deployment.start_seconds // _PROBE_SECONDS)),
        "readinessProbe": probe(READY_PATH, 1),
        "livenessProbe": probe(LIVE_PATH, 3),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_LEAVE_SECONDS)]}}},
    }


def _waiting() -> dict[str, Any]:
    return {
        "ports": [{"name": "ssh", "containerPort": SSH_PORT}],
        "readinessProbe": {"tcpSocket": {"port": "ssh"}, "periodSeconds": _PROBE_SECONDS},
    }


def _volumes(deployment: Deployment) -> list[dict[str, Any]]:
    engine = deployment.engine
    volumes: list[dict[str, Any]] = [
        {"name": "engine", "persistentVolumeClaim": {"claimName": f"{deployment.name}-engine", "readOnly": True}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": f"{engine.shared_memory // _GIB}Gi"},
        },
        {"name": "tmp", "emptyDir": {"sizeLimit": _TMP_SIZE}},
    ]
    if deployment.layout.nodes > 1:
        volumes.append({"name": "ssh", "secret": {"secretName": f"{deployment.name}-ssh", "defaultMode": 0o440}})
    return volumes
