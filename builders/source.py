"""Opens the input of an engine build: a checkpoint, its prompts, and the limits that the user asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import EMBEDDING
from nvlm_trt.planner.limits import engine_limits
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import TOKENIZER_FILES, Tokenizer


class EngineSource:
    """Holds one checkpoint, from which a build writes its engine and the engines that the gate compares it with."""

    def __init__(self, checkpoint_dir: Path | str, overrides: Mapping[str, int]) -> None:
        """Open and hash the checkpoint, once for all engines. `overrides` replaces fields of `default_limits`.

        Raises CheckpointError and ConfigError for the checkpoint, and EngineError for limits."""
        self.checkpoint_dir = Path(checkpoint_dir)
        with Checkpoint.open(checkpoint_dir) as checkpoint:
            self.config = checkpoint.config
            self.prompts = PromptEncoder(self.config, Tokenizer.from_directory(checkpoint_dir))
            self.limits = engine_limits(self.config, self.prompts.tag_length, overrides)
            self.digest = checkpoint.digest

    def write_model_files(self, directory: Path) -> None:
        """Write config.json and the tokenizer's files."""
        config_json = json.dumps(config_to_hf(self.config), indent=2, allow_nan=False) + "\n"
        (directory / "config.json").write_text(config_json, encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (self.checkpoint_dir / name).exists():
                shutil.copyfile(self.checkpoint_dir / name, directory / name)

    def tag_embeddings(self, checkpoint: Checkpoint) -> FloatArray | None:
        """Read the text embeddings [max_tiles, tag_length, hidden] of NVLM-H's tile tags; None for NVLM-D and -X."""
        if self.config.architecture != "H":
            return None
        tags = self.prompts.tag_ids(self.config.max_tiles)
        return checkpoint.rows(EMBEDDING, tags.reshape(-1)).reshape(*tags.shape, self.config.llm.hidden_size)
