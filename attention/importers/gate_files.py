"""What SeerAttention's two kinds of gates have in common: one matrix per layer and part, and the model's rotation."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import MOST_LAYERS, Source, Tensors, is_number, is_whole
from gossamer.attention.importers.target import Target
from gossamer.attention.policy_backends import BudgetEntry
from gossamer.kernels.layout import PAGE_SIZE
from gossamer.kernels.rotary import Rotary

POOLED = 3  # a page's keys come as their maximum, minimum and mean, in this order


class GateModel(NamedTuple):
    """The model of a gate, its rotation, and what the config.json beside the gates says."""

    target: Target
    rotary: Rotary
    config: Mapping[str, Any]


def gate_parts(file: ForeignFile, key: re.Pattern[str]) -> dict[int, dict[str, Tensor]]:
    """[layer][part], the tensors whose whole name fits `key`, a pattern of a layer's number and a part."""
    found: dict[int, dict[str, Tensor]] = {}
    if file.kind == "tensors" and isinstance(file.value, dict):
        for name, tensor in file.value.items():
            match = key.fullmatch(name)
            if match and len(match[1]) <= len(str(MOST_LAYERS)):
                found.setdefault(int(match[1]), {})[match[2]] = tensor
    return found


def gate_model(source: Source, layers: Mapping[int, object]) -> GateModel:
    """Refuses gates for other layers than the model's, and other pooling than ours. Raises ImportRefused."""
    target = source.target
    if target is None or target.rotary is None:
        raise source.refuse("gates need the rotation of the model's keys; give --model DIRECTORY, with its config.json")
    if sorted(layers) != list(range(target.layers)):
        raise source.refuse(f"it has gates of {len(layers)} layers, and {target.name} has {target.layers} layers")
    config = source.file.config_beside()
    size = config.get("seerattn_gate_block_size", PAGE_SIZE)
    if size != PAGE_SIZE:
        raise source.refuse(f"its gates judge blocks of {str(size)[:20]} tokens, and pages have {PAGE_SIZE}")
    return GateModel(target, target.rotary, config)


def gate_matrix(source: Source, parts: Mapping[str, Tensor], layer: int, part: str, shape: tuple[int, ...]) -> Tensor:
    """One part of a layer's gate, of this shape, finite, in float32. Raises ImportRefused."""
    if part not in parts:
        raise source.refuse(f"layer {layer} has no {part}; take another copy of it")
    tensor = parts[part]
    if tuple(tensor.shape) != shape:
        raise source.refuse(
            f"{part} of layer {layer} has the shape {list(tensor.shape)}, and not {list(shape)} as gates for "
            f"{source.target.name if source.target else 'the model'} have"
        )
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise source.refuse(f"{part} of layer {layer} does not hold finite numbers; take another copy of it")
    return tensor.float()


def gate_budget(source: Source, config: Mapping[str, Any]) -> tuple[BudgetEntry, list[str]]:
    """From --budget or --threshold, else from the config.json beside; with what was approximated."""
    options = source.options
    if options.budget is not None and options.threshold is not None:
        raise source.refuse("--budget and --threshold are two ways to say one thing; give one of them")
    if options.budget is not None:
        return BudgetEntry(tokens=options.budget), []
    if options.threshold is not None:
        return BudgetEntry(weight=options.threshold), []
    method = config.get("seerattn_sparsity_method", "threshold")
    threshold, ratio, tokens = (config.get(f"seerattn_{name}") for name in ("threshold", "nz_ratio", "token_budget"))
    if method == "token_budget" and is_whole(tokens) and 1 <= tokens <= 2**30:
        return BudgetEntry(tokens=tokens), []
    if method == "nz_ratio" and is_number(ratio) and 0 < ratio <= 1:
        note = f"all heads: a share of {ratio:g} of what each query block may see, and not one count for all blocks"
        return BudgetEntry(share=float(ratio)), [note]
    if method == "threshold" and is_number(threshold) and 0 < threshold <= 1:
        note = "all heads: the longer the sequence, the fewer pages reach the threshold; --budget does not depend on it"
        return BudgetEntry(weight=float(threshold)), [note]
    raise source.refuse("no config.json beside it says how much to read; give --budget, such as 4096, or --threshold")


def gate_file(layers: Mapping[str, Tensor], rotary: Rotary, turned: Tensor) -> Tensors:
    """The file that attention/artefacts.py describes, weights in bfloat16. turned: the gate's own frequencies."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in layers.items()}
    tensors["rotary.model"] = rotary.inv_freq.float().clone()
    tensors["rotary.gate"] = turned.float().clone()  # a copy, because safetensors refuses tensors that share memory
    return Tensors(tensors, {"scaling": repr(rotary.scaling)})
