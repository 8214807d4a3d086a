"""Rotations by Liger-Kernel against transformers' own, under Triton's interpreter. test_fused.py runs this file."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from liger_kernel.transformers import rope
from tiny_models import FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM

from gossamer.server.engine.fused import _rotate_at_once

assert os.environ.get("TRITON_INTERPRET") == "1", "test_fused.py runs this file"

OWN = {"phi3", "gpt_oss", "olmo3"}  # families that rotate in ways of their own
IDS = torch.randint(4, 300, (1, 37), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_are_what_they_were(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, family), dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    calls: list[int] = []
    turn = rope.liger_rotary_pos_emb

    def counted(*given: Any) -> Any:
        calls.append(1)
        return turn(*given)

    monkeypatch.setattr(rope, "liger_rotary_pos_emb", counted)
    with torch.no_grad():
        before = module(IDS).logits
        _rotate_at_once(module)
        torch.testing.assert_close(module(IDS).logits, before, rtol=1e-5, atol=1e-5)
        assert bool(calls) == (family not in OWN)
        del calls[:]
        torch.testing.assert_close(other(IDS).logits, before)
    assert not calls, "a model of the family that is not fused would rotate so too"
