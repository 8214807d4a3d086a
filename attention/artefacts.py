"""What a policy file points to beside itself: label channels and learned gates, as safetensors.

A labels file holds `layers.{i}` [KV heads, C] integers: the head's channels, the most important first. A gates file
holds for each layer i and phase p (prefill, decode) `layers.{i}.{p}.query` [KV heads, J, ratio * D, E], and
`layers.{i}.{p}.key` [KV heads, 3 D, E], or [KV heads, J, 3 D, E] with a key for each gate query; optionally
`layers.{i}.{p}.query_norm` and `.key_norm` [E]; `rotary.model` and `rotary.gate` hold the inverse frequencies of both
rotations, and the metadata may hold `scaling`, the model's factor on rotated keys (YaRN).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gossamer.kernels.rotary import Rotary
from gossamer.kvcache.summaries import GateKeys, Labels


class ArtefactError(Exception):
    """A file that a policy names cannot be used. One sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One layer's gate of one phase."""

    keys: GateKeys
    query: Tensor
    norm: Tensor | None


class Artefacts:
    """The files that the policies in one folder name, each read once, on one device."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self._folder = folder
        self._device = torch.device(device)
        self._read: dict[str, tuple[str, dict[str, Tensor], dict[str, str]]] = {}

    def labels(self, name: str, layer: int, count: int, kv_heads: int, head_dim: int | None) -> Labels:
        """The `count` most important channels of each KV head of a layer. Raises ArtefactError."""
        digest, tensors, _ = self._file(name)
        ranked = self._tensor(name, tensors, f"layers.{layer}", (kv_heads, None))
        if count > ranked.shape[1]:
            raise ArtefactError(
                f"{name} ranks {ranked.shape[1]} channels of layer {layer}; ask for no more, not {count}."
            )
        chosen = ranked[:, :count].int()
        if head_dim is not None and (chosen.min() < 0 or chosen.max() >= head_dim):
            raise ArtefactError(f"{name} names a channel of layer {layer} that a head of {head_dim} has not.")
        rows = tuple(tuple(row) for row in chosen.tolist())
        return Labels(f"{count} channels, {digest}", rows, chosen.to(self._device))

    def gate(self, name: str, layer: int, phase: str, kv_heads: int, head_dim: int | None) -> Gate:
        """A layer's gate for prompts ("prefill") or generated tokens ("decode"). Raises ArtefactError."""
        digest, tensors, metadata = self._file(name)
        part = f"layers.{layer}.{phase}"
        query = self._tensor(name, tensors, f"{part}.query", (kv_heads, None, None, None)).to(self._device)
        one = f"{part}.key" in tensors and tensors[f"{part}.key"].dim() == 3
        wanted = (kv_heads, None, query.shape[3]) if one else (kv_heads, query.shape[1], None, query.shape[3])
        key = self._tensor(name, tensors, f"{part}.key", wanted).to(self._device)
        key = key[:, None] if one else key
        dim, spare = divmod(key.shape[2], 3)
        if spare or dim != (head_dim or dim) or query.shape[2] % dim:
            raise ArtefactError(
                f"The gates of layer {layer} in {name} are for heads of {key.shape[2] / 3:g} channels; make gates for "
                "this model."
            )
        frequencies = (self._tensor(name, tensors, f"rotary.{which}", (None,)) for which in ("model", "gate"))
        model, gate = (each.float().to(self._device) for each in frequencies)
        norms = [tensors.get(f"{part}.{which}_norm") for which in ("query", "key")]
        query_norm, key_norm = (None if norm is None else norm.to(self._device) for norm in norms)
        rotary = Rotary(model, float(metadata.get("scaling", "1")))
        return Gate(GateKeys(f"{phase}, {digest}", layer, key, key_norm, rotary, Rotary(gate)), query, query_norm)

    def _file(self, name: str) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """The file's digest, tensors and metadata."""
        if name not in self._read:
            path = self._folder / name
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                with safe_open(path, framework="pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                    self._read[name] = digest, tensors, file.metadata() or {}
            except (OSError, SafetensorError) as error:
                raise ArtefactError(f"{path}, which the policy names, cannot be read: {error}.") from error
        return self._read[name]

    def _tensor(self, name: str, tensors: dict[str, Tensor], key: str, shape: tuple[int | None, ...]) -> Tensor:
        """One tensor of a file, of the right shape (None: any size)."""
        if key not in tensors:
            raise ArtefactError(f"{name} has no tensor {key!r}; it was made for another model, or for another use.")
        actual = tuple(tensors[key].shape)
        if len(actual) != len(shape) or any(want not in (None, got) for want, got in zip(shape, actual, strict=True)):
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise ArtefactError(
                f"{key!r} in {name} has the shape {list(actual)}, not {wanted}; it is for another model."
            )
        return tensors[key]
