"""JSON schemas of LeaderWorkerSet and of KEDA's ScaledObject.

Written by hand from the fields of their published APIs (kubernetes-sigs/lws, api/leaderworkerset/v1; kedacore/keda,
apis/keda/v1alpha1): no package has them. They know the fields that a deployment may use, and refuse others. Pod
templates are checked apart, with Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


_COUNT = {"type": "integer", "minimum": 0}
_COUNT_OR_PERCENT = {"anyOf": [_COUNT, {"type": "string", "pattern": r"^\d+%$"}]}
_TEMPLATE = {"type": "object"}
_METADATA = _object("name", name={"type": "string"}, labels={"type": "object"}, annotations={"type": "object"})

LEADER_WORKER_SET = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata=_METADATA,
    spec=_object(
        "leaderWorkerTemplate",
        replicas=_COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        networkConfig=_object("subdomainPolicy", subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
        rolloutStrategy=_object(
            "type",
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=_object(
                "", partition=_COUNT, maxUnavailable=_COUNT_OR_PERCENT, maxSurge=_COUNT_OR_PERCENT
            ),
        ),
        leaderWorkerTemplate=_object(
            "workerTemplate",
            leaderTemplate=_TEMPLATE,
            workerTemplate=_TEMPLATE,
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        ),
    ),
)

SCALED_OBJECT = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "keda.sh/v1alpha1"},
    kind={"const": "ScaledObject"},
    metadata=_METADATA,
    spec=_object(
        "scaleTargetRef triggers",
        scaleTargetRef=_object("name", name={"type": "string"}, apiVersion={"type": "string"}, kind={"type": "string"}),
        pollingInterval=_COUNT,
        initialCooldownPeriod=_COUNT,
        cooldownPeriod=_COUNT,
        idleReplicaCount=_COUNT,
        minReplicaCount=_COUNT,
        maxReplicaCount=_COUNT,
        triggers={
            "type": "array",
            "minItems": 1,
            "items": _object(
                "type metadata",
                type={"const": "prometheus"},
                name={"type": "string"},
                metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                metadata=_object(
                    "serverAddress query threshold",
                    serverAddress={"type": "string"},
                    query={"type": "string"},
                    threshold={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                ),
            ),
        },
    ),
)
