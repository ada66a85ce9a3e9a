from __future__ import annotations

import socket

import pytest

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.triton.ports import choose_ports, listen_address


def test_zeros_become_different_free_ports() -> None:
    ports = choose_ports("127.0.0.1", (0, 0, 0))
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_free_port_is_kept() -> None:
    (port,) = choose_ports("127.0.0.1", (0,))
    assert choose_ports("127.0.0.1", (port,)) == [port]


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} of 127.0.0.1 is in use"):
            choose_ports("127.0.0.1", (0, port, 0))


def test_one_port_twice_is_in_use() -> None:
    (port,) = choose_ports("127.0.0.1", (0,))
    with pytest.raises(ServerError, match=f"port {port} .* in use"):
        choose_ports("127.0.0.1", (port, port))


def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(ServerError, match=r"cannot listen on 192\.0\.2\.1"):
        choose_ports("192.0.2.1", (0,))


def test_a_host_is_listened_to_at_its_ipv4_address() -> None:
    assert listen_address("localhost") == listen_address("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "::1", "", "a" * 99, "\ud800"])
def test_a_host_without_ipv4_address_is_an_error(host: str) -> None:
    with pytest.raises(ServerError, match="cannot listen on host .* choose another --host"):
        listen_address(host)
