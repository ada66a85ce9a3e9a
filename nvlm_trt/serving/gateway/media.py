"""Reads the image of a URL: base64 within a data: URI, or a file from a host that the operator has allowed."""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from nvlm_trt.errors import ImageError
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.serving.sent_images import image_files

_FETCHES = 8  # at once; a slow host must not take all threads from others
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}
_THREADED_CHARACTERS = 1 << 16  # longer base64 is decoded in a thread: the event loop has answers to send

_NAT64 = ipaddress.ip_network("64:ff9b::/96")

IsPublic = Callable[[str], bool]


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet: not private, loopback, link-local, multicast or
    reserved, nor an IPv6 form of such an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class MediaReader:
    """Reads images. Its coroutine runs in the event loop; hosts are asked in threads."""

    def __init__(
        self,
        limits: ImageLimits,
        domains: Collection[str] = (),
        seconds: float = 10,
        is_public: IsPublic = is_public,
    ) -> None:
        """Allow http(s) URLs of the hosts `domains` ("images.example.com", or with a port, "example.com:8443"), each
        to be read within `seconds`."""
        self._limits = limits
        self._domains = {domain.lower() for domain in domains}
        self._seconds = seconds
        self._is_public = is_public
        self._threads = ThreadPoolExecutor(_FETCHES, thread_name_prefix="nvlm-media")

    async def read(self, url: str, name: str) -> bytes:
        """Return the bytes of an image. Raises ImageError, whose message begins with `name`, "image 2" for example."""
        if url[:5].lower() == "data:":
            if len(url) < _THREADED_CHARACTERS:
                return self._decode(url, name)
            return await asyncio.to_thread(self._decode, url, name)
        host, port = self._allowed(url, name)
        fetched = asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, url, host, port, name)
        try:
            return await asyncio.wait_for(fetched, self._seconds)
        except asyncio.TimeoutError:  # in the queue, or while the name was looked up, which has no time limit
            raise self._too_slow(name) from None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _decode(self, url: str, name: str) -> bytes:
        try:
            (data,) = image_files([url.encode("ascii", "replace")], self._limits)
        except ImageError as error:
            raise ImageError(f"{name}: {str(error).removeprefix('image: ')}") from None
        return data

    def _allowed(self, url: str, name: str) -> tuple[str, int]:
        """Return host and port of a URL that the operator allows."""
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme.lower(), (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            scheme, host, port = "", "", None
        if scheme not in _PORTS or not host:
            raise ImageError(f"{name}: the URL is not data:image/TYPE;base64,... ; send the image in the request")
        own = host if port in (None, _PORTS[scheme]) else f"{host}:{port}"
        if own not in self._domains or parts.username is not None:
            raise ImageError(
                f"{name}: images of this host are not read; send the image in the request as a data: URI (the operator "
                "may allow a host with --allowed-media-domain)"
            )
        return host, port or _PORTS[scheme]

    def _fetch(self, url: str, host: str, port: int, name: str) -> bytes:
        deadline = time.monotonic() + self._seconds
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            address = self._address(host, port, name)
            connection = _Connection(address, host, port, parts.scheme.lower() == "https", self._seconds)
            try:
                connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
                response = connection.getresponse()
                if response.status != 200:  # a redirect too: it may lead anywhere
                    raise ImageError(f"{name}: its host answers with status {response.status}; send a direct URL")
                return self._read(response, connection, deadline, name)
            finally:
                connection.close()
        except TimeoutError:
            raise self._too_slow(name) from None
        except (OSError, ValueError, http.client.HTTPException):
            # no details: they would tell what is reachable from here
            raise ImageError(f"{name}: it cannot be read from its host; send the image in the request") from None

    def _address(self, host: str, port: int, name: str) -> str:
        """Look the host up once. The connection is made to this address, so that a second look-up cannot lead
        elsewhere."""
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not found or not all(map(self._is_public, found)):
            raise ImageError(f"{name}: its host has an address that is not public; send the image in the request")
        return found[0]

    def _read(self, response: http.client.HTTPResponse, connection: _Connection, deadline: float, name: str) -> bytes:
        data = bytearray()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._too_slow(name)
            connection.own_socket.settimeout(left)
            chunk = response.read1(_CHUNK)
            if not chunk:
                return bytes(data)
            data += chunk
            if len(data) > self._limits.max_bytes:
                raise ImageError(f"{name}: more than the {self._limits.max_bytes} bytes allowed; compress it")

    def _too_slow(self, name: str) -> ImageError:
        return ImageError(f"{name}: its host took more than {self._seconds:g} s; send the image in the request")


class _Connection(http.client.HTTPConnection):
    """Connects to an address that was looked up before, and checks the certificate of the host's name."""

    own_socket: socket.socket  # http.client forgets the socket of a response that ends with the connection

    def __init__(self, address: str, host: str, port: int, is_https: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self.default_port = _PORTS["https" if is_https else "http"]  # left out of the header Host
        self._address = address
        self._is_https = is_https

    def connect(self) -> None:
        connected = socket.create_connection((self._address, self.port), self.timeout)
        if self._is_https:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=self.host)
        self.sock = self.own_socket = connected
