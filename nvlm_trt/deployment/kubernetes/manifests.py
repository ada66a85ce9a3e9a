"""Collects the manifests of a deployment on Kubernetes, a file each, and the kustomization that lists them."""

from __future__ import annotations

from typing import Any

from nvlm_trt.deployment.deployment import Deployment
from nvlm_trt.deployment.kubernetes.network import network_policy, service
from nvlm_trt.deployment.kubernetes.scaling import disruption_budget, scaled_object
from nvlm_trt.deployment.kubernetes.volume import engine_claim
from nvlm_trt.deployment.kubernetes.workload import workload


def manifests(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """Return file name -> manifest. `scaled-object.yaml` is not in the kustomization: it needs KEDA."""
    files = {
        "engine-claim.yaml": engine_claim(deployment),
        "workload.yaml": workload(deployment),
        "service.yaml": service(deployment),
        "network-policy.yaml": network_policy(deployment),
        "disruption-budget.yaml": disruption_budget(deployment),
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(files),
    }
    return {"kustomization.yaml": kustomization, **files, "scaled-object.yaml": scaled_object(deployment)}
