"""Checks API keys."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from nvlm_trt.bounded_file import CONFIG_BYTES, read_bounded
from nvlm_trt.errors import NvlmError

KEY_VARIABLE = "NVLM_TRT_API_KEY"
_SCHEME = b"bearer "


class ApiKeys:
    """The keys that open the gateway; without any, everyone may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        # hashed: the comparison of two digests takes the same time for keys of all lengths
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: bytes | None) -> bool:
        """Return whether the value of the header Authorization holds one of the keys. Compares it with every key, in a
        time that does not depend on where they differ."""
        if not self._digests:
            return True
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        sent = hashlib.sha256(authorization[len(_SCHEME) :].strip()).digest()
        # `sum`, because `any` would end with the first that is equal
        return sum(hmac.compare_digest(sent, digest) for digest in self._digests) > 0


def read_keys(keys: Sequence[str], file: Path | None) -> ApiKeys:
    """Collect the keys of the options, of a file with one key per line, and of the environment.

    Raises NvlmError for an empty key, for one with characters that no header may hold, and for a file without keys."""
    found = list(keys)
    if file is not None:
        try:
            lines = read_bounded(file, CONFIG_BYTES).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise NvlmError(
                f"cannot read --api-key-file {file} ({error}); name a text file, one key per line"
            ) from None
        of_file = [line.strip() for line in lines if line.strip()]
        if not of_file:
            raise NvlmError(f"--api-key-file {file} holds no key; write one per line")
        found += of_file
    if KEY_VARIABLE in os.environ:
        found.append(os.environ[KEY_VARIABLE])
    for key in found:
        if not key or not key.isascii() or not key.isprintable() or key.strip() != key:
            raise NvlmError("an API key is empty or holds other characters than printable ASCII; choose another one")
    return ApiKeys(found)


def check_exposure(host: str, address: str, keys: ApiKeys, no_auth: bool) -> None:
    """Raise NvlmError if everyone could ask at `host`, whose IP address is `address`, from other machines."""
    if keys or no_auth or ipaddress.ip_address(address).is_loopback:
        return
    raise NvlmError(
        f"--host {host} lets other machines ask without a key; pass --api-key-file FILE or set {KEY_VARIABLE}, or "
        "pass --no-auth if everyone may ask"
    )
