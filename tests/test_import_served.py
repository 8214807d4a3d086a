"""Imported policies in the real engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command_checks import run
from engines import ask, running_engine
from foreign_files import DIM, KV_HEADS, QUERY_HEADS, RATIO, gates, patterns, rankings, tsv, write
from tiny_models import VOCAB

from gossamer.server.engine.model import Model

PREFILL = {"mask_linear_k": (QUERY_HEADS, 3 * DIM, DIM)}
DECODE = {"attngate_linear_q": (KV_HEADS, RATIO, DIM, DIM), "attngate_linear_k": (KV_HEADS, 3 * DIM, DIM)}
STREAMING = tsv([[0.9, 0.1], [0.2, 0.8], [0.4, 0.95]])


def few(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Arguments of imports that leave most of 600 tokens out."""
    columns = write(folder / "a.json", patterns(value=["vertical_and_slash", 30, 50, 1.0]))
    table = write(folder / "b.tsv", STREAMING)
    ranked, prompts = write(folder / "c.json", rankings()), write(folder / "p.pth", gates(**PREFILL))
    return {
        "two": (columns, "--decode", table, "--sink", 64, "--recent", 128),
        "gates": (prompts, "--decode", write(folder / "d.pth", gates(**DECODE)), "--budget", 192),
        "channels": (table, "--decode", ranked, "--sink", 64, "--recent", 128, "--budget", 64, "--dense-layers", 0),
    }


def everything(folder: Path) -> dict[str, tuple[Any, ...]]:
    """... that leave nothing out."""
    columns = write(folder / "a.json", patterns(value=["vertical_and_slash", 1000, 1000, 1.0]))
    thresholds = write(folder / "b.py", f"all_4 = {[[1.0] * QUERY_HEADS] * 3!r}\n")
    ranked = write(folder / "c.json", rankings())
    return {
        "two": (columns, "--decode", ranked, "--budget", 1000),
        "thresholds": (thresholds, "--stride", 4),
        "table": (write(folder / "d.tsv", STREAMING), "--sink", 64, "--recent", 1000),
    }


@pytest.mark.parametrize("name", ["two", "gates", "channels"])
def test_what_is_imported_is_served(checkpoint: Path, model: Model, tmp_path: Path, name: str) -> None:
    """By the tiny model's own config.json: long answers differ from dense ones, short ones do not."""
    out = tmp_path / "mine.yaml"
    done = run(("policy", "import"), *few(tmp_path)[name], "-o", out, "--model", checkpoint)
    assert done.exit_code == 0, done.stderr
    prompt = torch.randint(4, VOCAB, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    with running_engine(checkpoint, model=model, attention_policy=str(out)) as engine:
        assert engine.points == ("exact", "imported") and engine.default_point == "exact"
        short = [ask(engine, prompt[:70], point=point).tokens() for point in engine.points]
        long = [ask(engine, prompt, point=point).tokens() for point in engine.points]
    assert short[0] == short[1] and long[0] != long[1]


@pytest.mark.parametrize("name", ["two", "thresholds", "table"])
def test_what_leaves_nothing_out_is_dense(checkpoint: Path, model: Model, tmp_path: Path, name: str) -> None:
    out = tmp_path / "mine.yaml"
    assert run(("policy", "import"), *everything(tmp_path)[name], "-o", out, "--model", checkpoint).exit_code == 0
    prompt = torch.randint(4, VOCAB, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    with running_engine(checkpoint, model=model, attention_policy=str(out), enable_prefix_caching=False) as engine:
        dense, same = (ask(engine, prompt, point=point).tokens() for point in engine.points)
    assert dense == same
