"""Loads fonts from Python packages, other fonts for each split: a test uses fonts that training has never shown."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Literal, get_args

from PIL import ImageFont

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_MATPLOTLIB = "matplotlib:mpl-data/fonts/ttf"
_PILLOW = "Pillow's default"  # Aileron Regular, inside Pillow itself

# package:folder/file; test shares no family with train
FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        f"{_MATPLOTLIB}/DejaVuSans.ttf",
        f"{_MATPLOTLIB}/DejaVuSans-Bold.ttf",
        f"{_MATPLOTLIB}/DejaVuSansMono.ttf",
        f"{_MATPLOTLIB}/DejaVuSansMono-Bold.ttf",
        f"{_MATPLOTLIB}/DejaVuSerif.ttf",
        f"{_MATPLOTLIB}/DejaVuSerif-Bold.ttf",
        f"{_MATPLOTLIB}/STIXGeneral.ttf",
        f"{_MATPLOTLIB}/STIXGeneralBol.ttf",
        f"{_MATPLOTLIB}/cmb10.ttf",
        "font_hanken_grotesk:files/HankenGrotesk-Regular.otf",
        "font_hanken_grotesk:files/HankenGrotesk-Medium.otf",
        "font_hanken_grotesk:files/HankenGrotesk-Bold.otf",
        "font_manrope:files/Manrope-Regular.ttf",
        "font_manrope:files/Manrope-SemiBold.ttf",
        "font_manrope:files/Manrope-Bold.ttf",
        "font_source_serif_pro:files/SourceSerifPro-Regular.ttf",
        "font_source_serif_pro:files/SourceSerifPro-Semibold.ttf",
        "font_source_serif_pro:files/SourceSerifPro-Bold.ttf",
    ),
    "validation": (_PILLOW, f"{_MATPLOTLIB}/cmss10.ttf"),
    "test": (
        "font_lato:files/Lato-Regular.ttf",
        "font_lato:files/Lato-Bold.ttf",
        "font_caladea:files/Caladea-Regular.ttf",
    ),
}


@functools.lru_cache(maxsize=4096)
def load_font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """Loads a font of FONTS at `size` pixels per em."""
    if name == _PILLOW:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
        return font
    package, _, path = name.partition(":")
    spec = importlib.util.find_spec(package)  # found, not imported: importing matplotlib is slow
    assert spec is not None, f"{package} is in the extra `eval`"
    assert spec.origin is not None, f"{package} has files"
    # basic layout: glyphs are drawn one by one, without kerning and ligatures (Raqm)
    return ImageFont.truetype(str(Path(spec.origin).parent / path), size, layout_engine=ImageFont.Layout.BASIC)
