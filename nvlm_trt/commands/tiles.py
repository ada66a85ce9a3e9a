"""Implements `nvlm-trt tiles`: draws the tiles that the model sees of an image."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nvlm_trt import terminal
from nvlm_trt.commands.decode_budget import DecodeMemoryOption, DecodeSecondsOption, image_limits
from nvlm_trt.commands.shared_options import JsonOption
from nvlm_trt.errors import NvlmError, RequestError

if TYPE_CHECKING:
    from PIL import Image

    from nvlm_trt.image.decoding import ImageLimits

# Lossless where the format can be, so that the pixels in the file are those that the encoder sees.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG", "optimize": True},
    ".jpg": {"format": "JPEG", "quality": 92, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 92, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
}
# The longest edge that libjpeg and libwebp can encode.
_LONGEST_EDGE = {"JPEG": 65_500, "WEBP": 16_383}


def tiles(
    image: Annotated[Path, typer.Argument(help="Image to draw the tiles of.")],
    output: Annotated[Path, typer.Option(help="File to write: .png, .jpg, .jpeg or .webp.")],
    tile_size: Annotated[int | None, typer.Option(help="Edge of a tile in pixels [448].")] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Most tiles, thumbnail not counted [6].")] = None,
    engine: Annotated[Path | None, typer.Option(help="Engine directory to take both numbers from.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint directory to take both numbers from.")] = None,
    max_decode_seconds: DecodeSecondsOption = None,
    max_decode_memory: DecodeMemoryOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file of that name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw the tiles that the model sees of an image.

    Example: nvlm-trt tiles docs/images/receipt.png --output tiles.png --checkpoint checkpoints/nvlm-h
    """
    options = _save_options(output)
    _check_output(output, image, overwrite)
    tile_size, max_tiles = _tiling(tile_size, max_tiles, engine, checkpoint)
    loaded = _load(image, image_limits(max_decode_seconds, max_decode_memory))

    from nvlm_trt.image.tile_sheet import draw_tile_sheet, layout_sheet

    layout = layout_sheet(loaded.size, tile_size, max_tiles)
    longest = _LONGEST_EDGE.get(options["format"])
    if longest and max(layout.size) > longest:
        raise RequestError(
            f"{output}: the sheet has {layout.size[0]} x {layout.size[1]} pixels, {options['format']} holds at most "
            f"{longest} along an edge; write a .png"
        )
    _save(draw_tile_sheet(loaded, tile_size, max_tiles), output, options, overwrite)
    if as_json:
        report = {
            "output": str(output),
            "image_size": loaded.size,
            "grid": layout.grid,
            "tile_size": tile_size,
            "tiles": len(layout.tags),
            "tags": layout.tags,
            "sheet_size": layout.size,
        }
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        terminal.note(f"wrote {output} ({layout.heading})")


def _save_options(output: Path) -> dict[str, Any]:
    options = _SAVE_OPTIONS.get(output.suffix.lower())
    if options is None:
        kind = f"suffix {output.suffix!r}" if output.suffix else "no suffix"
        raise RequestError(f"{output} has {kind}; name an --output that ends in {', '.join(_SAVE_OPTIONS)}")
    return options


def _check_output(output: Path, image: Path, overwrite: bool) -> None:
    """Refuses a wrong output before any work; `_save` finds all other errors."""
    if not os.path.isdir(output.parent):
        raise RequestError(f"{output.parent} is not a directory; create it or choose another --output")
    if os.path.isdir(output):
        raise RequestError(f"{output} is a directory; choose another --output")
    if os.path.lexists(output):
        if os.path.exists(output) and os.path.exists(image) and os.path.samefile(output, image):
            raise RequestError(f"{output} is the image itself, which is not overwritten; choose another --output")
        if not overwrite:
            raise RequestError(f"{output} exists; choose another --output or pass --overwrite")


def _tiling(
    tile_size: int | None, max_tiles: int | None, engine: Path | None, checkpoint: Path | None
) -> tuple[int, int]:
    """Returns the tile size and the most tiles: the model's, or the numbers given."""
    given = {"--tile-size": tile_size, "--max-tiles": max_tiles, "--engine": engine, "--checkpoint": checkpoint}
    named = [name for name, value in given.items() if value is not None]
    if (engine or checkpoint) and len(named) > 1:
        raise RequestError(
            f"{' and '.join(named)} exclude each other; pass one of --engine DIR and --checkpoint DIR, or numbers alone"
        )
    if engine:
        from nvlm_trt.engine import Engine

        opened = Engine.open(engine)
        return opened.config.vision.image_size, opened.limits.max_tiles
    if checkpoint:
        from nvlm_trt.model.hf_config import read_config

        config = read_config(checkpoint)
        return config.vision.image_size, config.max_tiles
    return 448 if tile_size is None else tile_size, 6 if max_tiles is None else max_tiles


def _load(path: Path, limits: ImageLimits) -> Image.Image:
    from nvlm_trt.image.decoder import ImageDecoder
    from nvlm_trt.image.image_file import naming_files, read_image_file

    with naming_files([path]), ImageDecoder(limits) as decoder:
        return decoder.load(read_image_file(path))


def _save(sheet: Image.Image, output: Path, options: dict[str, Any], overwrite: bool) -> None:
    """Writes beside `output` and renames: a file of that name is always whole."""
    from nvlm_trt.staging import publish_file

    # named before it exists: an interrupt at any moment leaves no file behind
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        sheet.save(temporary, **options)
        publish_file(temporary, output, overwrite)
    except FileExistsError:
        raise RequestError(f"{output} exists; choose another --output or pass --overwrite") from None
    except OSError as error:
        raise NvlmError(f"cannot write {output} ({error.strerror or error}); choose another --output") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
