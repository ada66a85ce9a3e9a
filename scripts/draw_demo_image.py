"""Draws docs/images/receipt.png, the image that the demo asks about.

The image is a form of TinyDocs' kind, in a font that the models were not trained on, at three times the size of the
3 x 2 tiles that it becomes.
"""

from pathlib import Path

import numpy as np

from nvlm_trt.evaluation.tinydocs.fonts import FONTS
from nvlm_trt.evaluation.tinydocs.page import TILE, Page

# tile column, tile row, key, value
ENTRIES = [(0, 0, "Order", "K7A2"), (2, 0, "Date", "12.05"), (0, 1, "Tax", "3.10"), (2, 1, "Total", "48.20")]
TARGET = Path(__file__).parent.parent / "docs" / "images" / "receipt.png"


class LargePage(Page):
    def choose_size(self) -> tuple[int, int]:
        return 3 * self.width, 3 * self.height


def draw_receipt() -> LargePage:
    page = LargePage(3, 2, FONTS["test"][1], np.random.default_rng(0))
    for column, row, key, value in ENTRIES:
        x, y = column * TILE + 6, row * TILE + 19
        page.text(key, x, y, 11)
        page.text(value, x, y + 17.5, 12.5)
    return page


if __name__ == "__main__":
    draw_receipt().image.save(TARGET, optimize=True)
