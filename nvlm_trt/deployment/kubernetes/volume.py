"""Renders the claim of the volume that holds the engine."""

from __future__ import annotations

import math
from typing import Any

from nvlm_trt.deployment.deployment import Deployment
from nvlm_trt.deployment.kubernetes.pod import labels

_SLACK = 1.1  # a file system's own
_GIB = 1 << 30


def engine_claim(deployment: Deployment) -> dict[str, Any]:
    """Render the claim. One pod fills the volume once, and the servers on all nodes mount it read only."""
    size = math.ceil(_SLACK * deployment.engine.nbytes / _GIB)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": f"{deployment.name}-engine", "labels": labels(deployment)},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": f"{size}Gi"}}},
    }
