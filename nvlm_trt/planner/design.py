"""Describes an engine, built or not, as far as its memory and its times depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nvlm_trt.backends.opening import backend_of
from nvlm_trt.backends.spec import BackendSpec, EncoderMemory
from nvlm_trt.engine import Engine
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.precision import FLOAT_BYTES, floating_type, quantised_components


@dataclass(frozen=True)
class EngineDesign:
    """What a build is asked for."""

    config: NvlmConfig
    limits: EngineLimits
    precisions: Mapping[str, str]  # of each component that the model has, at least
    backend: BackendSpec
    tag_length: int  # tokens of an NVLM-H tile tag
    runtimes: Mapping[str, str] | None = None  # of single stages, by an engine's manifest; None: as a build chooses

    @classmethod
    def of(cls, engine: Engine, tag_length: int) -> EngineDesign:
        """Describe an engine that was built. Raises EngineError for an unknown backend."""
        manifest = engine.manifest
        return cls(engine.config, engine.limits, manifest.precision, backend_of(engine), tag_length, manifest.runtimes)

    @property
    def stored_type(self) -> str:
        """Return the type of the caches, and of all weights in the engine's files that are not quantised."""
        return self.backend.memory.floating or floating_type(self.precisions)

    @property
    def number_size(self) -> int:
        """Return the bytes of a number of the stored type."""
        return FLOAT_BYTES[self.stored_type]

    @property
    def encoder(self) -> EncoderMemory | None:
        """Return how another runtime than the backend's runs the vision encoder, if one does."""
        runtimes = self.backend.runtimes_of(self.precisions) if self.runtimes is None else self.runtimes
        return self.backend.memory.encoders.get(runtimes.get("vision_encoder", ""))

    @property
    def unquantised(self) -> EngineDesign:
        """Return the engine with which the accuracy gate compares this one; itself without quantised components."""
        quantised = quantised_components(self.precisions)
        return self.with_precisions({**self.precisions, **dict.fromkeys(quantised, self.stored_type)})

    @property
    def loaded(self) -> EngineDesign:
        """Return the design with each precision as the backend holds it in memory."""
        loaded_as = self.backend.memory.loaded_as
        return replace(self, precisions={part: loaded_as.get(name, name) for part, name in self.precisions.items()})

    def with_precisions(self, precisions: Mapping[str, str]) -> EngineDesign:
        return replace(self, precisions=precisions, runtimes=None)

    def with_limits(self, **limits: int) -> EngineDesign:
        """Replace limits that the model allows."""
        return replace(self, limits=self.limits.model_copy(update=limits))
