"""Joins the page's sources to one HTML document, and makes the policy under which a browser runs it."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources

# Markup, style and scripts are files of their own, because a person reads and edits them; they are joined when the
# gateway starts, so that the browser loads one document and no build step stands between. A script uses what is above.
_SCRIPTS = (
    "elements",
    "preferences",
    "faults",
    "endpoint",
    "pictures",
    "tile_views",
    "chat_body",
    "snippets",
    "exchange_view",
    "composer",
    "conversation",
    "start",
)
_STYLE_PLACE = "<style></style>"
_SCRIPT_PLACE = '<script type="module"></script>'


@dataclass(frozen=True)
class PageDocument:
    """The document, and its Content-Security-Policy: a browser runs this style and this script and nothing else."""

    body: bytes
    policy: str


def read_page() -> PageDocument:
    """Join the files of this folder."""
    folder = resources.files(__package__)
    document = (folder / "page.html").read_text("utf-8")
    style = (folder / "page.css").read_text("utf-8")
    script = "\n".join((folder / "scripts" / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    for place, text in ((_STYLE_PLACE, style), (_SCRIPT_PLACE, script)):
        assert document.count(place) == 1, place
        assert "</" not in text, "the text would end its element"
        opening, closing = place.split("><")
        document = document.replace(place, f"{opening}>{text}<{closing}")
    return PageDocument(document.encode(), _policy(style, script))


def _policy(style: str, script: str) -> str:
    directives = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # text never becomes markup: the browser refuses innerHTML and its like, whoever calls it
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
