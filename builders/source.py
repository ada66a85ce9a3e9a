"""Opens the input of an engine build: a checkpoint, its prompts, and the limits that the user asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import CheckpointError
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import EMBEDDING
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.limits import engine_limits
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.prompt.tokenizer_files import copy_tokenizer


class EngineSource:
    """Holds one checkpoint, from which a build writes its engine and the engines that the gate compares it with."""

    def __init__(self, checkpoint_dir: Path | str, overrides: Mapping[str, int], lora: Path | None = None) -> None:
        """Open and hash the checkpoint, once for all engines. `overrides` replaces fields of `default_limits`; `lora`
        is an adapter that is merged into the weights.

        Raises CheckpointError and ConfigError for the checkpoint and the adapter, and EngineError for limits."""
        self.checkpoint_dir = Path(checkpoint_dir)
        self.lora = lora
        with Checkpoint.open(checkpoint_dir, lora) as checkpoint:
            self.stamp = checkpoint.stamp
            self.config = checkpoint.config
            self.prompts = PromptEncoder(self.config, Tokenizer.from_directory(checkpoint_dir))
            self.limits = engine_limits(self.config, self.prompts.tag_length, overrides)
            self.digest = checkpoint.digest

    def design(self, backend: BackendSpec, precisions: Mapping[str, str]) -> EngineDesign:
        """Describe the engine of a backend, in one precision per component."""
        return EngineDesign(self.config, self.limits, precisions, backend, self.prompts.tag_length)

    def open_checkpoint(self) -> Checkpoint:
        """Open the checkpoint again. Raises CheckpointError if its files have changed since it was hashed."""
        checkpoint = Checkpoint.open(self.checkpoint_dir, self.lora)
        try:
            self._check_stamp(checkpoint)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the files of the checkpoint have changed since it was hashed."""
        self.open_checkpoint().close()

    def _check_stamp(self, checkpoint: Checkpoint) -> None:
        for before, after in zip(self.stamp, checkpoint.stamp, strict=True):
            if before != after:
                raise CheckpointError(
                    f"{self.checkpoint_dir / after[0]} was changed while the engine was built; start the build again "
                    "when nothing writes the checkpoint"
                )

    def write_model_files(self, directory: Path) -> None:
        """Write config.json and the tokenizer's files."""
        config_json = json.dumps(config_to_hf(self.config), indent=2, allow_nan=False) + "\n"
        (directory / "config.json").write_text(config_json, encoding="utf-8")
        copy_tokenizer(self.checkpoint_dir, directory)

    def tag_embeddings(self, checkpoint: Checkpoint) -> FloatArray | None:
        """Read the text embeddings [max_tiles, tag_length, hidden] of NVLM-H's tile tags; None for NVLM-D and -X."""
        if self.config.architecture != "H":
            return None
        tags = self.prompts.tag_ids(self.config.max_tiles)
        return checkpoint.rows(EMBEDDING, tags.reshape(-1)).reshape(*tags.shape, self.config.llm.hidden_size)
