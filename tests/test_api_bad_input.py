"""What a hostile or careless client may send: one clear sentence, the right code, and nobody else notices."""

import json
import math
from collections.abc import Iterator
from typing import Any

import fake_engine
import httpx
import pytest
from serving import Running, running_server

from gossamer.server.config import ServerConfig

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(fake_engine.FakeEngine(), ServerConfig(model="fake", max_body_size=2 * 2**20)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def assert_refused(
    answer: httpx.Response, status: int = 400, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Status, OpenAI's shape, a short flat body that gives nothing away. Returns the error object."""
    assert answer.status_code == status, answer.text[:500]
    assert len(answer.content) < 4096
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and len(error["message"]) > 10
    for leak in ("Traceback", "site-packages", ".py", "pydantic", "0x"):
        assert leak not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return error


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return send(client, CHAT, {"model": "fake", "messages": MESSAGES, "max_tokens": 2, **fields})


def complete(client: httpx.Client, **fields: Any) -> httpx.Response:
    return send(client, TEXT, {"model": "fake", "prompt": "ab", "max_tokens": 2, **fields})


def send(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=raw, headers={"content-type": "application/json"})


def assert_healthy(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    assert complete(client).json()["choices"][0]["text"] == "Hé"


# --- JSON (items 18 to 31)

DEEP = 100_000
BROKEN = {
    "deep arrays": b"[" * DEEP,
    "deep arrays in an unknown field": b'{"x":' + b"[" * 500 + b"]" * 500 + b"}",
    "deep objects": b'{"messages":' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}",
    "NaN": b'{"prompt":"a","temperature":NaN}',
    "Infinity": b'{"prompt":"a","temperature":Infinity}',
    "-Infinity": b'{"prompt":"a","top_p":-Infinity}',
    "1e999": b'{"prompt":"a","temperature":1e999}',
    "5000 digits": b'{"prompt":"a","seed":' + b"9" * 5000 + b"}",
    "duplicate keys": b'{"prompt":"a","max_tokens":1,"max_tokens":2}',
    "duplicate keys, spelled apart": b'{"prompt":"a","max_tokens":1,"max\\u005ftokens":2}',
    "duplicate inner keys": b'{"prompt":"a","logit_bias":{"1":1,"1":2}}',
    "byte order mark": b'\xef\xbb\xbf{"prompt":"a"}',
    "UTF-16": '{"prompt":"a"}'.encode("utf-16"),
    "UTF-32": '{"prompt":"a"}'.encode("utf-32"),
    "invalid UTF-8": b'{"prompt":"\xff\xfe"}',
    "lone surrogate in the prompt": b'{"prompt":"\\ud800"}',
    "lone surrogate in stop": b'{"prompt":"a","stop":"\\udc00"}',
    "lone surrogate in model": b'{"prompt":"a","model":"\\ud800"}',
    "lone surrogate in user": b'{"prompt":"a","user":"\\ud800x"}',
    "NUL": b'{"prompt":"a\\u0000b"}',
    "NUL in a key": b'{"prompt":"a","\\u0000":1}',
    "truncated": b'{"prompt":"a"',
    "trailing garbage": b'{"prompt":"a"} x',
    "two documents": b'{"prompt":"a"}{"prompt":"b"}',
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "nothing": b"",
    "unknown field of 1 MB": b'{"prompt":"a","what":"' + b"x" * 2**20 + b'"}',
    "100 000 unknown fields": b"{" + b",".join(b'"f%d":1' % i for i in range(100_000)) + b"}",
    "40 000 wrong elements": json.dumps({"prompt": ["a", *[1.5] * 40_000]}).encode(),
    "40 000 wrong ids": json.dumps({"prompt": [1, *["x"] * 40_000]}).encode(),
    "40 000 wrong messages": json.dumps({"messages": [7] * 40_000}).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_broken_bodies(client: httpx.Client, name: str, path: str) -> None:
    assert_refused(send(client, path, BROKEN[name]))
    assert_healthy(client)


@pytest.mark.parametrize(
    "media", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"]
)
def test_other_content_types(client: httpx.Client, media: str) -> None:
    assert_refused(client.post(TEXT, content=b'{"prompt":"a"}', headers={"content-type": media}))


def test_a_missing_content_type_is_json(client: httpx.Client) -> None:
    request = client.build_request("POST", TEXT, content=b'{"prompt":"a","max_tokens":1}')
    assert "content-type" not in request.headers
    assert client.send(request).status_code == 200


def test_strings_with_quotes_and_colons_are_not_keys(client: httpx.Client) -> None:
    prompt = '{"a": 1, "a": 2} \\" : "b": \\\\'
    answer = complete(client, prompt=prompt, echo=True, max_tokens=0)
    assert answer.json()["choices"][0]["text"] == prompt


# --- types and ranges (items 32 to 69)


def short(value: object) -> str:
    return str(value)[:50]


IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"n": True}, "n"),
    ({"n": "1"}, "n"),
    ({"n": 1.0}, "n"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"stream": 1}, "stream"),
    ({"stream": "true"}, "stream"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    *(({"n": n}, "n") for n in (0, -1, 129, 2**31, 2**63, 2**70)),
    *(({"max_tokens": n}, "max_tokens") for n in (-1, 2**31, 2**63)),
    ({"min_tokens": 3}, "min_tokens"),
    ({"min_tokens": 10**6}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    *(({"temperature": t}, "temperature") for t in (-1, 1e30, 2.001)),
    *(({"top_p": p}, "top_p") for p in (0, -0.1, 1.1)),
    *(({"top_k": k}, "top_k") for k in (-5, 2**40)),
    *(({"min_p": p}, "min_p") for p in (-1, 2)),
    *(({name: x}, name) for name in ("presence_penalty", "frequency_penalty") for x in (1e9, -1e9)),
    *(({"repetition_penalty": x}, "repetition_penalty") for x in (0, -1, 1e-300, 1e9)),
    *(({"seed": s}, "seed") for s in (2**63, 2**70, 1.5)),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": "x" * 2**20}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    *(({"stop_token_ids": [i]}, "stop_token_ids") for i in (-1, fake_engine.VOCABULARY, 2**40)),
    ({"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"logit_bias": {str(fake_engine.VOCABULARY): 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
    ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"bad_words": [""]}, "bad_words"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
    ({"priority": 2**64}, "priority"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 2**20}, "cache_salt"),
    ({"cache_salt": "a\nb"}, "cache_salt"),
    ({"attention": {"policy": "nonsense"}}, "attention.policy"),
    ({"attention": {"policy": "../exact"}}, "attention.policy"),
    ({"attention": {"policy": "fast", "budget": -1}}, "attention.budget"),
    ({"attention": "fast"}, "attention"),
    ({"best_of": 2}, "best_of"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
    ({"guided_regex": "(a+)+$"}, "guided_regex"),
    ({"structured_outputs": {"choice": ["a"] * 100_000}}, "structured_outputs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 1000}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"temprature": 1}, "temprature"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 5}, "max_tokens"),  # differs from max_tokens
    ({"logprobs": 1}, "logprobs"),
    *(({"logprobs": True, "top_logprobs": k}, "top_logprobs") for k in (-1, 21, 10**6)),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": None}]}, "messages[1].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "what"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "a", "what": 1}]}, "messages[0].what"),
    ({"messages": MESSAGES * 10_000}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),  # the template refuses
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"conversation": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": "x" * 2**20}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": {}}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),  # this template knows no such thing
    ({"verbosity": "low"}, "verbosity"),
    ({"continue_final_message": True}, "messages"),
    (
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": "x"}],
            "continue_final_message": True,
            "add_generation_prompt": True,
        },
        "continue_final_message",
    ),
]
TEXT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": True}, "logprobs"),
    *(({"logprobs": k}, "logprobs") for k in (-1, 21)),
    *(({"prompt": [i]}, "prompt") for i in (-1, fake_engine.VOCABULARY, 2**31, 2**63, 1.5)),
    *(({"prompt": p}, "prompt") for p in ("", [], [[]], [""], ["a", [1]], [[1], "a"], [1, "a"], 5, {}, [None], [True])),
    ({"prompt": ["a"] * 50_000}, "prompt"),
    ({"prompt": ["a"] * 200, "n": 2}, "n"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": "yes"}, "echo"),
    ({"messages": MESSAGES}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), [*BOTH, *CHAT_ONLY], ids=short)
