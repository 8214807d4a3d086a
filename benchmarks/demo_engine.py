"""The real engine on a model folder, for benchmarks that bring their own policy."""

import torch

from gossamer.attention.policy import AttentionPolicy
from gossamer.server.config import ServerConfig
from gossamer.server.engine.build import assemble
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.loop import Observer
from gossamer.server.engine.model import load_model
from gossamer.server.engine.tokenizer import Tokenizer


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
    path = config.model_path
    tokenizer = Tokenizer.load(path, revision=None, chat_template=None)
    loaded = load_model(
        path,
        revision=None,
        dtype=config.dtype,
        device=torch.device(device),
        served_length=config.max_model_len,
        dummy=config.load_format == "dummy",
        report=print,
    )
    engine = assemble(config, loaded, tokenizer, policy, observer or Silent(), print)
    engine.start()
    return engine
