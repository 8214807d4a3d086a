"""API keys: without one, only health, readiness and version answer, however the path is written."""

from collections.abc import Iterator
from typing import Any

import fake_engine
import httpx
import pytest
from serving import running_server

from gossamer.server.config import ServerConfig

KEY = "right-key-0123456789"


def assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 401
    assert len(answer.content) < 1000 and KEY not in answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


@pytest.fixture(scope="module")
def locked() -> Iterator[httpx.Client]:
    config = ServerConfig(model="fake", api_key=(KEY, "second-key"))
    with (
        running_server(fake_engine.FakeEngine(), config) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client


WRONG_KEYS: list[Any] = [
    [],
    [("authorization", "")],
    [("authorization", "Bearer")],
    [("authorization", "Bearer wrong")],
    [("authorization", "Bearer " + KEY[:-1])],
    [("authorization", "Bearer " + KEY + "x")],
    [("authorization", "Basic " + KEY)],
    [("authorization", KEY)],
    [("authorization", b"Bearer \xff\xfe")],
    [("authorization", "Bearer " + "x" * 20_000)],
    [("authorization", "Bearer " + KEY), ("authorization", "Bearer wrong")],
]


@pytest.mark.parametrize("headers", WRONG_KEYS, ids=lambda headers: str(headers)[:50])
def test_wrong_keys(locked: httpx.Client, headers: Any) -> None:
    assert_refused(locked.get("/v1/models", headers=headers))


@pytest.mark.parametrize("value", ["Bearer " + KEY, "bearer " + KEY, "BEARER second-key", "Bearer  " + KEY])
def test_right_keys(locked: httpx.Client, value: str) -> None:
    assert locked.get("/v1/models", headers={"authorization": value}).status_code == 200


PATHS = [
    "//v1/models",
    "/V1/models",
    "/v1%2fmodels",
    "/v1/models/",
    "/./v1/models",
    "/v1/../metrics",
    "/health/../metrics",
]


@pytest.mark.parametrize(
    "path", [*PATHS, "/metrics", "/load", "/docs", "/openapi.json", "/tokenizer_info", "/health/", "/%68ealth/x"]
)
def test_no_path_goes_around_the_key(locked: httpx.Client, path: str) -> None:
    target = httpx.URL(str(locked.base_url).rstrip("/"), raw_path=path.encode())
    assert_refused(locked.get(target))
    assert_refused(locked.get(target, headers={"host": "x/health?"}))


def test_only_three_routes_answer_without_a_key(locked: httpx.Client) -> None:
    listed = locked.get("/openapi.json", headers={"authorization": "Bearer " + KEY}).json()["paths"]
    assert len(listed) >= 14
    answers = {path: locked.request(next(iter(methods)), path).status_code for path, methods in listed.items()}
    assert {path for path, status in answers.items() if status != 401} == {"/health", "/ready", "/version"}
