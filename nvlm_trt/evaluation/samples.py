"""Reads sets of samples from JSONL. A sample is a question of an evaluation, with its images and its known answer."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, overload

from nvlm_trt.bounded_file import open_regular
from nvlm_trt.errors import ImageError, NvlmError, RequestError
from nvlm_trt.evaluation.scoring import Metric, number_in
from nvlm_trt.image.decoder import ImageDecoder
from nvlm_trt.image.image_file import read_image_file
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.prompt.conversation import IMAGE_MARK

_MAX_BYTES, _MAX_LINE_BYTES = 1 << 30, 16 << 20
_REQUIRED = ("prompt", "answer")
_KEYS = (*_REQUIRED, "image", "images", "task", "name", "metric")


@dataclass(frozen=True)
class Sample:
    """Holds one question. `images` are encoded files, in the order in which the prompt shows them."""

    name: str  # unique within its set
    task: str
    prompt: str
    answer: str
    images: Sequence[bytes] = ()
    metric: Metric = "exact"


@dataclass(frozen=True)
class ImageFiles(Sequence[bytes]):
    """Reads a file whenever its item is asked for: the images of a set need not fit into memory."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...

    def __getitem__(self, index: int | slice) -> bytes | ImageFiles:
        if isinstance(index, slice):
            return ImageFiles(self.paths[index])
        return read_image_file(self.paths[index])


def read_samples(path: Path, metric: Metric = "exact") -> list[Sample]:
    """Reads a set from JSONL, with the keys of docs/evaluation.md; `metric` is for lines that name none.

    Raises RequestError, with the line's number, for a line that is no sample, names a missing image or repeats a name.
    """
    samples: list[Sample] = []
    line_of: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            sample = _parse(line, number, path.parent, metric)
            if sample.name in line_of:
                raise RequestError(f"the name {sample.name!r} is that of line {line_of[sample.name]}; names are unique")
        except NvlmError as error:
            raise RequestError(f"{path} line {number}: {error}") from None
        line_of[sample.name] = number
        samples.append(sample)
    if not samples:
        raise RequestError(f'{path} has no samples; write one {{"prompt": ..., "answer": ...}} per line')
    return samples


def digest_of(samples: Sequence[Sample], progress: Progress = no_progress, limits: ImageLimits | None = None) -> str:
    """Identifies a set: sha256 of everything in it, the bytes of the images included.

    Raises ImageError or RequestError for an image that does not decode. Decodes every image, so that a broken image
    stops an evaluation before its first question, not hours later.
    """
    digest = hashlib.sha256()
    whole: set[str] = set()  # many questions may be about one image
    with ImageDecoder(limits) as decoder:
        for done, sample in enumerate(samples):
            progress("checking samples", done, len(samples))
            keys = []
            for index in range(len(sample.images)):
                try:
                    data = sample.images[index]
                except NvlmError as error:
                    raise type(error)(f"sample {sample.name}: {error}") from None
                key = hashlib.sha256(data).hexdigest()
                if key not in whole:
                    _check_image(sample, index, data, decoder)
                whole.add(key)
                keys.append(key)
            fields = [sample.name, sample.task, sample.prompt, sample.answer, sample.metric, keys]
            digest.update(json.dumps(fields, allow_nan=False).encode() + b"\n")
    progress("checking samples", len(samples), len(samples))
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise RequestError(f"samples {path} have {size} bytes, at most {_MAX_BYTES} are read; split the file")
            for number in itertools.count(1):
                line = file.readline(_MAX_LINE_BYTES + 1)
                if len(line) > _MAX_LINE_BYTES:
                    raise RequestError(
                        f"{path} line {number}: more than {_MAX_LINE_BYTES} bytes; write one object per line"
                    )
                if not line:
                    return
                if line.strip():
                    yield number, line
    except OSError as error:
        raise RequestError(f"cannot read samples {path} ({error.strerror}); name a readable JSONL file") from None


def _parse(line: bytes, number: int, folder: Path, metric: Metric) -> Sample:
    """Parses one line. Raises errors without file and line, which the caller adds."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, an integer of thousands of digits
        raise RequestError(f"not JSON ({error}); write one object per line") from None
    if not isinstance(fields, dict):
        raise RequestError('not an object; write {"prompt": ..., "answer": ...}')
    for key in fields:
        if key not in _KEYS:
            raise RequestError(f"unknown key {key!r}; known are {', '.join(_KEYS)}")
    for key in _REQUIRED:
        if key not in fields:
            raise RequestError(f"no {key!r}; every sample needs {' and '.join(_REQUIRED)}")
    chosen = _text(fields, "metric", metric)
    if chosen not in get_args(Metric):
        raise RequestError(f"unknown metric {chosen!r}; choose one of {', '.join(get_args(Metric))}")
    sample = Sample(
        name=_text(fields, "name", str(number)),
        task=_text(fields, "task", "default"),
        prompt=_text(fields, "prompt"),
        answer=_text(fields, "answer"),
        images=_images(fields, folder),
        metric=chosen,  # type: ignore[arg-type]  # checked above
    )
    _check_marks(sample)
    _check_answer(sample)
    return sample


def _text(fields: dict[str, Any], key: str, default: str = "") -> str:
    value = fields.get(key, default)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{key!r} must be a string that is not blank")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{key!r} holds half of a UTF-16 surrogate pair; write valid Unicode") from None
    return value


def _images(fields: dict[str, Any], folder: Path) -> Sequence[bytes]:
    if "image" in fields and "images" in fields:
        raise RequestError("both 'image' and 'images'; use one of them")
    names = [fields["image"]] if "image" in fields else fields.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RequestError("'image' must be a path and 'images' a list of paths, relative to the JSONL file")
    paths = tuple(folder / name for name in names)
    for path in paths:
        try:
            found = path.is_file()
        except (OSError, ValueError):  # a name too long for the file system, a zero byte in it
            found = False
        if not found:
            raise RequestError(f"there is no image {str(path)!r}; paths are relative to the JSONL file")
    return ImageFiles(paths) if paths else ()


def _check_marks(sample: Sample) -> None:
    marks, images = sample.prompt.count(IMAGE_MARK), len(sample.images)
    if images and marks not in (0, images):
        raise RequestError(f"{marks} {IMAGE_MARK} marks for {images} images; mark the place of each, or of none")


def _check_answer(sample: Sample) -> None:
    if sample.metric == "numeric" and number_in(sample.answer) is None:
        raise RequestError(f"the answer {sample.answer!r} is not a number, which the metric numeric needs")


def _check_image(sample: Sample, index: int, data: bytes, decoder: ImageDecoder) -> None:
    try:
        decoder.load(data)
    except ImageError as error:
        name = sample.images.paths[index] if isinstance(sample.images, ImageFiles) else f"image {index + 1}"
        raise ImageError(f"sample {sample.name}: {name}: {str(error).removeprefix('image: ')}") from None
