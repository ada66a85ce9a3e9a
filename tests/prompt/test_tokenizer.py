"""Tests tokenizer and incremental decoding against transformers' fast tokenizer with the same tokenizer.json."""

from __future__ import annotations

import json
import threading
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from trained_tokenizers import QWEN2_SPECIAL, reference, train_qwen2_like, train_yi_like
from transformers import AutoTokenizer

from nvlm_trt.errors import ConfigError, RequestError
from nvlm_trt.prompt.detokenizer import IncrementalDecoder, byte_level_alphabet
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer

QWEN2, QWEN2_REFERENCE = Tokenizer(train_qwen2_like()), reference(train_qwen2_like())
YI, YI_REFERENCE = Tokenizer(train_yi_like()), reference(train_yi_like())

texts = st.text(max_size=40).filter(lambda text: not any(name in text for name in QWEN2_SPECIAL))
markup_texts = st.lists(
    st.sampled_from([*QWEN2_SPECIAL, "<tile_1>", "<|im_", "end|>", "<", "|", "im_end", " ", "é", "x"]), max_size=8
).map("".join)


@pytest.fixture(scope="module")
def byte_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory, max_tiles=6)
    return directory


# --- encoding --------------------------------------------------------------------------------------------------------


@given(texts)
def test_text_is_encoded_as_transformers_does(text: str) -> None:
    assert QWEN2.encode(text) == QWEN2_REFERENCE.encode(text, add_special_tokens=False)
    assert YI.encode(text) == YI_REFERENCE.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [QWEN2, YI], ids=["qwen2", "yi"])
@given(text=markup_texts)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    control = {tokenizer.token_id(name) for name in QWEN2_SPECIAL}
    ids = tokenizer.encode(text)
    assert not control & set(ids)
    if tokenizer is QWEN2:
        assert tokenizer.decode(ids) == text


def test_a_token_that_is_no_control_token_stays_one_token() -> None:
    assert QWEN2.encode("a <tool_call> b") == QWEN2_REFERENCE.encode("a <tool_call> b")
    assert QWEN2.token_id("<tool_call>") in QWEN2.encode("a <tool_call> b")


def test_prompt_tokens_are_special_whatever_the_file_says() -> None:
    raw = train_qwen2_like()
    raw.add_tokens([AddedToken(name, special=False) for name in ("<Image>", "<tile_1>", "<tile_global_thumbnail>")])
    tokenizer = Tokenizer(raw)
    ids = tokenizer.encode("<Image><tile_1><tile_global_thumbnail>")
    assert not {tokenizer.token_id("<Image>"), tokenizer.token_id("<tile_1>")} & set(ids)
    assert tokenizer.decode(ids) == "<Image><tile_1><tile_global_thumbnail>"


def test_control_token_that_is_also_an_ordinary_entry_is_refused() -> None:
    spec = json.loads(train_qwen2_like().to_str())
    spec["model"]["ignore_merges"] = True  # a word that is in the vocabulary is one token, as in Llama 3
    spec["model"]["vocab"]["<|x|>"] = 500
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.add_special_tokens(["<|x|>"])
    with pytest.raises(RequestError, match=r"text holds the control token <\|x\|>; remove it"):
        Tokenizer(raw).encode("<|x|>")


@given(texts)
def test_offsets_cover_the_text_in_order(text: str) -> None:
    ids, offsets = QWEN2.encode_with_offsets(text)
    assert len(ids) == len(offsets)
    ends = [end for _, end in offsets]
    assert ends == sorted(ends)
    assert all(0 <= start < end <= len(text) for start, end in offsets)
    if text:
        assert ends[-1] == len(text)


def test_bytes_of_one_character_share_its_offsets(byte_directory: Path) -> None:
    ids, offsets = Tokenizer.from_directory(byte_directory).encode_with_offsets("a😀é")
    assert ids == list("a😀é".encode())
    assert offsets == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (2, 3)]


def test_offsets_are_not_trimmed() -> None:
    raw = train_qwen2_like()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    _, offsets = Tokenizer(raw).encode_with_offsets("a \n\n b")
    assert offsets[-1][1] == 6
    assert all(start < end for start, end in offsets)


def test_truncation_and_padding_in_the_file_are_switched_off() -> None:
    raw = train_qwen2_like()
    raw.enable_truncation(4)
    raw.enable_padding(length=512)
    text = "What does the image show? " * 4
    assert Tokenizer(raw).encode(text) == QWEN2.encode(text)


def test_lone_surrogate_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        QWEN2.encode("a\ud83d")


@pytest.mark.parametrize("tokenizer", [QWEN2, YI], ids=["qwen2", "yi"])
@given(text=texts)
@example(text=" the" * 9)
def test_no_token_holds_more_text_than_the_longest(tokenizer: Tokenizer, text: str) -> None:
    normalised = unicodedata.normalize("NFC", text)  # as QWEN2 does
    assert len(normalised.encode()) <= tokenizer.longest_token * len(tokenizer.encode(text))


