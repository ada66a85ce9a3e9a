"""Writes a folder in the form of nvidia/NVLM-D-72B: its names, shapes, shards and side files, and nobody's weights.

    python -m lab.shaped_checkpoint FOLDER                                       # 159 GB of holes, which take no disk
    python -m lab.shaped_checkpoint FOLDER --llm-layers 1 --vision-layers 1 --random          # 8 GB of random numbers
    python -m lab.shaped_checkpoint FOLDER --llm-layers 1 --vision-layers 1 --vocab-size 16384 --random        # 4 GB

The shards are sparse files: every weight reads as zero. `--random` fills them, so that an engine has something to say.
The side files are those of the published folder: vocab.json and merges.txt of a byte-level BPE that was trained on this
repository's pages and filled up to Qwen2's 151,643 entries with made-up words, added tokens at Qwen2's ids, ChatML's
template, generation_config.json; no tokenizer.json. The vision encoder's 25 heads are padded to 32, as published.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lab.code_state import ROOT
from nvlm_trt.checkpoint.dummy_heads import padded_shape
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import find_preset

SHARDS = 46
DUMMY_HEADS = 7
ITEM_BYTES = 2  # bfloat16
VOCABULARY = 151_643  # Qwen2's entries before its added tokens
ADDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>")
MERGED = 4_000  # entries of the trained BPE, bytes included
_BLOCK = 1 << 22  # numbers made at a time
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

Shapes = Mapping[str, tuple[int, ...]]
Fill = Callable[[str, tuple[int, ...], int, int], npt.NDArray[np.float32]]


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--preset", default="nvlm-d-72b")
    made.add_argument("--llm-layers", type=int, help="fewer than the preset's")
    made.add_argument("--vision-layers", type=int, help="fewer than the preset's")
    made.add_argument("--vocab-size", type=int, help="for smaller embeddings than the preset's")
    made.add_argument("--shards", type=int, default=SHARDS)
    made.add_argument("--random", action="store_true", help="fill the shards with random numbers")
    return made


def write_shaped_checkpoint(directory: Path, config: NvlmConfig, shards: int = SHARDS, *, random: bool = False) -> None:
    """Write the folder, which must not exist. Memory holds one block of numbers."""
    directory.mkdir(parents=True)
    raw = config_to_hf(replace(config, image_token_id=None))
    raw.pop("name")  # the published file has neither
    _write_json(directory / "config.json", raw)
    write_qwen2_tokenizer(directory, min(VOCABULARY, config.llm.vocab_size - 64))
    padding = DUMMY_HEADS * config.vision.head_dim if config.vision.num_heads == 25 else 0
    layout = checkpoint_layout(config)
    shapes = {name: padded_shape(name, shape, padding) for name, shape in layout.items()}
    write_shards(directory, shapes, shards, _random_fill(layout) if random else None)


def write_shards(directory: Path, shapes: Shapes, shards: int, fill: Fill | None = None) -> None:
    """Spread bfloat16 tensors over at most `shards` files of about equal sizes, and write their index.

    `fill` makes the numbers [start, stop) of a tensor, given its name and shape; None: holes, which read as zeros."""
    total = sum(map(_nbytes, shapes.values()))
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        parts[min(done * shards // total, shards - 1)][name] = shape
        done += _nbytes(shape)
    parts = [part for part in parts if part]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        _write_shard(directory / file, part, fill)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def write_qwen2_tokenizer(directory: Path, entries: int) -> None:
    """Write Qwen2's files of a tokenizer with `entries` tokens and the added ones behind them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pages = sorted(ROOT.glob("docs/*.md"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(MERGED, entries), initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    raw.train_from_iterator((page.read_text(encoding="utf-8") for page in pages), trainer)
    trained = json.loads(raw.to_str())["model"]
    vocabulary: dict[str, int] = trained["vocab"]
    words = (f"Ġ{word}" for word in _words() if f"Ġ{word}" not in trained["vocab"])
    for word in itertools.islice(words, entries - len(vocabulary)):
        vocabulary[word] = len(vocabulary)
    _write_json(directory / "vocab.json", vocabulary)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in trained["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    ids = {token: entries + i for i, token in enumerate(ADDED_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(number): {"content": token, **flags} for token, number in ids.items()},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(directory / "added_tokens.json", ids)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": [*ADDED_TOKENS]}
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(directory / "generation_config.json", {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})


def _words() -> Sequence[str] | itertools.chain[str]:
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    return itertools.chain.from_iterable(map("".join, itertools.product(syllables, repeat=n)) for n in (2, 3))


def _random_fill(layout: Shapes) -> Fill:
    """Make numbers at which activations stay near 1: matrices by the number of their inputs, norms around 1, dummy
    heads 0."""

    def fill(name: str, shape: tuple[int, ...], start: int, stop: int) -> npt.NDArray[np.float32]:
        key = hashlib.sha256(f"{name} {start}".encode()).digest()
        values = np.random.Generator(np.random.SFC64(list(key))).standard_normal(stop - start, dtype=np.float32)
        if len(shape) == 1:
            values *= np.float32(0.05)
            if name.endswith(".weight"):
                values += 1
            elif name.endswith((".ls1", ".ls2")):
                values += np.float32(0.3)
        elif not name.endswith("embed_tokens.weight"):
            values /= np.float32(math.sqrt(math.prod(shape[1:])))
        if shape != layout[name]:
            _silence(values, name, start, shape, layout[name])
        return values

    return fill


def _silence(
    values: npt.NDArray[np.float32], name: str, start: int, stored: tuple[int, ...], real: tuple[int, ...]
) -> None:
    """Set the dummy heads of a tensor to 0: rows behind those of q, k and v each, or columns of proj."""
    row, column = np.divmod(np.arange(start, start + len(values)), math.prod(stored[1:]))
    parts = 3 if ".attn.qkv." in name else 1
    dummy = row % (stored[0] // parts) >= real[0] // parts
    if len(real) > 1:
        dummy |= column >= real[1]
    values[dummy] = 0


def _write_shard(path: Path, shapes: Shapes, fill: Fill | None) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _nbytes(shape)]}
        end += _nbytes(shape)
    text = json.dumps(header, allow_nan=False).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items() if fill else ():
            assert fill is not None
            count = math.prod(shape)
            for start in range(0, count, _BLOCK):
                values = fill(name, shape, start, min(start + _BLOCK, count))
                file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    os.truncate(path, 8 + len(text) + end)


def _nbytes(shape: tuple[int, ...]) -> int:
    return ITEM_BYTES * math.prod(shape)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def main() -> None:
    arguments = options().parse_args()
    config = find_preset(arguments.preset)
    if arguments.vision_layers:
        config = replace(config, vision=replace(config.vision, num_layers=arguments.vision_layers))
    if arguments.llm_layers:
        config = replace(config, llm=replace(config.llm, num_layers=arguments.llm_layers))
    if arguments.vocab_size:
        config = replace(config, llm=replace(config.llm, vocab_size=arguments.vocab_size))
    write_shaped_checkpoint(arguments.folder, config, arguments.shards, random=arguments.random)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir())
    disk = sum(path.stat().st_blocks * 512 for path in arguments.folder.iterdir())
    print(f"{arguments.folder}: {size / 1e9:.1f} GB, of which {disk / 1e9:.2f} GB on the disk", file=sys.stderr)


if __name__ == "__main__":
    main()
