"""Sockets: clients that are slow, broken, gone or silent, and a server that stops."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fake_engine
import httpx
import pytest
from serving import Running, running_server

from gossamer.server.api import stream as stream_module
from gossamer.server.config import ServerConfig
from gossamer.server.engine.records import Health

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    config = ServerConfig(
        model="fake", read_timeout=0.4, write_timeout=0.5, sse_keep_alive_interval=0.1, max_body_size=100_000
    )
    with running_server(fake_engine.FakeEngine(), config) as running:
        yield running


@contextlib.contextmanager
def connected(server: Running, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent)
        yield connection


def post(body: bytes | dict[str, Any], path: str = TEXT, headers: str = "") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n{headers}\r\n"
    return head.encode() + raw


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    seen = b""
    while end not in seen:
        part = connection.recv(65536)
        assert part, f"the server closed after {seen!r}"
        seen += part
    return seen


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def eventually(fact: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not fact() and time.monotonic() < end:
        time.sleep(0.01)
    return fact()


def assert_well(server: Running) -> None:
    assert httpx.get(server.url + "/health", timeout=60).status_code == 200
    assert eventually(lambda: not server.service.calls)
    assert server.engine.settled()


# --- slow and broken requests


def test_headers_that_never_end(server: Running) -> None:
    with connected(server, b"GET /health HTTP/1.1\r\nHost: x\r\n") as connection:
        began = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - began > 0.2


def test_headers_byte_by_byte(server: Running) -> None:
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        began = time.monotonic()
        while time.monotonic() - began < 60:
            connection.sendall(b"G")
            time.sleep(0.05)
        pytest.fail("the server waited")
    assert_well(server)


def test_slow_headers_after_a_first_request(server: Running) -> None:
    with connected(server, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert status_of(read_until(connection, b"}")) == 200
        connection.sendall(b"GET /version HTTP/1.1\r\n")
        assert read_all(connection) == b""


def test_a_body_that_never_comes(server: Running) -> None:
    for sent in (post(b"x" * 100)[:-50], post(b"")[:-2].replace(b"Length: 0", b"Length: 90000") + b"\r\n"):
        with connected(server, sent) as connection:
            assert status_of(read_all(connection)) == 408
    assert_well(server)


def test_a_body_byte_by_byte(server: Running) -> None:
    with connected(server, post(b"x" * 1000)[:-1000]) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                connection.sendall(b"x")
                time.sleep(0.05)
        assert status_of(read_all(connection)) == 408


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nBig: " + b"x" * 2**20 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"h%d: 1\r\n" % i for i in range(10_000)) + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"h%d: 1\r\n" % i for i in range(200)) + b"\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\nHost: x\r\n\r\nSM\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=lambda head: str(head[:80]),
)
def test_requests_that_are_not_http(server: Running, head: bytes) -> None:
    with connected(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)
        answer = read_all(connection)
        assert answer == b"" or (status_of(answer) in (400, 404, 431) and b'{"error":{"message":' in answer)
    assert_well(server)


def test_upgrades_are_not_followed(server: Running) -> None:
    for protocol in (b"websocket", b"h2c"):
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n"
        with connected(server, head) as connection:
            assert status_of(read_until(connection, b"}")) == 200


@pytest.mark.parametrize("host", [b"a/v1/../", b"x?y", b"x#/health", b"", b"127.0.0.1:1"])
def test_odd_hosts_change_nothing(server: Running, host: bytes) -> None:
    with connected(server, b"GET /nope HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n") as connection:
        assert status_of(read_all(connection)) in (400, 404)


def test_too_large_a_length_is_refused_before_the_body_comes(server: Running) -> None:
    head = post(b"").replace(b"Length: 0", b"Length: 99999999999999999999")
    for sent in (head, head.replace(b"9" * 20, b"200000")):
        with connected(server, sent) as connection:
            answer = read_until(connection, b"}}")
            assert status_of(answer) == 413 and b"connection: close" in answer


def test_expect_continue(server: Running) -> None:
    large = post(b"", headers="Expect: 100-continue\r\n").replace(b"Length: 0", b"Length: 200000")
    with connected(server, large) as connection:
        assert status_of(read_all(connection)) == 413  # and no 100 before it
    body = b'{"prompt":"a","max_tokens":1}'
    head = post(body, headers="Expect: 100-continue\r\nConnection: close\r\n")[: -len(body)]
    with connected(server, head) as connection:
        assert status_of(read_until(connection, b"\r\n\r\n")) == 100
        connection.sendall(body)
        assert status_of(read_all(connection)) == 200


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    requests = b"".join(post({"prompt": "x" * i, "echo": True, "max_tokens": 0}) for i in range(1, 11))
    with connected(server, requests) as connection:
        seen = b""
        while seen.count(b"HTTP/1.1 200") < 10 or not seen.endswith(b"}"):
            seen += connection.recv(65536)
    texts = [json.loads(part[part.index(b"{") :])["choices"][0]["text"] for part in seen.split(b"HTTP/1.1 ")[1:]]
    assert texts == ["x" * i for i in range(1, 11)]


def test_idle_connections_hold_nobody_up(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(server))
        assert_well(server)


# --- clients that leave


def last_ticket(server: Running) -> fake_engine.FakeTicket:
    ticket: fake_engine.FakeTicket = server.engine.tickets[-1]
    return ticket


@pytest.mark.parametrize("how", ["close", "half close", "reset"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mark", ["[silent]", "[stall]", "[slow]"])
def test_leaving_cancels(server: Running, mark: str, streaming: bool, how: str) -> None:
    before = len(server.engine.tickets)
    body = {"prompt": [mark, mark], "n": 2, "stream": streaming, "max_tokens": 1000}
    with connected(server, post(body)) as connection:
        assert eventually(lambda: len(server.engine.tickets) == before + 2)
        if streaming:
            read_until(connection, b"\r\n\r\n")
        if how == "half close":
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert eventually(lambda: all(ticket.cancelled.is_set() for ticket in server.engine.tickets[before:]))
    assert_well(server)


def test_leaving_before_the_body_ends(server: Running) -> None:
    before = len(server.engine.tickets)
    with connected(server, post(b"x" * 100)[:-50]):
        assert eventually(lambda: len(server.service.calls) == 1)
    assert_well(server)
    assert len(server.engine.tickets) == before


def test_leaving_while_the_prompt_is_tokenised(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(text: str, *, add_special_tokens: bool = True) -> list[int]:
        began.set()
        may_end.wait(60)
        ended.set()
        return [65]

    monkeypatch.setattr(server.engine.tokenizer, "encode", slow)
    before = len(server.engine.tickets)
    with connected(server, post({"prompt": "a"})):
        assert began.wait(60)
        assert httpx.get(server.url + "/health", timeout=60).status_code == 200  # the loop is free meanwhile
    assert eventually(lambda: not server.service.calls)
    may_end.set()
    assert ended.wait(60)
    assert len(server.engine.tickets) == before
    assert_well(server)


def test_left_clients_are_counted(server: Running) -> None:
    with connected(server, post({"prompt": "[silent]"})):
        assert eventually(lambda: len(server.service.calls) == 1)
    assert_well(server)
    assert 'route="/v1/completions",status="499"' in httpx.get(server.url + "/metrics").text


def test_a_finished_stream_cancels_nothing_that_matters(server: Running) -> None:
    with connected(server, post({"prompt": "a", "stream": True, "max_tokens": 2})) as connection:
        seen = read_until(connection, b"data: [DONE]\n\n")
        seen += read_until(connection, b"0\r\n\r\n") if not seen.endswith(b"0\r\n\r\n") else b""
        assert b"error" not in seen
        connection.sendall(post({"prompt": "b", "max_tokens": 1}))  # the connection can be used again
        assert status_of(read_until(connection, b"}}}")) == 200


# --- slow readers and silence


def flood(connection: socket.socket) -> None:
    """Ask for more than socket buffers hold but fewer events than a call may keep, and read nothing of it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(post({"prompt": "[flood]", "n": 10, "stream": True, "max_tokens": 1900, "logprobs": 20}))


