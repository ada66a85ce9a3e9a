"""Trains small tokenizers of the two kinds that NVLM's LLMs use, on a few sentences."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# the pre-tokenizer of Qwen2's tokenizer.json
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
CORPUS = [
    "Answer the questions. What does the image show?\nsystem user assistant",
    "<Image><tile_1></Image> <b><i>bold</i></b> <tile_2><tile_global_thumbnail></Image>",
    "Größe 12 €, naïve café, 东京 画像 😀😀",
] * 20


def train_qwen2_like() -> tokenizers.Tokenizer:
    """Byte-level BPE with Qwen2's normalizer and regex: tile tags are text, and `><` is one token."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in QWEN2_SPECIAL])
    raw.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    return raw


def train_yi_like() -> tokenizers.Tokenizer:
    """SentencePiece-style BPE with byte fallback, as Llama's and Yi's tokenizer.json spell it."""
    raw = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=fallback, show_progress=False)
    raw.train_from_iterator([text.split("😀")[0] for text in CORPUS], trainer)
    spec = json.loads(raw.to_str())
    spec["added_tokens"] = []
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return raw


def reference(raw: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(raw.to_str()), clean_up_tokenization_spaces=False
    )
