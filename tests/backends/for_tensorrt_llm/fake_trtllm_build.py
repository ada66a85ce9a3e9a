"""Stands for the program `trtllm-build` on PATH: strict about its options, it reads a checkpoint and writes an engine.

The options are those of TensorRT-LLM's commands/build.py (READ in states from 0.17 to 1.2) that the product uses. In
the place of an engine, rank{r}.engine holds the path of the checkpoint, in HF layout, that TRTLLM_ORACLE names.
TRTLLM_FAULT: "status" ends the program with an error, "rank" leaves the last rank out, "wait" never ends.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("checkpoint_dir", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    sizes = ("workers", "max_batch_size", "max_seq_len", "max_input_len", "max_num_tokens", "max_beam_width")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--gemm_plugin", choices=["auto"], required=True)
    parser.add_argument("--use_paged_context_fmha", choices=["enable", "disable"], required=True)
    for name in ("max_multimodal_len", "max_encoder_input_len"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--model_cls_file", type=Path)
    parser.add_argument("--model_cls_name")
    options = parser.parse_args()
    config = json.loads((options.checkpoint_dir / "config.json").read_text())
    if options.model_cls_file:
        module = ast.parse(options.model_cls_file.read_text())
        assert options.model_cls_name in {node.name for node in module.body if isinstance(node, ast.ClassDef)}
        assert options.workers == 1, "a spawned worker cannot unpickle the class"
    assert bool(options.model_cls_file) == config["architecture"].startswith("NVLM"), "architecture is not known"
    fault = os.environ.get("TRTLLM_FAULT")
    if fault == "status":
        raise MemoryError("the GPU has too little memory")
    if fault == "wait":
        time.sleep(3600)
    ranks = config["mapping"]["world_size"]
    for rank in range(ranks - (fault == "rank")):
        assert (options.checkpoint_dir / f"rank{rank}.safetensors").is_file()
        (options.output_dir / f"rank{rank}.engine").write_text(os.environ["TRTLLM_ORACLE"])
    built = {name: getattr(options, name) for name in sizes if name != "workers"}
    built["max_prompt_embedding_table_size"] = options.max_multimodal_len
    built["max_encoder_input_len"] = options.max_encoder_input_len
    document = {"version": "1.2.1", "pretrained_config": config, "build_config": built}
    (options.output_dir / "config.json").write_text(json.dumps(document))
    print("Total time of building all engines: 00:00:00", file=sys.stderr)


if __name__ == "__main__":
    main()
