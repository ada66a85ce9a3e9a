"""Runs llama.cpp with Q8_0 weights. The client starts this worker:

python -m lab.peers.llama_cpp_worker HF_DIRECTORY GGUF THREADS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

from lab.peers.gguf_files import Type, write_language_model
from lab.peers.llama_cpp_model import load_model
from lab.peers.worker import Answer, serve


def main() -> None:
    source, gguf, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    serve(lambda: load(source, gguf, threads))


def load(source: Path, path: Path, threads: int) -> tuple[str, Answer]:
    if not path.exists():
        write_language_model(source, path, Type.Q8_0)
    model = load_model(path)
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


if __name__ == "__main__":
    main()
