"""Completes an engine that was built with --checkpoint-only: `nvlm-trt build --continue`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nvlm_trt.backends.tensorrt_llm.engine_files import CHECKPOINT_FOLDER
from nvlm_trt.backends.tensorrt_llm.record import record_of
from nvlm_trt.backends.tensorrt_llm.trtllm_build import build_llm, check_this_gpu
from nvlm_trt.builders.smoke_test import SmokeTest
from nvlm_trt.builders.tensorrt_llm.check import check_llm_checkpoint
from nvlm_trt.engine import Engine, publish, write_manifest
from nvlm_trt.errors import EngineError
from nvlm_trt.progress import Progress
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer


def complete(engine: Engine, output: Path, overwrite: bool, progress: Progress) -> Engine:
    """Run `trtllm-build` on the checkpoint of `engine`, try the result, and publish it as the directory `output`.

    Leaves `engine` as it is. Raises EngineError for an engine that is complete, and for the errors of a build."""
    record = record_of(engine)
    if record.form != "checkpoint":
        raise EngineError(f"engine {engine.path} is complete; serve it with `nvlm-trt serve {engine.path}`")
    check_this_gpu(engine.config, engine.manifest.precision)
    check_llm_checkpoint(engine.path / CHECKPOINT_FOLDER, engine.config)
    with publish(output, overwrite) as staging:
        for name in engine.manifest.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _link(engine.path / name, staging / name)
        built = build_llm(staging, engine.config, engine.limits, record, progress)
        manifest = engine.manifest.model_copy(deep=True, update={"backend_record": built.model_dump()})
        write_manifest(staging, manifest)
        prompts = PromptEncoder(engine.config, Tokenizer.from_directory(engine.path))
        SmokeTest(prompts, engine.limits, engine.config).run(Engine.open(staging), progress)
    return Engine.open(output)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or make a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
