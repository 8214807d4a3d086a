"""What every test gets: no network, memory that starts as NaN, and repeatable random examples in CI."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported; inherited by servers under test

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from gossamer.server.engine.model import Model

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, for tests of whole engines."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> "Model":
    """The same, loaded."""
    from engines import load_tiny

    from gossamer.server.config import ServerConfig

    return load_tiny(ServerConfig(model=str(checkpoint), dtype="float32"))


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills `torch.empty` and its kin with NaN (floats) or the largest value (integers), so that code which reads what
    it never wrote is seen. Tests on a GPU run without: there the same switch forbids operations that are in use."""
    if request.node.get_closest_marker("gpu") is not None:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
