from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import RequestError, ServerError
from nvlm_trt.serving.client import AsyncClient, Client
from nvlm_trt.serving.triton.ports import choose_ports


@pytest.fixture
def nobody() -> str:
    (port,) = choose_ports("127.0.0.1", (0,))
    return f"grpc://127.0.0.1:{port}"


def test_no_server_is_an_error_that_says_what_to_do(nobody: str) -> None:
    with Client(nobody) as client:
        assert not client.ready()
        with pytest.raises(ServerError, match=f"no server answers at {nobody}; start one with `nvlm-trt serve`"):
            client.generate("Hello")


def test_no_server_for_the_async_client(nobody: str) -> None:
    async def ask() -> None:
        async with AsyncClient(nobody) as client:
            assert not await client.ready()
            await client.generate("Hello")

    with pytest.raises(ServerError, match="no server answers"):
        asyncio.run(ask())


@pytest.mark.parametrize("url", ["localhost:8001", "http://localhost:8001", "grpc://localhost", "grpc://:x", ""])
def test_a_wrong_address_is_an_error(url: str) -> None:
    with pytest.raises(ServerError, match="grpc://host:port"):
        Client(url)


def test_an_image_that_cannot_be_read_is_named(nobody: str, tmp_path: Path) -> None:
    with Client(nobody) as client, pytest.raises(RequestError, match=r"missing\.png"):
        client.generate("What?", images=[tmp_path / "missing.png"])


@pytest.mark.parametrize("images", [b"\x89PNG", "receipt.png", Path("receipt.png")])
def test_one_image_in_place_of_a_list_is_an_error(nobody: str, images: Any) -> None:
    with Client(nobody) as client, pytest.raises(RequestError, match="pass a list"):
        client.generate("What?", images=images)


@pytest.mark.parametrize("max_tiles", [1 << 31, 1.5])
def test_max_tiles_that_does_not_fit_its_tensor_is_an_error(nobody: str, max_tiles: Any) -> None:
    with Client(nobody) as client, pytest.raises(RequestError, match=f"max_tiles = {max_tiles}"):
        client.generate("What?", max_tiles=max_tiles)


@pytest.mark.parametrize("sampling", [{"n": 2}, SamplingParams(n=2)])
def test_generate_returns_one_answer_and_says_what_returns_more(nobody: str, sampling: Any) -> None:
    async def ask() -> None:
        async with AsyncClient(nobody) as client:
            await client.generate("Hello", sampling=sampling)

    with Client(nobody) as client, pytest.raises(RequestError, match=r"n = 2 asks for more; call `generate_all`"):
        client.generate("Hello", sampling=sampling)
    with pytest.raises(RequestError, match="generate_all"):
        asyncio.run(ask())


def test_a_host_that_does_not_exist_is_an_error_that_says_what_to_do() -> None:
    with Client("grpc://nobody.invalid:8001") as client, pytest.raises(ServerError, match="no server answers at"):
        client.generate("Hello")


def test_a_client_needs_no_engine_runtime() -> None:
    script = (
        "import sys; import nvlm_trt.serving.client; "
        "heavy = ('onnxruntime', 'onnx', 'torch', 'pytriton', 'tokenizers', 'PIL'); "
        "heavy += ('nvlm_trt.engine', 'nvlm_trt.runtime'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
