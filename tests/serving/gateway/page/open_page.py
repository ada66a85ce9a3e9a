"""Drives a gateway's page in a browser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from live_gateway import LiveGateway

RECEIPT = Path(__file__).parents[4] / "docs" / "images" / "receipt.png"
QUESTION = "What is the total?"
COUNTED = r"\d+ of \d+ tokens"


class OpenPage:
    """A page in a browser profile of its own. `view` is Playwright's page, `says` one of its assertions."""

    def __init__(self, context: Any) -> None:
        from playwright.sync_api import expect

        self.context = context
        self.view = context.new_page()
        self.says = expect
        self.expected: list[str] = []  # parts of console messages that the test provokes
        self.asked: list[dict[str, Any]] = []  # the bodies of chat completions
        self._messages: list[str] = []
        self.view.on("console", lambda message: self._messages.append(message.text))
        self.view.on("pageerror", lambda error: self._messages.append(str(error)))
        self.view.on("request", self._note)

    @classmethod
    def open(
        cls, chromium: Any, gateway: LiveGateway, width: int = 1280, height: int = 860, **settings: Any
    ) -> OpenPage:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, permissions=["clipboard-read", "clipboard-write"], **settings
        )
        context.set_default_timeout(20_000)
        page = cls(context)
        page.view.goto(f"http://127.0.0.1:{gateway.port}/")
        return page

    def add(self, *files: Path) -> None:
        """Choose images, and wait until they are counted."""
        self.view.locator("#files").set_input_files([str(file) for file in files])
        self.says(self.view.locator("#attachments .tag").first).to_be_visible()

    def ask(self, text: str) -> None:
        self.says(self.view.locator("#model")).to_be_visible()
        self.view.locator("#text").fill(text)
        self.view.locator("#text").press("Enter")

    @property
    def answers(self) -> Any:
        return self.view.locator(".answer .text")

    @property
    def fault(self) -> Any:
        return self.view.locator("[role=alert]:not(:empty)")

    def wait_for_answer(self, text: str, index: int = -1) -> None:
        self.says(self.answers.nth(index)).to_have_text(text)
        self.says(self.view.locator("#send")).to_be_visible()

    def figures(self) -> dict[str, str]:
        """The figures under the last answer."""
        pairs = self.view.locator(".answer").last.locator(".figures div")
        names, values = pairs.locator("dt").all_inner_texts(), pairs.locator("dd").all_inner_texts()
        return dict(zip(names, values, strict=True))

    def copied(self, kind: str) -> str:
        """Press one of the buttons copy, curl and python under the last answer, and return what is then in the
        clipboard."""
        button = self.view.locator(f".answer button.{kind}").last
        button.click()
        self.says(button).to_have_text("Copied")
        text: str = self.view.evaluate("navigator.clipboard.readText()")
        return text

    def set(self, **settings: object) -> None:
        for name, value in settings.items():
            self.view.locator(f"#{name}").fill(str(value))
            self.view.locator(f"#{name}").blur()

    def unexpected(self) -> Sequence[str]:
        return [text for text in self._messages if not any(part in text for part in self.expected)]

    def close(self) -> None:
        self.context.close()

    def _note(self, request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            self.asked.append(json.loads(request.post_data))
