"""Greedy answers equal those of transformers' own generate, token for token, whatever the engine does in between."""

from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ask, load_tiny, make_engine, running_engine
from tiny_models import FAMILIES, VOCAB, save_tiny_model
from transformers import AutoModelForCausalLM

from gossamer.server.config import ServerConfig
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.families import StartupError

LENGTHS = (5, 59, 60, 61, 130, 301)  # the last three of the short ones outgrow their page newest first
NEW = 12


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def expected(checkpoint: Path, asked: list[list[int]]) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    answers = []
    for prompt in asked:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def tight_engine(checkpoint: Path) -> AbstractContextManager[Engine]:
    """With the least memory in which one sequence of 320 tokens fits, and nothing to reuse."""
    options: dict[str, Any] = {"max_model_len": 320, "enable_prefix_caching": False, "max_num_batched_tokens": 64}
    model = load_tiny(ServerConfig(model=str(checkpoint), dtype="float32"))
    for memory in range(100_000, 4_000_000, 20_000):
        with suppress(StartupError):
            make_engine(checkpoint, model=model, kv_cache_memory=memory, **options)
            return running_engine(checkpoint, model=model, kv_cache_memory=memory, **options)
    raise AssertionError("320 tokens do not fit 4 MB")


def test_equals_generate(checkpoint: Path) -> None:
    """Alone and in a batch of mixed lengths, over many chunks, after prefix hits and after preemptions."""
    asked = prompts()
    right = expected(checkpoint, asked)
    same = {"max_tokens": NEW, "min_tokens": NEW, "ignore_eos": False}
    with running_engine(checkpoint, max_num_batched_tokens=48) as engine:
        alone = [ask(engine, prompt, **same).tokens() for prompt in asked]
        assert alone == right
        together = [ask(engine, prompt, **same) for prompt in asked]
        assert [answer.tokens() for answer in together] == right
        assert [answer.cached for answer in together] == [(n - 1) // 64 * 64 for n in LENGTHS]
    with tight_engine(checkpoint) as engine:
        crowd = [ask(engine, prompt, **same) for prompt in [*asked, *asked]]
        assert [answer.tokens() for answer in crowd] == [*right, *right]
        assert engine.stats().preemptions > 0
