"""Tests running a set on real tiny models: scores, interruptions, and results of another run, which are refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.errors import EngineError, NvlmError, RequestError
from nvlm_trt.evaluation.accuracy import (
    EvalOptions,
    Summary,
    agreement,
    document,
    evaluate,
    run_header,
    summarise,
)
from nvlm_trt.evaluation.answerers import Answerer, Answers, EngineAnswerer, ReferenceAnswerer
from nvlm_trt.evaluation.results import ResultsFile, read_results
from nvlm_trt.evaluation.samples import Sample, digest_of
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline

Directory = Callable[[str], Path]
OPTIONS = EvalOptions(max_tokens=32)  # enough for every sample below to have an answer of its own
ENGINES = ("nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny")


def image_file(seed: int, width: int = 168, height: int = 112) -> bytes:
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse([10 * seed, 10, 10 * seed + 60, 70], fill=(40 * seed % 255, 80, 160))
    draw.text((10, 80), f"number {seed}", fill="black", font_size=20)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


SAMPLES = [
    Sample("wide", "number", "What is the number?", "1", (image_file(1),)),
    Sample("one tile", "number", "What is the number?", "2", (image_file(2, 56, 56),)),
    Sample("two", "compare", "Is <image> like <image>?", "no", (image_file(3), image_file(4, 168, 56)), "contains"),
    Sample("reversed", "compare", "Is <image> like <image>?", "no", (image_file(4, 168, 56), image_file(3)), "anls"),
    Sample("small ones", "compare", "Compare.", "no", (image_file(5, 56, 56), image_file(6, 56, 56))),
    Sample("hello", "words", "Say hello.", "hello"),
    Sample("sum", "words", "2 + 2 =", "4", metric="numeric"),
]
NAMES = [sample.name for sample in SAMPLES]


def run(
    answerer: Answerer, path: Path | None = None, samples: Sequence[Sample] = SAMPLES, options: EvalOptions = OPTIONS
) -> tuple[Summary, dict[str, str]]:
    header = run_header(digest_of(samples), len(samples), answerer, options)
    with ResultsFile(path, header, [sample.name for sample in samples]) as results:
        summary = evaluate(samples, answerer, results, options)
        results.publish(document(samples, results, summary, options))
    return summary, results.answers


class Counting(EngineAnswerer):
    """Asks the real engine and records the samples. May fail after some answers, as a dying engine does."""

    def __init__(self, path: Path, fail_after: int | None = None) -> None:
        super().__init__(path, OPTIONS.max_tokens, concurrency=1)
        self.asked: list[str] = []
        self._fail_after = fail_after

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return super().answers(sample for sample in samples if not self.asked.append(sample.name))  # type: ignore[func-returns-value]

    def _ask(self, sample: Sample) -> str:
        if self._fail_after is not None and len(self.asked) > self._fail_after:
            raise EngineError("the engine failed; restart it")
        return super()._ask(sample)


@pytest.mark.parametrize("name", ENGINES)
def test_engine_and_reference_answer_alike(exact_engine: Directory, checkpoint: Directory, name: str) -> None:
    _, ours = run(EngineAnswerer(exact_engine(name), OPTIONS.max_tokens))
    _, theirs = run(ReferenceAnswerer(checkpoint(name), OPTIONS.max_tokens))
    assert set(ours) == set(NAMES)
    assert len(set(ours.values())) == len(SAMPLES), "answers that do not differ prove little"
    assert agreement(ours, theirs).differing == ()


def test_both_end_at_a_stop_token_and_leave_it_out(engine: Directory, checkpoint: Directory, tmp_path: Path) -> None:
    """Uses a checkpoint in which <|im_end|> is a little likelier than the sixth token of an answer."""
    name, hello = "nvlm-d-tiny", SAMPLES[5]
    request = ChatRequest([Message("user", hello.prompt)], (), SamplingParams(max_tokens=24))
    with Pipeline.open(engine(name)) as pipeline:
        ids = [token_id for delta in pipeline.generate(request) for token_id in delta.token_ids]
    copy = Path(shutil.copytree(checkpoint(name), tmp_path / "checkpoint"))
    tokenizer = Tokenizer.from_directory(copy)
    tensors = load_file(copy / "model.safetensors")
    head = tensors["language_model.lm_head.weight"].copy()  # [vocab, hidden]
    head[tokenizer.token_id("<|im_end|>")] = 1.05 * head[ids[5]]
    save_file(tensors | {"language_model.lm_head.weight": head}, copy / "model.safetensors")
    expected = tokenizer.decode(ids[: ids.index(ids[5])])
    _, ours = run(EngineAnswerer(build_engine(copy, tmp_path / "engine").path, OPTIONS.max_tokens))
    _, theirs = run(ReferenceAnswerer(copy, OPTIONS.max_tokens))
    assert ours["hello"] == expected
    assert agreement(ours, theirs).differing == ()


def test_answers_do_not_depend_on_concurrency(engine: Directory) -> None:
    together = run(EngineAnswerer(engine("nvlm-h-tiny"), OPTIONS.max_tokens, concurrency=20))
    alone = run(EngineAnswerer(engine("nvlm-h-tiny"), OPTIONS.max_tokens, concurrency=1))
    assert together == alone


def test_known_answers_score_and_others_do_not(engine: Directory) -> None:
    """For half of the samples, the known answers are the model's own answers."""
    path = engine("nvlm-h-tiny")
    _, answers = run(EngineAnswerer(path, OPTIONS.max_tokens))
    samples = [
        Sample("a", "read", SAMPLES[0].prompt, answers["wide"], SAMPLES[0].images),
        Sample("b", "read", SAMPLES[1].prompt, "never this", SAMPLES[1].images),
        Sample("c", "look", SAMPLES[1].prompt, answers["one tile"], SAMPLES[1].images),
        Sample("d", "talk", SAMPLES[5].prompt, "never this"),
    ]
    summary, _ = run(EngineAnswerer(path, OPTIONS.max_tokens), samples=samples)
    assert [(t.kind, t.task, t.count, t.score) for t in summary.tasks] == [
        ("image", "read", 2, 0.5),
        ("image", "look", 1, 1.0),
        ("text", "talk", 1, 0.0),
    ]
    image, text = summary.group("image"), summary.group("text")
    assert image is not None
    assert text is not None
    assert (image.tasks, image.count, image.score) == (2, 3, 0.75)  # of the tasks, not of the samples
    assert (text.tasks, text.count, text.score) == (1, 1, 0.0)
    assert (summary.overall.tasks, summary.overall.count, summary.overall.score) == (3, 4, 0.5)
    assert image.low < image.score < image.high


