"""The demo model's training attention: what it leaves out must be only what it says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

FOLDER = Path(__file__).parents[1] / "benchmarks" / "demo_model"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A tiny float32 Llama with grouped-query attention that attends as in training."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import context_attention

    context_attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=context_attention.NAME).eval()


def plain(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits with transformers' own attention."""
    trained = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    logits = model(tokens).logits
    model.config._attn_implementation = trained
    return logits


@torch.no_grad()
def test_rows_that_see_everything_equal_plain_attention(model: torch.nn.Module) -> None:
    tokens = torch.randint(0, 64, (1, 600))
    expected = plain(model, tokens)
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    every_row = torch.arange(600)[None]
    torch.testing.assert_close(model(tokens, events=every_row).logits, expected, atol=1e-4, rtol=1e-4)
    without = model(tokens, events=every_row[:, :1]).logits
    torch.testing.assert_close(without[:, :256], expected[:, :256], atol=1e-4, rtol=1e-4)
    assert (without[:, 300:] - expected[:, 300:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_questions_asked_alone_in_one_pass_equal_each_asked_by_itself(model: torch.nn.Module, cached: bool) -> None:
    document = torch.randint(0, 64, (1, 40))
    questions = [torch.randint(0, 64, (1, size)) for size in (5, 9, 1)]
    turns = torch.cat(questions, 1)
    blocks = torch.cat([torch.full((1, q.shape[1]), index) for index, q in enumerate(questions, 1)], 1)
    positions = torch.cat([torch.arange(40, 40 + q.shape[1]) for q in questions])[None]
    if cached:
        cache = model(document, use_cache=True).past_key_values
        together = model(turns, past_key_values=cache, position_ids=positions, blocks=blocks, use_cache=True).logits
    else:
        together = model(
            torch.cat([document, turns], 1),
            position_ids=torch.cat([torch.arange(40)[None], positions], 1),
            blocks=torch.cat([torch.zeros(1, 40, dtype=torch.long), blocks], 1),
        ).logits[:, 40:]
    alone = torch.cat([plain(model, torch.cat([document, q], 1))[:, 40:] for q in questions], 1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
