"""Writes the model card of a trained checkpoint; `lab.score_checkpoints` fills in the scores."""

from __future__ import annotations

from nvlm_trt.model.config import NvlmConfig

_KINDS = {
    "D": "decoder-only: all image tokens join the language model's sequence",
    "X": "gated cross-attention: the sequence holds the tile tags, all image tokens are cross-attended",
    "H": "hybrid: the thumbnail's image tokens join the sequence, the tiles' are cross-attended",
}

_CARD = """# {name}

A tiny NVLM-{architecture} ({kind}), trained from
nothing by this repository on data that it draws. The model exists so that engines can be judged by what they read. It
reads TinyDocs and nothing else.

| | |
|---|---|
| vision encoder | {encoder} |
| language model | {language} |
| format | Hugging Face layout, bfloat16; a tokenizer of words and single letters |
| data | TinyDocs (`nvlm-trt tinydocs`): drawn pages in 18 fonts, and text-only tasks; no data of others |
| recipe | `training/`, described in docs/training.md |

## Scores

`lab.score_checkpoints` writes this table:

<!-- scores: begin -->
<!-- scores: end -->

## Limits

- The model reads print of the size that TinyDocs uses, about 12 pixels in a tile of 56, in one line within a tile. It
  does not read text that crosses tiles.
- The model knows the questions of TinyDocs in the words in which TinyDocs asks them, 5 colours, 4 shapes, 8 form keys,
  16 list words, and codes without the letters I O Q D B S Z J. Other questions get a wrong answer of the same kind.
- The model answers one question a conversation: it has not seen a second turn.
"""


def model_card(config: NvlmConfig) -> str:
    """Returns the README.md of a checkpoint of `config`, without scores."""
    vision, llm = config.vision, config.llm
    language = (
        f"Qwen2: {llm.num_layers} layers of {llm.hidden_size}, {llm.num_heads} heads, {llm.num_kv_heads} KV heads"
    )
    if config.cross_layers:
        language += f"; gated cross-attention before layers {', '.join(map(str, config.cross_layers))}"
    return _CARD.format(
        name=config.name,
        architecture=config.architecture,
        kind=_KINDS[config.architecture],
        encoder=f"InternViT: {vision.num_layers} layers of {vision.hidden_size}, tiles of {vision.image_size} px in "
        f"patches of {vision.patch_size}, {config.tokens_per_tile} image tokens a tile",
        language=language,
    )
