"""`gossamer eval` against the real server over HTTP, and in process: the same answers, so the same numbers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_checks import complaint, run
from serving import Running, running_server

from gossamer.server.config import ServerConfig
from gossamer.server.engine.build import build_engine
from gossamer.server.metrics import Metrics

COMMAND = ("eval",)
ASKED = (
    *("--suite", "ruler", "--suite", "perplexity", "--suite", "needle", "--tasks", "niah_single_1,niah_multikey_2,vt"),
    *("--lengths", "1024", "--documents", "1", "--questions", "3", "--depths", "50"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    config = ServerConfig(device="cpu", max_model_len=2048, max_num_seqs=8, threads=1)
    metrics = Metrics(config.names[0])
    engine = build_engine(config, metrics, lambda line: None)
    with running_server(engine, config, metrics) as running:
        yield running


def numbers(*arguments: object, file: Path) -> dict[str, Any]:
    result = run(COMMAND, *ASKED, *arguments, "--json", file)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """What must agree; a point of one policy has a shorter name on a server."""

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        point = row["point"].removeprefix("gossamer-demo:")
        return row | {"point": "exact" if point == "dense" else point}

    return {name: [plain(row) for row in found[name]] for name in ("cells", "needle", "answers", "texts")}


def test_the_numbers_through_http_are_those_in_process(server: Running, tmp_path: Path) -> None:
    """Every reply, share, interval, density, cached token and log-likelihood."""
    here = numbers("--policy", "gossamer-demo:fast", "--device", "cpu", "--threads", "1", file=tmp_path / "here.json")
    there = numbers("--url", f"{server.url}/v1", "--policy", "fast", file=tmp_path / "there.json")
    assert (here["points"], there["points"]) == (["dense", "gossamer-demo:fast"], ["exact", "fast"])
    assert (here["baseline"], there["baseline"]) == ("dense", "exact")
    assert comparable(here) == comparable(there)
    cells = {(cell["task"], cell["point"]): cell for cell in there["cells"]}
    assert cells["niah_multikey_2", "fast"]["questions"] == 3
    assert cells["niah_single_1", "exact"]["accuracy"] == 1
    assert cells["perplexity", "exact"]["prefill_density"] == 1 > cells["perplexity", "fast"]["prefill_density"]
    assert any(answer["use"]["cached"] > 500 for answer in there["answers"])  # later questions found the document


def test_what_a_server_cannot_do_is_said_in_a_sentence(server: Running, tmp_path: Path) -> None:
    url = f"{server.url}/v1"
    one = ("--tasks", "niah_single_1", "--lengths", "1024", "--documents", "1")
    said = run(COMMAND, *one, "--url", url, "--policy", "fastest")
    assert said.exit_code == 1 and "no operating point 'fastest' that requests may choose; it offers" in said.stderr
    said = run(COMMAND, *one[:2], "--lengths", "4096", "--documents", "1", "--url", url)
    assert said.exit_code == 1 and "but the server takes 2048; give shorter --lengths" in said.stderr
    said = run(COMMAND, *one, "--url", server.url)
    assert said.exit_code == 1 and "refused /models" in said.stderr
    said = run(COMMAND, *one, "--url", "http://127.0.0.1:9/v1")
    assert said.exit_code == 1 and "cannot be reached" in said.stderr and "give another --url" in said.stderr
    assert "--threads is for a model in this process" in complaint(COMMAND, 2, *one, "--url", url, "--threads", "1")


class Other(BaseHTTPRequestHandler):
    """A server of another kind, which knows nothing of operating points and gives no log-probabilities of prompts."""

    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._say({"object": "list", "data": [{"id": "gpt-other", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"key": self.headers["Authorization"]})
        text = {"message": {"role": "assistant", "content": "It is 1234567."}} if "messages" in body else {"text": "Hm"}
        self._say({"choices": [{"index": 0, **text}], "usage": {"prompt_tokens": 9, "completion_tokens": 5}})

    def _say(self, value: object) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def other() -> Iterator[str]:
    Other.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_another_server_is_evaluated_as_it_is(other: str, tmp_path: Path) -> None:
    prompts, key, file = tmp_path / "mine.jsonl", tmp_path / "key", tmp_path / "found.json"
    line = {"messages": [{"role": "user", "content": "?"}], "references": ["1234567", "none"]}
    prompts.write_text(json.dumps(line), "utf-8")
    key.write_text("secret\n", "utf-8")
    result = run(COMMAND, "--suite", prompts, "--url", other, "--api-key-file", key, "--json", file)
    assert result.exit_code == 0, result.output
    told = json.loads(file.read_text("utf-8"))
    assert (told["points"], told["baseline"]) == (["served"], None)
    assert told["notes"] == ["The server offers no dense operating point to compare with."]
    assert (told["cells"][0]["accuracy"], told["cells"][0]["prefill_density"]) == (0.5, None)
    assert "not said" in result.stdout and "secret" not in file.read_text("utf-8")
    (body,) = Other.asked
    sent = {"model": "gpt-other", "temperature": 0, "max_tokens": 128, "key": "Bearer secret"}
    assert body == {**sent, "messages": line["messages"]}


def test_another_server_without_logprobs_cannot_give_perplexity(other: str) -> None:
    said = run(COMMAND, "--suite", "perplexity", "--lengths", "256", "--documents", "1", "--url", other)
    assert said.exit_code == 1 and "gives no log-probabilities of prompts" in said.stderr
    said = run(COMMAND, "--suite", "perplexity", "--lengths", "256", "--url", other, "--policy", "fast")
    assert said.exit_code == 1 and "it offers none, so leave --policy out" in said.stderr
