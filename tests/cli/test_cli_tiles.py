"""Tests `nvlm-trt tiles`: its file, its output, its errors, and that it leaves no half-written file."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import Run, assert_one_line_error
from PIL import Image

from nvlm_trt.image.tile_sheet import draw_tile_sheet

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "receipt.png"


@pytest.fixture
def run(run_cli: Run) -> Run:
    return functools.partial(run_cli, "tiles")


def sheet(tile_size: int, max_tiles: int = 6) -> Image.Image:
    return draw_tile_sheet(Image.open(IMAGE).convert("RGB"), tile_size, max_tiles)


def assert_is(path: Path, want: Image.Image, format_: str = "PNG") -> None:
    with Image.open(path) as image:
        assert image.format == format_
        np.testing.assert_array_equal(np.asarray(image), np.asarray(want))


def test_writes_the_sheet_and_one_line(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    status, out, err = run(IMAGE, "--output", output)
    assert status == 0
    assert out == ""
    assert err == f"wrote {output} (3 x 2 grid, 6 tiles of 448 px + thumbnail)\n"
    assert_is(output, sheet(448))
    assert output.stat().st_size < 300_000
    assert list(tmp_path.iterdir()) == [output]


def test_file_is_as_readable_as_any_other(run: Run, tmp_path: Path) -> None:
    """The mode of the file follows the umask; the mode of a `tempfile` does not."""
    (tmp_path / "any").touch()
    run(IMAGE, "--output", tmp_path / "out.png", "--tile-size", 56)
    assert (tmp_path / "out.png").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_numbers_reach_the_sheet(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    assert run(IMAGE, "--output", output, "--tile-size", 28, "--max-tiles", 2)[0] == 0
    assert_is(output, sheet(28, 2))


def test_json_is_one_object(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    status, out, err = run(IMAGE, "--output", output, "--tile-size", 56, "--json")
    assert status == 0
    assert err == ""
    with Image.open(output) as image:
        size = list(image.size)
    assert json.loads(out) == {
        "output": str(output),
        "image_size": [504, 336],
        "grid": [3, 2],
        "tile_size": 56,
        "tiles": 7,
        "tags": [*(f"<tile_{number}>" for number in range(1, 7)), "<tile_global_thumbnail>"],
        "sheet_size": size,
    }


def test_json_of_one_tile(run: Run, tmp_path: Path) -> None:
    _, out, _ = run(IMAGE, "--output", tmp_path / "out.png", "--max-tiles", 1, "--json")
    report = json.loads(out)
    assert (report["grid"], report["tiles"], report["tags"]) == ([1, 1], 1, ["<tile_global_thumbnail>"])


@pytest.mark.parametrize(
    ("name", "format_"),
    [("a.PNG", "PNG"), ("a.webp", "WEBP"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG")],
)
def test_format_follows_the_suffix(run: Run, tmp_path: Path, name: str, format_: str) -> None:
    output = tmp_path / name
    assert run(IMAGE, "--output", output, "--tile-size", 56)[0] == 0
    if format_ != "JPEG":
        assert_is(output, sheet(56), format_)
        return
    with Image.open(output) as image:
        assert image.format == "JPEG"
        difference = np.asarray(image).astype(int) - np.asarray(sheet(56))
    assert np.sqrt(np.mean(difference**2)) < 3


def test_numbers_of_a_checkpoint(run: Run, checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    assert run(IMAGE, "--output", output, "--checkpoint", checkpoint("nvlm-h-tiny"))[0] == 0
    assert_is(output, sheet(56))


def test_numbers_of_a_checkpoint_are_not_the_defaults(run: Run, checkpoint, tmp_path: Path) -> None:
    config = json.loads((checkpoint("nvlm-h-tiny") / "config.json").read_text())
    config["max_dynamic_patch"] = 2
    config["force_image_size"] = config["vision_config"]["image_size"] = 28
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out.png"
    assert run(IMAGE, "--output", output, "--checkpoint", tmp_path)[0] == 0
    assert_is(output, sheet(28, 2))


def test_numbers_of_an_engine(run: Run, engine, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    assert run(IMAGE, "--output", output, "--engine", engine("nvlm-h-tiny"))[0] == 0
    assert_is(output, sheet(56))


@pytest.mark.parametrize(
    "options",
    [
        ("--engine", "e", "--checkpoint", "c"),
        ("--engine", "e", "--tile-size", 56),
        ("--checkpoint", "c", "--max-tiles", 6),
        ("--checkpoint", "c", "--max-tiles", 0),
    ],
)
def test_model_and_numbers_exclude_each_other(run: Run, tmp_path: Path, options: tuple[object, ...]) -> None:
    result = run(IMAGE, "--output", tmp_path / "out.png", *options)
    assert_one_line_error(result, "exclude each other", str(options[0]), str(options[2]))


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--tile-size", 0), ("tile_size 0",)),
        (("--tile-size", -56), ("tile_size -56",)),
        (("--max-tiles", 0), ("max_tiles 0",)),
        (("--max-tiles", -1), ("max_tiles -1",)),
        (("--max-tiles", 65), ("max_tiles 65", "64")),
        (("--tile-size", 10**12), ("pixels", "lower")),
        (("--engine", "no-such-directory"), ("no-such-directory", "nvlm-trt build")),
        (("--checkpoint", "no-such-directory"), ("no-such-directory", "checkpoint directory")),
    ],
)
def test_bad_options(run: Run, tmp_path: Path, options: tuple[object, ...], fragments: tuple[str, ...]) -> None:
    assert_one_line_error(run(IMAGE, "--output", tmp_path / "out.png", *options), *fragments)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_is_no_engine(run: Run, tmp_path: Path) -> None:
    result = run(IMAGE, "--output", tmp_path / "out.png", "--engine", tmp_path)
    assert_one_line_error(result, "not an engine directory")


@pytest.mark.parametrize(
    ("name", "data", "fragments"),
    [
        ("missing.png", None, ("cannot read", "missing.png", "No such file")),
        ("text.png", b"not an image", ("text.png", "not a readable", "convert")),
        ("empty.png", b"", ("empty.png", "0 bytes")),
        ("half.png", IMAGE.read_bytes()[:2000], ("half.png", "truncated or corrupt")),
    ],
)
def test_bad_images(run: Run, tmp_path: Path, name: str, data: bytes | None, fragments: tuple[str, ...]) -> None:
    image = tmp_path / name
    if data is not None:
        image.write_bytes(data)
    output = tmp_path / "out.png"
    assert_one_line_error(run(image, "--output", output), *fragments)
    assert not output.exists()


def test_a_directory_is_no_image(run: Run, tmp_path: Path) -> None:
    assert_one_line_error(run(tmp_path, "--output", tmp_path / "out.png"), "cannot read", "directory")


@pytest.mark.parametrize("name", ["out.gif", "out.bmp", "out", ".png", "out.png.txt"])
def test_other_suffixes(run: Run, tmp_path: Path, name: str) -> None:
    assert_one_line_error(run(IMAGE, "--output", tmp_path / name), "suffix", ".png", ".webp")
    assert list(tmp_path.iterdir()) == []


def test_output_in_a_missing_directory(run: Run, tmp_path: Path) -> None:
    assert_one_line_error(run(IMAGE, "--output", tmp_path / "no" / "out.png"), "not a directory", "create it")
    assert list(tmp_path.iterdir()) == []


def test_output_is_a_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    assert_one_line_error(run(IMAGE, "--output", tmp_path / "out.png", "--overwrite"), "is a directory")


def test_output_name_longer_than_the_file_system_allows(run: Run, tmp_path: Path) -> None:
    assert_one_line_error(run(IMAGE, "--output", tmp_path / ("n" * 300 + ".png")), "cannot write", "too long")


def test_does_not_overwrite_unless_told(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    output.write_bytes(b"precious")
    assert_one_line_error(run(IMAGE, "--output", output, "--tile-size", 56), "exists", "--overwrite")
    assert output.read_bytes() == b"precious"
    assert run(IMAGE, "--output", output, "--tile-size", 56, "--overwrite")[0] == 0
    assert_is(output, sheet(56))


def test_never_overwrites_the_image(run: Run, tmp_path: Path) -> None:
    image, link = tmp_path / "image.png", tmp_path / "link.png"
    image.write_bytes(IMAGE.read_bytes())
    link.symlink_to(image)
    for output in (image, link):
        assert_one_line_error(run(image, "--output", output, "--overwrite"), "the image itself")
    assert image.read_bytes() == IMAGE.read_bytes()


def test_sheet_larger_than_the_format_holds(run: Run, tmp_path: Path) -> None:
    """64 tiles in one row of 448 px are wider than WEBP's 16,383."""
    image = tmp_path / "strip.png"
    Image.new("RGB", (640, 10), "red").save(image)
    output = tmp_path / "out.webp"
    assert_one_line_error(run(image, "--output", output, "--max-tiles", 64), "16383", ".png")
    assert not output.exists()


def test_full_disk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "out.png"
    output.write_bytes(b"precious")
    monkeypatch.setattr(Image.Image, "save", save)
    result = run(IMAGE, "--output", output, "--tile-size", 56, "--overwrite")
    assert_one_line_error(result, "cannot write", "out.png", "No space left")
    assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("existing", [None, b"precious"])
def test_interrupt_leaves_nothing_half_written(tmp_path: Path, existing: bytes | None) -> None:
    """SIGINT while a real sheet of noise is being compressed: exit 130, no traceback, the folder as it was."""
    image, output = tmp_path / "noise.png", tmp_path / "out.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (600, 900, 3), dtype=np.uint8)).save(image)
    if existing is not None:
        output.write_bytes(existing)
    before = set(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "nvlm_trt.cli", "tiles", image, "--output", output, "--tile-size", "1200",
         "--overwrite"],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while process.poll() is None and set(tmp_path.iterdir()) == before:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert set(tmp_path.iterdir()) == before
    if existing is not None:
        assert output.read_bytes() == existing


def test_help_has_an_example(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "Example: nvlm-trt tiles" in out
