"""The demo model's own queries and keys on a document with a question, and paged views of them."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.attention.policy import dense_policy
from gossamer.attention.profiling.capture import Captured, capture
from gossamer.attention.profiling.tasks import TASKS, Filler, make_prompt
from gossamer.kernels.layout import PAGE_SIZE, UNLIMITED, BlockRow, PagedKV, QueryBlocks
from gossamer.kvcache.summaries import FilledPages, Summary

DEMO = Path(str(files("gossamer") / "configs" / "models" / "gossamer-demo"))
FILLER = Path(__file__).parent.parent / "CONTRIBUTING.md"


@cache
def demo_layers(length: int) -> tuple[Captured, ...]:
    """What each layer of the packaged demo model does with about `length` tokens, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    filler = Filler(FILLER.read_text("utf-8").splitlines(), encode)
    prompt = make_prompt(TASKS["multikey"], length, 3, filler, reserve=16)
    chat = [*prompt.messages(0), {"role": "assistant", "content": prompt.questions[0].answer}]
    ids = encode(tokenizer.apply_chat_template(chat, tokenize=False))
    module = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return tuple(capture(module, torch.tensor(ids), dense_policy(4, 4)))


def paged(layer: Captured, summaries: Sequence[Summary] = ()) -> PagedKV:
    """One sequence whose pages lie in falling order, with summaries of its full pages."""
    (length, groups, dim), device = layer.k.shape, layer.k.device
    pages = -(-length // PAGE_SIZE)
    k, v = torch.full((2, groups, pages, PAGE_SIZE, dim), torch.nan)
    place = torch.arange(length)
    physical = pages - 1 - place // PAGE_SIZE
    k[:, physical, place % PAGE_SIZE], v[:, physical, place % PAGE_SIZE] = (
        layer.k.transpose(0, 1),
        layer.v.transpose(0, 1),
    )
    tables = {
        each.name: torch.full((groups, pages, *each.shape(PAGE_SIZE, dim)), torch.nan, device=device)
        for each in summaries
    }
    kv = PagedKV(
        k,
        v,
        torch.arange(pages - 1, -1, -1, dtype=torch.int32)[None],
        torch.tensor([length], dtype=torch.int32),
        torch.arange(groups, dtype=torch.int32),
        torch.zeros(1, groups, dtype=torch.int32),
        torch.full((1, groups), UNLIMITED, dtype=torch.int32),
        layer.ratio,
        tables,
    )
    for each in summaries:
        each.write(kv, FilledPages.of([(0, page) for page in range(length // PAGE_SIZE)], "cpu"))
    return kv


def last_blocks(layer: Captured, size: int, count: int) -> tuple[torch.Tensor, QueryBlocks]:
    """The queries of the last `count` blocks, and the blocks."""
    length = len(layer.q)
    first = max(0, (length - 1) // size - count + 1) * size
    rows = [BlockRow(0, at - first, at, min(size, length - at)) for at in range(first, length, size)]
    return layer.q[first:], QueryBlocks.of(size, rows)
