"""The real engine on a model folder, for benchmarks that bring their own policy."""

from dataclasses import replace

from gossamer.attention.policy import AttentionPolicy
from gossamer.server.config import ServerConfig
from gossamer.server.engine.build import build_engine
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.observer import Observer


class Silent:
    """An observer that keeps nothing."""

    def step(self, record: object) -> None: ...
    def first_token(self, record: object) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def finished(self, record: object) -> None: ...
    def checked(self, checked: object) -> None: ...


def start(
    config: ServerConfig, policy: AttentionPolicy, device: str = "cpu", observer: Observer | None = None
) -> Engine:
    """The engine that `config` describes, under `policy`, running."""
    asked = replace(config, device=device)
    engine = build_engine(asked, observer or Silent(), print, choose=lambda _: policy)
    engine.start()
    return engine
