"""Renders what runs the pods: a Deployment where a replica is one pod, a LeaderWorkerSet where it is several."""

from __future__ import annotations

from typing import Any

from nvlm_trt.deployment.deployment import Deployment
from nvlm_trt.deployment.kubernetes.pod import labels, pod_template
from nvlm_trt.deployment.launch_script import container_command

LEADER = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}  # LeaderWorkerSet sets this label


def workload(deployment: Deployment) -> dict[str, Any]:
    """Render the workload."""
    return _leader_worker_set(deployment) if deployment.layout.nodes > 1 else _deployment(deployment)


def scale_target(deployment: Deployment) -> dict[str, str]:
    """Refer to the workload, for an autoscaler."""
    rendered = workload(deployment)
    return {"apiVersion": rendered["apiVersion"], "kind": rendered["kind"], "name": deployment.name}


def served_labels(deployment: Deployment) -> dict[str, str]:
    """Return the labels of the pods that answer requests."""
    return labels(deployment) | (LEADER if deployment.layout.nodes > 1 else {})


def _deployment(deployment: Deployment) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": deployment.name, "labels": labels(deployment)},
        "spec": {
            "replicas": deployment.layout.replicas,
            "selector": {"matchLabels": labels(deployment)},
            # a surge would need free GPUs, so an old pod goes before the new one comes
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "progressDeadlineSeconds": deployment.start_seconds + 60 + deployment.stop_seconds,
            "template": pod_template(deployment, container_command(deployment)),
        },
    }


def _leader_worker_set(deployment: Deployment) -> dict[str, Any]:
    command = container_command(deployment)
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": deployment.name, "labels": labels(deployment)},
        "spec": {
            "replicas": deployment.layout.replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxSurge": 0, "maxUnavailable": 1},
            },
            "leaderWorkerTemplate": {
                "size": deployment.layout.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",  # ranks cannot join a launch that runs
                "leaderTemplate": pod_template(deployment, command),
                "workerTemplate": pod_template(deployment, command, serves=False),
            },
        },
    }
