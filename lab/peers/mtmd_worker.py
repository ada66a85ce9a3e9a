"""Runs the whole path in llama.cpp: mtmd encodes the image, llama.cpp the rest. The client starts this worker:

    python -m lab.peers.mtmd_worker HF_DIRECTORY CHECKPOINT FOLDER TYPE THREADS

TYPE is that of all matrices, Q8_0 or BF16. mtmd tiles the image by InternVL's rule; KV cache and batches are as
llama.cpp has them by default.
"""

from __future__ import annotations

import base64
import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

from lab.peers.gguf_files import Type, write_language_model, write_vision_encoder
from lab.peers.internvl import Vocabulary, prompt_text
from lab.peers.llama_cpp_model import load_model, log
from lab.peers.worker import Answer, Clock, serve

CONTEXT = 4096  # tokens


def main() -> None:
    source, checkpoint, folder = map(Path, sys.argv[1:4])
    serve(lambda: load(source, checkpoint, folder, Type[sys.argv[4]], threads=int(sys.argv[5])))


def load(source: Path, checkpoint: Path, folder: Path, kind: Type, threads: int) -> tuple[str, Answer]:
    language, vision = folder / "model.gguf", folder / "mmproj.gguf"
    if not language.exists():
        write_language_model(source, language, kind, Vocabulary.of(checkpoint))
    if not vision.exists():
        write_vision_encoder(checkpoint, vision, kind)
    model = load_model(language)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    options = llama.llama_context_default_params()
    options.n_ctx = CONTEXT
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(model, options)
    assert context, "llama.cpp makes no context"
    mtmd.mtmd_helper_log_set(log, ctypes.c_void_p(0))
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu = parameters.print_timings = parameters.warmup = False
    parameters.n_threads = threads
    images = mtmd.mtmd_init_from_file(str(vision).encode(), model, parameters)
    assert images, f"mtmd does not load {vision}"
    marker = mtmd.mtmd_default_marker().decode()

    def answer(image: str, question: str, tokens: int) -> dict[str, Any]:
        clock = Clock()
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        chunks = chunks_of(base64.b64decode(image), prompt_text(marker, question))
        done = llama.llama_pos(0)
        status = mtmd.mtmd_helper_eval_chunks(images, context, chunks, 0, 0, options.n_batch, True, ctypes.byref(done))
        assert status == 0, f"mtmd_helper_eval_chunks: {status}"
        answers = [best()]
        clock.tick()
        for _ in range(tokens - 1):
            step(answers[-1])
            answers.append(best())
            clock.tick()
        counts = [
            (mtmd.mtmd_input_chunk_get_type(chunk), mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            for chunk in (mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks)))
        ]
        mtmd.mtmd_input_chunks_free(chunks)
        return clock.answer(
            answers,
            prompt_tokens=sum(count for _, count in counts),
            image_tokens=sum(count for kind, count in counts if kind == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE),
        )

    def chunks_of(image: bytes, prompt: str) -> Any:
        buffer = (ctypes.c_uint8 * len(image)).from_buffer_copy(image)
        bitmap = mtmd.mtmd_helper_bitmap_init_from_buf(images, buffer, len(image), False)
        assert bitmap, "mtmd does not decode the image"
        encoded = prompt.encode()
        text = mtmd.mtmd_input_text(encoded, len(encoded), add_special=False, parse_special=True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        status = mtmd.mtmd_tokenize(images, chunks, ctypes.byref(text), bitmaps, 1)
        assert status == 0, f"mtmd_tokenize: {status}"
        mtmd.mtmd_bitmap_free(bitmap)
        return chunks

    def step(token: int) -> None:
        ids = (llama.llama_token * 1)(token)
        status = llama.llama_decode(context, llama.llama_batch_get_one(ids, 1))
        assert status == 0, f"llama_decode: {status}"

    def best() -> int:
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (vocabulary,))
        return int(logits.argmax())

    return f"llama-cpp-python {llama.__version__}", answer


if __name__ == "__main__":
    main()
