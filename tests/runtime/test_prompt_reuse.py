"""Tests which prompts are kept, taken over and dropped. test_scheduler.py tests that answers stay the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from toy_backend import Asked, Receiver, ToyBackend, ask, byte_tokenizer, follow_up, tokens_alone, with_other_image

from nvlm_trt.api import SamplingParams
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.scheduler import Scheduler

CHUNK = 8
SHORT = SamplingParams(3, ignore_eos=True)
LONG = SamplingParams(30, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(directory)


class Server:
    """A scheduler over a toy, and what it does with one question after the other."""

    def __init__(self, tokenizer: Tokenizer, slots: int = 3, reuse: bool = True) -> None:
        self.tokenizer = tokenizer
        self.backend = ToyBackend(tokenizer.image_token_id, max_slots=slots)
        self.scheduler = Scheduler(self.backend, tokenizer, 20, CHUNK, reuse)

    def submit(self, asked: Asked) -> Receiver:
        receiver = Receiver(asked.sampling.n)
        self.scheduler.enqueue(asked.request(receiver))
        return receiver

    def run(self) -> None:
        while self.scheduler.has_work:
            self.scheduler.step()

    def cached(self, asked: Asked) -> int:
        """Asks, checks the answer, and returns how many tokens of the prompt were taken over."""
        receiver = self.submit(asked)
        self.run()
        assert receiver.token_ids == tokens_alone(self.backend, self.tokenizer, asked)
        assert receiver.usage is not None
        return receiver.usage.cached_tokens


def question(tokenizer: Tokenizer, index: int, images: int = 0, length: int = 20) -> Asked:
    return ask(tokenizer.image_token_id, index, length, images, SHORT, first_token=100 + index)


def test_a_second_question_takes_over_the_whole_chunks_of_the_first(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    first = question(tokenizer, 0, images=2)
    size = len(first.prompt.input_ids)
    assert server.cached(first) == 0
    for kept in (size, 19, 17, 16, 15, 9, 7):
        assert server.cached(follow_up(first, kept, seed=kept, length=9, sampling=SHORT)) == kept // CHUNK * CHUNK
    metrics = server.scheduler.metrics()
    assert metrics.cached_tokens > 0
    prefilled = sum(tokens for kind, tokens in server.backend.calls if kind == "prefill")
    assert metrics.prompt_tokens == metrics.cached_tokens + prefilled


def test_the_last_token_of_a_prompt_is_read_again(tokenizer: Tokenizer) -> None:
    """Its logits are needed."""
    server = Server(tokenizer)
    asked = question(tokenizer, 0, length=2 * CHUNK)
    assert server.cached(asked) == 0
    assert server.cached(asked) == CHUNK
    longer = question(tokenizer, 1, length=2 * CHUNK + 1)
    assert server.cached(longer) == 0
    assert server.cached(longer) == 2 * CHUNK


def test_nothing_is_taken_over_if_that_is_off(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, reuse=False)
    asked = question(tokenizer, 0)
    assert [server.cached(asked), server.cached(asked)] == [0, 0]
    assert server.scheduler.metrics().kept_prompts == 0


@pytest.mark.parametrize("index", [0, 1])
def test_images_with_the_same_tokens_share_only_what_comes_before_them(tokenizer: Tokenizer, index: int) -> None:
    """The images are read from token 9 and 17 on."""
    server = Server(tokenizer)
    asked = question(tokenizer, 3, images=2, length=30)
    ids = np.full(len(asked.prompt.input_ids), 70)
    one, two = (len(image.embeddings) for image in asked.images)
    ids[9 : 9 + one] = ids[17 : 17 + two] = tokenizer.image_token_id
    of_first, of_both = asked.images[0].cross_tokens, asked.prompt.cross_tokens
    ranges = np.zeros_like(asked.prompt.cross_ranges)
    ranges[9:, 1], ranges[17:, 1] = of_first, of_both
    asked = dataclasses.replace(asked, prompt=dataclasses.replace(asked.prompt, input_ids=ids, cross_ranges=ranges))
    assert server.cached(asked) == 0
    assert server.cached(with_other_image(asked, index)) == (CHUNK, 2 * CHUNK)[index]
    assert server.cached(asked) == len(ids) // CHUNK * CHUNK


def test_an_image_without_a_key_is_like_no_other(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    asked = dataclasses.replace(question(tokenizer, 3, images=3), image_keys=None)
    first = int(np.flatnonzero(asked.is_image | (asked.prompt.cross_ranges[:, 1] > 0))[0])
    server.cached(asked)
    assert server.cached(asked) == first // CHUNK * CHUNK


def test_the_least_recently_used_prompt_goes_first(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, slots=3)
    a, b, c, d = (question(tokenizer, index) for index in range(4))
    assert [server.cached(asked) for asked in (a, b, c)] == [0, 0, 0]
    assert server.scheduler.metrics().kept_prompts == 3
    assert server.cached(a) == 2 * CHUNK
    assert server.cached(d) == 0  # in place of b
    assert [server.cached(asked) for asked in (a, c, d)] == [2 * CHUNK] * 3
    assert server.cached(b) == 0


def test_a_prompt_that_another_contains_is_kept_once(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    asked = question(tokenizer, 0)
    server.cached(asked)
    server.cached(asked)
    assert server.scheduler.metrics().kept_prompts == 1
    longer = follow_up(asked, 20, seed=1, length=20, sampling=SHORT)
    assert server.cached(longer) == 2 * CHUNK
    assert server.scheduler.metrics().kept_prompts == 1
    assert server.cached(asked) == 2 * CHUNK
    branch = follow_up(asked, 9, seed=2, length=20, sampling=SHORT)
    assert server.cached(branch) == CHUNK
    assert server.scheduler.metrics().kept_prompts == 2
    assert server.cached(longer) == 5 * CHUNK - CHUNK
    assert server.cached(branch) == 3 * CHUNK


def test_a_running_request_lends_its_prompt(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    asked = dataclasses.replace(question(tokenizer, 0, images=1), sampling=LONG)
    running = server.submit(asked)
    for _ in range(5):
        server.scheduler.step()
    assert server.scheduler.metrics().active == 1
    later = follow_up(asked, len(asked.prompt.input_ids), 1, 9, SHORT)
    assert server.cached(later) == len(asked.prompt.input_ids) // CHUNK * CHUNK
    assert running.token_ids == tokens_alone(server.backend, tokenizer, asked)


def test_one_prompt_after_the_other_copies_nothing_that_is_taken_over_whole(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    asked = question(tokenizer, 0)
    for kept in (20, 30, 20):
        server.cached(asked)
        asked = follow_up(asked, min(kept, len(asked.prompt.input_ids)), kept, 9, SHORT)
    assert server.backend.moves == 0


def test_prompts_shorter_than_a_chunk_are_not_kept(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    for index in range(4):
        server.cached(question(tokenizer, index, length=CHUNK - 1))
    assert server.scheduler.metrics().kept_prompts == 0
    assert server.backend.moves == 0


def test_what_a_cancelled_request_has_read_is_kept(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    asked = question(tokenizer, 0, length=40)
    request = asked.request(Receiver())
    server.scheduler.enqueue(request)
    for _ in range(3):
        server.scheduler.step()
    request.cancel()
    server.run()
    assert server.cached(asked) == 3 * CHUNK


def test_what_a_failed_request_has_read_is_not_kept(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    asked = ask(tokenizer.image_token_id, 1, 18, sampling=LONG, first_token=7)  # logits that are not finite
    receiver = server.submit(asked)
    server.run()
    assert receiver.error is not None
    assert server.scheduler.metrics().kept_prompts == 0


def test_kept_prompts_take_no_slot_from_several_answers(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, slots=3)
    for index in range(3):
        server.cached(question(tokenizer, index))
    asked = dataclasses.replace(question(tokenizer, 1), sampling=SamplingParams(5, n=3, ignore_eos=True))
    receiver = server.submit(asked)
    server.run()
    assert receiver.tokens == [tokens_alone(server.backend, tokenizer, asked)] * 3
    assert receiver.usage is not None
    assert receiver.usage.cached_tokens == 2 * CHUNK
    assert server.scheduler.metrics().kept_prompts == 1
