"""Lists the weight files of a checkpoint: one file, the shards of an index, or numbered shards without an index."""

from __future__ import annotations

import json
import re
from pathlib import Path

from nvlm_trt.bounded_file import INDEX_BYTES, read_bounded
from nvlm_trt.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_INDEX_SUFFIX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_ADAPTER = "adapter_model.safetensors"
_PICKLES = ("pytorch_model*.bin", "model*.bin", "consolidated*.pt*", "*.ckpt")


def weight_files(directory: Path) -> tuple[str, ...]:
    """Returns the names of the weight files, sorted; those of an index may be missing.

    Raises CheckpointError without weights, with two sets of weights, and for an index that is malformed or names a
    file that is not beside it."""
    indexes = sorted(path.name for path in directory.glob(f"*{_INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise CheckpointError(f"{directory} has two indexes, {indexes[0]} and {indexes[1]}; remove the one out of date")
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if _ADAPTER in found:
        raise _adapter(directory, alone=len(found) == 1 and not indexes)
    if indexes:
        if WEIGHTS_FILE in found:
            raise CheckpointError(
                f"{directory} has both {WEIGHTS_FILE} and {indexes[0]}; remove the one that is out of date"
            )
        return tuple(sorted(set(weight_map(directory / indexes[0]).values())))
    if not found:
        raise _no_weights(directory)
    if len(found) == 1 and not _NUMBERED.fullmatch(found[0]):
        return tuple(found)
    return _numbered_shards(directory, found)


def weight_map(index: Path) -> dict[str, str]:
    """Reads an index -> tensor name: file name. Raises CheckpointError for one that is malformed, and for a file name
    that leads out of its folder."""
    try:
        names = json.loads(read_bounded(index, INDEX_BYTES).decode())["weight_map"]
        outside = [name for name in names.values() if name in ("", "..") or Path(name).name != name]
    except OSError as error:
        raise CheckpointError(f"cannot read {index} ({error.strerror}); restore it from the checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not a safetensors index; restore it from the checkpoint") from None
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file beside it; restore the index")
    return dict(names)


def _numbered_shards(directory: Path, found: list[str]) -> tuple[str, ...]:
    """Returns shards NAME-0000I-of-0000N.safetensors, missing ones too. Raises CheckpointError for other files."""
    matches = [_NUMBERED.fullmatch(name) for name in found]
    sets = {(match["stem"], match["count"]) if match else None for match in matches}
    if len(sets) != 1 or None in sets:
        raise CheckpointError(
            f"{directory} has {found[0]} and {found[1]} without an index that says which belong together; download "
            f"{INDEX_FILE}, or remove the file out of date"
        )
    ((stem, count),) = (key for key in sets if key is not None)
    return tuple(f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1))


def _adapter(directory: Path, alone: bool) -> CheckpointError:
    if alone:
        return CheckpointError(
            f"{directory} is a LoRA adapter, not a whole checkpoint; name the checkpoint it was trained on, and pass "
            f"--lora {directory} to `nvlm-trt build`"
        )
    return CheckpointError(
        f"{directory} has a LoRA adapter beside its weights; move {_ADAPTER} and adapter_config.json to a folder of "
        "their own, and pass that folder as --lora to `nvlm-trt build`"
    )


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{directory} has its weights in {pickles[0]}, a format that can run code when it is read; save it as "
            "safetensors: save_pretrained(..., safe_serialization=True)"
        )
    return CheckpointError(f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; name a checkpoint in HF layout")
