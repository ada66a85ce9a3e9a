"""Take the pictures of the gateway's page that docs/openai.md shows, with playwright and this machine's Chromium.

Usage: python scripts/page_screenshots.py ENGINE_OF_NVLM_H_TINY [--output docs/images/page]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
RECEIPT = ROOT / "docs" / "images" / "receipt.png"
DESKTOP = (1280, 830)
PHONE = (390, 844)
COLOURS = 128  # the page has few, and a picture of few colours is small


@contextlib.contextmanager
def serving(engine: Path, *options: str) -> Iterator[str]:
    """Run a gateway -> its address."""
    command = [sys.executable, "-m", "nvlm_trt.cli", "gateway", "--engine", str(engine), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"(http://[^/]+)/v1", process.stdout.readline())
            assert found, "the gateway did not start; see its message above"
            yield found[1]
        finally:
            process.terminate()


@contextlib.contextmanager
def opened(browser: Browser, address: str, size: tuple[int, int], **settings: Any) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def attach(page: Page) -> None:
    page.locator("#files").set_input_files(str(RECEIPT))
    expect(page.locator("#attachments .tag").first).to_be_visible()
    page.locator("#text").fill("What is the total?")
    expect(page.locator("#count")).to_contain_text("42 of")


def ask(page: Page) -> None:
    """Ask twice, so that the picture shows what the image cache does and no cold start."""
    attach(page)
    page.locator("#text").press("Enter")
    expect(page.locator(".answer .text")).to_have_text("48.20")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".figures")).to_contain_text("1 image")


def save(page: Page, path: Path) -> None:
    page.mouse.move(0, 0)  # no button is under it
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def take_pictures(browser: Browser, engine: Path, output: Path) -> None:
    with serving(engine) as address:
        with opened(browser, address, DESKTOP) as page:
            expect(page.locator("#model")).to_be_visible()
            save(page, output / "first.png")
            attach(page)
            save(page, output / "tiles.png")
        with opened(browser, address, DESKTOP) as page:
            ask(page)
            page.locator("summary").click()
            page.locator("#conversation").evaluate("place => { place.scrollTop = place.scrollHeight }")
            save(page, output / "answer.png")
        with opened(browser, address, DESKTOP, color_scheme="dark") as page:
            ask(page)
            page.locator("#text").fill("And the tax?")
            expect(page.locator("#count")).to_contain_text("of")
            save(page, output / "dark.png")
        with opened(browser, address, PHONE, device_scale_factor=2) as page:
            ask(page)
            save(page, output / "phone.png")
    with serving(engine, "--api-key", "secret") as address, opened(browser, address, DESKTOP) as page:
        expect(page.get_by_role("alert").first).to_contain_text("API key")
        page.get_by_role("button", name="Enter a key").click()
        save(page, output / "error.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "page")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-proxy-server"])
        take_pictures(browser, arguments.engine, arguments.output)
        browser.close()


if __name__ == "__main__":
    main()
