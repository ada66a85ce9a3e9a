"""Tests tokenizers without tokenizer.json against transformers' Qwen2Tokenizer, added tokens, and stop ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained_tokenizers import QWEN2_SPECIAL, train_qwen2_like, train_yi_like
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.errors import ConfigError
from nvlm_trt.model.hf_config import read_config
from nvlm_trt.prompt.tokenizer import Tokenizer

Directory = Callable[[str], Path]

# a line in each script that Unicode's table of blocks begins with, and what tokenizers get wrong: numbers,
# contractions, spaces of many widths, line ends, composed and decomposed letters, emoji of several code points
EVERY_SCRIPT = """Latin: The quick brown fox's don't; ÀÉÎÕÜ àéîõü, Straße, Łódź, ĳ, ﬁ
Greek: Ξεσκεπάζω την ψυχοφθόρα βδελυγμία Cyrillic: Съешь ещё этих мягких французских булок
Armenian: Բարեւ աշխարհ Hebrew: שָׁלוֹם עולם Arabic: مرحبا بالعالم ١٢٣ Syriac: ܫܠܡܐ Thaana: ހެޔޮ
Devanagari: नमस्ते दुनिया १२३ Bengali: ওহে বিশ্ব Gurmukhi: ਸਤ ਸ੍ਰੀ ਅਕਾਲ Gujarati: નમસ્તે Oriya: ନମସ୍କାର
Tamil: வணக்கம் Telugu: నమస్కారం Kannada: ನಮಸ್ಕಾರ Malayalam: നമസ്കാരം Sinhala: ආයුබෝවන්
Thai: สวัสดีชาวโลก Lao: ສະບາຍດີ Tibetan: བཀྲ་ཤིས Burmese: မင်္ဂလာပါ Georgian: გამარჯობა Hangul: 안녕하세요 ᄒᆞᆫ
Ethiopic: ሰላም Cherokee: ᎣᏏᏲ Khmer: សួស្តី Mongolian: ᠰᠠᠶᠢᠨ Han: 你好，世界 漢字 Kana: こんにちは カタカナ ｶﾅ
Gothic: 𐌷𐌰𐌹𐌻𐍃 Cuneiform: 𒀀𒁀 Egyptian: 𓀀𓂀 Mathematics: ∀x∈ℝ: ⌈x⌉ ≥ x, 𝒳² Braille: ⠓⠑⠇⠇⠕ Music: 𝄞
Emoji: 😀👩‍👩‍👧‍👦🏳️‍🌈👋🏽 e\u0301 é Å\u030a ﷺ \u200b\u00a0\u3000\u2028 tab\tand  two   three\r\n\r\n  12345 ３４ ½ Ⅷ"""


def write_vocabulary(directory: Path, **config: object) -> Path:
    """Write Qwen2's files without tokenizer.json: vocab.json, merges.txt, tokenizer_config.json."""
    directory.mkdir(exist_ok=True)
    spec = json.loads(train_qwen2_like().to_str())
    (directory / "vocab.json").write_text(json.dumps(spec["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"])]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(token["id"]): {flag: token[flag] for flag in flags} for token in spec["added_tokens"]}
    defaults = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps({**defaults, **config}))
    return directory


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def qwen2(vocabulary: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(vocabulary)
    assert type(tokenizer) is Qwen2Tokenizer
    return tokenizer


def test_a_text_of_every_script(vocabulary: Path, qwen2: PreTrainedTokenizerBase) -> None:
    ours = Tokenizer.from_directory(vocabulary)
    assert ours.encode(EVERY_SCRIPT) == qwen2.encode(EVERY_SCRIPT)
    for line in EVERY_SCRIPT.splitlines():
        assert ours.encode(line) == qwen2.encode(line)
        assert ours.decode(qwen2.encode(line)) == qwen2.decode(qwen2.encode(line))
    assert ours.vocab_size == len(qwen2)
    for name in (*QWEN2_SPECIAL, "<tool_call>"):
        assert ours.token_id(name) == qwen2.convert_tokens_to_ids(name)


@given(text=st.text(max_size=60).filter(lambda text: not any(name in text for name in QWEN2_SPECIAL)))
def test_any_text(vocabulary: Path, qwen2: PreTrainedTokenizerBase, text: str) -> None:
    assert Tokenizer.from_directory(vocabulary).encode(text) == qwen2.encode(text)


def test_an_engine_gets_a_tokenizer_json(vocabulary: Path, checkpoint: Directory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("nvlm-d-tiny"), tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(vocabulary / name, source)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "image_token_id": None}))
    assert read_config(source).image_token_id == Tokenizer.from_directory(vocabulary).token_id("<|vision_pad|>")
    engine = build_engine(source, tmp_path / "engine")
    assert not (engine.path / "vocab.json").exists()
    text = "<tile_1> and <|im_start|>"
    assert Tokenizer.from_directory(engine.path).encode(text) == Tokenizer.from_directory(vocabulary).encode(text)


