"""Makes engines for TensorRT that serving can read: manifest and config, without plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nvlm_trt.backends.plans.profiles import profiles_of
from nvlm_trt.backends.tensorrt.record import TensorRtRecord
from nvlm_trt.engine import Engine, save_manifest


def for_tensorrt(engine: Engine, dtype: str, path: Path | None = None, stripped: bool = False) -> Engine:
    """Returns `engine` as if it had been built for TensorRT in `dtype`. Writes its manifest to `path`, if given."""
    record = TensorRtRecord(
        version="11.1.0.33",
        capability=90,
        gpu="a GPU made of paper",
        container="nvcr.io/nvidia/tritonserver:26.07-py3",
        dtype=dtype,
        plugin="",
        aliased={},
        profiles=profiles_of(engine.config, engine.limits),
        stripped=stripped,
    )
    manifest = engine.manifest.model_copy(update={"backend": "tensorrt", "backend_record": record.model_dump()})
    if path is not None:
        save_manifest(path, manifest)
    return replace(engine, manifest=manifest, path=path or engine.path)
