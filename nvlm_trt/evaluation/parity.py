"""Compares an engine with the PyTorch reference, stage by stage: `nvlm-trt verify`.

Gives every stage the reference's own input, so that a difference names the stage that makes it. The last row is end
to end: the tokens that the whole pipeline generates from encoded image bytes and text.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.base import ImageFeatures, StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine, save_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.extras import require
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.image_file import naming_files, read_image_file
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from nvlm_trt.reference.model import ReferenceModel

QUESTION = "What is written in the second line?"

TOLERANCE = 1e-3  # largest absolute difference in fp32
# Largest difference of image tokens computed in bf16, as a share of the largest image token: twice what rounding the
# result of every operator to bf16 changes.
_BF16_SHARE = 2e-2


@dataclass(frozen=True)
class StageComparison:
    """Holds one row of a report. A value on either side that is not finite makes `max_abs_diff` infinite."""

    name: str
    shape: str
    max_abs_diff: float | None
    cosine: str
    passed: bool

    @property
    def difference(self) -> str:
        return "" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"


@dataclass
class ParityReport:
    title: str
    tolerance: float
    stages: list[StageComparison] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.stages) and all(stage.passed for stage in self.stages)

    def compare(
        self, name: str, actual: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float | None = None
    ) -> None:
        """Adds a row: passed if shapes are equal, all values finite, and no difference is above `tolerance`, by default
        the report's."""
        a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        comparable = actual.shape == expected.shape and bool(np.isfinite(a).all() and np.isfinite(b).all())
        difference = float(np.abs(a - b).max(initial=0.0)) if comparable else float("inf")
        cosine = f"{a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30):.8f}" if comparable else "-"
        shape = "x".join(map(str, actual.shape))
        allowed = self.tolerance if tolerance is None else tolerance
        self.stages.append(StageComparison(name, shape, difference, cosine, difference <= allowed))

    def compare_tokens(self, name: str, actual: list[int], expected: list[int]) -> None:
        equal = sum(a == b for a, b in zip(actual, expected, strict=False))
        passed = actual == expected and bool(expected)
        self.stages.append(StageComparison(name, f"{equal} of {len(expected)}", None, "", passed))

    def to_dict(self) -> dict[str, Any]:
        stages = [
            {
                "name": s.name,
                "shape": s.shape,
                "max_abs_diff": _finite(s.max_abs_diff),
                "cosine": s.cosine,
                "passed": s.passed,
            }
            for s in self.stages
        ]
        return {"passed": self.passed, "tolerance": _finite(self.tolerance), "stages": stages}


