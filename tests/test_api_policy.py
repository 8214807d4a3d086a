"""A request picks an operating point, in its body or by a header, and is told what its attention read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import pytest
from engines import ask, running_engine
from serving import Running, running_server
from tiny_models import save_tiny_model

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import BlockSparse, Budget, Dense, SinkRecent
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent
from gossamer.server.api.answer import Usage
from gossamer.server.api.job import POLICY_HEADER
from gossamer.server.config import ServerConfig
from gossamer.server.engine.request import AttentionUse, Delta

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(fake_engine.FakeEngine(), ServerConfig(model="fake")) as running:
        yield running


def chat(server: Running, header: str | None = None, **fields: Any) -> httpx.Response:
    headers = {} if header is None else {POLICY_HEADER: header}
    return httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, **fields}, headers=headers, timeout=60)


@pytest.mark.parametrize("header", [None, "fast"])
@pytest.mark.parametrize("body", [None, {}, {"policy": "fast"}, {"policy": None}])
def test_body_and_header_pick_a_point(server: Running, header: str | None, body: dict[str, Any] | None) -> None:
    answer = chat(server, header, **({} if body is None else {"attention": body}))
    assert answer.status_code == 200
    asked = header or (body or {}).get("policy")
    assert server.engine.requests[-1].point == asked
    assert answer.json()["system_fingerprint"] == server.engine.fingerprint_of(asked)


def test_completions_take_the_header_too(server: Running) -> None:
    body = {"model": "fake", "prompt": "ab", "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers={POLICY_HEADER: "fast"}).status_code == 200
    assert server.engine.requests[-1].point == "fast"


@pytest.mark.parametrize(
    ("header", "body", "status", "code", "says"),
    [
        ("nonsense", None, 400, "unknown_policy", "choose one of: exact, fast"),
        (None, "nonsense", 400, "unknown_policy", "choose one of: exact, fast"),
        ("private", None, 403, "forbidden_policy", "'private'; allowed: exact, fast"),
        (None, "private", 403, "forbidden_policy", "'private'; allowed: exact, fast"),
        ("exact", "fast", 400, None, "differ; send one of them"),
    ],
)
def test_refusals(
    server: Running, header: str | None, body: str | None, status: int, code: str | None, says: str
) -> None:
    answer = chat(server, header, **({} if body is None else {"attention": {"policy": body}}))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, "attention.policy", code)
    assert says in error["message"]


def test_a_header_given_twice_is_refused(server: Running) -> None:
    headers = [("X-Gossamer-Policy", "exact"), ("X-Gossamer-Policy", "fast")]
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    answer = httpx.post(server.url + "/v1/chat/completions", headers=headers, json=body)
    assert answer.status_code == 400 and "There is no such attention policy" in answer.json()["error"]["message"]


SHORT = HeadPolicy(BlockSparse(Budget("tokens", 128), above=10_000), Dense(), KeepAll())
SPARSE = HeadPolicy(SinkRecent(64, 64), SinkRecent(64, 64), KeepSinkRecent(64, 64))
POLICY = AttentionPolicy(
    "p",
    (
        OperatingPoint("exact", ((DENSE,) * 2,) * 3),
        OperatingPoint("later", ((SHORT,) * 2,) * 3),
        OperatingPoint("fast", ((SPARSE, DENSE),) * 3),
    ),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def test_what_was_read_is_told_with_the_last_delta(checkpoint: Path) -> None:
    """640 tokens in one batch at three points: counted page by page, by hand."""
    prompt = [5 + n % 50 for n in range(640)]
    with running_engine(checkpoint, policy=POLICY, enable_prefix_caching=False) as engine:
        answers = {point: ask(engine, prompt, point=point, max_tokens=3) for point in POLICY.names}
        uses = {point: answer.finish().attention for point, answer in answers.items()}
    for point, use in uses.items():
        assert use is not None and use.point == point
        assert (use.prefill_possible, use.decode_possible) == (64 * 6 * sum(range(1, 11)), 6 * 2 * 11)
    exact, later, fast = (uses[point] for point in POLICY.names)
    assert exact is not None and later is not None and fast is not None
    assert (exact.prefill_read, exact.decode_read) == (exact.prefill_possible, exact.decode_possible)
    assert (exact.dense_because, later.dense_because, fast.dense_because) == ("policy", "short", None)
    # a streaming head reads the sink page, its own, and the one before: 1, 2, then 3 pages
    assert fast.prefill_read == exact.prefill_read / 2 + 64 * 3 * (1 + 2 + 8 * 3)
    assert fast.decode_read < 0.7 * exact.decode_read
    assert fast.kv_bytes < 0.75 * exact.kv_bytes
    assert all(delta.attention is None for delta in answers["exact"].deltas()[:-1])


def test_usage_adds_up_the_choices() -> None:
    usage = Usage()
    assert "attention" not in usage.body()
    numbers = {"prefill_possible": 10.0, "decode_possible": 0.0, "decode_read": 0.0, "kv_bytes": 100}
    for read in (5.0, 2.5):
        use = AttentionUse(point="fast", prefill_read=read, dense_because=None, **numbers)  # type: ignore[arg-type]
        usage.attention.append(use)
    assert usage.body()["attention"] == {
        "policy": "fast",
        "prefill_density": 0.375,
        "decode_density": None,
        "kv_bytes": 200,
        "dense_because": None,
    }
    assert Delta(index=0, text="", tokens=()).attention is None
