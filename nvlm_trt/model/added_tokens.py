"""Reads the tokens that were added to a vocabulary, from whichever of a tokenizer's files names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_trt.bounded_file import TOKENIZER_BYTES
from nvlm_trt.errors import ConfigError
from nvlm_trt.model.json_file import read_json_object

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_IDS_ALONE = "added_tokens.json"  # {content: id}, of saves before transformers 4.34
_SPECIAL_NAMES = "special_tokens_map.json"


@dataclass(frozen=True)
class AddedTokenEntry:
    """A token beside the vocabulary's own, with the flags of the `tokenizers` package."""

    content: str
    token_id: int
    special: bool
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def added_tokens(directory: Path) -> dict[str, AddedTokenEntry]:
    """Reads the added tokens of all files by content. Of two files that name a token, the first counts: tokenizer.json,
    tokenizer_config.json, added_tokens.json.

    Raises ConfigError for a file that is malformed, and for two ids of one token."""
    path = directory / TOKENIZER_JSON
    own = _read(path, lambda raw: [_entry(token["id"], token) for token in raw.get("added_tokens", [])])
    return _merged(directory, [*own, *side_file_tokens(directory).values()])


def side_file_tokens(directory: Path) -> dict[str, AddedTokenEntry]:
    """Reads the added tokens of the files beside tokenizer.json, as `added_tokens` does."""
    path = directory / TOKENIZER_CONFIG
    decoder = _read(path, lambda raw: [_entry(key, token) for key, token in _decoder(raw).items()])
    path = directory / _IDS_ALONE
    names = _special_names(directory)
    return _merged(
        directory, [*decoder, *_read(path, lambda raw: [_bare(content, key, names) for content, key in raw.items()])]
    )


def _merged(directory: Path, entries: list[AddedTokenEntry]) -> dict[str, AddedTokenEntry]:
    found: dict[str, AddedTokenEntry] = {}
    for entry in entries:
        known = found.setdefault(entry.content, entry)
        if known.token_id != entry.token_id:
            raise ConfigError(
                f"the tokenizer's files in {directory} give {entry.content} the ids {known.token_id} and "
                f"{entry.token_id}; restore the files from one checkpoint"
            )
    return found


def _read(path: Path, entries: Any) -> list[AddedTokenEntry]:
    raw = read_json_object(path, TOKENIZER_BYTES)
    try:
        return [] if raw is None else list(entries(raw))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{path} is not a tokenizer of HF layout; restore it from the checkpoint") from None


def _decoder(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns added_tokens_decoder {id: {content, special, ...}} of tokenizer_config.json."""
    return raw.get("added_tokens_decoder") or {}


def _entry(key: object, token: Mapping[str, Any]) -> AddedTokenEntry:
    flags = {name: bool(token[name]) for name in ("normalized", "lstrip", "rstrip", "single_word") if name in token}
    return AddedTokenEntry(_text(token["content"]), int(str(key)), bool(token.get("special", False)), **flags)


def _bare(content: str, key: object, special_names: set[str]) -> AddedTokenEntry:
    special = content in special_names
    return AddedTokenEntry(content, int(str(key)), special, normalized=not special)


def _special_names(directory: Path) -> set[str]:
    """Reads special_tokens_map.json: {"eos_token": name or {content}, "additional_special_tokens": [...]}."""

    def names(raw: Mapping[str, Any]) -> Iterator[str]:
        for value in raw.values():
            for token in value if isinstance(value, list) else [value]:
                yield _text(token["content"] if isinstance(token, Mapping) else token)

    path = directory / _SPECIAL_NAMES
    raw = read_json_object(path)
    try:
        return set() if raw is None else set(names(raw))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path} does not name special tokens; restore it from the checkpoint") from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
