"""Encodes and decodes text with a checkpoint's tokenizer. Text never becomes a control token."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nvlm_trt.errors import ConfigError, RequestError
from nvlm_trt.model.added_tokens import TOKENIZER_CONFIG, TOKENIZER_JSON
from nvlm_trt.model.config import IMAGE_TOKEN
from nvlm_trt.prompt.detokenizer import IncrementalDecoder, TokenBytes, byte_level_alphabet
from nvlm_trt.prompt.tokenizer_files import GENERATION_CONFIG, read_stop_ids, read_tokenizer

TOKENIZER_FILES = (TOKENIZER_JSON, TOKENIZER_CONFIG)  # the second is optional: only transformers reads it
MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
IMAGE_START = "<Image>"
IMAGE_END = "</Image>"
THUMBNAIL_TAG = "<tile_global_thumbnail>"


def tile_tag(number: int) -> str:
    """Return the text tag of a tile. Tiles of an image are counted from 1."""
    return f"<tile_{number}>"


def tile_tags(tiles: int) -> list[str]:
    """Return the tags of an image's tiles, the last of which is the thumbnail."""
    return [*(tile_tag(number) for number in range(1, tiles)), THUMBNAIL_TAG]


_FORMAT_TOKEN = re.compile(
    "|".join(map(re.escape, (MESSAGE_START, MESSAGE_END, END_OF_TEXT, IMAGE_TOKEN, IMAGE_START, IMAGE_END)))
    + r"|<tile_(\d+|global_thumbnail)>"
)


