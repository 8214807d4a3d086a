"""The queries, keys and values of every layer's attention on a text, as the serving path computes them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.profiling.reading import LayerCall, Reader


@dataclass(frozen=True, slots=True)
class Captured:
    """One layer on one text of T tokens, after RoPE: q [T, H, D], k and v [T, G, D]; the logits are scale * q . k."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def ratio(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]


def capture(module: nn.Module, tokens: Tensor, policy: AttentionPolicy, chunk: int = 2048) -> list[Captured]:
    """Run `module`, a causal language model of transformers, on tokens [T] under the policy's first operating point
    -> one entry per layer. The model's own attention is put back afterwards."""
    recording = _Recording([[] for _ in policy.points[0].heads])
    reader = Reader(module, policy, room=tokens.numel(), chunk=chunk, watcher=recording)
    reader.read(tokens.tolist(), prompt=tokens.numel(), rows=())
    return recording.joined()


@dataclass(frozen=True, slots=True)
class _Recording:
    """What every layer was given, a chunk at a time."""

    parts: list[list[Captured]]

    def layer(self, call: LayerCall) -> None:
        self.parts[call.layer].append(Captured(call.q.clone(), call.k.clone(), call.v.clone(), call.scale))

    def joined(self) -> list[Captured]:
        return [
            Captured(
                torch.cat([part.q for part in parts]),
                torch.cat([part.k for part in parts]),
                torch.cat([part.v for part in parts]),
                parts[0].scale,
            )
            for parts in self.parts
        ]
