"""Runs `trtllm-build` of TensorRT-LLM, which builds an engine file per rank on the GPU of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from nvlm_trt.backends.tensorrt_llm.engine_files import CHECKPOINT_FOLDER, ENGINE_FOLDER
from nvlm_trt.backends.tensorrt_llm.record import TrtLlmRecord
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.planner.gpus import refused_by_capability
from nvlm_trt.progress import Progress
from nvlm_trt.temporary import temporary_folder

PROGRAM = "trtllm-build"
# not imported here: it needs TensorRT-LLM
_MODEL_CLASS_FILE, _MODEL_CLASS = Path(__file__).with_name("model_class.py"), "NvlmForCausalLM"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0  # between SIGTERM and SIGKILL
_MOST_SHOWN = 400  # characters of the program's last error


def check_this_gpu(config: NvlmConfig, precisions: Mapping[str, str]) -> None:
    """Raise EngineError if TensorRT-LLM does not run the engine on the GPU of this machine, or runs it wrongly."""
    import torch

    if not torch.cuda.is_available():
        return  # trtllm-build says so
    major, minor = torch.cuda.get_device_capability()
    reason = refused_by_capability(
        10 * major + minor, torch.cuda.get_device_name(), precisions, split=True, crosses=bool(config.cross_layers)
    )
    if reason:
        raise EngineError(reason)


def build_llm(
    directory: Path, config: NvlmConfig, limits: EngineLimits, record: TrtLlmRecord, progress: Progress
) -> TrtLlmRecord:
    """Build the checkpoint of an engine's directory into the LLM's engine, and remove the checkpoint.

    Returns the record of the engine, which is complete then."""
    checkpoint, output = directory / CHECKPOINT_FOLDER, directory / ENGINE_FOLDER
    output.mkdir()
    run_trtllm_build(build_command(checkpoint, output, config, limits, record), output, record.ranks, progress)
    shutil.rmtree(checkpoint)
    return record.model_copy(update={"form": "engine"})


def build_command(
    checkpoint: Path, output: Path, config: NvlmConfig, limits: EngineLimits, record: TrtLlmRecord
) -> list[str]:
    """Return the command that builds the ranks of `checkpoint` into the folder `output`.

    `--workers 1`: workers are spawned, and a spawned worker cannot unpickle the class of `--model_cls_file`."""
    command = [
        *(PROGRAM, "--checkpoint_dir", str(checkpoint), "--output_dir", str(output), "--workers", "1"),
        *("--gemm_plugin", "auto", "--use_paged_context_fmha", "enable", "--max_beam_width", "1"),
        *("--max_batch_size", str(limits.max_slots), "--max_seq_len", str(limits.max_seq_len)),
        # a prompt leaves room for one token of the answer
        *("--max_input_len", str(limits.max_seq_len - 1), "--max_num_tokens", str(record.max_num_tokens)),
    ]
    if record.max_prompt_table:
        command += ["--max_multimodal_len", str(limits.max_slots * record.max_prompt_table)]
    if config.cross_layers:
        command += ["--model_cls_file", str(_MODEL_CLASS_FILE), "--model_cls_name", _MODEL_CLASS]
        command += ["--max_encoder_input_len", str(record.max_encoder_len)]
    return command


def run_trtllm_build(command: Sequence[str], output: Path, ranks: int, progress: Progress) -> None:
    """Run `command` until each of `ranks` has its file in `output`. The program ends with this call, however it ends.

    Raises EngineError if the program is missing or fails; the message has the program's last error."""
    if shutil.which(command[0]) is None:
        raise EngineError(
            f"{command[0]} is not on PATH; build in NVIDIA's container, or add --checkpoint-only to stop before it"
        )
    with tempfile.TemporaryFile(dir=temporary_folder()) as log:
        with _running(command, log) as program:
            while program.poll() is None:
                progress("trtllm-build", _built(output), ranks)
                time.sleep(_POLL_SECONDS)
        if program.returncode:
            raise EngineError(f"{command[0]} ended with status {program.returncode}: {_last_error(log)}")
    missing = next((rank for rank in range(ranks) if not rank_file(output, rank).is_file()), None)
    if missing is not None:
        raise EngineError(f"{command[0]} wrote no {rank_file(output, missing).name}; run it by hand: {_typed(command)}")
    progress("trtllm-build", ranks, ranks)


def rank_file(output: Path, rank: int) -> Path:
    return output / f"rank{rank}.engine"


@contextlib.contextmanager
def _running(command: Sequence[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a process group of its own, which ends with the context."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield program
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(_PATIENCE_SECONDS)


def _built(output: Path) -> int:
    return len(list(output.glob("rank*.engine")))


def _last_error(log: IO[bytes]) -> str:
    """Return the last line that is not empty, one line of a Python traceback's error as a rule."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - (1 << 16)))
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:_MOST_SHOWN] if lines else "it printed nothing"


def _typed(command: Sequence[str]) -> str:
    return " ".join(command)