def _finite(value: float | None) -> float | None:
    """Return None for infinity, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None


def verify_engine(
    engine_path: Path,
    checkpoint: Path,
    image: Path | None = None,
    tokens: int = 64,
    tolerance: float | None = None,
    progress: Progress = no_progress,
    lora: Path | None = None,
) -> ParityReport:
    """Compares an engine with the reference of `checkpoint` and records the result in the engine's manifest.

    `tolerance` None: TOLERANCE, and a share of the largest value for image tokens that the engine computes in bf16.
    `lora`: the adapter that the engine was built with.
    Raises EngineError if the engine was built from another checkpoint, NvlmError if torch is not installed.
    """
    engine = Engine.open(engine_path, full_check=True)
    with Checkpoint.open(checkpoint, lora) as source:
        if source.digest != engine.manifest.checkpoint_digest:
            raise EngineError(
                f"engine {engine_path} was not built from checkpoint {checkpoint} (their digests differ); "
                "name the checkpoint, and the --lora, that it was built from"
            )
    reference = _load_reference(checkpoint, lora)
    report = ParityReport(
        f"{engine.config.name} on {engine.manifest.backend}", TOLERANCE if tolerance is None else tolerance
    )
    bf16_share = _BF16_SHARE if tolerance is None and _encodes_in_bf16(engine) else None
    data = _read_image(image) if image is not None else draw_image(engine)
    progress("verifying", 0, 3)
    with open_backend(engine) as backend:
        prompt, llm_tokens, cross_kv = _compare_stages(report, engine, backend, reference, data, bf16_share)
    progress("verifying", 1, 3)
    expected = reference.generate(prompt, llm_tokens, cross_kv, max_tokens=tokens)
    progress("verifying", 2, 3)
    with Pipeline.open(engine_path) as pipeline:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        deltas = pipeline.generate(ChatRequest([Message("user", QUESTION)], (data,), sampling, None))
        actual = [token for delta in deltas for token in delta.token_ids]
    report.compare_tokens("greedy tokens", actual, expected)
    progress("verifying", 3, 3)
    engine.manifest.verification = report.to_dict()
    save_manifest(engine_path, engine.manifest)
    return report


def _encodes_in_bf16(engine: Engine) -> bool:
    return "bf16" in (engine.manifest.precision["vision_encoder"], engine.manifest.precision["projector"])


def _read_image(path: Path) -> bytes:
    """Raises ImageError that names the file before the stages are compared."""
    data = read_image_file(path)
    with naming_files([path]):
        load_image(data)
    return data


def _compare_stages(
    report: ParityReport,
    engine: Engine,
    backend: StepBackend,
    reference: ReferenceModel,
    data: bytes,
    bf16_share: float | None,
) -> tuple[EncodedPrompt, Any, Any]:
    """Compares tiles, image tokens, cross K/V and prefill logits; returns the inputs of the reference's `generate`: the
    engine's image tokens where it computes them in bf16, because the smallest difference may change a token, and the
    row of the image tokens bounds the difference already."""
    import torch

    from nvlm_trt.reference.preprocess import reference_tiles

    config, max_tiles = engine.config, engine.limits.max_tiles
    encoder = PromptEncoder(config, Tokenizer.from_directory(engine.path))
    loaded = load_image(data)
    tiles = reference_tiles(loaded, config.vision.image_size, max_tiles)  # [n, 3, E, E]
    report.compare("tiles", tile_image(loaded, config.vision.image_size, max_tiles), tiles.numpy())

    with torch.inference_mode():
        image_tokens = reference.encode(tiles)  # [n, T, hidden]
        allowed = None if bf16_share is None else bf16_share * float(image_tokens.abs().max())
        encoded_tiles = backend.to_host(backend.encode(tiles.numpy()))
        report.compare("image tokens", encoded_tiles, image_tokens.numpy(), allowed)
        llm_tokens, cross_kv = _reference_features(reference, encoder, image_tokens)
        # gives this backend the reference's image tokens: compares the embeddings, keys and values made from them
        features = backend.features(backend.import_tokens(image_tokens.contiguous().numpy()))
        if cross_kv is not None:
            expected = torch.stack([torch.stack(pair) for pair in cross_kv]).numpy()
            assert features.cross_kv is not None, "an image of several tiles is cross-attended"
            report.compare("cross K/V", backend.to_host(features.cross_kv), expected)
            features = ImageFeatures(features.embeddings, backend.import_tokens(expected), features.tiles)
            backend.write_cross_kv(0, 0, features)

        prompt = encoder.encode([Message("user", QUESTION)], [len(tiles)])
        text = encoder.encode([Message("user", QUESTION)], [])
        for name, encoded, tokens in (("prefill logits", prompt, llm_tokens), ("text-only logits", text, None)):
            ids = torch.from_numpy(encoded.input_ids)[None]
            ranges = torch.from_numpy(encoded.cross_ranges)[None]
            logits, _ = reference(ids, tokens, cross_kv, ranges, None)
            embeddings = backend.embeddings([features], 0, encoded.placeholders)
            actual = backend.prefill(0, 0, encoded.input_ids, embeddings, encoded.cross_ranges)
            report.compare(name, actual, logits[0, -1].numpy())
        if bf16_share is not None:
            llm_tokens, cross_kv = _reference_features(reference, encoder, torch.from_numpy(encoded_tiles))
    return prompt, llm_tokens, cross_kv


def _reference_features(
    reference: ReferenceModel, encoder: PromptEncoder, image_tokens: Any
) -> tuple[Any, list[Any] | None]:
    """Returns what the reference's decoder reads of image tokens [n, T, hidden]: embeddings [M, hidden], and each
    layer's keys and values, if the model has cross-attention."""
    import torch

    config = encoder.config
    llm_tiles, cross_tiles = split_tiles(config.architecture, len(image_tokens))
    llm_tokens = image_tokens[llm_tiles].reshape(-1, config.llm.hidden_size)
    if config.cross_attention is None:
        return llm_tokens, None
    crossed = image_tokens[cross_tiles]
    tags = torch.from_numpy(encoder.tag_ids(len(crossed))) if config.architecture == "H" else None
    return llm_tokens, reference.cross_kv(crossed, tags)


def draw_image(engine: Engine) -> bytes:
    """Draws a PNG with text and shapes, wide enough to become several tiles of `engine`'s size."""
    edge = engine.config.vision.image_size
    image = Image.new("RGB", (3 * edge, 2 * edge), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse([edge // 8, edge // 8, edge, edge], fill="#c03030")
    draw.polygon([(2 * edge, edge // 4), (3 * edge - 8, edge), (edge + edge // 2, edge)], fill="#3050b0")
    for line in range(4):
        draw.text((edge // 8, edge * (5 + line) // 4), f"line {line + 1}: NVLM", fill="black", font_size=edge // 6)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def _load_reference(checkpoint: Path, lora: Path | None) -> ReferenceModel:
    require("reference", "the PyTorch reference")
    from nvlm_trt.reference.model import ReferenceModel

    return ReferenceModel.from_checkpoint(checkpoint, lora=lora)
