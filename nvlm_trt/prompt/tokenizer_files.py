"""Reads a tokenizer from the files that a checkpoint has: tokenizer.json, or Qwen2's vocab.json with merges.txt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nvlm_trt.bounded_file import TOKENIZER_BYTES, read_bounded
from nvlm_trt.errors import ConfigError
from nvlm_trt.model.added_tokens import TOKENIZER_CONFIG, TOKENIZER_JSON, AddedTokenEntry, added_tokens
from nvlm_trt.model.json_file import read_json_object

GENERATION_CONFIG = "generation_config.json"
_VOCAB, _MERGES = "vocab.json", "merges.txt"
_SENTENCEPIECE = "tokenizer.model"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# how Qwen2 splits text before it merges bytes: contractions, words, single digits, punctuation, line breaks, spaces
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Read the tokenizer of a checkpoint, with the tokens that its other files add.

    Raises ConfigError for files that are missing, malformed, contradict each other, or are of another kind."""
    path = directory / TOKENIZER_JSON
    raw = _from_tokenizer_json(path) if path.is_file() else _from_vocabulary(directory)
    known = {token_id: token.content for token_id, token in raw.get_added_tokens_decoder().items()}
    for entry in sorted(added_tokens(directory).values(), key=lambda entry: entry.token_id):
        if known.get(entry.token_id) != entry.content:
            _add(raw, entry, directory)
    return raw


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of the checkpoint `source` into an engine: tokenizer.json, made where the checkpoint has
    none, and the files that say how transformers uses it and which tokens end an answer."""
    path = source / TOKENIZER_JSON
    raw = read_tokenizer(source)
    if path.is_file() and raw.to_str() == _from_tokenizer_json(path).to_str():
        shutil.copyfile(path, target / TOKENIZER_JSON)
    else:
        (target / TOKENIZER_JSON).write_text(raw.to_str(pretty=True) + "\n", encoding="utf-8")
    for name in (TOKENIZER_CONFIG, GENERATION_CONFIG):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def read_stop_ids(directory: Path) -> frozenset[int]:
    """Read the ids that end an answer, `eos_token_id` of generation_config.json; none without the file."""
    path = directory / GENERATION_CONFIG
    ids = (read_json_object(path) or {}).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError(f"{path}: eos_token_id {ids} is not a list of token ids; restore it from the checkpoint")
    return frozenset(ids)


def chat_template_file(directory: Path) -> str | None:
    """Return the name of the file that has the chat template; None without one."""
    for name in _TEMPLATE_FILES:
        if (directory / name).is_file():
            return name
    try:
        found = read_json_object(directory / TOKENIZER_CONFIG, TOKENIZER_BYTES)
    except ConfigError:
        return None
    return TOKENIZER_CONFIG if found and found.get("chat_template") else None


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    data = _read(path)
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the bindings raise bare Exception
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a tokenizer ({detail}); restore it from the checkpoint") from None


def _from_vocabulary(directory: Path) -> tokenizers.Tokenizer:
    """Build Qwen2's tokenizer of vocab.json and merges.txt, without its added tokens."""
    vocabulary, merges = directory / _VOCAB, directory / _MERGES
    if not (vocabulary.is_file() and merges.is_file()):
        raise _no_tokenizer(directory)
    kind = (read_json_object(directory / TOKENIZER_CONFIG, TOKENIZER_BYTES) or {}).get("tokenizer_class")
    if kind not in _QWEN2:
        raise ConfigError(
            f"{directory} has {_VOCAB} and {_MERGES}, but {TOKENIZER_CONFIG} does not say that they are of "
            f"{_QWEN2[0]} (tokenizer_class {kind!r}), and other tokenizers split text in other ways; save "
            f"{TOKENIZER_JSON} with transformers: {_converted(directory)}"
        )
    try:
        model = models.BPE(vocab=json.loads(_read(vocabulary)), merges=_merges(_read(merges).decode()))
    except Exception as error:  # the bindings raise bare Exception
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"{vocabulary} and {_MERGES} are not a byte-level BPE ({detail}); restore them from the checkpoint"
        ) from None
    raw = tokenizers.Tokenizer(model)
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def _merges(text: str) -> list[tuple[str, str]]:
    """Read a line `left right` per merge, in the order of their rank. Raises ValueError for another line."""
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    pairs = []
    for line in lines:
        left, right = line.rstrip("\r").split(" ")
        pairs.append((left, right))
    return pairs


def _add(raw: tokenizers.Tokenizer, entry: AddedTokenEntry, directory: Path) -> None:
    """Add a token. Raises ConfigError where it would get another id than the files give it."""
    token = AddedToken(
        entry.content,
        special=entry.special,
        normalized=entry.normalized,
        lstrip=entry.lstrip,
        rstrip=entry.rstrip,
        single_word=entry.single_word,
    )
    if entry.special:
        raw.add_special_tokens([token])
    else:
        raw.add_tokens([token])
    if raw.token_to_id(entry.content) != entry.token_id:
        raise ConfigError(
            f"the tokenizer of {directory} gives the added token {entry.content} the id "
            f"{raw.token_to_id(entry.content)}, its files say {entry.token_id}; restore the files from one checkpoint"
        )


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, TOKENIZER_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); restore it from the checkpoint") from None


def _no_tokenizer(directory: Path) -> ConfigError:
    if (directory / _SENTENCEPIECE).is_file():
        return ConfigError(
            f"no {TOKENIZER_JSON} in {directory}, only SentencePiece's {_SENTENCEPIECE}; convert it with transformers: "
            f"{_converted(directory)}"
        )
    return ConfigError(
        f"no {TOKENIZER_JSON} in {directory}, nor {_VOCAB} with {_MERGES}; copy those the model was trained with"
    )


def _converted(directory: Path) -> str:
    return f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