def test_other_threads_run_while_a_long_text_is_encoded(byte_directory: Path) -> None:
    tokenizer, ticks, done = Tokenizer.from_directory(byte_directory), [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks[0] += 1

    ticking = threading.Thread(target=tick)
    ticking.start()
    before = ticks[0]
    tokenizer.encode("word " * 100_000)
    during = ticks[0] - before
    done.set()
    ticking.join()
    assert during > 10


# --- decoding --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 400), max_size=60))
def test_decode_is_that_of_transformers(ids: list[int]) -> None:
    """Any byte tokens, most of them invalid UTF-8."""
    assert QWEN2.decode(ids) == QWEN2_REFERENCE.decode(ids, skip_special_tokens=True)


@given(texts)
def test_decode_inverts_encode(text: str) -> None:
    ids = YI_REFERENCE.encode(text, add_special_tokens=False)
    assert YI.decode(ids) == YI_REFERENCE.decode(ids, skip_special_tokens=True)
    normalized = QWEN2_REFERENCE.backend_tokenizer.normalizer.normalize_str(text)
    assert QWEN2.decode(QWEN2.encode(text)) == normalized


@pytest.mark.parametrize("tokenizer", [QWEN2, YI], ids=["qwen2", "yi"])
@given(ids=st.lists(st.integers(-1, 500), max_size=60))
def test_pushes_joined_are_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


@given(st.text(st.characters(min_codepoint=0x80, exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_valid_text_never_streams_a_replacement_character(text: str) -> None:
    decoder = IncrementalDecoder(QWEN2)
    streamed = [decoder.push(token_id) for token_id in QWEN2.encode(text)]
    assert "\ufffd" not in "".join(streamed)
    assert decoder.flush() == ""


def test_a_character_comes_out_with_its_last_byte(byte_directory: Path) -> None:
    decoder = IncrementalDecoder(Tokenizer.from_directory(byte_directory))
    assert [decoder.push(byte) for byte in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert decoder.flush() == ""


def test_unfinished_character_is_replaced_at_the_end(byte_directory: Path) -> None:
    decoder = IncrementalDecoder(Tokenizer.from_directory(byte_directory))
    assert [decoder.push(byte) for byte in "é".encode()[:1]] == [""]
    assert decoder.flush() == "\ufffd"


def test_special_tokens_and_foreign_ids_decode_to_nothing(byte_directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(byte_directory)
    assert tokenizer.decode([104, tokenizer.image_token_id, 105, 511, 151_935, -1, *tokenizer.stop_ids]) == "hi"
    assert QWEN2.decode([QWEN2.token_id("<tool_call>")]) == "<tool_call>"


def test_the_text_of_one_token_is_that_of_transformers() -> None:
    for token_id in range(QWEN2.vocab_size):
        text, data = QWEN2.token_text(token_id), QWEN2.token_bytes[token_id]
        assert text == QWEN2_REFERENCE.decode([token_id], clean_up_tokenization_spaces=False)
        assert data == b"" if text in QWEN2_SPECIAL else data.decode(errors="replace") == text
    assert QWEN2.token_text(QWEN2.vocab_size) == ""


def test_the_text_of_one_sentencepiece_token_keeps_its_space() -> None:
    tokens = YI_REFERENCE.convert_ids_to_tokens(list(range(YI.vocab_size)))
    spaced = [token_id for token_id, token in enumerate(tokens) if token.startswith("▁")]
    assert spaced
    assert all(YI.token_text(token_id) == tokens[token_id].replace("▁", " ") for token_id in spaced)
    assert YI.token_text(tokens.index("<0x41>")) == "A"
    assert (YI.token_text(tokens.index("<0xE2>")), YI.token_bytes[tokens.index("<0xE2>")]) == ("\ufffd", b"\xe2")


def test_first_space_of_sentencepiece_is_stripped_once() -> None:
    ids = YI.encode("the image")
    decoder = IncrementalDecoder(YI)
    assert "".join(map(decoder.push, ids)) == "the image" == YI_REFERENCE.decode(ids)


def test_unknown_decoder_is_a_config_error() -> None:
    raw = train_qwen2_like()
    raw.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="decoder WordPiece is not supported"):
        Tokenizer(raw)


# --- files -----------------------------------------------------------------------------------------------------------


def test_byte_tokenizer_is_the_bytes_and_its_special_tokens(byte_directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(byte_directory)
    names = [*QWEN2_SPECIAL, "<Image>", "</Image>", *(f"<tile_{i}>" for i in range(1, 7)), "<tile_global_thumbnail>"]
    assert [tokenizer.token_id(name) for name in names] == list(range(256, 256 + 13))
    assert tokenizer.vocab_size == 269
    assert tokenizer.stop_ids == {256, 258}
    assert tokenizer.image_token_id == 259
    assert tokenizer.token_id("<tile_7>") is None
    assert tokenizer.encode("<tile_1> \x00 ÿ") == list("<tile_1> \x00 ÿ".encode())


def test_byte_tokenizer_loads_in_transformers(byte_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(byte_directory)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("é<|im_end|>") == [0xC3, 0xA9, 258]
    assert tokenizer.decode([0xC3, 0xA9, 258], skip_special_tokens=True) == "é"


def test_alphabet_is_that_of_tokenizers() -> None:
    assert set(byte_level_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))


def test_missing_and_malformed_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in .*, nor vocab\.json with merges\.txt; copy those"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer") as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokenizer_without_chatml_is_a_config_error(tmp_path: Path) -> None:
    spec = json.loads(train_qwen2_like().to_str())
    for token in spec["added_tokens"]:
        token["content"] = token["content"].replace("<|im_end|>", "<|end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"no special token <\|im_end\|>"):
        Tokenizer.from_directory(tmp_path)


def test_tokenizer_without_the_image_token_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"no added token <\|vision_pad\|>; set image_token_id"):
        _ = YI.image_token_id


def test_tokenizer_that_treats_the_start_of_a_text_specially_is_refused() -> None:
    raw = train_yi_like()
    raw.normalizer = None
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    with pytest.raises(ConfigError, match="differently at the start"):
        Tokenizer(raw)
