"""The page's controls in a real browser: stopping, keyboard, key, errors, its policy, narrow and dark screens."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_calls import ENDLESS, png, wait_until
from live_gateway import MAX_QUEUE, LiveGateway, open_gateway
from open_page import COUNTED, RECEIPT, OpenPage

from nvlm_trt.serving.gateway.auth import ApiKeys
from nvlm_trt.serving.gateway.gateway import GatewayOptions

Open = Callable[..., OpenPage]
KEY = "first-key"
SLOTS = 8
LONG = 3000  # tokens, more than a test waits for


@pytest.fixture(scope="module")
def closed(engine: Callable[[str], Path]) -> Iterator[LiveGateway]:
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions(keys=ApiKeys([KEY]))) as gateway:
        yield gateway


@contextlib.contextmanager
def taken(live: LiveGateway, count: int) -> Iterator[None]:
    """Let others have so many slots, and beyond them places in the queue."""
    with contextlib.ExitStack() as requests:
        for number in range(1, count + 1):
            requests.enter_context(live.begin(live.body(**ENDLESS)))
            wait_until(lambda number=number: live.active + live.queued == number, f"{number} requests are there")
            wait_until(lambda number=number: live.active == min(number, SLOTS), "slots are taken first")
        yield


def answer_for_long(page: OpenPage, live: LiveGateway, patch: pytest.MonkeyPatch) -> None:
    """Make the page's answers last: they go on behind the end of a text, because a random model may end one with any
    token, and a step takes 10 ms, because the browser is slower than a tiny model."""

    def changed(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}, allow_nan=False))

    def decode(*arguments: Any) -> Any:
        time.sleep(0.01)
        return at_once(*arguments)

    backend = live.pipeline._generator._backend
    at_once = backend.decode
    patch.setattr(backend, "decode", decode)
    page.view.route("**/v1/chat/completions", changed)
    page.set(max_tokens=LONG)


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_frees_the_slot_and_keeps_the_text(
    open_page: Open, live: LiveGateway, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    page = open_page(live)
    answer_for_long(page, live, monkeypatch)
    page.ask("Go on")
    page.says(page.answers.first).to_have_text(re.compile("."))
    assert live.active == 1
    if how == "button":
        page.view.locator("#stop").click()
    else:
        page.view.keyboard.press(how)
    live.wait_until_idle()
    page.says(page.view.locator("#send")).to_be_visible()
    text = page.answers.first.text_content()
    assert text
    assert page.figures()["ended"] == "stopped by you"
    page.set(max_tokens=4)
    page.ask("And now?")
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    assert page.asked[1]["messages"][1] == {"role": "assistant", "content": text}
    assert page.figures()["ended"] == "at the most tokens"


def test_stop_before_the_first_token(open_page: Open, live: LiveGateway) -> None:
    page = open_page(live)
    with taken(live, SLOTS):
        page.ask("Wait")
        wait_until(lambda: live.queued == 1, "the page's request waits")
        page.view.keyboard.press("Escape")
        wait_until(lambda: live.queued == 0, "the page's request is gone")
    live.wait_until_idle()
    page.set(max_tokens=4)
    page.ask("Now")
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    assert [message["content"] for message in page.asked[1]["messages"]] == ["Now"]


def test_keys_of_the_keyboard(open_page: Open, live: LiveGateway) -> None:
    page = open_page(live)
    page.set(max_tokens=4)
    text = page.view.locator("#text")
    text.focus()
    page.view.keyboard.type("one")
    page.view.keyboard.press("Shift+Enter")
    page.view.keyboard.type("two")
    page.says(text).to_have_value("one\ntwo")
    page.view.keyboard.press("Enter")
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    page.says(page.view.locator(".question .text")).to_have_text("one\ntwo")
    page.says(text).to_have_value("")
    page.view.keyboard.press("Enter")  # nothing to send
    assert len(page.asked) == 1


def test_the_focus_is_seen_and_every_control_has_a_name(open_page: Open, live: LiveGateway) -> None:
    page = open_page(live)
    page.set(max_tokens=4)
    page.add(RECEIPT)
    page.ask("Hi")
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    page.add(RECEIPT)
    names = page.view.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")].filter((e) => e.checkVisibility())
            .map((e) => e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent)"""
    )
    assert len(names) > 15
    assert all(name.strip() for name in names), names
    page.view.locator("#model").focus()
    for _ in range(10):
        page.view.keyboard.press("Tab")
        outline = page.view.evaluate(
            "() => { const style = getComputedStyle(document.activeElement);"
            " return [document.activeElement.tagName, style.outlineStyle, style.outlineWidth] }"
        )
        assert outline[1:] == ["solid", "2px"], outline


def test_a_key_is_asked_for_and_forgotten_with_the_tab(open_page: Open, closed: LiveGateway) -> None:
    page = open_page(closed)
    page.expected.append("401 (Unauthorized)")
    page.says(page.fault).to_contain_text("The API key is missing or wrong")
    page.view.get_by_role("button", name="Enter a key").click()
    page.says(page.view.locator("#key")).to_be_focused()
    page.view.keyboard.type("wrong")
    page.view.keyboard.press("Tab")
    page.says(page.fault).to_contain_text("The API key is missing or wrong")
    page.set(key=KEY)
    page.says(page.view.locator("#model")).to_be_visible()
    page.says(page.fault).to_have_count(0)
    page.set(max_tokens=4)
    page.ask("Hi")
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    assert KEY not in page.view.evaluate("JSON.stringify(localStorage)")
    assert KEY in page.view.evaluate("JSON.stringify(sessionStorage)")
    assert "NVLM_TRT_API_KEY" in page.copied("curl")
    assert KEY not in page.copied("python")


