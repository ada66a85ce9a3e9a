"""Compares an engine with the PyTorch reference, stage by stage: `nvlm-trt verify`.

Gives every stage of both the same input, so that a difference names the stage that makes it. Memory holds a stage of
the engine, or one of its layers, or a layer of the reference, and never two of these.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine, save_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.evaluation.engine_stages import EngineStages, fits
from nvlm_trt.evaluation.parity_report import ParityReport
from nvlm_trt.evaluation.probe import QUESTION, Probe
from nvlm_trt.extras import require
from nvlm_trt.kept_folder import kept_folder
from nvlm_trt.layer_loop import LayerLoop
from nvlm_trt.machine import available_memory
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.prompt.image_tokens import split_tiles

if TYPE_CHECKING:
    from nvlm_trt.reference.layerwise import LayerwiseReference

TOLERANCE = 1e-3  # largest absolute difference in fp32
# Largest difference of image tokens computed in bf16, as a share of the largest image token: twice what rounding the
# result of every operator to bf16 changes.
_BF16_SHARE = 2e-2
_WORK = "verify"


def verify_engine(
    engine_path: Path,
    checkpoint: Path,
    image: Path | None = None,
    tokens: int = 64,
    tolerance: float | None = None,
    progress: Progress = no_progress,
    lora: Path | None = None,
    memory: float | None = None,
) -> ParityReport:
    """Compares an engine with the reference of `checkpoint` and records the result in the engine's manifest.

    `tolerance` None: TOLERANCE, and a share of the largest value for image tokens that the engine computes in bf16.
    `lora`: the adapter that the engine was built with. `memory`: bytes that the engine may take, None: what is free;
    an engine on the CPU that needs more runs a layer at a time. What layers have computed is kept beside the engine
    until the comparison is complete: one that was killed goes on there.
    Raises EngineError if the engine was built from another checkpoint, NvlmError if torch is not installed."""
    engine = Engine.open(engine_path, full_check=True)
    with Checkpoint.open(checkpoint, lora) as source:
        if source.digest != engine.manifest.checkpoint_digest:
            raise EngineError(
                f"engine {engine_path} was not built from checkpoint {checkpoint} (their digests differ); "
                "name the checkpoint, and the --lora, that it was built from"
            )
        require("reference", "the PyTorch reference")
        from nvlm_trt.reference.layerwise import LayerwiseReference

        probe = Probe(engine, image)
        by_layers = not fits(engine, available_memory() if memory is None else memory, probe.tag_length)
        report = ParityReport(
            f"{engine.config.name} on {engine.manifest.backend}" + (", a layer at a time" if by_layers else ""),
            TOLERANCE if tolerance is None else tolerance,
        )
        bf16_share = _BF16_SHARE if tolerance is None and _encodes_in_bf16(engine) else None
        with kept_folder(engine_path.absolute(), _WORK, _key(engine, probe, tokens, by_layers)) as folder:
            loop = LayerLoop(folder, progress)
            stages = EngineStages(engine, loop, by_layers)
            answer = None if by_layers else stages.answer(QUESTION, probe.image, tokens)
            _compare(report, stages, LayerwiseReference(source, loop), probe, answer, tokens, bf16_share)
            engine.manifest.verification = report.to_dict()
            save_manifest(engine_path, engine.manifest)
    return report


def _encodes_in_bf16(engine: Engine) -> bool:
    return "bf16" in (engine.manifest.precision["vision_encoder"], engine.manifest.precision["projector"])


def _key(engine: Engine, probe: Probe, tokens: int, by_layers: bool) -> str:
    """Hash everything that what layers compute depends on; the engine's fingerprint has the checkpoint's digest."""
    versions = [importlib.metadata.version(package) for package in ("nvlm-trt", "torch")]
    parts = [engine.fingerprint, hashlib.sha256(probe.image).hexdigest(), tokens, by_layers, versions]
    return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()


def _compare(
    report: ParityReport,
    engine: EngineStages,
    reference: LayerwiseReference,
    probe: Probe,
    answer: list[int] | None,
    tokens: int,
    bf16_share: float | None,
) -> None:
    """Adds a row per stage. Both sides get the reference's tiles, the engine's image tokens, the reference's keys and
    values, and the same `answer`: greedy tokens of the engine, or, None, tokens of a text."""
    tiles = probe.reference_tiles()
    report.compare("tiles", probe.tiles(), tiles)

    image_tokens = engine.encode(tiles)  # [n, T, hidden]
    expected = reference.encode(tiles)
    allowed = None if bf16_share is None else bf16_share * float(np.abs(expected).max())
    report.compare("image tokens", image_tokens, expected, allowed)

    cross_kv = None
    crossed = image_tokens[split_tiles(probe.config.architecture, len(tiles))[1]]
    if len(crossed):
        cross_kv = reference.cross_kv(crossed, probe.tag_ids(len(crossed)))
        report.compare("cross K/V", engine.cross_kv(image_tokens), cross_kv)

    # the last token of an answer is read by no other
    forced = probe.given(tokens) if answer is None else answer
    sequences = [probe.sequence(image_tokens, cross_kv, forced[:-1]), probe.text()]
    actual, actual_text = engine.logits(sequences)  # [tokens, vocab], [1, vocab]
    wanted, wanted_text = reference.logits(sequences)
    report.compare("prefill logits", actual[0], wanted[0])
    if len(actual) > 1:
        report.compare("decode logits", actual[1:], wanted[1:])
    report.compare("text-only logits", actual_text[0], wanted_text[0])
    actual[:, probe.config.image_token_id] = wanted[:, probe.config.image_token_id] = -np.inf
    likeliest = [int(token) for token in wanted.argmax(axis=1)]
    if answer is None:
        report.compare_tokens("likeliest tokens", [int(token) for token in actual.argmax(axis=1)], likeliest)
    else:
        report.compare_tokens("greedy tokens", answer, likeliest)
