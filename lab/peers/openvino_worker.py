"""Runs OpenVINO with 8-bit weights. The client starts this worker:

    python -m lab.peers.openvino_worker HF_DIRECTORY DIRECTORY THREADS [--profile]

--profile adds {"operators": [[name, type, milliseconds per step], ...]} to the answers.

optimum-intel converts the model as OpenVINO's own documentation does: stateful, with the KV cache inside, weights
compressed by NNCF.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from lab.peers.worker import Answer, serve


def main() -> None:
    source, target, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    serve(lambda: load(source, target, threads, profile="--profile" in sys.argv[4:]))


def load(source: Path, target: Path, threads: int, profile: bool) -> tuple[str, Answer]:
    if not target.exists():
        convert(source, target)
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": profile}

    def open_model() -> tuple[openvino.InferRequest, set[str]]:
        compiled = openvino.Core().compile_model(target / "openvino_model.xml", "CPU", options)
        return compiled.create_infer_request(), {name for port in compiled.inputs for name in port.names}

    opened = None if profile else open_model()

    def decode(prompt: list[list[int]], steps: int, banned: int) -> dict[str, Any]:
        request, inputs = opened or open_model()  # a profile is the mean over all runs of an opened model
        request.reset_state()
        sequences, tokens = len(prompt), len(prompt[0])

        def step(ids: np.ndarray, position: int) -> np.ndarray:
            """ids [sequences, new tokens] from `position` on -> the likeliest next token of each."""
            new = ids.shape[1]
            given = {
                "input_ids": ids,
                "attention_mask": np.ones((sequences, position + new), np.int64),
                "position_ids": np.tile(np.arange(position, position + new, dtype=np.int64), (sequences, 1)),
                "beam_idx": np.arange(sequences, dtype=np.int32),
            }
            request.infer({name: value for name, value in given.items() if name in inputs}, share_inputs=True)
            logits = request.get_tensor("logits").data[:, -1]  # [sequences, vocabulary]
            logits[:, banned] = -np.inf
            return logits.argmax(-1)

        answers = [step(np.array(prompt, np.int64), 0)]
        prefill = profile_of(request) if profile else {}
        started = time.perf_counter()
        for done in range(steps):
            answers.append(step(answers[-1][:, None], tokens + done))
        seconds = time.perf_counter() - started
        means = profile_of(request) if profile else {}
        operators = [(*operator, (mean * (steps + 1) - prefill[operator]) / steps) for operator, mean in means.items()]
        return {"seconds": seconds, "tokens": np.stack(answers, axis=1).tolist(), "operators": operators}

    return f"openvino {openvino.__version__}", decode


def profile_of(request: openvino.InferRequest) -> dict[tuple[str, str], float]:
    """Returns (name, type) of an operator -> milliseconds, the mean over all runs of the request's model."""
    return {
        (info.node_name, info.node_type): info.real_time.total_seconds() * 1e3 for info in request.get_profiling_info()
    }


def convert(source: Path, target: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, quantization_config=OVWeightQuantizationConfig(bits=8)
    )
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    temporary.rename(target)


if __name__ == "__main__":
    main()
