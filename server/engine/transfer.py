"""Between host and device without waiting: what goes there, and the one copy that brings a step's results back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """The same on the device, which nobody waits for: from pinned memory, as other memory is read by the driver when
    it likes."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def numbers_to_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)


@dataclass(frozen=True, slots=True)
class Unread:
    """Tokens that the step before chose, which the host does not know yet, and where the next step takes them in."""

    tokens: Tensor  # [S] int64, on the device
    places: list[int]  # of those that are taken, among these
    at: list[int]  # ... and among the next step's tokens

    def put(self, tokens: Tensor) -> None:
        """Write them to where they belong in `tokens` [T] int64."""
        if self.at == self.places == list(range(len(self.tokens))):  # mostly: the same sequences again
            tokens[: len(self.at)].copy_(self.tokens)
            return
        at, places = numbers_to_device([self.at, self.places], tokens.device).unbind()
        tokens[at] = self.tokens[places]


class CopyOut:
    """Tensors on their way to the host, by name: one copy for all of them, begun when this is made.

    They travel as float64, which holds float32 and whole numbers below 2**53 exactly.
    """

    __slots__ = ("_arrived", "_host", "_shapes")

    def __init__(self, tensors: Mapping[object, Tensor]) -> None:
        """At least one tensor, all on one device."""
        self._shapes = {name: each.shape for name, each in tensors.items()}
        packed = torch.cat([each.reshape(-1).double() for each in tensors.values()])
        self._host = packed
        self._arrived: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(packed.device))

    def read(self) -> dict[object, Tensor]:
        """The tensors on the host, in their shapes. Waits for the copy, and for nothing that was launched behind it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found, start = dict[object, Tensor](), 0
        for name, shape in self._shapes.items():
            found[name] = self._host[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return found
