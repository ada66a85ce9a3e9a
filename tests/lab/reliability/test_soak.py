"""Sees planted errors, other answers, leaks and drift."""

from __future__ import annotations

import itertools
import os
import time

from lab.reliability import soak
from lab.reliability.answers import FirstAnswers
from lab.reliability.memory import growth
from lab.reliability.question import KINDS, SoakQuestion, questions
from lab.reliability.soak_course import Ask, SoakCourse, Stretch
from lab.reliability.wire import Reply
from nvlm_trt.errors import RequestError


def answer(question: SoakQuestion) -> Reply:
    """Answers as a sound server does."""
    time.sleep(0.005)
    if question.wrong:
        return Reply(error=RequestError("no"))
    tokens = tuple(range(question.max_tokens))
    return Reply(tokens[: question.leaves_after])


def soaked(ask: Ask, seconds: float = 1.5) -> Stretch:
    course = SoakCourse(ask, questions(1), lambda: {"toy": os.getpid()}, lambda: {}, concurrency=4)
    return course.run(seconds, lambda: True, lambda stretch: None)


def test_a_sound_server_passes() -> None:
    stretch = soaked(answer)
    assert (stretch.errors, stretch.differing, stretch.lines) == (0, 0, [])
    assert sum(stretch.requests.values()) > 100
    assert stretch.first_p95_ms > 4


def test_a_planted_other_answer_is_seen() -> None:
    counter = itertools.count()

    def ask(question: SoakQuestion) -> Reply:
        reply = answer(question)
        if question.kind == "cached image" and next(counter) == 10:
            return Reply((*reply.tokens[:5], 999, *reply.tokens[6:]))
        return reply

    stretch = soaked(ask)
    assert stretch.differing == 1
    assert "cached image: image " in stretch.lines[0]
    assert "token 5 of 24 differs" in stretch.lines[0]
    assert "1 other answers" in soak.faults(stretch)[0]


def test_planted_errors_are_seen() -> None:
    def ask(question: SoakQuestion) -> Reply:
        if question.kind == "three images":
            return Reply(broken="the connection ended")
        return Reply((1,)) if question.wrong else answer(question)

    stretch = soaked(ask)
    assert stretch.errors >= 2
    assert {line.split(":")[0] for line in stretch.lines} == {"three images", "a wrong request"}


def test_growth_and_drift_are_faults() -> None:
    good = Stretch(growth_mb={"nvlm": 1.0}, growth_percent={"nvlm": 1.9}, first_p95_ms=100, last_p95_ms=109)
    bad = Stretch(growth_mb={"nvlm": 9.0}, growth_percent={"nvlm": 2.1}, first_p95_ms=100, last_p95_ms=111)
    assert soak.faults(good) == []
    assert soak.faults(bad) == ["nvlm grew by 2.1 % (9.0 MiB), more than 2 %", "p95 went from 100 to 111 ms, +11 %"]


def test_answers_are_compared_with_the_first() -> None:
    first = FirstAnswers()
    assert first.difference("a", (1, 2, 3), whole=True) == ""
    assert first.difference("a", (1, 2), whole=False) == ""
    assert first.difference("a", (1, 2), whole=True)
    assert first.difference("a", (1, 9), whole=False)
    assert first.difference("b", (1,), whole=False) == ""
    assert first.difference("b", (1, 2), whole=False) == ""
    assert first.difference("b", (1, 3), whole=False)


def test_every_kind_of_question_comes_as_often() -> None:
    kinds = [question.kind for question in itertools.islice(questions(1), 5 * len(KINDS))]
    assert {kinds.count(kind) for kind in set(kinds)} <= {5, 10}
    assert len(set(kinds)) == 8


def test_growth_leaves_out_the_warm_up_and_moments() -> None:
    flat = [50.0] * 30 + [100.0] * 70
    found = growth(flat)
    assert found is not None
    assert found.mebibytes == 0
    flat[60] = 900.0
    assert growth(flat) == found
    rising = growth([100.0 + number for number in range(100)])
    assert rising is not None
    assert 45 < rising.mebibytes < 60
    assert growth([1.0] * 5) is None