def test_a_task_with_and_without_images_is_in_both_parts() -> None:
    samples = [Sample("a", "mixed", "?", "yes", (b"png",)), Sample("b", "mixed", "?", "yes", metric="anls")]
    summary = summarise(samples, {"a": "yes", "b": "no"}, OPTIONS)
    assert [(t.kind, t.metric, t.score) for t in summary.tasks] == [("image", "exact", 1.0), ("text", "anls", 0.0)]
    assert summarise(samples[1:], {"b": "yes"}, OPTIONS).group("image") is None


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "results.json"


def partial(path: Path) -> Path:
    return path.with_name("results.json.partial")


def test_an_engine_that_dies_in_the_middle_loses_nothing(engine: Directory, path: Path) -> None:
    directory = engine("nvlm-d-tiny")
    with pytest.raises(EngineError) as caught:
        run(Counting(directory, fail_after=3), path)
    assert "restart it (3 of 7 answers are kept in" in str(caught.value)
    assert "run the same command to go on" in str(caught.value)
    assert len(partial(path).read_text().splitlines()) == 1 + 3
    again = Counting(directory)
    resumed = run(again, path)
    assert again.asked == NAMES[3:]
    assert resumed == run(Counting(directory))
    assert not partial(path).exists()
    assert [entry["name"] for entry in json.loads(path.read_text())["answers"]] == NAMES
    assert list(path.parent.iterdir()) == [path]


def test_without_a_file_the_error_says_that_nothing_is_kept(engine: Directory) -> None:
    with pytest.raises(EngineError, match=r"nothing is kept; with --output"):
        run(Counting(engine("nvlm-d-tiny"), fail_after=2))


def test_a_line_that_was_cut_is_asked_again(engine: Directory, path: Path) -> None:
    """The last line is cut at every place, as by a full disk or a machine that stops."""
    directory = engine("nvlm-d-tiny")
    with pytest.raises(EngineError):
        run(Counting(directory, fail_after=5), path)
    whole = partial(path).read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    expected = run(Counting(directory))
    for cut in (start, start + 1, len(whole) - 2, len(whole) - 1):
        path.unlink(missing_ok=True)
        partial(path).write_bytes(whole[:cut])
        again = Counting(directory)
        assert run(again, path) == expected
        assert again.asked == NAMES[4:]


def test_a_run_that_is_cut_twice(engine: Directory, path: Path) -> None:
    directory = engine("nvlm-d-tiny")
    for done in (3, 2):
        with pytest.raises(EngineError):
            run(Counting(directory, fail_after=done), path)
        partial(path).write_bytes(partial(path).read_bytes()[:-5])
    again = Counting(directory)
    assert run(again, path) == run(Counting(directory))
    assert again.asked == NAMES[3:]


def test_every_answer_is_on_disk_before_the_next_is_asked(engine: Directory, path: Path) -> None:
    lines = []

    class Looking(Counting):
        def _ask(self, sample: Sample) -> str:
            lines.append(partial(path).read_bytes().count(b"\n"))
            return super()._ask(sample)

    run(Looking(engine("nvlm-d-tiny")), path)
    assert lines == [1, 2, 3, 4, 5, 6, 7]  # the header is one


