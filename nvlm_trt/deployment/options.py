"""The options of `nvlm-trt deploy`, checked where one is wrong by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvlm_trt.errors import EngineError

# a DNS label, shorter than its 63 characters: LeaderWorkerSet and Kubernetes append numbers and hashes
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# as in the specification of container images; a registry may have a port, and a digest may follow
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/:-]{0,180}(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?", re.ASCII)


@dataclass(frozen=True)
class DeployOptions:
    """Options of a deployment. Raises EngineError for a wrong one."""

    replicas: int = 1
    max_replicas: int | None = None  # of the autoscaler; None: twice `replicas`
    nodes: int | None = None  # of one replica; None: as few as hold its ranks
    gpus_per_node: int = 8
    name: str | None = None  # of everything that is deployed; None: the model's
    image: str | None = None  # of the server; None: the name, with nvlm-trt's version
    prometheus: str = "http://prometheus.monitoring.svc.cluster.local:9090"

    def __post_init__(self) -> None:
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise EngineError(
                f"--name {self.name!r} is not a DNS label; use up to 40 of a-z, 0-9 and hyphens, and a letter first"
            )
        if self.image is not None and not _IMAGE.fullmatch(self.image):
            raise EngineError(f"--image {self.image!r} is not the name of an image; use registry/name:tag")
        if not re.fullmatch(r"https?://[^\s\"'\\]+", self.prometheus):
            raise EngineError(f"--prometheus {self.prometheus!r} is not an address; use http://HOST:PORT")
        if self.most_replicas < self.replicas:
            raise EngineError(
                f"--max-replicas {self.max_replicas} is below --replicas {self.replicas}; raise it, or leave it out"
            )

    @property
    def most_replicas(self) -> int:
        return 2 * self.replicas if self.max_replicas is None else self.max_replicas
