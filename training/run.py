"""One training run: its stages over a work directory, each taking up where it was left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nvlm_trt.checkpoint.writer import write_checkpoint
from nvlm_trt.evaluation.tinydocs import Split
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.tokenizer import TOKENIZER_FILES, Tokenizer
from nvlm_trt.reference.model import ReferenceModel
from training import recipe
from training.alignment_stage import train_alignment
from training.card import model_card
from training.features import scene_features
from training.initialise import initialise
from training.language_stage import SceneSet, train_language
from training.loop import load_weights, trained_steps
from training.pages import scenes as draw_scenes
from training.sequences import Packer
from training.targets import TokenTargets
from training.tokens import write_tiny_tokenizer
from training.vision_stage import train_vision


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
        initialise(model)
        return model.to(self.device)

    def common_stages(self) -> None:
        train_vision(
            self.config("d").vision,
            recipe.VISION,
            self.work / "vision",
            recipe.SEED,
            recipe.DENSE_TILES,
            recipe.PAGE_SHARES,
            self.device,
        )
        if trained_steps(self.work / "language" / "state.safetensors") < recipe.LANGUAGE.steps:
            self.train_language_model()

    def train_language_model(self) -> None:
        """From nothing, before any picture: texts, and pages whose image tokens are the targets of `TokenTargets`."""
        model = self.new_model("d")
        targets = self.targets()
        model.mlp1 = nn.Sequential()  # identity: the tokens are made already
        counts: dict[Split, int] = {"train": recipe.SCENES, "validation": recipe.VALIDATION_SCENES}
        sets = []
        for split, count in counts.items():
            _, labels, drawn = draw_scenes(split, recipe.SEED + 1, count, recipe.PAGE_SHARES)
            tokens = [targets.of(part.to(self.device))[0].bfloat16() for part in torch.from_numpy(labels).split(4096)]
            sets.append(SceneSet(drawn, torch.cat(tokens), labels))
        packer = Packer(model.config, self.tokenizer)
        train_language(model, packer, recipe.LANGUAGE, recipe.LANGUAGE_MIX, self.work / "language", recipe.SEED, *sets)

    def targets(self) -> TokenTargets:
        """Of the embeddings that every language model here starts from."""
        return TokenTargets(self.new_model("d"), self.tokenizer)

    def tune(self, name: str) -> None:
        """Align the projector of one model, unless it starts from one that was, and fine-tune it (tune-NAME)."""
        model = self.model_with_vision(name)
        training = self.scenes(model, "train", recipe.SCENES)
        validation = self.scenes(model, "validation", recipe.VALIDATION_SCENES)
        if name in recipe.START:
            for part in ("language_model.", "mlp1."):
                self.load(model, recipe.START[name], prefix=part, into=part)
        else:
            self.load(model, "language", prefix="language_model.", into="language_model.")
            self.align(model, f"align-{name}", training)
        packer = Packer(model.config, self.tokenizer)
        directory = self.work / f"tune-{name}"
        train_language(model, packer, recipe.TUNING[name], recipe.MIX, directory, recipe.SEED, training, validation)

    def model_with_vision(self, name: str) -> ReferenceModel:
        """A new model with the trained vision encoder."""
        model = self.new_model(name)
        self.load(model, "vision", prefix="encoder.", into="vision_model.")
        return model

    def scenes(
        self, model: ReferenceModel, split: Split, count: int, kind: str = "", shares: dict[str, float] | None = None
    ) -> SceneSet:
        """Scenes of a split with the frozen encoder's features."""
        path = self.work / f"scenes-{split}{kind}.safetensors"
        return scene_features(model, split, recipe.SEED + 1, count, shares or recipe.PAGE_SHARES, path, self.device)

    def align(self, model: ReferenceModel, stage: str, training: SceneSet) -> None:
        train_alignment(model, self.targets(), recipe.ALIGNMENT, self.work / stage, recipe.SEED, training)

    def export(self, name: str, directory: Path) -> None:
        model = self.model_with_vision(name)
        stage = self.work / f"tune-{name}" / "state.safetensors"
        if trained_steps(stage) < recipe.TUNING[name].steps:
            raise SystemExit(f"error: {stage} is not trained to its end; run python -m training --work {self.work}")
        for part in ("mlp1.", "language_model."):
            self.load(model, f"tune-{name}", prefix=part, into=part)
        tensors = ((key, tensor.detach().float().cpu().numpy()) for key, tensor in model.state_dict().items())
        card = self.work / f"tune-{name}" / "README.md"
        card.write_text(model_card(model.config), encoding="utf-8")
        files = [card, *(self.work / file for file in TOKENIZER_FILES)]
        write_checkpoint(directory, model.config, tensors, files=files, overwrite=True)

    def load(self, model: nn.Module, stage: str, prefix: str = "", into: str = "") -> None:
        """Copy the weights of another stage that this model has too, by name and shape."""
        own = model.state_dict()
        for key, tensor in load_weights(self.work / stage / "state.safetensors").items():
            name = into + key.removeprefix(prefix)
            if key.startswith(prefix) and name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)
