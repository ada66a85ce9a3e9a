"""Compares the training passes with the reference model, whose weights are exported."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nvlm_trt.api import Message
from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.reference.model import ReferenceModel
from training.batch import collate
from training.forward import decode, encode_patches
from training.packed_sequence import NOT_ANSWERED
from training.packer import Packer

IMAGES = {"none": (), "one tile": (range(2, 3),), "tiles": (range(0, 5),), "two": (range(3, 6), range(0, 1))}
QUESTIONS = [
    Question("ocr", "What does the red text say?", "K7A2P"),
    Question("location", "Where is the red star?", "top left"),
    Question("add", "What is 3+4?", "7"),
]


def random_model(architecture, tokenizer):
    torch.manual_seed(3)
    config = replace(PRESETS[f"nvlm-{architecture}-tiny"], image_token_id=tokenizer.image_token_id)
    model = ReferenceModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms, biases and gates: away from the values that hide an error
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.3, std=0.2)
    return model.eval().requires_grad_(False)


def test_patches_equal_the_references(tokenizer):
    model = random_model("d", tokenizer)
    pixels = torch.randint(0, 256, (3, 56, 56, 3), dtype=torch.uint8)
    normalised = (pixels.float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    expected = model.vision_model(normalised.permute(0, 3, 1, 2))
    torch.testing.assert_close(encode_patches(model.vision_model, pixels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["d", "x", "h"])
@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_a_packed_question_is_computed_as_if_alone(architecture, images, tokenizer):
    model = random_model(architecture, tokenizer)
    packer = Packer(model.config, tokenizer)
    features = torch.randn(6, 16, 512)
    longer = packer.pack(IMAGES["tiles"], QUESTIONS * 2)  # a longer neighbour, so that the other sequence is padded
    batch = collate([packer.pack(images, QUESTIONS), longer])
    tags = torch.from_numpy(packer.encoder.tag_ids(6)) if architecture == "h" else None
    hidden = decode(model, batch, features, tags)[0]
    logits = model.language_model.lm_head(hidden)
    for number, question in enumerate(QUESTIONS, start=1):
        own = (batch.answers[0] == number - 1) & (batch.labels[0] != NOT_ANSWERED)
        expected, answer = alone(model, packer, tokenizer, images, question, features, tags)
        assert batch.labels[0][own].tolist() == answer
        torch.testing.assert_close(logits[own], expected, atol=2e-4, rtol=1e-4)


def alone(model, packer, tokenizer, images, question, features, tags):
    """Returns the reference's logits of one answer, and the answer's ids with the end of the message."""
    prompt = packer.encoder.encode([Message("user", question.prompt)], [len(tiles) for tiles in images])
    answer = [*tokenizer.encode(question.answer), tokenizer.token_id("<|im_end|>")]
    ids = torch.tensor([[*prompt.input_ids, *answer[:-1]]])
    ranges = np.concatenate([prompt.cross_ranges, [[0, prompt.cross_tokens]] * (len(answer) - 1)])
    llm: list[int] = []
    cross: list[int] = []
    cross_tags: list[int] = []
    for tiles in images:
        in_llm, in_cross = split_tiles(model.config.architecture, len(tiles))
        llm += tiles[in_llm]
        cross += tiles[in_cross]
        cross_tags += range(len(tiles))[in_cross]
    kv = None
    if cross:
        kv = model.cross_kv(model.mlp1(features[cross]), None if tags is None else tags[cross_tags])
    image = model.mlp1(features[llm]).flatten(0, 1) if llm else None
    logits, _ = model(ids, image, kv, torch.from_numpy(ranges)[None] if kv else None)
    return logits[0, -len(answer) :], answer


def test_a_packer_leaves_out_tags_or_tiles(tokenizer):
    config = replace(PRESETS["nvlm-x-tiny"], image_token_id=tokenizer.image_token_id)
    tags = {tokenizer.token_id(name) for name in ("<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>")}
    with_tags = Packer(config, tokenizer).pack((range(5),), QUESTIONS)
    without = Packer(config, tokenizer, tags=False).pack((range(5),), QUESTIONS)
    assert tags <= set(with_tags.ids)
    assert not tags & set(without.ids)
    assert without.cross_tiles == with_tags.cross_tiles == (0, 1, 2, 3, 4)
    assert Packer(config, tokenizer, thumbnail_only=True).pack((range(5),), QUESTIONS).cross_tiles == (4,)
