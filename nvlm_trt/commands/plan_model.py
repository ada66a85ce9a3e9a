"""Finds the engine that `nvlm-trt plan` is about: of a preset, of a checkpoint, or one that was built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_trt.backends.table import DEFAULT_BACKEND, find_backend
from nvlm_trt.errors import EngineError, NvlmError
from nvlm_trt.model.preset_names import PRESET_NAMES

if TYPE_CHECKING:
    from nvlm_trt.planner.design import EngineDesign

_PRESET_TAG_LENGTH = 1  # a tile tag is one token of the tokenizer that `nvlm-trt init-checkpoint` writes


@dataclass(frozen=True)
class PlannedModel:
    design: EngineDesign
    precision: str  # as the user, or the manifest, writes it
    checkpoint_bytes: int | None  # of its weight files; None: not known
    engine: Path | None  # None: not built yet
    concurrency: int  # requests decoded at once, at most the slots
    tp: int = 1  # of a built engine
    pp: int = 1


def find_model(
    engine: Path | None,
    checkpoint: Path | None,
    preset: str | None,
    backend: str | None,
    precision: str | None,
    limits: Mapping[str, int | None],
) -> PlannedModel:
    """Describe the engine of exactly one of the first three; `limits`: those that the user asked for.

    Raises NvlmError for no source or two, and for options that a built engine does not leave open; EngineError for an
    engine, backend, precision or limit; CheckpointError for a checkpoint."""
    if sum(source is not None for source in (engine, checkpoint, preset)) != 1:
        raise NvlmError(
            f"name one of an engine directory, --checkpoint DIR, and --preset NAME, for example {PRESET_NAMES[0]}"
        )
    given = {name: value for name, value in limits.items() if value is not None}
    if engine is not None:
        return _built(engine, backend, precision, given)
    from nvlm_trt.planner.design import EngineDesign
    from nvlm_trt.planner.limits import engine_limits

    spec = find_backend(backend or DEFAULT_BACKEND)
    precision = precision or spec.precisions.default
    precisions = spec.precisions.parse(precision)
    nbytes = None
    if preset is not None:
        from nvlm_trt.model.presets import find_preset

        config, tag_length = find_preset(preset), _PRESET_TAG_LENGTH
    else:
        from nvlm_trt.checkpoint.reader import Checkpoint
        from nvlm_trt.prompt.encoder import PromptEncoder
        from nvlm_trt.prompt.tokenizer import Tokenizer

        assert checkpoint is not None
        with Checkpoint.open(checkpoint) as opened:
            config = opened.config
            tag_length = PromptEncoder(config, Tokenizer.from_directory(checkpoint)).tag_length
            nbytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    design = EngineDesign(config, engine_limits(config, tag_length, given), precisions, spec, tag_length)
    return PlannedModel(design, precision, nbytes, None, design.limits.max_slots)


def _built(path: Path, backend: str | None, precision: str | None, limits: Mapping[str, int]) -> PlannedModel:
    from nvlm_trt.engine import Engine
    from nvlm_trt.planner.design import EngineDesign
    from nvlm_trt.prompt.encoder import PromptEncoder
    from nvlm_trt.prompt.tokenizer import Tokenizer

    fixed = {"--backend": backend, "--precision": precision, "--context": limits.get("max_seq_len")}
    fixed["--max-image-tokens"] = limits.get("max_image_tokens")
    if named := [name for name, value in fixed.items() if value is not None]:
        raise NvlmError(f"{named[0]}: the engine {path} was built already; leave it out, or plan from --checkpoint")
    opened = Engine.open(path)
    tag_length = PromptEncoder(opened.config, Tokenizer.from_directory(path)).tag_length
    design = EngineDesign.of(opened, tag_length)
    slots = opened.limits.max_slots
    concurrency = limits.get("max_slots", slots)
    if concurrency > slots:
        raise EngineError(
            f"the engine {path} has {slots} slots, not {concurrency}; rebuild it with --max-slots {concurrency}"
        )
    named_precision = ",".join(f"{part}={name}" for part, name in opened.manifest.precision.items())
    needs = design.backend.server_needs(opened)
    return PlannedModel(design, named_precision, None, path, concurrency, needs.tp, needs.pp)
