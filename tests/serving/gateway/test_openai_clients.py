"""Clients that nobody here wrote ask the gateway as they ask OpenAI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_calls import data_uri, image_part, png, text_part
from live_gateway import LiveGateway

CONTENT = [image_part(png(1)), text_part("What is this?")]


@pytest.fixture(scope="module")
def expected(live: LiveGateway) -> str:
    text: str = live.chat(CONTENT, max_tokens=24).json["choices"][0]["message"]["content"]
    assert text
    return text


# --- openai ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(live: LiveGateway) -> Any:
    openai = pytest.importorskip("openai", reason="needs openai: pip install 'nvlm-trt[test]'")
    return openai.OpenAI(base_url=live.url, api_key="none", max_retries=0)


def ask(live: LiveGateway, content: Any = CONTENT, **fields: Any) -> dict[str, Any]:
    return {"model": live.model, "messages": [{"role": "user", "content": content}], "max_tokens": 24, **fields}


def test_openai_whole(client: Any, live: LiveGateway, expected: str) -> None:
    answer = client.chat.completions.create(**ask(live))
    assert answer.choices[0].message.content == expected
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.prompt_tokens_details.image_tiles == 7


def test_openai_stream(client: Any, live: LiveGateway, expected: str) -> None:
    chunks = list(client.chat.completions.create(**ask(live), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 0


def test_openai_stream_helper(client: Any, live: LiveGateway, expected: str) -> None:
    """The client joins the chunks by itself. An answer that was cut would be an error to it, so this one stops."""
    stop = expected[-2:]
    with client.chat.completions.stream(**ask(live, stop=stop, logprobs=True, top_logprobs=2)) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert whole.choices[0].message.content == expected[: expected.index(stop)]
    assert all(len(token.top_logprobs) == 2 for token in whole.choices[0].logprobs.content)


def test_openai_parameters(client: Any, live: LiveGateway) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "n": 2, "stop": ["zz"], "user": "ann"}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"70": 1}, "logprobs": True}
    answers = [
        client.chat.completions.create(**ask(live, **fields), extra_body={"top_k": 40, "min_p": 0.01, "max_tiles": 2})
        for _ in range(2)
    ]
    assert [choice.message.content for choice in answers[0].choices] == [c.message.content for c in answers[1].choices]
    assert [choice.index for choice in answers[0].choices] == [0, 1]
    assert answers[0].usage.prompt_tokens_details.image_tiles == 3


def test_openai_conversation(client: Any, live: LiveGateway) -> None:
    """The answer goes back as the client holds it."""
    first = client.chat.completions.create(**ask(live)).choices[0].message
    messages = [{"role": "user", "content": CONTENT}, first, {"role": "user", "content": "And now?"}]
    assert client.chat.completions.create(model=live.model, messages=messages, max_tokens=4).choices[0].message
    dumped = [messages[0], first.model_dump(), messages[2]]
    assert client.chat.completions.create(model=live.model, messages=dumped, max_tokens=4).choices[0].message


def test_openai_completions_and_models(client: Any, live: LiveGateway) -> None:
    completion = client.completions.create(model=live.model, prompt="Hello", max_tokens=4, logprobs=2)
    assert len(completion.choices[0].logprobs.tokens) <= 4
    streamed = client.completions.create(model=live.model, prompt="Hello", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == completion.choices[0].text
    assert [model.id for model in client.models.list()] == [live.model]
    assert client.models.retrieve(live.model).id == live.model


def test_openai_errors(client: Any, live: LiveGateway) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(**{**ask(live), "model": "gpt-9"})
    assert (raised.value.code, raised.value.param, raised.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,####"}}]
    with pytest.raises(openai.BadRequestError, match="wrong base64") as raised:
        client.chat.completions.create(**ask(live, broken))
    assert raised.value.code == "invalid_image"
    assert raised.value.request_id
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        client.chat.completions.create(**ask(live, tools=[{"type": "function", "function": {"name": "f"}}]))


def test_openai_async(live: LiveGateway, expected: str) -> None:
    """Twelve at once, whole and streamed, and one that is left in the middle."""
    openai = pytest.importorskip("openai", reason="needs openai: pip install 'nvlm-trt[test]'")

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url, api_key="none") as client:

            async def whole() -> str:
                answer = await client.chat.completions.create(**ask(live))
                return str(answer.choices[0].message.content)

            async def streamed() -> str:
                stream = await client.chat.completions.create(**ask(live), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def abandoned() -> str:
                endless = ask(live, stream=True, max_tokens=3000, extra_body={"ignore_eos": True})
                async with await client.chat.completions.create(**endless) as stream:
                    async for _ in stream:
                        return expected
                raise AssertionError("the stream is empty")

            return await asyncio.gather(*(ask() for ask in (whole, streamed) * 6), abandoned())

    assert set(asyncio.run(run())) == {expected}
    live.wait_until_idle()


# --- litellm ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # its own, of pydantic
def test_litellm(live: LiveGateway, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet when it is imported
    litellm = pytest.importorskip("litellm", reason="needs litellm: pip install 'nvlm-trt[test]'")
    server = {"api_base": live.url, "api_key": "none", **ask(live), "model": f"openai/{live.model}"}
    answer = litellm.completion(**server)
    assert answer.choices[0].message.content == expected
    chunks = list(litellm.completion(**server, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == expected
    assert asyncio.run(litellm.acompletion(**server, n=2)).choices[1].message.content == expected
    with pytest.raises(litellm.exceptions.BadRequestError, match="image"):
        litellm.completion(**{**server, "messages": [{"role": "user", "content": [image_part(b"no image")]}]})


# --- langchain -------------------------------------------------------------------------------------------------------


def test_langchain(live: LiveGateway, expected: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai: pip install 'nvlm-trt[test]'")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    model = langchain.ChatOpenAI(base_url=live.url, api_key="none", model=live.model, max_tokens=24, temperature=0)
    question = HumanMessage(CONTENT)
    answer = model.invoke([question])
    assert answer.content == expected
    assert answer.usage_metadata["input_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in model.stream([question])) == expected
    assert [a.content for a in model.batch([[question]] * 3)] == [expected] * 3
    history = [SystemMessage("Be brief."), question, AIMessage(expected), HumanMessage("And now?")]
    assert model.invoke(history).content is not None
    assert asyncio.run(model.ainvoke([question])).content == expected
    # LangChain's own form of an image
    data = data_uri(png(1)).partition(",")[2]
    block = {"type": "image", "base64": data, "mime_type": "image/png"}
    assert model.invoke([HumanMessage([block, text_part("What is this?")])]).content == expected