class TestAddedTokens:
    def test_of_a_save_before_transformers_4_34(self, vocabulary: Path, tmp_path: Path) -> None:
        write_vocabulary(tmp_path, added_tokens_decoder=None)
        whole = Tokenizer.from_directory(vocabulary)
        names = (*QWEN2_SPECIAL, "<tool_call>")
        (tmp_path / "added_tokens.json").write_text(json.dumps({name: whole.token_id(name) for name in names}))
        special = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": QWEN2_SPECIAL}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
        old = Tokenizer.from_directory(tmp_path)
        for text in ("<|im_end|><tool_call>", EVERY_SCRIPT):
            assert old.encode(text) == whole.encode(text)
        assert [old.token_id(name) for name in names] == [whole.token_id(name) for name in names]

    def test_beside_tokenizer_json(self, tmp_path: Path) -> None:
        """A fine-tune that adds a token may write it into tokenizer_config.json alone."""
        raw = train_qwen2_like()
        raw.save(str(tmp_path / "tokenizer.json"))
        count = raw.get_vocab_size()
        config = {"added_tokens_decoder": {str(count): {"content": "<ref>", "special": True}}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert (tokenizer.token_id("<ref>"), tokenizer.vocab_size) == (count, count + 1)
        assert count not in tokenizer.encode("<ref>")
        config = {"added_tokens_decoder": {str(count + 5): {"content": "<ref>"}}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=rf"<ref> the id {count}, its files say {count + 5}"):
            Tokenizer.from_directory(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
            ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
            ("tokenizer_config.json", "[]"),
            ("added_tokens.json", '{"a": "b"}'),
            ("special_tokens_map.json", '{"eos_token": 3}'),
        ],
    )
    def test_malformed_files(self, tmp_path: Path, name: str, content: str) -> None:
        train_qwen2_like().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            Tokenizer.from_directory(tmp_path)

    def test_an_id_behind_a_hole(self, tmp_path: Path) -> None:
        """`tokenizers` gives such a token the next free id, and says nothing."""
        raw = json.loads(train_qwen2_like().to_str())
        raw["added_tokens"].append({**raw["added_tokens"][-1], "id": 5000, "content": "<|beyond|>"})
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match=r"<\|beyond\|> the id \d+, its files say 5000; restore the files"):
            Tokenizer.from_directory(tmp_path)


class TestStopIds:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        train_qwen2_like().save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def read(self, directory: Path, eos: object) -> Tokenizer:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.5}))
        return Tokenizer.from_directory(directory)

    def test_those_of_the_generation_config_are_added(self, directory: Path) -> None:
        plain = Tokenizer.from_directory(directory).stop_ids
        assert len(plain) == 2
        assert self.read(directory, 7).stop_ids == plain | {7}
        assert self.read(directory, [8, 9]).stop_ids == plain | {8, 9}
        assert self.read(directory, None).stop_ids == plain

    @pytest.mark.parametrize("eos", [-1, "x", [1.5], [True], {"a": 1}, 1_000_000])
    def test_mistakes(self, directory: Path, eos: object) -> None:
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
            self.read(directory, eos)

    def test_an_engine_ends_its_answers_there(self, checkpoint: Directory, tmp_path: Path) -> None:
        from nvlm_trt.api import ChatRequest, Message, SamplingParams
        from nvlm_trt.runtime.pipeline import Pipeline

        source = Path(shutil.copytree(checkpoint("nvlm-d-tiny"), tmp_path / "source"))

        def first_tokens(name: str) -> tuple[list[int], str | None]:
            build_engine(source, tmp_path / name)
            with Pipeline.open(tmp_path / name) as pipeline:
                deltas = list(
                    pipeline.generate(ChatRequest([Message("user", "hello")], (), SamplingParams(max_tokens=6)))
                )
            return [token for delta in deltas for token in delta.token_ids], deltas[-1].finish_reason

        tokens, reason = first_tokens("plain")
        assert (len(tokens), reason) == (6, "length")
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[3]]}))
        stopped, reason = first_tokens("stopped")
        assert reason == "stop"
        assert stopped[:3] == tokens[:3]
        assert len(stopped) <= 4


class TestRefused:
    def test_a_vocabulary_of_another_tokenizer(self, tmp_path: Path) -> None:
        write_vocabulary(tmp_path, tokenizer_class="GPT2Tokenizer")
        with pytest.raises(ConfigError, match="not of|does not say that they are of Qwen2Tokenizer .*GPT2Tokenizer"):
            Tokenizer.from_directory(tmp_path)

    def test_sentencepiece(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(b"\n")
        with pytest.raises(ConfigError, match="only SentencePiece's tokenizer.model; convert it"):
            Tokenizer.from_directory(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [("merges.txt", "a b c\n"), ("merges.txt", "zz qq\n"), ("vocab.json", '{"a": "b"}'), ("vocab.json", "{")],
    )
    def test_malformed_files(self, tmp_path: Path, name: str, content: str) -> None:
        write_vocabulary(tmp_path)
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match="vocab.json and merges.txt are not a byte-level BPE"):
            Tokenizer.from_directory(tmp_path)


def test_a_converted_tokenizer_of_another_family_still_works(tmp_path: Path) -> None:
    train_yi_like().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).encode("hello")
