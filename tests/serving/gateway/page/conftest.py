"""A headless Chromium of this machine, and pages in it that are checked for errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_gateway import LiveGateway
from open_page import OpenPage

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'nvlm-trt[test]'")
    program = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if program is None:
        pytest.skip("there is no Chromium here; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # a proxy of the environment does not reach this machine's own servers
        browser = driver.chromium.launch(executable_path=program, args=["--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: object) -> Iterator[Callable[..., OpenPage]]:
    """`open_page(gateway, width=360)` is the page of a gateway in a fresh browser profile. At the end of the test, the
    page must have written nothing to the console: no error, and no violation of its policy."""
    opened = []

    def open_at(gateway: LiveGateway, **settings: Any) -> OpenPage:
        opened.append(OpenPage.open(chromium, gateway, **settings))
        return opened[-1]

    yield open_at
    for page in opened:
        page.close()
        assert page.unexpected() == []
