"""What the endpoints answer: shapes, framing, order, usage, log-probabilities, tokens and models."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import fake_engine
import httpx
import pytest
from fake_engine import answer
from serving import Running, running_server

from gossamer import __version__
from gossamer.server.api.logprobs import CompletionLogprobs
from gossamer.server.config import ServerConfig
from gossamer.server.engine.records import Health

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(fake_engine.FakeEngine(), ServerConfig(model="fake")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def text_of(tokens: int) -> str:
    return "".join(answer(step) for step in range(tokens))


def post(client: httpx.Client, path: str, **fields: Any) -> Any:
    reply = client.post(path, json=fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(client: httpx.Client, path: str, **fields: Any) -> list[Any]:
    """The parsed chunks of a stream, after a look at its framing."""
    reply = client.post(path, json={"stream": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-request-id"]
    assert "content-length" not in reply.headers
    assert reply.text.endswith("data: [DONE]\n\n")
    frames = reply.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames.count("data: [DONE]") == 1
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


def test_chat(client: httpx.Client, server: Running) -> None:
    body = post(client, CHAT, model="fake", messages=MESSAGES, max_completion_tokens=5)
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    prompt = len(server.engine.tokenizer.encode_chat(MESSAGES))
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "system_fingerprint": server.engine.fingerprint,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text_of(5), "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 5,
            "total_tokens": prompt + 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_defaults_come_from_the_model(client: httpx.Client, server: Running) -> None:
    post(client, CHAT, messages=MESSAGES, stop="H")
    params = server.engine.requests[-1].params
    assert params.max_tokens == fake_engine.CONTEXT - len(server.engine.requests[-1].prompt)
    assert params.temperature == 0.5  # the model's own
    post(client, TEXT, prompt="a")
    assert server.engine.requests[-1].params.max_tokens == 16
    post(client, TEXT, prompt=[65] * (fake_engine.CONTEXT - 3), temperature=0)
    assert server.engine.requests[-1].params.max_tokens == 3
    assert server.engine.requests[-1].params.temperature == 0.0


def test_every_sampling_field_reaches_the_engine(client: httpx.Client, server: Running) -> None:
    fields = {
        "max_tokens": 7, "min_tokens": 1, "temperature": 0.25, "top_p": 0.5, "top_k": 9, "min_p": 0.125, "seed": 42,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "stop_token_ids": [5, 6],
        "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False,
    }  # fmt: skip
    request = {"stop": ["q", "z"], "logit_bias": {"65": 1.5}, "n": 2, "priority": 3, "cache_salt": "s"}
    post(client, TEXT, prompt="a", attention={"policy": "fast"}, **fields, **request)
    seen = server.engine.requests[-1]
    for name, value in fields.items():
        assert getattr(seen.params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert seen.params.stop == ("q", "z")
    assert seen.params.logit_bias == ((65, 1.5),)
    assert (seen.n, seen.priority, seen.cache_salt, seen.point) == (2, 3, "s", "fast")


def test_chat_messages(client: httpx.Client, server: Running) -> None:
    messages = [
        {"role": "developer", "content": "rules", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None, "annotations": []},
    ]
    post(client, CHAT, messages=messages, max_tokens=1, continue_final_message=True)
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt)
    assert prompt == "system:rulesuser:a\nbassistant:c"
    post(client, CHAT, messages=MESSAGES, max_tokens=1, chat_template_kwargs={"enable_thinking": False})


def test_chat_stream(client: httpx.Client) -> None:
    chunks = stream(client, CHAT, messages=MESSAGES, max_tokens=4)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0] == {
        "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None
    }  # fmt: skip
    assert [choice["delta"].get("content") for choice in choices[1:]] == [*text_of(4), None]
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]


def test_completion_stream(client: httpx.Client) -> None:
    chunks = stream(client, TEXT, prompt="a", max_tokens=3)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == list(text_of(3))
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_usage_in_streams(client: httpx.Client, path: str) -> None:
    prompt: Any = {"messages": MESSAGES} if path == CHAT else {"prompt": "a"}
    whole = post(client, path, **prompt, max_tokens=3)["usage"]
    chunks = stream(client, path, **prompt, max_tokens=3, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    chunks = stream(client, path, **prompt, max_tokens=3, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 3 and chunks[-1]["usage"] == whole


def test_stop(client: httpx.Client) -> None:
    choice = post(client, CHAT, messages=MESSAGES, max_tokens=9, stop=["€"])["choices"][0]
    assert choice["message"]["content"] == "Hé"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "€")
    last = stream(client, TEXT, prompt="a", max_tokens=9, stop="€")[-1]["choices"][0]
    assert (last["text"], last["finish_reason"], last["stop_reason"]) == ("", "stop", "€")


def test_choices_and_prompts_are_numbered_through(client: httpx.Client, server: Running) -> None:
    fields: dict[str, Any] = {"prompt": ["a", "bb", "ccc"], "n": 2, "max_tokens": 2, "echo": True}
    body = post(client, TEXT, **fields)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    texts = [prompt + text_of(2) for prompt in ("a", "bb", "ccc") for _ in range(2)]
    assert [choice["text"] for choice in body["choices"]] == texts
    prompt_tokens = 2 + 3 + 4  # once per prompt, whatever n is
    assert body["usage"]["prompt_tokens"] == prompt_tokens and body["usage"]["completion_tokens"] == 12
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert len({request.id for request in server.engine.requests[-3:]}) == 3
    streamed = [""] * 6
    ends = []
    for chunk in stream(client, TEXT, **fields):
        choice = chunk["choices"][0]
        streamed[choice["index"]] += choice["text"]
        ends += [choice["index"]] * (choice["finish_reason"] is not None)
    assert streamed == texts
    assert sorted(ends) == list(range(6))


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]], ids=str)
def test_the_four_forms_of_a_prompt(client: httpx.Client, server: Running, prompt: Any) -> None:
    body = post(client, TEXT, prompt=prompt, max_tokens=1, echo=True)
    assert body["choices"][0]["text"] == "abH"
    from_text = "ab" in (prompt, prompt[0])
    assert list(server.engine.requests[-1].prompt) == [fake_engine.BOS] * from_text + [97, 98]


def test_special_tokens_can_be_left_out(client: httpx.Client, server: Running) -> None:
    post(client, TEXT, prompt="ab", max_tokens=1, add_special_tokens=False)
    assert list(server.engine.requests[-1].prompt) == [97, 98]


def test_chat_logprobs(client: httpx.Client) -> None:
    body = post(client, CHAT, messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=2)
    second = body["choices"][0]["logprobs"]["content"][1]
    assert second["token"] == "é" and second["bytes"] == [0xC3, 0xA9]
    assert [entry["token"] for entry in second["top_logprobs"]] == ["é", "A"]
    assert second["logprob"] == second["top_logprobs"][0]["logprob"]
    body = post(client, CHAT, messages=MESSAGES, max_tokens=2, logprobs=True)
    assert [entry["top_logprobs"] for entry in body["choices"][0]["logprobs"]["content"]] == [[], []]
    assert post(client, CHAT, messages=MESSAGES, max_tokens=2, logprobs=False)["choices"][0]["logprobs"] is None
    chunks = stream(client, CHAT, messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=1)
    tokens = [c["choices"][0]["logprobs"]["content"][0]["token"] for c in chunks if c["choices"][0]["logprobs"]]
    assert tokens == ["H", "é"]


def test_text_offsets_count_characters_of_the_text() -> None:
    """Of special tokens only those that are shown, and of several tokens for one character the last."""

    class Coder:
        pieces: ClassVar = {1: b"<s>", 2: b"a", 3: b"\xc3", 4: b"\xa9", 5: b"z"}

        def token_bytes(self, token: int) -> bytes:
            return self.pieces[token]

        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            return b"".join(self.pieces[token] for token in ids if token != 1).decode(errors="replace")

    for skips, offsets in ((True, [0, 0, 1, 1, 2]), (False, [0, 3, 4, 4, 5])):
        logprobs = CompletionLogprobs(Coder(), skips)  # type: ignore[arg-type]
        parts = [logprobs.part([1, 2, 3], [None] * 3, 0), logprobs.part([4, 5], [None] * 2, 0)]
        assert [offset for part in parts for offset in part["text_offset"]] == offsets


def test_completion_logprobs(client: httpx.Client) -> None:
    logprobs = post(client, TEXT, prompt="a", max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "é", "€"]
    assert logprobs["text_offset"] == [0, 1, 2]
    for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert len(top) == 2 and max(top.values()) == value  # the same float: so lm-eval finds greedy tokens
    logprobs = post(client, TEXT, prompt="a", max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"H": -0.1}]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_as_lm_eval_asks(client: httpx.Client, max_tokens: int) -> None:
    fields: dict[str, Any] = {
        "prompt": [[97, 98, 99]],
        "max_tokens": max_tokens,
        "logprobs": 1,
        "echo": True,
        "seed": 1,
    }
    choice = post(client, TEXT, **fields, stop=[])["choices"][0]
    logprobs = choice["logprobs"]
    expected = ["a", "b", "c", "H"][: 3 + max_tokens]
    assert choice["text"] == "".join(expected) and logprobs["tokens"] == expected
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert value == max(top.values())
    assert choice["finish_reason"] == "length"
    parts = [chunk["choices"][0] for chunk in stream(client, TEXT, **fields)]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name in logprobs:
        joined = list(itertools.chain.from_iterable(part["logprobs"][name] for part in parts if part["logprobs"]))
        assert joined == logprobs[name], name


def test_token_ids(client: httpx.Client, server: Running) -> None:
    choice = post(client, TEXT, prompt=[97], max_tokens=2, return_token_ids=True)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97], [ord("H"), ord("é")])
    for path, prompt in ((CHAT, {"messages": MESSAGES}), (TEXT, {"prompt": [97]})):
        chunks = stream(client, path, **prompt, max_tokens=2, return_token_ids=True)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert choices[0]["prompt_token_ids"] == list(server.engine.requests[-1].prompt)
        assert [i for choice in choices for i in choice.get("token_ids", [])] == [ord("H"), ord("é")]


def test_fingerprint_follows_the_policy(client: httpx.Client) -> None:
    body = post(client, CHAT, messages=MESSAGES, max_tokens=1, attention={"policy": "fast"})
    assert body["system_fingerprint"] == f"gossamer-{__version__}-dense@fast-11111111"


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_tokenize(client: httpx.Client, path: str) -> None:
    body = post(client, path, prompt="aé", return_token_strs=True)
    assert body == {
        "count": 3,
        "max_model_len": fake_engine.CONTEXT,
        "tokens": [fake_engine.BOS, 97, 0xE9],
        "token_strs": ["<bos>", "a", "é"],
    }
    assert post(client, path, prompt="a", add_special_tokens=False)["tokens"] == [97]
    chat = post(client, path, model="fake", messages=MESSAGES, add_generation_prompt=False)
    assert chat["tokens"][-1] == fake_engine.END


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_detokenize(client: httpx.Client, path: str) -> None:
    assert post(client, path, tokens=[fake_engine.BOS, 97])["prompt"] == "<bos>a"
    assert post(client, path, tokens=[])["prompt"] == ""
    assert client.post(path, json={"tokens": [-1]}).json()["error"]["param"] == "tokens"


def test_tokenizer_info(client: httpx.Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<eos>" and info["model_max_length"] == 1e30


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["fake", "org/fake-2"]
    assert client.get("/v1/models/org/fake-2").json() == listed["data"][1]
    assert listed["data"][0]["max_model_len"] == fake_engine.CONTEXT
    assert listed["data"][0]["attention_policies"] == ["exact", "fast"]
    assert post(client, TEXT, model="org/fake-2", prompt="a")["model"] == "org/fake-2"


def test_health_ready_version(client: httpx.Client, server: Running) -> None:
    assert client.get("/version").json() == {"version": __version__}
    for path in ("/health", "/ready"):
        assert client.get(path).status_code == 200
        assert client.head(path).status_code == 200
    server.engine.state = Health(alive=True, ready=False, reason="Warming up.")
    assert client.get("/health").status_code == 200
    ready = client.get("/ready")
    assert ready.status_code == 503 and ready.json()["error"]["message"] == "Warming up."
    assert int(ready.headers["retry-after"]) > 0
    server.engine.state = Health(alive=True, ready=True)


def test_metrics(client: httpx.Client) -> None:
    client.get("/nothing/like/this")
    post(client, TEXT, prompt="a")
    text = client.get("/metrics").text
    assert 'vllm:num_requests_waiting{engine="0",model_name="fake"} 2.0' in text
    assert 'gossamer:http_requests_total{route="/v1/completions",status="200"}' in text
    assert 'gossamer:http_requests_total{route="unmatched",status="404"}' in text
    assert "nothing/like" not in text


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-1.2:3_Z", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a<b>", False),
        ("é", False),
        ("", False),
    ],
)
def test_request_ids(client: httpx.Client, server: Running, given: str, kept: bool) -> None:
    for reply in (
        client.get("/version", headers={"x-request-id": given.encode()}),
        client.post(TEXT, json={"prompt": "a"}, headers={"x-request-id": given.encode()}),
    ):
        assert (reply.headers["x-request-id"] == given) == kept
        assert reply.headers["x-request-id"].isascii() and reply.headers["x-request-id"]
    assert given == "" or given not in server.engine.requests[-1].id


def test_errors_of_the_engine(client: httpx.Client) -> None:
    reply = client.post(TEXT, json={"prompt": "[full]"})
    assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["code"] == "max_num_queued_reqs"
    assert client.post(TEXT, json={"prompt": "[fail]"}).status_code == 500
    aborted = client.post(TEXT, json={"prompt": "[abort]"})
    assert aborted.status_code == 503 and aborted.json()["error"]["message"] == "The engine gave up."
    for stream_fields in ({"stream": True}, {}):  # before the 200, errors keep their status
        assert client.post(TEXT, json={"prompt": "[full]", **stream_fields}).status_code == 503


def test_a_refused_prompt_cancels_its_siblings(client: httpx.Client, server: Running) -> None:
    before = len(server.engine.tickets)
    assert client.post(TEXT, json={"prompt": ["[silent]", "[silent]", "[full]"]}).status_code == 503
    assert [ticket.cancelled.is_set() for ticket in server.engine.tickets[before:]] == [True, True]
    assert server.engine.settled()


@pytest.mark.parametrize("mark", ["[fail]", "[abort]"])
def test_errors_in_a_stream(client: httpx.Client, mark: str) -> None:
    chunks = stream(client, TEXT, prompt=mark, max_tokens=5)
    assert chunks[0]["choices"][0]["text"] == "a"
    assert chunks[-1]["error"]["message"] == "The engine gave up."
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}


def test_docs_can_be_left_out(client: httpx.Client) -> None:
    assert client.get("/docs").status_code == 200
    schema = client.get("/openapi.json").json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "max_completion_tokens" in body["properties"] and "$ref" not in json.dumps(body)
    with (
        running_server(fake_engine.FakeEngine(), ServerConfig(model="fake", disable_fastapi_docs=True)) as bare,
        httpx.Client(base_url=bare.url) as other,
    ):
        assert other.get("/docs").status_code == other.get("/openapi.json").status_code == 404


def test_origins_and_root_path_and_open_metrics() -> None:
    config = ServerConfig(
        model="fake", allowed_origins=("https://a.example",), root_path="/llm", api_key=("k",), open_metrics=True
    )
    with (
        running_server(fake_engine.FakeEngine(), config) as running,
        httpx.Client(base_url=running.url) as other,
    ):
        ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert other.options(TEXT, headers=ask).headers["access-control-allow-origin"] == "https://a.example"
        refused = other.get("/v1/models", headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in refused.headers
        other_site = other.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other_site.headers
        assert other.get("/health").status_code == 200
        assert other.get("/llm/health").status_code == 401
        assert other.get("/v1/models", headers={"authorization": "Bearer k"}).status_code == 200
        schema = other.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
        assert schema["servers"] == [{"url": "/llm"}]
        assert other.get("/metrics").status_code == 200


def test_the_access_log_names_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gossamer.access")
    config = ServerConfig(model="fake", access_log=True, api_key=("secret-key",))
    with running_server(fake_engine.FakeEngine(), config) as running:
        headers = {"authorization": "Bearer secret-key", "x-request-id": "mine"}
        httpx.post(running.url + TEXT + "?secret=query", json={"prompt": "secret words"}, headers=headers)
    lines = [record.getMessage() for record in caplog.records if record.name == "gossamer.access"]
    assert len(lines) == 1 and lines[0].startswith("POST /v1/completions 200 ") and lines[0].endswith("s mine")
    assert "secret" not in caplog.text