def test_a_full_queue(open_page: Open, live: LiveGateway) -> None:
    page = open_page(live)
    page.expected.append("429 (Too Many Requests)")
    page.set(max_tokens=4)
    page.says(page.view.locator("#model")).to_be_visible()
    with taken(live, SLOTS + MAX_QUEUE):
        page.ask("Hi")
        page.says(page.fault).to_contain_text("The server is busy")
        page.says(page.fault).to_contain_text("Try again in 1 second.")
    live.wait_until_idle()
    page.fault.get_by_role("button", name="Try again").click()
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    page.says(page.fault).to_have_count(0)


def test_a_server_that_is_gone(open_page: Open, live: LiveGateway) -> None:
    page = open_page(live)
    page.expected.append("ERR_INTERNET_DISCONNECTED")
    page.says(page.view.locator("#model")).to_be_visible()
    page.context.set_offline(True)
    page.ask("Hi")
    page.says(page.view.locator(".answer .fault")).to_contain_text("The server cannot be reached")
    page.context.set_offline(False)


def test_a_server_that_stops(open_page: Open, engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_gateway(engine("nvlm-h-tiny"), GatewayOptions()) as gateway:
        page = open_page(gateway)
        page.expected += ["503 (Service Unavailable)", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_REFUSED"]
        answer_for_long(page, gateway, monkeypatch)
        page.ask("Go on")
        page.says(page.answers.first).to_have_text(re.compile("."))
        gateway.server.drain()
        page.view.locator("#text").fill("Hi")
        page.says(page.view.locator("#count-fault")).to_contain_text("The server is not ready")
        gateway.server.close()
        page.says(page.view.locator(".answer .fault")).to_contain_text("The answer broke off")
        page.says(page.view.locator("#count-fault")).to_contain_text("The server cannot be reached")


def test_a_file_that_is_no_image(open_page: Open, live: LiveGateway, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(png()[:60])
    page = open_page(live)
    page.expected.append("400 (Bad Request)")
    page.view.locator("#files").set_input_files(str(file))
    page.says(page.fault).to_contain_text("The server cannot read an image")
    page.says(page.fault).to_contain_text("Remove the image")
    page.view.get_by_role("button", name="Remove broken.png").click()
    page.says(page.fault).to_have_count(0)


def test_the_policy_stops_what_gets_into_the_page(open_page: Open, live: LiveGateway) -> None:
    page = open_page(live)
    page.expected += ["Content Security Policy", "TrustedHTML", "TrustedScript"]
    page.view.evaluate(
        """() => {
            const attempts = [
                () => { document.body.innerHTML = "<p>hit</p>" },
                () => { const s = document.createElement("script"); s.textContent = "window.hit = 1";
                        document.body.append(s) },
                () => { const b = document.createElement("button"); b.setAttribute("onclick", "window.hit = 1");
                        document.body.append(b); b.click() },
                () => { const i = new Image(); i.src = "/health"; document.body.append(i) },
                () => { fetch("https://stranger.example/").catch(() => {}) },
            ];
            for (const attempt of attempts) { try { attempt() } catch (error) { console.log(String(error)) } }
        }"""
    )
    assert page.view.evaluate("window.hit") is None
    page.says(page.view.locator("#composer")).to_be_visible()
    said = "\n".join(page._messages)
    for part in ("TrustedHTML", "TrustedScript", "/health", "stranger.example"):
        assert part in said, (part, said)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(open_page: Open, live: LiveGateway, tmp_path: Path, width: int) -> None:
    page = open_page(live, width=width, height=740)
    if width < 1000:
        page.view.locator("#settings-button").click()
        assert_fits(page)
    page.set(max_tokens=60)
    if width < 1000:
        page.view.keyboard.press("Escape")
        page.says(page.view.locator("#settings")).to_be_hidden()
    wide = tmp_path / f"{'a-very-long-name-' * 6}.png"
    wide.write_bytes(png(width=1200, height=100))
    page.add(wide, RECEIPT)
    page.says(page.view.locator("#count")).to_have_text(re.compile(COUNTED))
    assert_fits(page)
    page.ask("unbroken" * 60)
    page.says(page.view.locator(".answer[data-state=done]")).to_have_count(1)
    for summary in page.view.locator("summary").all():
        summary.click()
    assert_fits(page)


def assert_fits(page: OpenPage) -> None:
    for place in ("html", "#conversation", "#composer", "#attachments"):
        scroll, client = page.view.locator(place).evaluate("place => [place.scrollWidth, place.clientWidth]")
        assert scroll <= client, place
    # six tiles side by side do not fit a phone: their sheet scrolls by itself
    right = page.view.evaluate(
        """() => Math.max(...[...document.querySelectorAll("button, p, canvas, h2, h3, textarea")]
            .filter((e) => e.checkVisibility() && !e.closest(".sheet")).map((e) => e.getBoundingClientRect().right))"""
    )
    assert right <= page.view.viewport_size["width"]


def test_light_and_dark(open_page: Open, live: LiveGateway) -> None:
    page = open_page(live, color_scheme="dark")

    def brightness() -> int:
        colour = page.view.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness() < 150
    page.view.get_by_role("button", name="Light").click()
    assert brightness() > 700
    page.view.reload()
    assert brightness() > 700
    page.view.get_by_role("button", name="Dark").click()
    page.view.emulate_media(color_scheme="light")
    assert brightness() > 700, "the switch is back at what the system says, and follows it"
