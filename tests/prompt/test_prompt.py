"""Tests prompts of the three architectures: layouts written by hand, whole-string tokenisation, ranges, injection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained_tokenizers import QWEN2_SPECIAL, reference, train_qwen2_like, train_yi_like
from transformers import AutoTokenizer

from nvlm_trt.api import ImagePart, Message, TextPart
from nvlm_trt.errors import ConfigError, RequestError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.conversation import parse_messages
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer

D, X, H = (PRESETS[f"nvlm-{architecture}-tiny"] for architecture in "dxh")
T = 16  # image tokens of a tiny preset's tile
PAD = "<|vision_pad|>"
THUMBNAIL = "<tile_global_thumbnail>"

QWEN2, QWEN2_REFERENCE = Tokenizer(train_qwen2_like()), reference(train_qwen2_like())
YI = Tokenizer(train_yi_like()), reference(train_yi_like())
every_architecture = pytest.mark.parametrize("config", [D, X, H], ids=["D", "X", "H"])


@pytest.fixture(scope="module")
def byte_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory, max_tiles=6)
    return directory


@pytest.fixture(scope="module")
def byte_tokenizer(byte_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(byte_directory)


def user(content: str) -> list[Message]:
    return [Message("user", content)]


# --- golden layouts over the byte tokenizer --------------------------------------------------------------------------

Golden = list[tuple[str, int, tuple[int, int]]]  # token or text, how often, range

BYTE_IDS = {
    "<|im_start|>": 257,
    "<|im_end|>": 258,
    PAD: 259,
    "<Image>": 260,
    "</Image>": 261,
    "<tile_1>": 262,
    "<tile_2>": 263,
    THUMBNAIL: 268,
}


def head(text: str) -> Golden:
    nothing = (0, 0)
    return [
        ("<|im_start|>", 1, nothing),
        ("system\nAnswer the questions.", 1, nothing),
        ("<|im_end|>", 1, nothing),
        ("\n", 1, nothing),
        ("<|im_start|>", 1, nothing),
        ("user\n" + text, 1, nothing),
    ]


def tail(seen: int) -> Golden:
    return [
        ("<|im_end|>", 1, (0, seen)),
        ("\n", 1, (0, seen)),
        ("<|im_start|>", 1, (0, seen)),
        ("assistant\n", 1, (0, seen)),
    ]


def assert_golden(prompt: EncodedPrompt, golden: Golden) -> None:
    ids, ranges = [], []
    for text, count, read in golden:
        piece = [BYTE_IDS[text]] if text in BYTE_IDS else list(text.encode())
        ids += piece * count
        ranges += [read] * (len(piece) * count)
    assert prompt.input_ids.tolist() == ids
    assert [tuple(row) for row in prompt.cross_ranges.tolist()] == ranges
    assert prompt.input_ids.dtype == np.int64
    assert prompt.cross_ranges.dtype == np.int32


@every_architecture
def test_text_only(config: NvlmConfig, byte_tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(config, byte_tokenizer).encode(user("Hi"))
    assert_golden(prompt, head("Hi") + tail(0))
    assert (prompt.placeholders, prompt.cross_tokens) == (0, 0)


def test_d_with_two_tiles_and_thumbnail(byte_tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(D, byte_tokenizer).encode(user("See <image>, ok?"), [3])
    none = (0, 0)
    image = [("<Image>", 1, none), ("<tile_1>", 1, none), (PAD, T, none), ("<tile_2>", 1, none), (PAD, T, none)]
    image += [(THUMBNAIL, 1, none), (PAD, T, none), ("</Image>", 1, none), (", ok?", 1, none)]
    assert_golden(prompt, head("See ") + image + tail(0))
    assert (prompt.placeholders, prompt.cross_tokens) == (3 * T, 0)


def test_x_with_two_tiles_and_thumbnail(byte_tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(X, byte_tokenizer).encode(user("See <image>, ok?"), [3])
    image = [
        ("<Image>", 1, (0, 0)),
        ("<tile_1>", 1, (0, 16)),
        ("<tile_2>", 1, (16, 32)),
        (THUMBNAIL, 1, (32, 48)),
        ("</Image>", 1, (0, 48)),
        (", ok?", 1, (0, 48)),
    ]
    assert_golden(prompt, head("See ") + image + tail(48))
    assert (prompt.placeholders, prompt.cross_tokens) == (0, 48)


def test_h_with_two_tiles_and_thumbnail(byte_tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(H, byte_tokenizer).encode(user("See <image>, ok?"), [3])
    seen = (0, 2 * (1 + T))  # a tile's tag is one token of this tokenizer
    image = [("<Image>", 1, (0, 0)), (THUMBNAIL, 1, (0, 0)), (PAD, T, seen), ("</Image>", 1, seen), (", ok?", 1, seen)]
    assert_golden(prompt, head("See ") + image + tail(seen[1]))
    assert (prompt.placeholders, prompt.cross_tokens) == (T, 34)


@pytest.mark.parametrize(("config", "pads", "cross"), [(D, T, 0), (X, 0, T), (H, T, 0)], ids=["D", "X", "H"])
def test_one_tile_image_is_only_a_thumbnail(
    config: NvlmConfig, pads: int, cross: int, byte_tokenizer: Tokenizer
) -> None:
    prompt = PromptEncoder(config, byte_tokenizer).encode(user("<image>"), [1])
    image = [("<Image>", 1, (0, 0)), (THUMBNAIL, 1, (0, cross)), (PAD, pads, (0, 0)), ("</Image>", 1, (0, cross))]
    assert_golden(prompt, head("") + image + tail(cross))
    assert (prompt.placeholders, prompt.cross_tokens) == (pads, cross)


def test_x_conversation_with_images_in_two_turns(byte_tokenizer: Tokenizer) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "A<image>"),
        Message("assistant", "ok <image>"),  # only a user's mark counts
        Message("user", "B<image>"),
    ]
    prompt = PromptEncoder(X, byte_tokenizer).encode(messages, [1, 3])
    first, both = (0, 16), (0, 64)
    golden = [
        ("<|im_start|>", 1, (0, 0)),
        ("system\nBe brief.", 1, (0, 0)),
        ("<|im_end|>", 1, (0, 0)),
        ("\n", 1, (0, 0)),
    ]
    golden += [("<|im_start|>", 1, (0, 0)), ("user\nA", 1, (0, 0)), ("<Image>", 1, (0, 0)), (THUMBNAIL, 1, (0, 16))]
    golden += [("</Image>", 1, first), ("<|im_end|>", 1, first), ("\n", 1, first)]
    golden += [("<|im_start|>", 1, first), ("assistant\nok <image>", 1, first), ("<|im_end|>", 1, first)]
    golden += [("\n", 1, first), ("<|im_start|>", 1, first), ("user\nB", 1, first), ("<Image>", 1, first)]
    golden += [("<tile_1>", 1, (16, 32)), ("<tile_2>", 1, (32, 48)), (THUMBNAIL, 1, (48, 64)), ("</Image>", 1, both)]
    assert_golden(prompt, golden + tail(64))
    assert prompt.decode_range == (0, 64)


def test_h_image_without_cross_attended_tiles_leaves_the_ranges_of_the_one_before(byte_tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(H, byte_tokenizer).encode(user("<image><image>"), [3, 1])
    seen = (0, 34)
    image = [("<Image>", 1, (0, 0)), (THUMBNAIL, 1, (0, 0)), (PAD, T, seen), ("</Image>", 1, seen)]
    image += [("<Image>", 1, seen), (THUMBNAIL, 1, seen), (PAD, T, seen), ("</Image>", 1, seen)]
    assert_golden(prompt, head("") + image + tail(34))


def test_unmarked_images_come_first_each_with_a_newline(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(D, byte_tokenizer)
    turns = [Message("user", "Look."), Message("assistant", "Yes."), Message("user", "And?")]
    marked = [Message("user", "<image>\n<image>\nLook."), *turns[1:]]
    np.testing.assert_array_equal(encoder.encode(turns, [1, 3]).input_ids, encoder.encode(marked, [1, 3]).input_ids)


def test_mark_without_images_is_text(byte_tokenizer: Tokenizer) -> None:
    prompt = PromptEncoder(X, byte_tokenizer).encode(user("What does <image> mean in HTML?"))
    assert_golden(prompt, head("What does <image> mean in HTML?") + tail(0))


# --- content parts -----------------------------------------------------------------------------------------------


def test_parts_are_a_marked_string(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(H, byte_tokenizer)
    parts = [TextPart("A"), ImagePart(), TextPart("B"), ImagePart(), TextPart("C?")]
    expected = encoder.encode(user("A<image>B<image>C?"), [3, 1])
    prompt = encoder.encode([Message("user", parts)], [3, 1])
    np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)
    np.testing.assert_array_equal(prompt.cross_ranges, expected.cross_ranges)


def test_a_mark_in_a_part_is_text(byte_tokenizer: Tokenizer) -> None:
    """One image, and a question about the tag: the image stays where it was put."""
    encoder = PromptEncoder(X, byte_tokenizer)
    question = "how do I write an <image> tag?"
    prompt = encoder.encode([Message("user", [ImagePart(), TextPart(question)])], [1])
    image = [("<Image>", 1, (0, 0)), (THUMBNAIL, 1, (0, T)), ("</Image>", 1, (0, T)), (question, 1, (0, T))]
    assert_golden(prompt, head("") + image + tail(T))
    earlier = [Message("user", question), Message("assistant", "so."), Message("user", [TextPart("And"), ImagePart()])]
    assert_golden_text(encoder.encode(earlier, [1]), question)


def assert_golden_text(prompt: EncodedPrompt, text: str) -> None:
    ids = prompt.input_ids.tolist()
    wanted = list(text.encode())
    assert any(ids[start : start + len(wanted)] == wanted for start in range(len(ids)))


def test_a_backslash_makes_a_mark_text(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(D, byte_tokenizer)
    prompt = encoder.encode(user("<image> is a \\<image>, \\\\ too"), [1])
    parts = [ImagePart(), TextPart(" is a <image>, \\\\ too")]
    np.testing.assert_array_equal(prompt.input_ids, encoder.encode([Message("user", parts)], [1]).input_ids)
    unmarked = encoder.encode(user("What is \\<image>?"), [1])
    parts = [ImagePart(), TextPart("\nWhat is <image>?")]
    np.testing.assert_array_equal(unmarked.input_ids, encoder.encode([Message("user", parts)], [1]).input_ids)


part_lists = st.lists(st.one_of(st.builds(TextPart, st.text(max_size=9)), st.just(ImagePart())), max_size=6)


@every_architecture
@given(contents=st.lists(part_lists, min_size=1, max_size=3), data=st.data())
def test_images_stand_where_the_parts_say(
    config: NvlmConfig, byte_tokenizer: Tokenizer, contents: list[list[TextPart | ImagePart]], data: st.DataObject
) -> None:
    """Every image stands between the texts of its neighbours, whatever the texts say; no text becomes an image."""
    contents[-1].append(TextPart("?"))
    images = sum(isinstance(part, ImagePart) for content in contents for part in content)
    tiles = data.draw(st.lists(st.integers(1, 3), min_size=images, max_size=images))
    messages = [Message("user", content) for content in contents]
    prompt = PromptEncoder(config, byte_tokenizer).encode(messages, tiles)
    start, end = (byte_tokenizer.token_id(name) for name in ("<Image>", "</Image>"))
    spelled, inside = [], False
    for token_id in prompt.input_ids.tolist():
        inside = token_id == start or (inside and token_id != end)
        if token_id == start:
            spelled.append(None)
        elif not inside and token_id < 256:
            spelled.append(token_id)
    wanted: list[int | None] = list(b"system\nAnswer the questions.\n")
    for content in contents:
        wanted += b"user\n"
        for part in content:
            wanted += [None] if isinstance(part, ImagePart) else list(part.text.encode())
        wanted += b"\n"
    assert spelled == [*wanted, *b"assistant\n"]


@given(st.lists(st.tuples(st.sampled_from(["a b", "<image>", "é", ""]), st.integers(1, 7)), max_size=4))
def test_a_draft_tokenises_each_text_once(images: list[tuple[str, int]]) -> None:
    """A draft that is encoded several times gives the same prompt as encoding once, without a draft."""
    parts = [part for text, _ in images for part in (TextPart(text), ImagePart())]
    messages = [Message("user", [*parts, TextPart("what?")])]
    encoder = PromptEncoder(X, counting := CountingTokenizer(train_qwen2_like()))
    draft = encoder.draft(messages, len(images))
    draft.encode([1] * len(images))
    before = list(counting.texts)
    tiles = [n for _, n in images]
    prompt = draft.encode(tiles)
    np.testing.assert_array_equal(prompt.input_ids, PromptEncoder(X, QWEN2).encode(messages, tiles).input_ids)
    assert len(set(counting.texts)) == len(counting.texts)
    assert all(n == 1 for n in tiles) <= (counting.texts == before)


class CountingTokenizer(Tokenizer):
    """Records every text that it tokenises after its construction."""

    texts: list[str] = []  # noqa: RUF012

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        self.texts = [*self.texts, text]
        return super().encode_with_offsets(text)


def test_image_alone_is_a_prompt(byte_tokenizer: Tokenizer) -> None:
    assert PromptEncoder(D, byte_tokenizer).encode(user(""), [1]).placeholders == T


def test_text_only_chat_is_that_of_transformers_chat_template(byte_directory: Path, byte_tokenizer: Tokenizer) -> None:
    messages = [Message("system", "S"), Message("user", "ä?"), Message("assistant", "b"), Message("user", "c")]
    template = AutoTokenizer.from_pretrained(byte_directory)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    want = template.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert PromptEncoder(X, byte_tokenizer).encode(messages).input_ids.tolist() == want


@pytest.mark.parametrize(
    ("architecture", "tiles", "in_llm", "in_cross"),
    [("D", 7, range(7), ()), ("X", 7, (), range(7)), ("H", 7, [6], range(6)), ("H", 1, [0], ()), ("X", 1, (), [0])],
)
def test_split_tiles(architecture: str, tiles: int, in_llm: range, in_cross: range) -> None:
    llm_tiles, cross_tiles = split_tiles(architecture, tiles)
    assert list(range(tiles)[llm_tiles]) == list(in_llm)
    assert list(range(tiles)[cross_tiles]) == list(in_cross)


# --- whole-string tokenisation over a Qwen2-like vocabulary, where tags are text --------------------------------------

plain_texts = st.text(max_size=15).filter(
    lambda text: "<|" not in text and "<image>" not in text and not text.endswith("\\")  # \<image> is no mark
)
conversations = st.tuples(
    st.lists(st.tuples(plain_texts, st.integers(1, 7)), max_size=3),  # what stands before each image, its tiles
    plain_texts.map(lambda text: text + "?"),
)


def written_out(config: NvlmConfig, images: list[tuple[str, int]], question: str) -> tuple[str, list[tuple[int, int]]]:
    """Writes the whole ChatML string in NVLM's format, and for each character the range of a token that ends there."""
    string, reads, seen = "", [], 0

    def write(text: str, read: tuple[int, int] | None = None) -> None:
        nonlocal string
        string += text
        reads.extend([read or (0, seen)] * len(text))

    tag_length = len(QWEN2_REFERENCE.encode("<tile_1>"))
    write("<|im_start|>system\nAnswer the questions.<|im_end|>\n<|im_start|>user\n")
    for text, tiles in images:
        write(text + "<Image>")
        start = seen
        for tile in range(1, tiles + 1):
            tag = THUMBNAIL if tile == tiles else f"<tile_{tile}>"
            if config is X:
                write(tag, (start + (tile - 1) * T, start + tile * T))
                seen += T if tile == tiles else 0
            elif config is D or tile == tiles:
                write(tag)
                seen = start + (tiles - 1) * (T + tag_length) if config is H else 0
                write(PAD * T)
        seen = start + tiles * T if config is X else seen
        write("</Image>")
    write(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    return string, reads


@every_architecture
@given(conversation=conversations)
def test_prompt_is_the_whole_string_tokenised(
    config: NvlmConfig, conversation: tuple[list[tuple[str, int]], str]
) -> None:
    images, question = conversation
    content = "".join(text + "<image>" for text, _ in images) + question
    prompt = PromptEncoder(config, QWEN2).encode(user(content), [tiles for _, tiles in images])

    string, reads = written_out(config, images, question)
    want = QWEN2_REFERENCE(string, add_special_tokens=False, return_offsets_mapping=True)
    assert prompt.input_ids.tolist() == want["input_ids"]
    assert [tuple(row) for row in prompt.cross_ranges.tolist()] == [reads[end - 1] for _, end in want["offset_mapping"]]
    assert prompt.placeholders == string.count(PAD)
    assert prompt.cross_tokens == (reads[-1][1] if images else 0)


@given(plain_texts)
def test_sentencepiece_prompt_is_the_whole_string_tokenised(text: str) -> None:
    yi, yi_reference = YI
    prompt = PromptEncoder(replace(D, image_token_id=500), yi).encode(user(text + "?"))
    string = f"<|im_start|>system\nAnswer the questions.<|im_end|>\n<|im_start|>user\n{text}?<|im_end|>\n"
    want = yi_reference.encode(string + "<|im_start|>assistant\n", add_special_tokens=False)
    assert prompt.input_ids.tolist() == want


def test_merge_across_tags_belongs_to_the_tag_of_its_last_character() -> None:
    prompt = PromptEncoder(X, QWEN2).encode(user("<image>"), [2])
    tokens = [QWEN2_REFERENCE.decode([token_id]) for token_id in prompt.input_ids]
    joints = [tuple(read) for token, read in zip(tokens, prompt.cross_ranges.tolist(), strict=True) if token == "><"]
    # <Image><tile_1>, then <tile_1><tile_global_thumbnail>; `></` at the end is another token
    assert joints == [(0, T), (T, 2 * T)]


@every_architecture
@given(conversation=conversations)
def test_ranges_grow_from_nothing_to_everything(
    config: NvlmConfig, conversation: tuple[list[tuple[str, int]], str]
) -> None:
    images, question = conversation
    content = "".join(text + "<image>" for text, _ in images) + question
    prompt = PromptEncoder(config, QWEN2).encode(user(content), [tiles for _, tiles in images])
    starts, ends = prompt.cross_ranges.T
    assert prompt.cross_ranges.shape == (len(prompt.input_ids), 2)
    assert (starts <= ends).all()
    assert ((starts >= 0) & (ends <= prompt.cross_tokens)).all()
    before_image = starts == 0
    assert (np.diff(ends[before_image]) >= 0).all()  # except for NVLM-X's tags, ranges only grow
    assert tuple(prompt.cross_ranges[0]) == (0, 0)
    assert tuple(prompt.cross_ranges[-1]) == prompt.decode_range == (0, prompt.cross_tokens)
    assert np.count_nonzero(prompt.input_ids == QWEN2.image_token_id) == prompt.placeholders


# --- text that looks like control tokens -----------------------------------------------------------------------------

LOOKALIKES = [*QWEN2_SPECIAL, "<Image>", "</Image>", "<tile_1>", THUMBNAIL, "<|im_", "end|>", "<tile_", "1>", "\n"]
hostile_texts = st.lists(st.sampled_from(LOOKALIKES), max_size=6).map(lambda parts: "".join(parts) + "?")


@every_architecture
@pytest.mark.parametrize("kind", ["byte", "qwen2"])
@given(before=hostile_texts, after=hostile_texts)
def test_text_cannot_inject_control_tokens_or_ranges(
    config: NvlmConfig, kind: str, byte_tokenizer: Tokenizer, before: str, after: str
) -> None:
    tokenizer = byte_tokenizer if kind == "byte" else QWEN2
    encoder = PromptEncoder(config, tokenizer)
    hostile = encoder.encode(user(f"{before}<image>{after}"), [3])
    harmless = encoder.encode(user("?<image>?"), [3])
    control = [tokenizer.token_id(name) for name in BYTE_IDS if tokenizer.token_id(name) is not None]

    def control_tokens(prompt: EncodedPrompt) -> list[int]:
        return prompt.input_ids[np.isin(prompt.input_ids, control)].tolist()

    def distinct_ranges(prompt: EncodedPrompt) -> list[list[int]]:
        ranges = prompt.cross_ranges
        return ranges[[0, *(np.flatnonzero(np.diff(ranges, axis=0).any(axis=1)) + 1)]].tolist()

    assert control_tokens(hostile) == control_tokens(harmless)
    assert distinct_ranges(hostile) == distinct_ranges(harmless)
    assert hostile.placeholders == harmless.placeholders
    assert hostile.cross_tokens == harmless.cross_tokens


def test_image_token_that_is_ordinary_text_is_refused(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(replace(D, image_token_id=ord("x")), byte_tokenizer)
    assert encoder.encode(user("<image>"), [1]).placeholders == T
    with pytest.raises(RequestError, match="image token 120; remove it"):
        encoder.encode(user("<image> x"), [1])


# --- NVLM-H's tags ---------------------------------------------------------------------------------------------------


def test_h_tags_are_the_tokens_of_their_text(byte_tokenizer: Tokenizer) -> None:
    encoder = PromptEncoder(H, QWEN2)
    tags = encoder.tag_ids(6)
    assert tags.dtype == np.int64
    assert tags.shape == (6, encoder.tag_length)
    assert [tag.tolist() for tag in tags] == [QWEN2_REFERENCE.encode(f"<tile_{k}>") for k in range(1, 7)]
    assert PromptEncoder(H, byte_tokenizer).tag_ids(6).tolist() == [[262 + k] for k in range(6)]


def test_h_with_tags_of_different_lengths_is_a_config_error() -> None:
    with pytest.raises(
        ConfigError, match=r"<tile_10> is \d tokens and <tile_1> is \d, .* lower max_dynamic_patch to 9"
    ):
        PromptEncoder(replace(H, max_tiles=12), QWEN2)
    assert PromptEncoder(replace(H, max_tiles=9), QWEN2).tag_length == len(QWEN2_REFERENCE.encode("<tile_1>"))


@pytest.mark.parametrize("config", [D, X], ids=["D", "X"])
def test_d_and_x_have_no_cross_attended_tags(config: NvlmConfig) -> None:
    encoder = PromptEncoder(replace(config, max_tiles=12), QWEN2)
    assert encoder.tag_length == 0
    assert encoder.tag_ids(6).shape == (6, 0)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([], 0, "the last message must be the user's"),
        ([Message("user", "a"), Message("assistant", "b")], 0, "the last message must be the user's"),
        ([Message("system", "a")], 1, "the last message must be the user's"),
        ([Message("user", "a"), Message("system", "b"), Message("user", "c")], 0, "a system message must be the first"),
        (user(""), 0, "the prompt is empty"),
        (user(" \n\t"), 0, "the prompt is empty"),
        ([Message("user", "a"), Message("assistant", "b"), Message("user", " ")], 0, "the prompt is empty"),
        (user("<image> <image>"), 1, "2 <image> marks for 1 images"),
        (user("<image>"), 3, "1 <image> marks for 3 images"),
        (user("a\ud800"), 0, "surrogate"),
        ([Message("user", [ImagePart(), TextPart("a")])], 0, "1 image parts in the messages, 0 images were sent"),
        ([Message("user", [ImagePart(), TextPart("a")])], 2, "1 image parts in the messages, 2 images were sent"),
        ([Message("user", [ImagePart(), TextPart("a")]), Message("user", "<image>")], 2, "1 image parts"),
        ([Message("assistant", [ImagePart()]), Message("user", "a")], 1, "role assistant holds an image"),
        ([Message("user", [])], 0, "the prompt is empty"),
        ([Message("user", [TextPart(" "), TextPart("\n")])], 0, "the prompt is empty"),
    ],
)
def test_bad_conversation_is_a_request_error(
    messages: list[Message], images: int, message: str, byte_tokenizer: Tokenizer
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        PromptEncoder(X, byte_tokenizer).encode(messages, [1] * images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a non-empty list"),
        ([], "messages must be a non-empty list"),
        ({"role": "user", "content": "a"}, "messages must be a non-empty list"),
        (["a"], r"messages\[0\] must be an object"),
        ([{"role": "user"}], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": "a", "name": "b"}], r"messages\[0\] must be an object"),
        (
            [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
            r"messages\[1\]\.role 'tool' is not one",
        ),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role"),
        ([{"role": "x" * 10_000, "content": "a"}], r"^messages\[0\]\.role .{,100}$"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "photo"}]}], r"part 1 must be \{"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"part 0 must be \{"),
        ([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}], r"part 0 must be \{"),
    ],
)
def test_malformed_messages_are_request_errors(messages: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_messages(messages)


def test_parse_messages() -> None:
    parsed = parse_messages([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    assert parsed == [Message("system", "a"), Message("user", "b")]


def test_parse_messages_with_parts() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    parsed = parse_messages([{"role": "user", "content": content}])
    assert parsed == [Message("user", [TextPart("a"), ImagePart(), TextPart("b")])]


def test_tokenizer_larger_than_the_models_vocabulary_is_a_config_error(byte_tokenizer: Tokenizer) -> None:
    small = replace(D, llm=replace(D.llm, vocab_size=268))
    with pytest.raises(ConfigError, match="269 ids, the model's vocab_size is 268"):
        PromptEncoder(small, byte_tokenizer)


def test_tokenizer_without_image_token_needs_it_in_the_config() -> None:
    yi, _ = YI
    with pytest.raises(ConfigError, match="set image_token_id in config"):
        PromptEncoder(D, yi)
    assert PromptEncoder(replace(D, image_token_id=500), yi).encode(user("a <image>"), [1]).placeholders == T
