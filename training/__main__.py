"""Train tiny NVLM-D, -X and -H: `python -m training --work DIR`. A run that was cut goes on where it was.

Stages: tokenizer, vision encoder, language model on text, features of the frozen encoder, projector alignment, then
fine-tuning of each model. `--models` picks models, so that several can be trained side by side once the stages
before them are done; `--export DIR` writes checkpoints of those that are finished.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nvlm_trt.checkpoint_writer import write_checkpoint
from nvlm_trt.config import PRESETS, NvlmConfig
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.tokenizer import TOKENIZER_FILES, Tokenizer
from training import recipe
from training.alignment_stage import train_alignment
from training.features import scene_features
from training.language_stage import train_language
from training.loop import load_weights, trained_steps
from training.sequences import Packer
from training.tokens import write_tiny_tokenizer
from training.vision_stage import train_vision


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="states, logs and cached features")
    parser.add_argument("--models", nargs="*", choices=list(recipe.TUNING), default=list(recipe.TUNING))
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--export", type=Path, help="write the finished models' checkpoints under this directory")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options.work, torch.device(options.device))
    if options.export:
        for name in options.models:
            run.export(name, options.export / f"nvlm-{name}-tiny")
        return
    run.common_stages()
    for name in options.models:
        run.tune(name)


class Run:
    """The stages over one work directory."""

    def __init__(self, work: Path, device: torch.device) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.device = work, device
        if not (work / TOKENIZER_FILES[0]).exists():
            config = PRESETS["nvlm-d-tiny"]
            write_tiny_tokenizer(work, config.llm.vocab_size, config.max_tiles)
        self.tokenizer = Tokenizer.from_directory(work)

    def config(self, name: str) -> NvlmConfig:
        return replace(PRESETS[f"nvlm-{name}-tiny"], image_token_id=self.tokenizer.image_token_id)

    def new_model(self, name: str) -> ReferenceModel:
        torch.manual_seed(recipe.SEED)
        model = ReferenceModel(self.config(name))
        nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.1)
        if name != "d":
            for block in model.language_model.cross_layers:
                nn.init.constant_(block.attn_gate, 0.5)  # from 0, attention starts learning only as the gate opens
                nn.init.constant_(block.mlp_gate, 0.1)
        return model.to(self.device)

    def common_stages(self) -> None:
        train_vision(
            self.config("d").vision, recipe.VISION, self.work / "vision", recipe.SEED, recipe.DENSE_TILES, self.device
        )
        model = self.new_model("d")
        packer = Packer(model.config, self.tokenizer)
        train_language(model, packer, recipe.TEXT, recipe.TEXT_MIX, self.work / "text", recipe.SEED)

    def tune(self, name: str) -> None:
        """Align the projector of one model and fine-tune it; the state is in WORK/tune-NAME."""
        tuning = recipe.TUNING[name]
        model = self.new_model(name)
        self._load(model, "vision", prefix="encoder.", into="vision_model.")
        seed = recipe.SEED
        training, labels = scene_features(
            model, "train", seed + 1, recipe.SCENES, self.work / "scenes-train.safetensors", self.device
        )
        validation, _ = scene_features(
            model, "validation", seed + 1, recipe.VALIDATION_SCENES, self.work / "scenes-validation.safetensors",
            self.device,
        )  # fmt: skip
        start = "text" if tuning.start == "text" else f"tune-{tuning.start}"
        self._load(model, start)
        if not self._same_projector(name, tuning.start):
            align = self.work / f"align-{name}"
            train_alignment(model, self.tokenizer, recipe.ALIGNMENT, align, seed, training.features, labels)
        packer = Packer(model.config, self.tokenizer)
        train_language(
            model, packer, tuning.stage, tuning.mix, self.work / f"tune-{name}", seed, training, validation
        )

    def export(self, name: str, directory: Path) -> None:
        model = self.new_model(name)
        stage = self.work / f"tune-{name}" / "state.safetensors"
        if trained_steps(stage) < recipe.TUNING[name].stage.steps:
            raise SystemExit(f"error: {stage} is not trained to its end; run python -m training --work {self.work}")
        self._load(model, f"tune-{name}")
        tensors = ((key, tensor.detach().float().cpu().numpy()) for key, tensor in model.state_dict().items())
        files = [self.work / file for file in TOKENIZER_FILES]
        write_checkpoint(directory, model.config, tensors, tokenizer_files=files, overwrite=True)

    def _same_projector(self, name: str, start: str) -> bool:
        """NVLM-D and NVLM-H have two-layer projectors, NVLM-X has one layer, text has none."""
        return start != "text" and self.config(name).projector_width == self.config(start).projector_width

    def _load(self, model: nn.Module, stage: str, prefix: str = "", into: str = "") -> None:
        """Copy the weights of another stage that this model has too, by name and shape."""
        own = model.state_dict()
        for key, tensor in load_weights(self.work / stage / "state.safetensors").items():
            name = into + key.removeprefix(prefix)
            if key.startswith(prefix) and name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)


if __name__ == "__main__":
    main()
