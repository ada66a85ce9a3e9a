"""Runs llama.cpp with Q8_0 weights. The client starts this worker:

python -m lab.peers.llama_cpp_worker HF_DIRECTORY GGUF THREADS
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

from lab.peers.worker import Decode, serve

ERROR = 4  # GGML_LOG_LEVEL_ERROR


@llama.llama_log_callback
def _log(level: int, text: bytes, data: object) -> None:
    """Prints errors only."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def main() -> None:
    source, gguf, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    serve(lambda: load(source, gguf, threads))


def load(source: Path, path: Path, threads: int) -> tuple[str, Decode]:
    if not path.exists():
        convert(source, path)
    llama.llama_log_set(_log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp does not load {path}"
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def decode(prompt: list[list[int]], steps: int, banned: int) -> dict[str, Any]:
        """Decodes all sequences as one batch in a new context."""
        sequences, tokens = len(prompt), len(prompt[0])
        options = llama.llama_context_default_params()
        options.n_seq_max = sequences
        options.n_ctx = sequences * (tokens + steps + 1)
        options.n_batch = options.n_ubatch = max(512, sequences * tokens)
        options.n_threads = options.n_threads_batch = threads
        context = llama.llama_init_from_model(model, options)
        assert context, "llama.cpp makes no context"
        batch = llama.llama_batch_init(sequences * tokens, 0, 1)

        def step(ids: list[list[int]], position: int) -> list[int]:
            """ids[sequence] from `position` on -> the likeliest next token of each."""
            batch.n_tokens = 0
            last = []
            for sequence, of_sequence in enumerate(ids):
                for offset, token in enumerate(of_sequence):
                    index = batch.n_tokens
                    batch.token[index] = token
                    batch.pos[index] = position + offset
                    batch.n_seq_id[index] = 1
                    batch.seq_id[index][0] = sequence
                    batch.logits[index] = offset == len(of_sequence) - 1
                    batch.n_tokens += 1
                last.append(batch.n_tokens - 1)
            status = llama.llama_decode(context, batch)
            assert status == 0, f"llama_decode: {status}"
            best = []
            for index in last:
                logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, index), (vocabulary,))
                logits[banned] = -np.inf
                best.append(int(logits.argmax()))
            return best

        answers = [step(prompt, 0)]
        started = time.perf_counter()
        for done in range(steps):
            answers.append(step([[token] for token in answers[-1]], tokens + done))
        seconds = time.perf_counter() - started
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        return {"seconds": seconds, "tokens": np.array(answers).T.tolist()}

    return f"llama-cpp-python {llama.__version__}", decode


def convert(source: Path, path: Path) -> None:
    """Writes Qwen2 in HF layout, float32 safetensors, as GGUF: every matrix in Q8_0, norms and biases in float32.

    Leaves out the tokenizer: the benchmark sends token ids."""
    import gguf
    from safetensors import safe_open

    config = json.loads((source / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    temporary = path.with_suffix(".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(temporary, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    with safe_open(source / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert renamed, name
            if tensor.ndim == 1:
                writer.add_tensor(renamed, tensor)
            else:
                quantised = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(renamed, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
