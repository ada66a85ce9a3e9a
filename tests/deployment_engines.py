"""Engines for the tests of deployments: whole manifests and configs, with empty files in the place of weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nvlm_trt.engine import FileRecord, Manifest, save_manifest, write_manifest
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.presets import PRESETS

CONTAINER = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
LIMITS = EngineLimits(max_slots=8, max_seq_len=4096, max_image_tokens=7168, max_tiles=6)


def llm_record(tp: int, pp: int, **changes: Any) -> dict[str, Any]:
    """The record of an engine for TensorRT-LLM."""
    return {
        "version": "1.2.1",
        "dtype": "bf16",
        "tp": tp,
        "pp": pp,
        "form": "engine",
        "quantization": None,
        "kv_cache_quantization": None,
        "max_prompt_table": 3584,
        "max_encoder_len": 7168,
        "max_num_tokens": 2048,
        "container": CONTAINER,
        **changes,
    }


def write_engine(
    folder: Path, preset: str, backend: str, precision: str, record: dict[str, Any] | None, nbytes: int | None = None
) -> Path:
    """Writes an engine directory. `nbytes`: what the manifest says that its files have, for a manifest that is only
    read; None: what they have."""
    folder.mkdir(parents=True)
    config = dataclasses.replace(PRESETS[preset], image_token_id=259)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    if record and record.get("form") == "engine":
        (folder / "llm").mkdir()
        built = {
            "version": record["version"],
            "pretrained_config": {
                "dtype": "bfloat16",
                "mapping": {"tp_size": record["tp"], "pp_size": record["pp"]},
            },
            "build_config": {
                "max_batch_size": LIMITS.max_slots,
                "max_input_len": LIMITS.max_seq_len,
                "max_seq_len": LIMITS.max_seq_len,
                "max_num_tokens": record["max_num_tokens"],
                "max_prompt_embedding_table_size": LIMITS.max_slots * record["max_prompt_table"],
                "max_encoder_input_len": record["max_encoder_len"],
            },
        }
        (folder / "llm" / "config.json").write_text(json.dumps(built))
        for rank in range(record["tp"] * record["pp"]):
            (folder / "llm" / f"rank{rank}.engine").write_bytes(b"")
    components = ["vision_encoder", "projector", "decoder", "lm_head"] + ["cross_attention"] * bool(config.cross_layers)
    manifest = Manifest(
        model_name=preset,
        architecture=config.architecture,
        backend=backend,
        precision=dict.fromkeys(components, precision),
        limits=LIMITS,
        checkpoint_digest="0" * 64,
        tool_versions={"nvlm-trt": "0.1.0"},
        backend_record=record,
    )
    write_manifest(folder, manifest)
    if nbytes is not None:
        manifest.files["weights"] = FileRecord(size=nbytes, sha256="0" * 64)
        save_manifest(folder, manifest)
    return folder
