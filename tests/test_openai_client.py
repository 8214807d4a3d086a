"""The real openai package against a running server, as users call it."""

import itertools
from collections.abc import Iterator
from typing import Any

import fake_engine
import httpx
import openai
import pytest
from fake_engine import answer
from openai.types.chat import ChatCompletionMessageParam
from serving import Running, running_server

from gossamer.server.config import ServerConfig

KEY = "sk-test"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    config = ServerConfig(model="fake", api_key=(KEY,), sse_keep_alive_interval=0.05)
    with running_server(fake_engine.FakeEngine(), config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def text_of(tokens: int) -> str:
    return "".join(answer(step) for step in range(tokens))


def test_chat(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=5, seed=1, user="u")
    assert done.choices[0].message.content == text_of(5)
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens == 5
    assert done.usage.prompt_tokens_details is not None and done.usage.prompt_tokens_details.cached_tokens == 1
    assert done.system_fingerprint is not None and "dense@exact" in done.system_fingerprint
    assert done._request_id


def test_chat_stream(client: openai.OpenAI) -> None:
    text, usage, reasons = "", None, []
    with client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=6, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons.append(choice.finish_reason)
    assert text == text_of(6)
    assert usage is not None and usage.completion_tokens == 6
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}


def test_the_stream_collector(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=MESSAGES, stop="😀", n=2, logprobs=True) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in events and "logprobs.content.delta" in events
    assert [choice.message.content for choice in final.choices] == [text_of(3)] * 2  # up to the stop string


def test_comments_are_not_seen(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt="[slow]", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text_of(8)


def test_completions(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="fake", prompt=["a", "b"], n=2, max_tokens=2, echo=True, logprobs=1, stop=None
    )
    assert [choice.text for choice in done.choices] == [p + text_of(2) for p in "aabb"]
    logprobs = done.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["<bos>", "a", "H", "é"]
    assert logprobs.text_offset == [0, 0, 1, 2]  # <bos> is not in the text
    assert client.completions.create(model="fake", prompt=[[97]], max_tokens=1).choices[0].text == "H"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=3)
    content = done.choices[0].logprobs.content if done.choices[0].logprobs else None
    assert content is not None and [entry.token for entry in content] == ["H", "é"]
    assert len(content[0].top_logprobs) == 3 and content[0].logprob == content[0].top_logprobs[0].logprob


def test_stop_and_our_own_fields(client: openai.OpenAI, server: Running) -> None:
    extra = {"top_k": 5, "attention": {"policy": "fast"}, "chat_template_kwargs": {"enable_thinking": False}}
    done = client.chat.completions.create(model="fake", messages=MESSAGES, stop=["é"], extra_body=extra)
    assert done.choices[0].message.content == "H" and done.choices[0].finish_reason == "stop"
    assert (server.engine.requests[-1].params.top_k, server.engine.requests[-1].point) == (5, "fast")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "org/fake-2"]
    assert client.models.retrieve("org/fake-2").id == "org/fake-2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


ERRORS: list[tuple[type[openai.APIStatusError], dict[str, Any], str | None, str | None]] = [
    (openai.BadRequestError, {"temperature": 3}, "temperature", None),
    (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", None),
    (openai.BadRequestError, {"messages": []}, "messages", None),
    (
        openai.BadRequestError,
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        "messages",
        "context_length_exceeded",
    ),
    (openai.NotFoundError, {"model": "gpt-5"}, "model", "model_not_found"),
    (openai.InternalServerError, {"messages": [{"role": "user", "content": "[full]"}]}, None, "max_num_queued_reqs"),
]


@pytest.mark.parametrize(("kind", "fields", "param", "code"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    client: openai.OpenAI,
    kind: type[openai.APIStatusError],
    fields: dict[str, Any],
    param: str,
    code: str,
    stream: bool,
) -> None:
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**{"model": "fake", "messages": MESSAGES, "stream": stream, **fields})
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.message


def test_wrong_key(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        client.with_options(api_key="sk-wrong").models.list()
    assert raised.value.code == "invalid_api_key"


@pytest.mark.parametrize("mark", ["[fail]", "[abort]"])
def test_an_error_in_a_stream_is_raised(client: openai.OpenAI, mark: str) -> None:
    stream = client.completions.create(model="fake", prompt=mark, stream=True)
    assert next(stream).choices[0].text == "a"
    with pytest.raises(openai.APIError, match="gave up"):
        list(stream)


def test_time_outs_cancel(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(model="fake", prompt="[silent]")
    assert server.engine.settled()
    stream = client.completions.create(model="fake", prompt="[stall]", stream=True)
    assert next(stream).choices[0].text == "H"
    stream.close()
    assert server.engine.settled()


def test_retries_follow_retry_after(server: Running) -> None:
    sent: list[float] = []
    with (
        httpx.Client(event_hooks={"request": [lambda request: sent.append(0)]}) as http,
        openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=1, http_client=http) as client,
    ):
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="fake", prompt="[full]", extra_headers={"x-request-id": "again"})
        assert raised.value.response.headers["retry-after"] == "1"
        assert len(sent) == 2
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="fake", prompt="a", temperature=9)
        assert len(sent) == 3  # what is wrong stays wrong


def test_the_async_client(server: Running) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
            many = [client.completions.create(model="fake", prompt="[slow]", max_tokens=4) for _ in range(20)]
            return [done.choices[0].text for done in await asyncio.gather(*many)]

    assert set(itertools.chain(asyncio.run(ask()))) == {text_of(4)}
