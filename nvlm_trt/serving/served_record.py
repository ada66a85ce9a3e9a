"""Describes the engine that a server has loaded, as the server tells its clients."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nvlm_trt import strict_json
from nvlm_trt.errors import ServerError

if TYPE_CHECKING:
    from nvlm_trt.engine import Engine


@dataclass(frozen=True)
class ServedRecord:
    """Describes an engine. Two engines with one fingerprint are the same."""

    fingerprint: str
    model: str
    digest: str
    precision: dict[str, str]
    limits: dict[str, int]

    @classmethod
    def of(cls, engine: Engine) -> ServedRecord:
        limits = engine.limits.model_dump()
        return cls(engine.fingerprint, engine.config.name, engine.digest, engine.manifest.precision, limits)

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ServedRecord:
        """Read `to_json`, also of a later nvlm-trt. Raises ServerError for anything else."""
        try:
            raw: dict[str, Any] = strict_json.loads(text)
            return cls(**{name: raw[name] for name in cls.__dataclass_fields__})
        except (ValueError, KeyError, TypeError):
            raise ServerError("the server describes its engine in a way that this nvlm-trt does not read") from None