class Tokenizer:
    """Wraps a Hugging Face `tokenizers` tokenizer. Special tokens are reached by name only, never by text.

    Special tokens are those that tokenizer.json marks as special, and all tokens of the prompt format.
    Raises ConfigError for a tokenizer that cannot encode ChatML prompts; `source` names it in the message.
    """

    def __init__(
        self, raw: tokenizers.Tokenizer, source: Path | str = TOKENIZER_JSON, stop_ids: Collection[int] = ()
    ) -> None:
        """`stop_ids` end an answer beside <|im_end|> and <|endoftext|>."""
        added = raw.get_added_tokens_decoder().values()
        forgeable = [token.content for token in added if not token.special and _FORMAT_TOKEN.fullmatch(token.content)]
        raw.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in forgeable])
        raw.no_truncation()
        raw.no_padding()
        # removed: it would add tokens around a text, and ByteLevel's trimmed offsets lose a token's last character
        raw.post_processor = None
        self._raw = raw
        self._added = {token.content: token_id for token_id, token in raw.get_added_tokens_decoder().items()}
        self._special = {token_id: t.content for token_id, t in raw.get_added_tokens_decoder().items() if t.special}
        self.token_bytes = TokenBytes(raw)
        for name in (MESSAGE_START, MESSAGE_END):
            if self._added.get(name) not in self._special:
                raise ConfigError(f"{source} has no special token {name}; only ChatML tokenizers are supported")
        self._check_text_after_control_token(source)
        raw.encode_special_tokens = True
        if outside := [token_id for token_id in stop_ids if token_id >= self.vocab_size]:
            raise ConfigError(
                f"{Path(source).parent / GENERATION_CONFIG}: eos_token_id {outside[0]} is outside the tokenizer's "
                f"{self.vocab_size} ids; restore both from one checkpoint"
            )
        named = (self._added[name] for name in (MESSAGE_END, END_OF_TEXT) if name in self._added)
        self.stop_ids = frozenset(named) | frozenset(stop_ids)  # the ids that end an answer

    @classmethod
    def from_directory(cls, directory: Path | str) -> Tokenizer:
        """Read the tokenizer of a checkpoint or an engine. Raises ConfigError if it is missing, malformed or not
        supported."""
        directory = Path(directory)
        return cls(read_tokenizer(directory), directory / TOKENIZER_JSON, read_stop_ids(directory))

    def _check_text_after_control_token(self, source: Path | str) -> None:
        """Check that encoding a prompt in stretches between control tokens equals encoding it whole."""
        for text in ("user", " user", "\nuser "):
            whole = self._raw.encode(MESSAGE_END + text, add_special_tokens=False).ids
            if whole != [self._added[MESSAGE_END], *self._raw.encode(text, add_special_tokens=False).ids]:
                raise ConfigError(
                    f"{source} encodes {text!r} differently at the start and after {MESSAGE_END}, which is not "
                    "supported; set its pre_tokenizer's prepend_scheme to 'never' or 'always' as in training"
                )

    @functools.cached_property
    def vocab_size(self) -> int:
        """Return the largest id, added tokens included, plus one."""
        return max(self._raw.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def image_token_id(self) -> int:
        """Return the id of the image placeholder, which an image embedding replaces in the LLM's sequence."""
        if IMAGE_TOKEN not in self._added:
            raise ConfigError(f"{TOKENIZER_JSON} has no added token {IMAGE_TOKEN}; set image_token_id in config.json")
        return self._added[IMAGE_TOKEN]

    @functools.cached_property
    def longest_token(self) -> int:
        """Return the largest number of bytes that one token stands for."""
        return max(len(self.token_bytes[token_id]) for token_id in range(self.vocab_size))

    def token_id(self, name: str) -> int | None:
        """Return the id of an added token such as <|im_end|>; None if `name` is ordinary text in this tokenizer."""
        return self._added.get(name)

    def token_text(self, token_id: int) -> str:
        """Return one token for people: the name of a special token, else its text with U+FFFD for bytes that are no
        whole character; "" for an id outside the vocabulary."""
        return self._special.get(token_id) or self.token_bytes[token_id].decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        """Encode a text. The name of a control token in it is ordinary text."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text. Return its ids, and the (start, end) of each id's characters in `text`.

        All byte tokens of a multi-byte character have the offsets of that character. Raises RequestError for text that
        is not valid Unicode or becomes a control token.
        """
        try:
            # a batch, because `encode` blocks all other threads of the process until it is done
            (encoding,) = self._raw.encode_batch([text], add_special_tokens=False)
        except TypeError:
            raise RequestError("text holds half of a UTF-16 surrogate pair; send valid Unicode") from None
        # a vocabulary that also lists its special tokens as ordinary entries could merge letters into one
        if forged := self._special.keys() & set(encoding.ids):
            raise RequestError(f"text holds the control token {self._special[min(forged)]}; remove it from the text")
        return encoding.ids, encoding.offsets

    def to_json(self) -> str:
        """Return the tokenizer as tokenizer.json describes it, with the tokens of the prompt format marked special."""
        return self._raw.to_str()

    def decode(self, token_ids: Iterable[int]) -> str:
        """Decode ids. Special tokens and ids outside the vocabulary give no text; invalid UTF-8 becomes U+FFFD."""
        decoder = IncrementalDecoder(self)
        return decoder.extend(token_ids) + decoder.flush()


# --- the tokenizer of the random presets ---------------------------------------------------------------------------

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_byte_tokenizer(directory: Path | str, max_tiles: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for a vocabulary that needs no training: ids 0-255 are bytes."""
    raw = tokenizers.Tokenizer(models.BPE(vocab=byte_level_alphabet(), merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    write_tokenizer_files(raw, directory, max_tiles)


def format_tokens(max_tiles: int) -> list[str]:
    """Return the tokens of the prompt format: ChatML's, the image placeholder, <Image>, </Image>, the tile tags."""
    tags = [tile_tag(number) for number in range(1, max_tiles + 1)]
    return [END_OF_TEXT, MESSAGE_START, MESSAGE_END, IMAGE_TOKEN, IMAGE_START, IMAGE_END, *tags, THUMBNAIL_TAG]


def write_tokenizer_files(raw: tokenizers.Tokenizer, directory: Path | str, max_tiles: int) -> None:
    """Add the tokens of the prompt format to `raw`, and write its tokenizer.json and tokenizer_config.json."""
    raw.add_special_tokens([AddedToken(name, special=True) for name in format_tokens(max_tiles)])
    raw.save(str(Path(directory) / TOKENIZER_JSON))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": MESSAGE_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    path = Path(directory) / TOKENIZER_FILES[1]
    path.write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
