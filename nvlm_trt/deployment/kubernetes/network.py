"""Renders how a server is reached: its Service, and a NetworkPolicy that lets nobody else in."""

from __future__ import annotations

from typing import Any

from nvlm_trt.deployment.deployment import GRPC_PORT, HTTP_PORT, METRICS_PORT, Deployment
from nvlm_trt.deployment.kubernetes.pod import labels
from nvlm_trt.deployment.kubernetes.workload import served_labels

CLIENT_LABEL = "nvlm-trt/client"  # of pods that may send requests, "true"
_MONITORING = {"kubernetes.io/metadata.name": "monitoring"}  # the namespace that scrapes metrics


def service(deployment: Deployment) -> dict[str, Any]:
    """Render the Service. Clients open a new gRPC connection every minute, so a plain one spreads their load."""
    ports = {"http": HTTP_PORT, "grpc": GRPC_PORT, "metrics": METRICS_PORT}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": deployment.name, "labels": labels(deployment)},
        "spec": {
            "selector": served_labels(deployment),
            "ports": [{"name": name, "port": port, "targetPort": name} for name, port in ports.items()],
        },
    }


def network_policy(deployment: Deployment) -> dict[str, Any]:
    """Render the NetworkPolicy. The server itself opens no connection; the pods of one that has several reach each
    other, and the cluster's DNS."""
    requests = [{"protocol": "TCP", "port": port} for port in (HTTP_PORT, GRPC_PORT)]
    metrics = [{"protocol": "TCP", "port": METRICS_PORT}]
    ingress: list[dict[str, Any]] = [
        {"from": [{"podSelector": {"matchLabels": {CLIENT_LABEL: "true"}}}], "ports": requests},
        {"from": [{"namespaceSelector": {"matchLabels": _MONITORING}}], "ports": metrics},
    ]
    egress: list[dict[str, Any]] = []
    if deployment.layout.nodes > 1:
        others = [{"podSelector": {"matchLabels": labels(deployment)}}]
        ingress.append({"from": others})  # MPI and NCCL choose their ports
        egress.append({"to": others})
        egress.append(
            {
                "to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}],
                "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")],
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": deployment.name, "labels": labels(deployment)},
        "spec": {
            "podSelector": {"matchLabels": labels(deployment)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }
