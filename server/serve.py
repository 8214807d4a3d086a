"""`gossamer serve`: the port, the engine, the app, in that order, and what is printed on the way."""

import shlex
import sys
import time

import orjson
from rich.console import Console

from gossamer import __version__
from gossamer.server.api.app import create_app
from gossamer.server.api.facade import ServingEngine
from gossamer.server.api.serving import bind, run_server
from gossamer.server.config import ConfigError, ServerConfig
from gossamer.server.engine.build import build_engine
from gossamer.server.engine.families import StartupError
from gossamer.server.logs import configure_logs
from gossamer.server.metrics import Metrics


def serve(config: ServerConfig) -> int:
    """Runs until it is told to stop; the exit code. What is wrong at start is one sentence on standard error."""
    configure_logs(config.log_level)
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()

    def report(line: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f}s  {line}", markup=False)

    try:
        config.keys()  # a key file that cannot be read should not cost a model load
        listener = bind(config)
        with listener:
            port = listener.getsockname()[1]
            report(f"Port {port} on {config.host} is ours")
            metrics = Metrics(config.names[0])
            engine = build_engine(config, metrics, report)
            app = create_app(engine, config, metrics)
            engine.start()
            try:
                alive = run_server(app, config, listener, lambda: _welcome(console, engine, config, port))
            finally:
                engine.stop(0.0)
    except (ConfigError, StartupError) as error:
        print(f"gossamer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if alive else 1


def _welcome(console: Console, engine: ServingEngine, config: ServerConfig, port: int) -> None:
    url = f"http://{shown_host(config.host)}:{port}/v1"
    policy, _, point = policy_of(engine.fingerprint).partition("@")
    points = f" (requests may choose {', '.join(engine.points)})" if len(engine.points) > 1 else ""
    rows = {
        "Ready": f"{url}  (OpenAI API)",
        "Model": f"{engine.model.name}, up to {engine.model.max_model_len:,} tokens",
        "Attention": f"policy {policy}, operating point {point or engine.default_point}{points}",
        "KV cache": f"{engine.stats().kv_token_capacity:,} tokens" + (" in FP8" if config.fp8_cache else ""),
    }
    console.print()
    for name, text in rows.items():
        console.print(f"{name:<11}", style="bold", end="")
        console.print(text, markup=False)
    console.print("\nTry:\n", style="bold")
    console.print(f"  {curl_line(url, engine, needs_key=bool(config.keys()))}\n", markup=False)


def curl_line(url: str, engine: ServingEngine, *, needs_key: bool) -> str:
    """A command that gets an answer from this server."""
    body: dict[str, object] = {"model": engine.model.name}
    if engine.tokenizer.has_chat_template:
        path, body["messages"] = "/chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "/completions", "Hello"
    body["max_tokens"] = 64
    key = ' -H "Authorization: Bearer $KEY"' if needs_key else ""
    data = shlex.quote(orjson.dumps(body).decode())
    return f"curl {url}{path} -H 'Content-Type: application/json'{key} -d {data}"


def shown_host(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def policy_of(fingerprint: str) -> str:
    """ "dense@exact" of "gossamer-0.1.0-dense@exact-0123abcd"."""
    return fingerprint.removeprefix(f"gossamer-{__version__}-").rpartition("-")[0]
