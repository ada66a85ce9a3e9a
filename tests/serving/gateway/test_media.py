"""Images of URLs: of hosts that the operator has named, at public addresses, within limits, without redirects."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from gateway_calls import data_uri, png
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.errors import ImageError
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.serving.gateway.media import MediaReader, is_public

IMAGE = png()
LIMITS = ImageLimits(max_bytes=1 << 20)


class Handler(http.server.BaseHTTPRequestHandler):
    """A host of images, one of which never ends, another of which is slow."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError):
            if self.path.startswith("/image.png"):
                self.answer(200, IMAGE)
            elif self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "/image.png")
                self.end_headers()
            elif self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(bytes(1 << 16))
            elif self.path == "/dripping":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            elif self.path == "/silent":
                time.sleep(1)
            else:
                self.answer(404, b"secret text")

    def answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def read(url: str, *domains: str, loopback: bool = True, seconds: float = 5) -> bytes:
    reader = MediaReader(LIMITS, domains, seconds, (lambda address: True) if loopback else is_public)
    try:
        return asyncio.run(reader.read(url, "image 2"))
    finally:
        reader.close()


def test_an_allowed_host_is_read(host: http.server.ThreadingHTTPServer) -> None:
    own = f"localhost:{host.server_port}"
    assert read(f"http://{own}/image.png?x=1#y", own) == IMAGE
    assert read(f"HTTP://LocalHost.:{host.server_port}/image.png", own.upper()) == IMAGE
    assert host.seen[-2:] == [("/image.png?x=1", own), ("/image.png", own)]  # type: ignore[attr-defined]


FAULTS = {
    "/redirect": "status 302",
    "/missing": "status 404",
    "/endless": "more than the 1048576 bytes",
    "/dripping": "took more than 0.5 s",
    "/silent": "took more than 0.5 s",
}


@pytest.mark.parametrize("path", FAULTS)
def test_a_host_that_does_not_give_an_image(host: http.server.ThreadingHTTPServer, path: str) -> None:
    own = f"localhost:{host.server_port}"
    started = time.monotonic()
    with pytest.raises(ImageError, match=f"^image 2: .*{FAULTS[path]}") as raised:
        read(f"http://{own}{path}", own, seconds=0.5)
    assert "secret" not in str(raised.value)
    assert time.monotonic() - started < 20


REFUSED = (
    "http://{own}/image.png",  # another host is allowed
    "http://allowed.example:{port}/image.png",  # another port
    "http://user@localhost:{port}/image.png",
    "ftp://localhost:{port}/image.png",
    "file:///etc/passwd",
    "gopher://localhost:{port}/",
    "//localhost:{port}/image.png",
    "http:///image.png",
    "http://localhost:99999/",
    "http://[::1/",
    "image.png",
    "",
)


@pytest.mark.parametrize("url", REFUSED)
def test_other_urls_are_refused_without_a_connection(host: http.server.ThreadingHTTPServer, url: str) -> None:
    before = list(host.seen)  # type: ignore[attr-defined]
    own = f"localhost:{host.server_port}"
    allowed = "allowed.example" if url.startswith(("http://{own}", "http://allowed")) else own
    with pytest.raises(ImageError, match="^image 2: "):
        read(url.format(own=own, port=host.server_port), allowed)
    assert host.seen == before  # type: ignore[attr-defined]


def test_an_allowed_name_of_a_private_address(host: http.server.ThreadingHTTPServer) -> None:
    own = f"localhost:{host.server_port}"
    before = list(host.seen)  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match="not public"):
        read(f"http://{own}/image.png", own, loopback=False)
    assert host.seen == before  # type: ignore[attr-defined]


def test_the_name_is_looked_up_once(host: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is made to the address that was checked: a second look-up could give another."""
    asked: list[object] = []
    look_up = socket.getaddrinfo

    def once(name: str, *arguments: object, **options: object) -> object:
        if name == "images.example":
            asked.append(name)
            name = "127.0.0.1"
        return look_up(name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", once)
    own = f"images.example:{host.server_port}"
    assert read(f"http://{own}/image.png", own) == IMAGE
    assert asked == ["images.example"]
    assert host.seen[-1] == ("/image.png", own)  # type: ignore[attr-defined]


def test_one_private_address_among_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [(2, 1, 6, "", (address, 443)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    with pytest.raises(ImageError, match="not public"):
        read("https://images.example/a.png", "images.example", loopback=False)


# of IANA's registries of special purposes
NOT_PUBLIC = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24"),
    *("192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/128", "::1/128", "fc00::/7", "fe80::/10", "ff00::/8", "2001:db8::/32"),
)


@given(st.sampled_from(NOT_PUBLIC).flatmap(lambda network: st.ip_addresses(network=network)))
def test_addresses_that_are_not_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert not is_public(str(address))
    if isinstance(address, ipaddress.IPv4Address):
        for form in (
            f"::ffff:{address}",
            f"64:ff9b::{address}",
            str(ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80))),  # 6to4
        ):
            assert not is_public(form), form
    else:
        assert not is_public(f"{address}%eth0")


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@given(st.binary(max_size=200))
def test_a_data_uri_gives_its_bytes(data: bytes) -> None:
    assert read(data_uri(data), loopback=False) == data


@given(st.binary(min_size=1, max_size=60), st.integers(0, 80), st.sampled_from("*%-_ \n\t=é\0"))
def test_base64_is_strict(data: bytes, place: int, wrong: str) -> None:
    uri = data_uri(data)
    place = min(len("data:image/png;base64,") + place, len(uri.rstrip("=")))
    with pytest.raises(ImageError, match="^image 2: "):
        read(uri[:place] + wrong + uri[place:], loopback=False)
