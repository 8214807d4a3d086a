"""Where heads look: attention mass by distance and by page, of single queries, from their exact softmax."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gossamer.attention.profiling.reading import LayerCall, Shape
from gossamer.kernels.layout import PAGE_SIZE, PagedKV

SINK, NEAR = 64, 256  # tokens
QUERIES = 4  # of each chunk, beside all generated ones
HELD = 0.9  # of the mass


@dataclass(frozen=True, slots=True)
class Looks:
    """Sums over `queries` single queries; the group's query heads count as a mean. float64 on the CPU.

    distance [layers, G, bins]: mass at distances below 64, 128, 256 ... tokens, each bin without the one before.
    sink, near [layers, G]: mass of the first SINK tokens, and of the last NEAR. pages [layers, G]: the share of the
    pages that hold HELD of the mass, the heaviest first.
    """

    queries: Tensor  # [1]
    distance: Tensor
    sink: Tensor
    near: Tensor
    pages: Tensor

    @classmethod
    def empty(cls, shape: Shape, length: int) -> "Looks":
        bins = max(1, (max(length, 2) - 1).bit_length() - 5)
        heads = shape.layers, shape.kv_heads
        sizes: tuple[tuple[int, ...], ...] = ((1,), (*heads, bins), heads, heads, heads)
        return cls(*(torch.zeros(size, dtype=torch.float64) for size in sizes))

    @classmethod
    def add_up(cls, documents: Sequence[Mapping[str, Tensor]]) -> "Looks":
        """Of what `flat` gave for some texts of about one length."""
        names = [each.name for each in fields(cls)]
        return cls(*(torch.stack([flat[f"looks.{name}"] for flat in documents]).sum(0) for name in names))

    def flat(self) -> dict[str, Tensor]:
        """By name, as a file has them."""
        return {f"looks.{each.name}": getattr(self, each.name) for each in fields(self)}

    @property
    def far(self) -> Tensor:
        """[layers, G]: mean mass that is neither at the beginning nor near: what a streaming head would lose."""
        return 1 - (self.sink + self.near) / self.queries.clamp(min=1)


class Statistics:
    """Looks on while texts are read, and adds up."""

    def __init__(self, shape: Shape, length: int, seed: int) -> None:
        self.looks = Looks.empty(shape, length)
        self._shape, self._seed = shape, seed

    def layer(self, call: LayerCall) -> None:
        (span,) = call.step.spans
        rng = random.Random(f"{self._seed}/{span.first}")
        chosen = sorted(rng.sample(range(span.new), min(QUERIES, span.new)))
        chosen += [at for at in range(span.new) if span.first + at >= span.prompt and at not in chosen]
        chosen = [at for at in chosen if span.first + at >= NEAR]
        if call.layer == 0:
            self.looks.queries.add_(len(chosen))
        if self._shape.windows[call.layer] is not None:
            return
        (kv,) = call.step.views.layer(call.layer)
        for at in chosen:
            self._add(call, kv, at, span.first + at)

    def _add(self, call: LayerCall, kv: PagedKV, at: int, position: int) -> None:
        count, layer, looks = position + 1, call.layer, self.looks
        pages = kv.table[0, : -(-count // PAGE_SIZE)].long()
        keys = kv.k[:, pages].flatten(1, 2)[:, :count].float()  # [G, count, D]
        query = call.q[at].float().unflatten(0, (keys.shape[0], -1))  # [G, ratio, D]
        logits = query @ keys.transpose(1, 2) * call.scale
        if call.softcap:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        weight = logits.softmax(-1).mean(1).double().cpu()  # [G, count]
        back = weight.flip(-1).cumsum(-1)
        edges = [min(count, PAGE_SIZE << n) for n in range(looks.distance.shape[2])]
        within = back[:, torch.tensor(edges) - 1]
        looks.distance[layer] += torch.diff(within, prepend=torch.zeros(len(within), 1, dtype=torch.float64))
        looks.sink[layer] += weight[:, :SINK].sum(-1)
        looks.near[layer] += weight[:, max(SINK, count - NEAR) :].sum(-1)
        padded = torch.nn.functional.pad(weight, (0, -count % PAGE_SIZE)).unflatten(1, (-1, PAGE_SIZE)).sum(-1)
        held = padded.sort(-1, descending=True).values.cumsum(-1)
        looks.pages[layer] += ((held < HELD).sum(-1) + 1) / held.shape[-1]