def test_wrong_chat_fields(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert_refused(chat(client, **fields), param=param)


@pytest.mark.parametrize(("fields", "param"), [*BOTH, *TEXT_ONLY], ids=short)
def test_wrong_completion_fields(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert_refused(complete(client, **fields), param=param)


def test_the_server_is_well_after_all_that(client: httpx.Client, server: Running) -> None:
    assert_healthy(client)
    assert server.engine.settled()
    assert client.get("/load").json() == {"server_load": 0}


FINE: list[dict[str, Any]] = [
    {"temperature": 1e-45},
    {"top_p": 1e-300},
    {"top_k": -1},
    {"top_k": 10**7},
    {"seed": -1},
    {"seed": 2**63 - 1},
    {"stop": []},
    {"stop": None},
    {"stop": "never"},
    {"stop_token_ids": []},
    {"logit_bias": {"5": -100, "7": 100.0}},
    {"user": "x" * 2**20},
    {"metadata": {"k": "x" * 2**20}},
    {"store": True, "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k"},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
    {"best_of": 1, "n": 1},
    {"what_is_this": None},
    {"temperature": 1, "top_p": 1, "presence_penalty": 0},
    {"attention": {"policy": "fast"}, "cache_salt": "tenant-7", "priority": -3},
    dict.fromkeys(("n", "seed", "stop", "stream", "stream_options", "logit_bias", "max_tokens", "min_tokens")),
]


@pytest.mark.parametrize("fields", FINE, ids=lambda fields: str(fields)[:60])
def test_unusual_but_right(client: httpx.Client, fields: dict[str, Any]) -> None:
    for answer in (chat(client, **fields), complete(client, **fields)):
        assert answer.status_code == 200, answer.text


def test_minimum_with_null_maximum(client: httpx.Client) -> None:
    assert_refused(chat(client, max_tokens=None, min_tokens=10**6), param="min_tokens")
    assert_refused(complete(client, max_tokens=None, min_tokens=17), param="min_tokens")
    assert complete(client, max_tokens=None, min_tokens=16).status_code == 200


@pytest.mark.parametrize("name", ["nope", "../../etc/passwd", "x" * 2**20, "", "FAKE"], ids=lambda name: name[:20])
def test_unknown_models(client: httpx.Client, name: str) -> None:
    assert_refused(chat(client, model=name), 404, code="model_not_found", param="model")
    assert_refused(complete(client, model=name), 404, code="model_not_found", param="model")


def test_unknown_model_in_the_path(client: httpx.Client) -> None:
    assert_refused(client.get("/v1/models/nope"), 404, code="model_not_found")


def test_at_over_and_far_over_the_context(client: httpx.Client, server: Running) -> None:
    most = fake_engine.CONTEXT
    assert complete(client, prompt=[65] * (most - 1), max_tokens=1).status_code == 200
    error = assert_refused(complete(client, prompt=[65] * most, max_tokens=1), code="context_length_exceeded")
    assert str(most) in error["message"]
    assert_refused(complete(client, prompt=[65] * (most - 1), max_tokens=2), code="context_length_exceeded")
    assert complete(client, prompt=[65] * most, max_tokens=0, echo=True).status_code == 200
    assert_refused(chat(client, messages=[{"role": "user", "content": "x" * most}]), code="context_length_exceeded")


def test_far_too_long_text_is_not_tokenised(
    client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = server.engine.tokenizer.encode

    def watched(text: str, **options: Any) -> list[int]:
        seen.append(len(text))
        tokens: list[int] = encode(text, **options)
        return tokens

    monkeypatch.setattr(server.engine.tokenizer, "encode", watched)
    assert_refused(complete(client, prompt=" " * (64 * fake_engine.CONTEXT)), code="context_length_exceeded")
    assert seen == []


def test_special_tokens_in_text_stay_text(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"messages": [{"role": "user", "content": "<|start|>system"}]}).json()[
        "tokens"
    ]
    assert tokens.count(fake_engine.START) == 2  # the template's own two


# --- transport, as far as HTTP clients can show it (items 8, 14 to 16)


def test_bodies_over_the_limit(client: httpx.Client) -> None:
    too_large = b'{"prompt":"' + b"x" * (3 * 2**20) + b'"}'
    for content in (too_large, iter([too_large[: 2**20], too_large[2**20 :]])):  # with a length, and chunked
        assert_refused(client.post(TEXT, content=content), 413)
    assert_healthy(client)


def test_compressed_bodies(client: httpx.Client) -> None:
    assert_refused(client.post(TEXT, content=b"\x1f\x8b", headers={"content-encoding": "gzip"}), 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("TRACE", "/health", 405),
        ("BREW", "/health", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/nope", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/V1/models", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "//v1/models", 404),
    ],
)
def test_unknown_routes_and_methods(client: httpx.Client, method: str, path: str, status: int) -> None:
    target = httpx.URL(str(client.base_url).rstrip("/") + path)
    assert_refused(client.request(method, target), status)


def test_internal_errors_say_nothing(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    error = assert_refused(complete(client, prompt="[boom] my private words"), 500, code="internal_error")
    assert "secret" not in error["message"] and "private" not in error["message"]
    assert "my private words" not in caplog.text
    assert_healthy(client)


def test_infinite_numbers_cannot_even_be_written() -> None:
    assert math.isinf(json.loads("1e999"))  # why orjson, which refuses it, reads the bodies
