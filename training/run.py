"""Runs the training stages over a work directory; each resumes where it was cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nvlm_trt.checkpoint.writer import write_checkpoint
from nvlm_trt.evaluation.tinydocs import Split
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.tokenizer import TOKENIZER_FILES, Tokenizer
from nvlm_trt.reference.model import ReferenceModel
from training.alignment_stage import train_alignment
from training.card import model_card
from training.features import scene_features
from training.initialise import initialise
from training.language_stage import train_language
from training.packer import Packer
from training.pages import Shares
from training.pages import scenes as draw_scenes
from training.recipe import RECIPE, Recipe
from training.scene_set import SceneSet
from training.state import load_weights, trained_steps
from training.targets import TokenTargets
from training.tokens import write_tiny_tokenizer
from training.vision_stage import train_vision


class Run:
    """The stages of a recipe over one work directory."""

    def __init__(self, work: Path, device: torch.device, recipe: Recipe = RECIPE) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.device, self.recipe = work, device, recipe
        if not (work / TOKENIZER_FILES[0]).exists():
            config = recipe.models["d"]
            write_tiny_tokenizer(work, config.llm.vocab_size, config.max_tiles, recipe.tokenizer_rounds)
        self.tokenizer = Tokenizer.from_directory(work)

    def config(self, name: str) -> NvlmConfig:
        """Returns the configuration of a model, with the image placeholder of this run's tokenizer."""
        return replace(self.recipe.models[name], image_token_id=self.tokenizer.image_token_id)

    def new_model(self, name: str) -> ReferenceModel:
        """Makes a model with the weights that training starts from."""
        torch.manual_seed(self.recipe.seed)
        model = ReferenceModel(self.config(name))
        initialise(model)
        return model.to(self.device)

    def common_stages(self) -> None:
        """Trains the vision encoder and the language model that all models start from."""
        train_vision(
            self.config("d").vision,
            self.recipe.vision,
            self.work / "vision",
            self.recipe.seed,
            self.recipe.dense_tiles,
            self.recipe.page_shares,
            self.device,
            self.recipe.vision_batch,
        )
        if trained_steps(self.work / "language" / "state.safetensors") < self.recipe.language.steps:
            self.train_language_model()

    def train_language_model(self) -> None:
        """Trains on texts, and on pages whose image tokens are the targets of `TokenTargets`, not encoded images."""
        model = self.new_model("d")
        targets = self.targets()
        model.mlp1 = nn.Sequential()  # identity: the targets are in the LLM's space already
        counts: dict[Split, int] = {"train": self.recipe.scenes, "validation": self.recipe.validation_scenes}
        sets = []
        for split, count in counts.items():
            _, labels, drawn = draw_scenes(split, self.recipe.seed + 1, count, self.recipe.page_shares)
            tokens = [targets.of(part.to(self.device))[0].bfloat16() for part in torch.from_numpy(labels).split(4096)]
            sets.append(SceneSet(drawn, torch.cat(tokens), labels))
        training, validation = sets
        packer = Packer(model.config, self.tokenizer)
        train_language(
            model,
            packer,
            self.recipe.language,
            self.recipe.language_mix,
            self.work / "language",
            self.recipe.seed,
            training,
            validation,
            self.recipe.text_questions,
        )

    def targets(self) -> TokenTargets:
        """Makes the targets from the embeddings that every language model starts from."""
        return TokenTargets(self.new_model("d"), self.tokenizer)

    def tune(self, name: str) -> None:
        """Fine-tunes a model (tune-NAME), after aligning its projector unless the model starts from a tuned one."""
        model = self.model_with_vision(name)
        training = self.scenes(model, "train", self.recipe.scenes)
        validation = self.scenes(model, "validation", self.recipe.validation_scenes)
        if name in self.recipe.tuning_start:
            for part in ("language_model.", "mlp1."):
                self.load(model, self.recipe.tuning_start[name], prefix=part, into=part)
        else:
            self.load(model, "language", prefix="language_model.", into="language_model.")
            self.align(model, f"align-{name}", training)
        packer = Packer(model.config, self.tokenizer)
        train_language(
            model,
            packer,
            self.recipe.tuning[name],
            self.recipe.tuning_mix,
            self.work / f"tune-{name}",
            self.recipe.seed,
            training,
            validation,
            self.recipe.text_questions,
        )

    def model_with_vision(self, name: str) -> ReferenceModel:
        """Makes a new model with the trained vision encoder."""
        model = self.new_model(name)
        self.load(model, "vision", prefix="encoder.", into="vision_model.")
        return model

    def scenes(
        self, model: ReferenceModel, split: Split, count: int, kind: str = "", shares: Shares | None = None
    ) -> SceneSet:
        """Makes the scenes of a split with the frozen encoder's features, or reads them from the work directory."""
        path = self.work / f"scenes-{split}{kind}.safetensors"
        shares = shares or self.recipe.page_shares
        return scene_features(model, split, self.recipe.seed + 1, count, shares, path, self.device)

    def align(self, model: ReferenceModel, stage: str, training: SceneSet) -> None:
        """Trains the projector, in the directory `stage`."""
        train_alignment(
            model,
            self.targets(),
            self.recipe.alignment,
            self.work / stage,
            self.recipe.seed,
            training,
            self.recipe.alignment_batch,
            self.recipe.alignment_checks,
        )

    def export(self, name: str, directory: Path) -> None:
        """Writes the checkpoint of a tuned model. Raises SystemExit if its training is not finished."""
        model = self.model_with_vision(name)
        stage = self.work / f"tune-{name}" / "state.safetensors"
        if trained_steps(stage) < self.recipe.tuning[name].steps:
            raise SystemExit(f"error: {stage} is not trained to its end; run python -m training --work {self.work}")
        for part in ("mlp1.", "language_model."):
            self.load(model, f"tune-{name}", prefix=part, into=part)
        tensors = ((key, tensor.detach().float().cpu().numpy()) for key, tensor in model.state_dict().items())
        card = self.work / f"tune-{name}" / "README.md"
        card.write_text(model_card(model.config), encoding="utf-8")
        files = [card, *(self.work / file for file in TOKENIZER_FILES)]
        write_checkpoint(directory, model.config, tensors, files=files, overwrite=True)

    def load(self, model: nn.Module, stage: str, prefix: str = "", into: str = "") -> None:
        """Copies those weights of another stage whose name and shape this model has too."""
        own = model.state_dict()
        for key, tensor in load_weights(self.work / stage / "state.safetensors").items():
            name = into + key.removeprefix(prefix)
            if key.startswith(prefix) and name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)