def test_a_header_that_was_cut_starts_afresh(engine: Directory, path: Path) -> None:
    directory = engine("nvlm-d-tiny")
    with pytest.raises(EngineError):
        run(Counting(directory, fail_after=1), path)
    partial(path).write_bytes(partial(path).read_bytes()[:20])
    again = Counting(directory)
    run(again, path)
    assert again.asked == NAMES


def test_a_finished_run_is_not_asked_again_and_stays_as_it_is(engine: Directory, path: Path) -> None:
    first = run(Counting(engine("nvlm-d-tiny")), path)
    written = path.read_bytes()
    again = Counting(engine("nvlm-d-tiny"))
    assert run(again, path) == first
    assert again.asked == []
    assert path.read_bytes() == written


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_something_else_are_refused_and_kept(engine: Directory, path: Path, finished: bool) -> None:
    def attempt(name: str, samples: Sequence[Sample], options: EvalOptions) -> str:
        with pytest.raises(RequestError) as caught:
            run(EngineAnswerer(engine(name), options.max_tokens), path, samples, options)
        assert "choose another --output" in str(caught.value)
        return str(caught.value)

    if finished:
        run(Counting(engine("nvlm-d-tiny")), path)
    else:
        with pytest.raises(EngineError):
            run(Counting(engine("nvlm-d-tiny"), fail_after=2), path)
    file = path if finished else partial(path)
    before = file.read_bytes()
    assert "another model (source=engine name=nvlm-d-tiny" in attempt("nvlm-x-tiny", SAMPLES, OPTIONS)
    assert "another sample set (count=7" in attempt("nvlm-d-tiny", SAMPLES[:-1], OPTIONS)
    assert "other options (max_tokens=32" in attempt("nvlm-d-tiny", SAMPLES, EvalOptions(max_tokens=9))
    assert file.read_bytes() == before


def test_the_reference_is_another_model_than_its_engine(engine: Directory, checkpoint: Directory, path: Path) -> None:
    run(Counting(engine("nvlm-d-tiny")), path)
    with pytest.raises(RequestError, match="another model"):
        run(ReferenceAnswerer(checkpoint("nvlm-d-tiny"), OPTIONS.max_tokens), path)


@pytest.mark.parametrize("damage", [b"{}\n", b"null\n", b"{\n", b"\xff\n", b'{"name": "x"}\n'])
def test_damaged_files_are_named(engine: Directory, path: Path, damage: bytes) -> None:
    with pytest.raises(EngineError):
        run(Counting(engine("nvlm-d-tiny"), fail_after=2), path)
    with partial(path).open("ab") as file:
        file.write(damage)
    with pytest.raises(RequestError, match=r"results\.json\.partial line 4 is damaged"):
        run(Counting(engine("nvlm-d-tiny")), path)
    path.write_bytes(damage)
    with pytest.raises(RequestError, match=r"results\.json is not a results file"):
        run(Counting(engine("nvlm-d-tiny")), path)
    with pytest.raises(RequestError, match="is not a results file"):
        read_results(path)


def test_a_place_that_cannot_be_written_is_named_before_anything_is_asked(engine: Directory, tmp_path: Path) -> None:
    answerer = Counting(engine("nvlm-d-tiny"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NvlmError, match="cannot write"):
        run(answerer, tmp_path / "file" / "results.json")
    with pytest.raises(RequestError, match="is a folder"):
        run(answerer, tmp_path)
    assert answerer.asked == []


# --- one sample that cannot be asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["engine", "reference"])
def test_a_sample_that_the_model_cannot_take_is_named(engine: Directory, checkpoint: Directory, source: str) -> None:
    answerer: Answerer = (
        EngineAnswerer(engine("nvlm-d-tiny"), 4)
        if source == "engine"
        else ReferenceAnswerer(checkpoint("nvlm-d-tiny"), 4)
    )
    bad = Sample("marks", "task", "<image> and <image>", "x", (image_file(1),))
    with pytest.raises(RequestError, match="sample marks: 2 <image> marks for 1 images"):
        run(answerer, samples=[SAMPLES[0], bad], options=EvalOptions(4))


def test_what_is_under_way_when_one_fails_is_kept(engine: Directory, path: Path) -> None:
    bad = Sample("bad", "task", "<image> and <image>", "x", (image_file(1),))
    with pytest.raises(RequestError, match="3 of 4 answers are kept"):
        run(EngineAnswerer(engine("nvlm-d-tiny"), OPTIONS.max_tokens, concurrency=4), path, [bad, *SAMPLES[:3]])


# --- agreement ------------------------------------------------------------------------------------------------------


def test_agreement_counts_and_names() -> None:
    same = agreement({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    assert (same.equal, same.total, same.differing) == (2, 2, ())
    other = agreement({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "2 ", "d": "4"})
    assert (other.equal, other.total, other.differing) == (1, 4, ("b", "c", "d"))
