"""ServerConfig: units, checks, the YAML file, and the command line made from its fields."""

import dataclasses
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import pytest
from typer.testing import CliRunner

from gossamer import __version__
from gossamer.server import serve as serve_module
from gossamer.server.api.serving import bind
from gossamer.server.cli import app
from gossamer.server.config import ConfigError, ServerConfig, flag_of, make_config, parse_bytes, parse_tokens
from gossamer.server.engine.families import StartupError

SAMPLE: dict[str, Any] = {bool: True, int: 3, float: 0.5, str: "text", tuple: ("a", "b")}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("4GiB", 2**32),
        ("4 gib", 2**32),
        ("1.5MiB", 3 * 2**19),
        ("2kB", 2000),
        ("3g", 3 * 10**9),
        ("7B", 7),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "count"), [("8192", 8192), ("128k", 131072), ("1M", 2**20), ("0.5k", 512)])
def test_tokens(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "x", "4XB", "-1", "1 2", "iB", "1e3", "4GiBs"])
def test_sizes_that_are_none(text: str) -> None:
    for parse in (parse_bytes, parse_tokens):
        with pytest.raises(ValueError, match="expected"):
            parse(text)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"port": "x"}, "--port: expected a whole number, not 'x'"),
    ({"port": "70000"}, "--port must be at most 65535"),
    ({"port": True}, "--port: expected a whole number"),
    ({"max_num_seqs": "0"}, "--max-num-seqs must be at least 1"),
    ({"max_model_len": "12q"}, "--max-model-len: expected a number of tokens"),
    ({"kv_cache_memory": "much"}, "--kv-cache-memory: expected a size"),
    ({"gpu_memory_utilization": "1.5"}, "--gpu-memory-utilization must be at most 1"),
    ({"gpu_memory_utilization": "nan"}, "--gpu-memory-utilization must be"),
    ({"dtype": "int3"}, "--dtype must be one of auto, bfloat16, float16, float32, not 'int3'"),
    ({"model": ""}, "--model must not be empty"),
    ({"served_model_name": [""]}, "--served-model-name"),
    ({"served_model_name": 5}, "--served-model-name: expected a list of texts"),
    ({"enable_prefix_caching": "yes"}, "--enable-prefix-caching: expected true or false"),
    ({"host": 5}, "--host: expected a text"),
    ({"api_key": ["schlüssel"]}, "--api-key must hold printable ASCII"),
    ({"root_path": "x"}, "--root-path must start with a slash"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=str)
def test_wrong_settings_are_one_sentence(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        make_config(flags)
    assert "\n" not in str(raised.value)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 9000\nmax-model-len: 64k\nserved-model-name: [a, b]\nqueue_timeout: 5\nthreads:\n")
    config = make_config({"port": "9001", "host": None}, file)
    assert (config.port, config.max_model_len, config.names, config.queue_timeout) == (9001, 65536, ("a", "b"), 5.0)
    assert config.host == "127.0.0.1" and config.threads is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "did you mean port?"),
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "is not valid YAML (line 1)"),
        ("port: 1\nport: 2", "is not valid YAML: the key 'port' is given twice"),
        ("port: x", "--port: expected a whole number"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"\xff\xfe", "it is not UTF-8 text"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config({}, file)
    with pytest.raises(ConfigError, match="no such file"):
        make_config({}, tmp_path / "nothing.yaml")


def test_keys_come_from_flag_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys\nfirst\n\n second \n")
    config = ServerConfig(api_key=("zero",), api_key_file=str(file))
    assert config.keys() == ("zero", "first", "second")
    assert "zero" not in repr(config)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        config.keys()
    file.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        config.keys()


def test_the_demo_model_is_packaged() -> None:
    assert ServerConfig().model_path.endswith("configs/models/gossamer-demo")
    assert ServerConfig().names == ("gossamer-demo",)
    assert ServerConfig(model="org/name").model_path == "org/name"


# --- the command line


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_version() -> None:
    assert invoke("--version") == (0, f"gossamer {__version__}\n")


def test_every_setting_has_a_flag_and_a_help_text() -> None:
    code, text = invoke("serve", "--help")
    assert code == 0
    for spec in dataclasses.fields(ServerConfig):
        assert spec.name == "model" or flag_of(spec.name) in text, spec.name
        assert spec.metadata["help"].endswith((".", ")")), spec.name
        assert spec.metadata["group"] in text
    assert "8000" in text and "--no-enable-prefix-caching" in text


def test_every_flag_reaches_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServerConfig] = []
    monkeypatch.setattr(serve_module, "serve", lambda config: seen.append(config) or 0)
    values = {
        "port": "1234", "max_model_len": "4k", "kv_cache_memory": "2MiB", "gpu_memory_utilization": "0.5",
        "dtype": "float32", "device": "cpu", "load_format": "dummy", "generation_config": "none", "log_level": "debug",
        "root_path": "/x", "max_body_size": "1MiB", "enable_prefix_caching": False, "cuda_graphs": False,
        "fused_kernels": False, "kv_cache_dtype": "fp8", "async_scheduling": False, "quality_sample_rate": "0.5",
        "quality_min_recall": "0.75",
    }  # fmt: skip
    arguments = ["serve", "my/model"]
    for spec in dataclasses.fields(ServerConfig):
        flag, default = flag_of(spec.name), spec.default
        value = values.get(spec.name, {bool: True, tuple: ("a", "b")}.get(type(default), "7"))
        if value is True:
            arguments.append(flag)
        elif value is False:
            arguments.append("--no-" + flag[2:])
        elif spec.name != "model":
            for part in value if isinstance(value, tuple) else (value,):
                arguments += [flag, part]
    assert invoke(*arguments)[0] == 0
    default = ServerConfig()
    same = [s.name for s in dataclasses.fields(default) if getattr(seen[0], s.name) == getattr(default, s.name)]
    assert same == []
    assert (seen[0].model, seen[0].max_model_len, seen[0].api_key) == ("my/model", 4096, ("a", "b"))


