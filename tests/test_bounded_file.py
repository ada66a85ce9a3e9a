"""Tests that files are read whole only if they are regular and within a bound, wherever the product reads one."""

from __future__ import annotations

import io
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nvlm_trt.benchmark.results_document import read_document
from nvlm_trt.bounded_file import FileTooLargeError, open_regular, read_bounded
from nvlm_trt.builders.quantization.calibration import is_calibration, read_calibration
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ImageError, NvlmError, RequestError
from nvlm_trt.evaluation.results import read_results
from nvlm_trt.evaluation.samples import ImageFiles, Sample, digest_of, read_samples
from nvlm_trt.image.image_file import naming_files, read_image_file
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.model.hf_config import read_config
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.serving.client import Client

HUGE = 40 << 30


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(path))  # an address has about 100 characters


IRREGULAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "a folder, not a regular file"),
    "pipe": (os.mkfifo, "a pipe, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a regular file"),
    "socket": (make_socket, "a socket, not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "image": read_image_file,
    "image of a sample": lambda path: ImageFiles((path,))[0],
    "image of a client": lambda path: Client("grpc://127.0.0.1:1").generate("what?", images=[path]),
    "samples": read_samples,
    "config.json": lambda path: read_config(path.parent),
    "manifest.json": lambda path: Engine.open(path.parent),
    "tokenizer.json": lambda path: Tokenizer.from_directory(path.parent),
    "results": read_results,
    "benchmark": read_document,
    "calibration": read_calibration,
    "is_calibration": is_calibration,
    "model.safetensors": lambda path: Checkpoint.open(path.parent),
    "model.safetensors.index.json": lambda path: Checkpoint.open(path.parent),
}
# what else a reader's folder must hold before the reader looks at the file
BESIDE = {"model.safetensors": "config.json", "model.safetensors.index.json": "config.json"}


@pytest.fixture
def checkpoint_config() -> bytes:
    return next(Path(__file__).parents[1].glob("checkpoints/*/config.json")).read_bytes()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("reader", READERS)
def test_irregular_file_is_refused_in_one_line(
    reader: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_config: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / (reader if "." in reader else "file")
    if reader in BESIDE:
        (tmp_path / BESIDE[reader]).write_bytes(checkpoint_config)
    make, reason = IRREGULAR[kind]
    make(path)
    with pytest.raises(NvlmError) as caught:
        READERS[reader](path)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    if reader in ("image", "samples", "results", "calibration"):
        assert str(path) in message
        assert reason in message


@pytest.mark.parametrize(
    "reader", [reader for reader in READERS if reader not in ("is_calibration", "model.safetensors")]
)
def test_huge_file_is_not_read(reader: str, tmp_path: Path, checkpoint_config: bytes) -> None:
    path = tmp_path / (reader if "." in reader else "file")
    if reader in BESIDE:
        (tmp_path / BESIDE[reader]).write_bytes(checkpoint_config)
    make_huge(path)
    tracemalloc.start()
    try:
        with pytest.raises(NvlmError, match=f"{HUGE} bytes, at most [0-9]+ are"):
            READERS[reader](path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_bound_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    assert read_bounded(path, 100) == bytes(100)
    with pytest.raises(FileTooLargeError, match="100 bytes, at most 99 are allowed"):
        read_bounded(path, 99)
    with pytest.raises(OSError, match="Invalid argument"):
        read_bounded("a\0b", 9)


def test_file_whose_size_is_not_known_is_bounded() -> None:
    content = Path("/proc/self/status").read_bytes()  # a regular file of 0 bytes, says the kernel
    assert read_bounded("/proc/self/status", 1 << 20)[:5] == content[:5]
    with pytest.raises(FileTooLargeError, match="more than the 99 bytes allowed"):
        read_bounded("/proc/self/status", 99)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "file").write_bytes(b"1")
    for _ in range(20):
        with pytest.raises(OSError, match="a folder"):
            open_regular(tmp_path)
        with pytest.raises(FileTooLargeError):
            read_bounded(tmp_path / "file", 0)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes; name an encoded image"),
        (b"%PDF-1.7", "a PDF document, not a readable format; save the page as PNG or JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, .*`git lfs pull`"),
        (bytes(2001), "2001 bytes, at most 2000 are allowed; compress it"),
    ],
)
def test_error_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"^image {path}: {message}"):
        read_image_file(path, ImageLimits(max_bytes=2000))
    with pytest.raises(ImageError, match=f"^sample one: image {path}: "):
        digest_of([Sample("one", "t", "p", "a", ImageFiles((path,)))])


def test_sample_with_an_unreadable_image_is_named(tmp_path: Path) -> None:
    sample = Sample("one", "t", "p", "a", ImageFiles((tmp_path,)))
    with pytest.raises(RequestError, match="^sample one: cannot read image .*a folder, not a regular file"):
        digest_of([sample])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImageError("image: bad"), "image a.png: bad"),
        (ImageError("image 2: bad"), "image b.png: bad"),
        (RequestError("invalid request: image 1: bad"), "invalid request: image a.png: bad"),
        (RequestError("image 3: bad"), "image 3: bad"),
        (RequestError("image 0: bad"), "image 0: bad"),
        (RequestError("the request has 17 images"), "the request has 17 images"),
    ],
)
def test_numbers_of_images_become_names(error: NvlmError, message: str) -> None:
    with pytest.raises(type(error)) as caught, naming_files([Path("a.png"), Path("b.png")]):
        raise error
    assert str(caught.value) == message


def test_endless_line_of_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n' + b" " * (17 << 20))
    with pytest.raises(RequestError, match=r"samples\.jsonl line 2: more than 16777216 bytes"):
        read_samples(path)


def test_image_within_the_bound_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, "PNG")
    path = tmp_path / "image"
    path.write_bytes(buffer.getvalue())
    assert read_image_file(path) == read_image_file(str(path)) == buffer.getvalue()
