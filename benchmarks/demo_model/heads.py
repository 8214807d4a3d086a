"""Which heads of the demo model can stream, by DuoAttention's trained α, beside what each head's streaming alone does.

    python benchmarks/demo_model/corpus.py --out demo/corpus
    python benchmarks/demo_model/heads.py --model configs/models/gossamer-demo --corpus demo/corpus \
        --out benchmarks/results/demo_heads.json

`distance` is how far the final states that decide answers are from the model's own, as a share of their mean square, on
texts that training did not read. `one_head`: where that head alone streams. `streaming`: where the heads with the least
α stream, and where as many heads with the most do.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.attention.profiling.heads import agreement, streaming_distance, streaming_heads, train_heads
from gossamer.attention.profiling.passkeys import Passkeys
from gossamer.attention.profiling.tasks import Filler
from gossamer.server.bench.provenance import provenance, write_report

SHARES = (0.25, 0.5, 0.75, 0.875)
HELD_OUT = 1_000_000  # number of the first text that is kept back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--shortest", type=int, default=1024, help="tokens")
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=6, help="texts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    module: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    lines = (args.corpus / "train.txt").read_text(encoding="utf-8")[:4_000_000].replace("\0", "\n").split("\n")
    texts = Passkeys(
        Filler(lines, encode),
        lambda chat: encode(tokenizer.apply_chat_template(chat, tokenize=False)),
        args.shortest,
        args.longest,
        seed=args.seed,
    )
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(round(loss, 5))
        print(f"step {step + 1}: loss {loss:.4f}", flush=True)

    alpha = train_heads(module, texts, steps=args.steps, sink=args.sink, recent=args.recent, report=report)
    kept = [texts(HELD_OUT + number) for number in range(args.held_out)]

    def distance(stream: Tensor) -> float:
        return streaming_distance(module, kept, stream, sink=args.sink, recent=args.recent)

    one_head = torch.zeros_like(alpha)
    for layer, head in torch.ones_like(alpha).nonzero().tolist():
        one_head[layer, head] = distance(only(alpha, layer, head))
    result = {
        "alpha": rounded(alpha),
        "losses": losses,
        "held_out": [text.tokens.numel() for text in kept],
        "one_head": rounded(one_head),
        "streaming": [compared(alpha, one_head, share, distance) for share in SHARES],
    }
    settings = {name: value for name, value in vars(args).items() if name not in ("model", "corpus", "out", "device")}
    write_report(args.out, {**provenance(args.device), "settings": settings, **result})


def only(alpha: Tensor, layer: int, head: int) -> Tensor:
    """One head, as [layers, KV heads] bool."""
    chosen = torch.zeros_like(alpha, dtype=torch.bool)
    chosen[layer, head] = True
    return chosen


def compared(alpha: Tensor, one_head: Tensor, share: float, distance: Callable[[Tensor], float]) -> dict[str, Any]:
    """What letting a share of the heads stream does, by α and against α; and whether single heads tell the same."""
    found = agreement(alpha, one_head, share)
    stream = streaming_heads(alpha, share)
    return {
        "share": share,
        "heads": stream.int().tolist(),
        "distance": round(distance(stream), 5),
        "distance_of_single": round(distance(streaming_heads(one_head, share)), 5),
        "distance_of_most": round(distance(streaming_heads(-alpha, share)), 5),
        "correlation": round(found.correlation, 4),
        "overlap": round(found.overlap, 4),
        "by_chance": round(found.by_chance, 4),
    }


def rounded(table: Tensor) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in table]


if __name__ == "__main__":
    main()
