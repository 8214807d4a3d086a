"""A server over real sockets, in a thread, for whatever engine a test brings."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gossamer.server.api.app import create_app
from gossamer.server.api.facade import ServingEngine
from gossamer.server.api.service import Service
from gossamer.server.api.serving import Server, bind
from gossamer.server.config import ServerConfig
from gossamer.server.metrics import Metrics


@dataclass(frozen=True)
class Running:
    engine: Any
    url: str  # without /v1
    port: int
    service: Service
    server: Server
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def running_server(
    engine: ServingEngine, config: ServerConfig | None = None, metrics: Metrics | None = None
) -> Iterator[Running]:
    """Starts and stops `engine` too. `metrics` is what the engine was built with; the port is a free one."""
    config = replace(config or ServerConfig(), host="127.0.0.1", port=0, shutdown_timeout=0.0)
    app = create_app(engine, config, metrics)
    listener = bind(config)
    port = listener.getsockname()[1]
    server = Server(app, config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    engine.start()
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server did not start"
        yield Running(engine, f"http://127.0.0.1:{port}", port, app.state.service, server, loops[0])
    finally:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(server.stop)
        thread.join(20)
        engine.stop(0.0)
        assert not thread.is_alive(), "the server did not stop"
