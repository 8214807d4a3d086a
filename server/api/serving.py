"""Running the app on a socket: start, watch the engine, drain on SIGTERM, leave."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from gossamer.server.api.connection import MAX_HEADER_BYTES, timed_connection
from gossamer.server.api.service import Service
from gossamer.server.config import ConfigError, ServerConfig

logger = logging.getLogger("gossamer.server")

KEEP_ALIVE_SECONDS = 65  # longer than the usual 60 s of proxies, so that they, not we, close idle connections
_TICK = 0.1


def bind(config: ServerConfig) -> socket.socket:
    """A bound socket, so that a taken port is noticed before the model is loaded. Raises ConfigError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ConfigError(f"--host {config.host} is not an address of this machine.") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {config.port} is taken; choose another with --port, or stop what uses it."
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"Port {config.port} needs more rights; choose one above 1023 with --port.") from None
        raise ConfigError(f"--host {config.host} cannot be listened on: {error.strerror}.") from None
    listener.set_inheritable(False)
    return listener


class Server(uvicorn.Server):
    """Answers while it drains: readiness turns 503 at once, the socket closes when the open calls are done."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=timed_connection(config.read_timeout, config.write_timeout),
                root_path=config.root_path,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )
        self._service: Service = app.state.service
        self._drain_seconds = config.shutdown_timeout
        self._draining: asyncio.Task[None] | None = None
        self.engine_died = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours, not uvicorn's: see `run_server`."""
        yield

    async def on_tick(self, counter: int) -> bool:
        if not self.engine_died and not self._service.engine.health().alive:
            logger.error("the engine has stopped; leaving")
            self.engine_died = True
            self.stop()
        return await super().on_tick(counter)

    def stop(self) -> None:
        """The first call drains, the second interrupts what is still open. On the event loop."""
        if self._draining is not None:
            self._service.interrupt("The server is shutting down.")
            self.should_exit = True
            return
        self._service.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        count = len(self._service.calls)
        if count:
            logger.info(
                "draining %d open requests, for at most %g s; a second signal ends them", count, self._drain_seconds
            )
        deadline = asyncio.get_running_loop().time() + (0.0 if self.engine_died else self._drain_seconds)
        while self._service.calls and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_TICK)
        self._service.interrupt("The server is shutting down.")
        self.should_exit = True


def run_server(app: FastAPI, config: ServerConfig, listener: socket.socket, started: Callable[[], None]) -> bool:
    """Serve until SIGINT or SIGTERM. `started` is called once the port answers. False when the engine died."""
    server = Server(app, config)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        task = loop.create_task(server.serve([listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.02)
        if server.started:
            started()
        await task

    asyncio.run(run())
    return not server.engine_died