def test_every_setting_is_used() -> None:
    folder = Path(serve_module.__file__).parent
    sources = "".join(file.read_text() for file in folder.glob("**/*.py"))
    for spec in dataclasses.fields(ServerConfig):
        assert re.search(rf"(config|settings|self)\.{spec.name}\b", sources), spec.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--prot", "1"], "--port"),
        (["serve", "--max-model-length", "1"], "--max-model-len"),
        (["serve", "--port", "x"], "--port: expected a whole number, not 'x'."),
        (["serve", "--config", "/nothing/here.yaml"], "cannot be read"),
        (["serv"], "serve"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str) -> None:
    code, text = invoke(*arguments)
    assert code == 2 and message in text and "Traceback" not in text


def test_a_taken_port_is_noticed_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_module, "build_engine", lambda *_: pytest.fail("the model was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve_module.serve(ServerConfig(port=port)) == 1
    assert (
        capsys.readouterr().err
        == f"gossamer: Port {port} is taken; choose another with --port, or stop what uses it.\n"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_hosts_that_are_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} .*\\.$"):
        bind(ServerConfig(host=host))


def test_what_is_wrong_at_start_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise StartupError("This model is broken; get another.")

    monkeypatch.setattr(serve_module, "build_engine", refuse)
    assert serve_module.serve(ServerConfig(port=0)) == 1
    assert capsys.readouterr().err == "gossamer: This model is broken; get another.\n"
    assert serve_module.serve(ServerConfig(port=0, api_key_file="/nothing/here")) == 1
    assert "--api-key-file" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_from_start_to_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    engine = fake_engine.FakeEngine()
    answers: list[httpx.Response] = []

    def build(config: ServerConfig, metrics: object, report: Any) -> fake_engine.FakeEngine:
        report("loading [weights]")
        return engine

    def use() -> None:
        welcome = ""
        while "curl" not in welcome:
            time.sleep(0.02)
            welcome += capsys.readouterr().out
        printed.append(welcome)
        found = re.search(r"curl (http://127.0.0.1:\d+)/v1/chat/completions .*-d '(.*)'", welcome)
        assert found is not None
        answers.append(httpx.post(found[1] + "/v1/chat/completions", content=found[2]))
        os.kill(os.getpid(), number)

    printed: list[str] = []
    monkeypatch.setattr(serve_module, "build_engine", build)
    client = threading.Thread(target=use)
    client.start()
    assert serve_module.serve(ServerConfig(model="fake", port=0)) == 0
    client.join()
    assert answers[0].status_code == 200
    text = printed[0]
    assert "loading [weights]" in text
    assert re.search(r"Ready +http://127.0.0.1:\d+/v1", text)
    assert "6,400 tokens" in text  # what fits the cache
    assert re.search(r"policy dense, operating point exact \(requests may choose exact, fast\)", text)


def test_a_dead_engine_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine.FakeEngine()
    engine.state = dataclasses.replace(engine.state, alive=False)
    monkeypatch.setattr(serve_module, "build_engine", lambda *_: engine)
    assert serve_module.serve(ServerConfig(model="fake", port=0)) == 1


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]"), ("a.example", "a.example")]
)
def test_where_to_point_a_client(host: str, shown: str) -> None:
    assert serve_module.shown_host(host) == shown