def test_a_client_that_never_reads_is_dropped(server: Running) -> None:
    assert stream_module.MAX_PENDING > 10 * 1900
    before = len(server.engine.tickets)
    with connected(server) as connection:
        flood(connection)
        assert eventually(lambda: len(server.engine.tickets) == before + 1)
        fine = httpx.post(server.url + TEXT, json={"prompt": "a", "max_tokens": 3}, timeout=60)
        assert fine.json()["choices"][0]["text"] == "Hé€"
        assert eventually(server.engine.tickets[before].cancelled.is_set)
    assert_well(server)


def test_too_many_waiting_events_end_the_stream(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[Any]:
        monkeypatch.setattr(stream_module, "MAX_PENDING", 3)
        queue = stream_module.EventQueue()
        publish = queue.publisher(0)
        for index in range(10):
            publish(stream_module.Event.__args__[2](index=index, text="", tokens=()))
        assert len(queue._pending) <= 4
        with pytest.raises(stream_module.Interrupted):
            await queue.get(None)
        return []

    asyncio.run(run())


def test_comments_fill_the_silence(server: Running) -> None:
    with connected(server, post({"prompt": "[silent]", "stream": True})) as connection:
        seen = read_until(connection, b"tokens\n\n")
        assert b": keep-alive 1/9 prompt tokens\n\n" in seen
        began = time.monotonic()
        for _ in range(3):
            read_until(connection, b": keep-alive")
        assert time.monotonic() - began > 0.2  # no more often than asked for
    with connected(server, post({"prompt": "[stall]", "stream": True})) as connection:
        seen = read_until(connection, b": keep-alive")
        assert b'"text":"H"' in seen
    assert_well(server)


def test_no_comments_when_switched_off() -> None:
    config = ServerConfig(model="fake", sse_keep_alive_interval=0)
    with running_server(fake_engine.FakeEngine(), config) as quiet:
        with connected(quiet, post({"prompt": "[silent]", "stream": True})) as connection:
            read_until(connection, b"\r\n\r\n")
            connection.settimeout(0.4)
            with pytest.raises(TimeoutError):
                connection.recv(100)
        assert_well(quiet)


def test_waiting_too_long_in_the_queue() -> None:
    with running_server(fake_engine.FakeEngine(), ServerConfig(model="fake", queue_timeout=1.0)) as impatient:
        silence = impatient.engine._run
        impatient.engine._run = lambda request, text, ticket, publish: ticket.cancelled.wait(600)
        answer = httpx.post(impatient.url + TEXT, timeout=60, json={"prompt": "a"})
        assert answer.status_code == 503 and "too long" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"]
        streamed = httpx.post(impatient.url + TEXT, timeout=60, json={"prompt": "a", "stream": True})
        assert b'"error"' in streamed.content and streamed.content.endswith(b"data: [DONE]\n\n")
        assert eventually(lambda: all(ticket.cancelled.is_set() for ticket in impatient.engine.tickets))
        impatient.engine._run = silence
        began = httpx.post(impatient.url + TEXT, timeout=60, json={"prompt": "[slow]", "max_tokens": 30})
        assert began.status_code == 200  # what has begun may take its time


# --- many at once, and the end


def test_a_full_server_says_so() -> None:
    config = ServerConfig(model="fake", max_num_seqs=1, max_queued_requests=2)
    with running_server(fake_engine.FakeEngine(), config) as small, contextlib.ExitStack() as stack:
        for count in range(1, 4):
            stack.enter_context(connected(small, post({"prompt": "[silent]"})))
            assert eventually(lambda count=count: len(small.service.calls) == count)  # type: ignore[misc]
        answer = httpx.post(small.url + TEXT, json={"prompt": "a"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert httpx.get(small.url + "/load").json() == {"server_load": 3}
        assert (
            'admission_rejections_total{model_name="fake",reason="max_open_calls"} 1.0'
            in httpx.get(small.url + "/metrics").text
        )
        stack.close()
        assert_well(small)


def stop(server: Running) -> None:
    server.loop.call_soon_threadsafe(server.server.stop)


def test_draining_lets_open_requests_finish() -> None:
    with running_server(fake_engine.FakeEngine(), ServerConfig(model="fake")) as running:
        running.server._drain_seconds = 10.0
        with connected(running, post({"prompt": "[slow]", "stream": True, "max_tokens": 12})) as connection:
            read_until(connection, b'"text"')
            stop(running)
            assert eventually(lambda: running.service.draining)
            ready = httpx.get(running.url + "/ready")
            assert ready.status_code == 503 and ready.headers["retry-after"]
            assert httpx.get(running.url + "/health").status_code == 200
            refused = httpx.post(running.url + TEXT, json={"prompt": "a"})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            rest = read_until(connection, b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in rest and b"error" not in rest
        assert eventually(lambda: running.server.should_exit)


def test_a_second_signal_ends_open_streams() -> None:
    with running_server(fake_engine.FakeEngine(), ServerConfig(model="fake")) as running:
        running.server._drain_seconds = 60.0
        with (
            connected(running, post({"prompt": "[stall]", "stream": True})) as streaming,
            connected(running, post({"prompt": "[stall]"})) as waiting,
        ):
            read_until(streaming, b'"text"')
            assert eventually(lambda: len(running.service.calls) == 2)
            stop(running)
            stop(running)
            rest = read_until(streaming, b"data: [DONE]\n\n")
            assert b'"error"' in rest and b"shutting down" in rest
            assert status_of(read_all(waiting)) == 503
        assert all(ticket.cancelled.is_set() for ticket in running.engine.tickets)


def test_the_server_leaves_when_the_engine_has_died() -> None:
    with running_server(fake_engine.FakeEngine(), ServerConfig(model="fake")) as running:
        running.engine.state = Health(alive=False, ready=False, reason="The engine broke.")
        assert eventually(lambda: running.server.should_exit)
        assert running.server.engine_died
