"""Replaces the part of a page that stands between two marks."""

from __future__ import annotations

from pathlib import Path


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between the marks of `page`; `text` ends with a newline."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")
