"""Runs the whole path in OpenVINO GenAI's VLM pipeline, as an InternVL. The client starts this worker:

    python -m lab.peers.genai_worker HF_DIRECTORY CHECKPOINT VISION FOLDER WEIGHTS THREADS

VISION is the vision encoder with its projector as TorchScript. WEIGHTS are "float", which OpenVINO multiplies in bf16
where the processor has it, or "int8", compressed by NNCF as optimum-intel does it for all parts. optimum-intel itself
converts InternVL only from the code that its checkpoints bring, with transformers 4.57 at the latest; the parts are
converted here with its functions, and OpenVINO's, one by one.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from PIL import Image

from lab.peers.internvl import MESSAGE_END, Vocabulary, prompt_text
from lab.peers.worker import Answer, Clock, serve

IMAGE = "<image>"  # what the pipeline replaces
LANGUAGE, VISION, TEXT = (f"openvino_{part}_model.xml" for part in ("language", "vision_embeddings", "text_embeddings"))

LIBRARY = "transformers"  # what optimum-intel exports from


def main() -> None:
    source, checkpoint, vision, folder = map(Path, sys.argv[1:5])
    serve(lambda: load(source, checkpoint, vision, folder, sys.argv[5], threads=int(sys.argv[6])))


def load(source: Path, checkpoint: Path, vision: Path, folder: Path, weights: str, threads: int) -> tuple[str, Answer]:
    original, compressed = folder / "float", folder / "int8"
    if not original.exists():
        convert(source, checkpoint, vision, original)
    if weights == "int8" and not compressed.exists():
        compress(original, compressed)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 1 << 20  # as by default: no limit
    scheduler.enable_prefix_caching = False  # every round's image has the same pixels, and would be known
    pipeline = openvino_genai.VLMPipeline(
        folder / weights, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY"
    )
    text = pipeline.get_tokenizer()

    def answer(image: str, question: str, tokens: int) -> dict[str, Any]:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = tokens
        options.ignore_eos = True
        options.apply_chat_template = False
        clock = Clock()
        streamer = Streamer(clock)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))
        answered = pipeline.generate(
            prompt_text(IMAGE, question),
            images=[openvino.Tensor(pixels)],
            generation_config=options,
            streamer=streamer,
        )
        prompt_tokens = answered.perf_metrics.get_num_input_tokens()
        around = text.encode(prompt_text("<img></img>", question), add_special_tokens=False).input_ids.shape[1]
        return clock.answer(streamer.tokens, prompt_tokens, image_tokens=prompt_tokens - around)

    return f"openvino-genai {openvino_genai.__version__}", answer


class Streamer(openvino_genai.StreamerBase):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.tokens: list[int] = []

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        for one in [token] if isinstance(token, int) else token:
            self.tokens.append(one)
            self._clock.tick()
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def convert(source: Path, checkpoint: Path, vision: Path, folder: Path) -> None:
    """Writes the parts with float32 weights."""
    with filled(folder) as temporary:
        convert_language_model(source, temporary)
        convert_vision_encoder(vision, temporary / VISION)
        convert_tokenizer(Vocabulary.of(checkpoint), temporary)
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        edge = config["vision_config"]["image_size"]
        described = {
            "config.json": {"model_type": "internvl_chat", "hidden_size": config["llm_config"]["hidden_size"]},
            "preprocessor_config.json": {
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
                "size": {"shortest_edge": edge},
                "crop_size": {"height": edge, "width": edge},
            },
        }
        for name, content in described.items():
            (temporary / name).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def compress(original: Path, folder: Path) -> None:
    """Compresses the weights of all parts to 8 bits, asymmetric in the language model, as optimum-intel chooses."""
    import nncf

    parts = (LANGUAGE, VISION, TEXT)
    with filled(folder) as temporary:
        for part in parts:
            kind = nncf.CompressWeightsMode.INT8_ASYM if part == LANGUAGE else nncf.CompressWeightsMode.INT8_SYM
            model = nncf.compress_weights(openvino.Core().read_model(original / part), mode=kind)
            openvino.save_model(model, temporary / part, compress_to_fp16=False)
        for file in original.iterdir():
            if not file.name.startswith(tuple(Path(part).stem for part in parts)):
                shutil.copy(file, temporary)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `folder` when all of it is written."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(folder)


def convert_language_model(source: Path, folder: Path) -> None:
    """Writes the decoder, stateful, from embeddings to logits, and the embedding of tokens."""
    from optimum.exporters.openvino import export
    from optimum.exporters.openvino.model_configs import (
        get_vlm_text_embeddings_config,
        get_vlm_text_generation_config,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    described = (model.config.model_type, model.config, "int64", "fp32")
    embedding: Any = model.get_input_embeddings()
    embedding.config = model.config
    export(embedding, get_vlm_text_embeddings_config(*described), folder / TEXT, stateful=False, library_name=LIBRARY)
    export(model, get_vlm_text_generation_config(*described), folder / LANGUAGE, stateful=True, library_name=LIBRARY)


def convert_vision_encoder(vision: Path, path: Path) -> None:
    import torch

    traced = torch.jit.load(vision)
    model = openvino.convert_model(traced, input=[([-1, 3, -1, -1], np.float32)])
    model.outputs[0].get_tensor().set_names({"last_hidden_state"})
    model.inputs[0].get_tensor().set_names({"pixel_values"})
    openvino.save_model(model, path, compress_to_fp16=False)


def convert_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    import openvino_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer.json"
    path.write_text(json.dumps(vocabulary.tokenizer, allow_nan=False), encoding="utf-8")
    fast = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=MESSAGE_END)
    models = openvino_tokenizers.convert_tokenizer(fast, with_detokenizer=True)
    for model, name in zip(models, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        openvino.save_model(model, folder / name)


if __name__ == "__main__":
    main()
