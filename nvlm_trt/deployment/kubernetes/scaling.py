"""Renders the autoscaler, KEDA's ScaledObject, and the PodDisruptionBudget."""

from __future__ import annotations

from typing import Any

from nvlm_trt.deployment.deployment import Deployment
from nvlm_trt.deployment.kubernetes.pod import labels
from nvlm_trt.deployment.kubernetes.workload import scale_target
from nvlm_trt.serving.triton.models.histograms import QUEUE_TIME

QUEUED = "nvlm_queued_requests"  # of nvlm_trt.serving.triton.models.metrics
QUEUE_SECONDS = 2.0  # that nine of ten requests may wait for a slot


def scaled_object(deployment: Deployment) -> dict[str, Any]:
    """Render the ScaledObject. It scales on the time that requests wait for a slot. That time is known when a request
    has ended, so the requests that wait now count too: no more than one replica decodes at once."""
    pods = f'pod=~"{deployment.name}-.*"'
    waited = f"sum by (le) (rate({QUEUE_TIME.name}_bucket{{{pods}}}[2m]))"
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": deployment.name, "labels": labels(deployment)},
        "spec": {
            "scaleTargetRef": scale_target(deployment),
            "minReplicaCount": deployment.layout.replicas,
            "maxReplicaCount": deployment.options.most_replicas,
            "pollingInterval": 15,
            "cooldownPeriod": 300,
            "triggers": [
                # without requests the quantile is NaN, which the comparison drops
                _trigger(
                    deployment, f"(histogram_quantile(0.9, {waited}) > 0) or vector(0)", f"{QUEUE_SECONDS:g}", "Value"
                ),
                _trigger(
                    deployment, f"sum({QUEUED}{{{pods}}}) or vector(0)", str(deployment.engine.slots), "AverageValue"
                ),
            ],
        },
    }


def disruption_budget(deployment: Deployment) -> dict[str, Any]:
    """Render the budget: a drain of nodes takes one pod at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": deployment.name, "labels": labels(deployment)},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels(deployment)}},
    }


def _trigger(deployment: Deployment, query: str, threshold: str, metric_type: str) -> dict[str, Any]:
    metadata = {"serverAddress": deployment.options.prometheus, "query": query, "threshold": threshold}
    return {"type": "prometheus", "metricType": metric_type, "metadata": metadata}
