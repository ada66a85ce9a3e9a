"""The programs of README.md and docs/structured_output.md run as they stand; docs/openai.md names what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_gateway import LiveGateway, open_gateway

from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.serving.gateway.chat_request import ChatCompletionRequest
from nvlm_trt.serving.gateway.completion_request import CompletionRequest
from nvlm_trt.serving.gateway.gateway import GatewayOptions

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STRUCTURED = (ROOT / "docs" / "structured_output.md").read_text(encoding="utf-8")
DOCS = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
ANSWER = "48.20"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    engine = tmp_path_factory.mktemp("trained") / "nvlm-h-tiny"
    build_engine(ROOT / "checkpoints" / "nvlm-h-tiny", engine)
    with open_gateway(engine, GatewayOptions()) as gateway:
        yield gateway


def snippet(language: str, containing: str, served: LiveGateway, page: str = README) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if containing in block]
    assert "127.0.0.1:8080" in block
    return block.replace("127.0.0.1:8080", f"127.0.0.1:{served.port}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(served: LiveGateway) -> None:
    script = snippet("bash", "chat/completions", served).replace("curl ", "curl --silent --noproxy '*' ")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f'"message":{{"role":"assistant","content":"{ANSWER}"' in done.stdout


def test_openai_python(served: LiveGateway) -> None:
    pytest.importorskip("openai", reason="needs openai: pip install 'nvlm-trt[test]'")
    script = snippet("python", "from openai", served)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ANSWER


def test_the_program_that_parses_an_answer(served: LiveGateway) -> None:
    pytest.importorskip("openai", reason="needs openai: pip install 'nvlm-trt[test]'")
    program = snippet("python", ".parse(", served, STRUCTURED)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"total=[0-9]{1,3} currency='(EUR|CHF)'\n", done.stdout)


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_every_parameter_is_documented(kind: type[ChatCompletionRequest]) -> None:
    for name in (*kind.model_fields, *kind.UNSUPPORTED):
        assert f"`{name}`" in DOCS or name in ("model", "messages", "function_call"), name
