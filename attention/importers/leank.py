"""LeanK's masks of key channels (Zhang et al. 2025): one tensor [layers, KV heads, D] of zeros and ones.

A head that keeps no channel reads the first and the most recent tokens alone, which a policy can say. A head that keeps
some is read in full here: that keys can be compared in fewer channels, a policy cannot say, and to choose single tokens
by them would be another method.
"""

import torch

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import (
    DENSE_HEAD,
    Format,
    Imported,
    Source,
    file_stem,
    of_heads,
    streaming_head,
)

SINK, RECENT = 128, 768  # that LeanK keeps of every head


def _recognises(file: ForeignFile) -> bool:
    return file.kind == "tensors" and isinstance(file.value, torch.Tensor) and file.value.dim() == 3


def _read(source: Source) -> Imported:
    mask, options = source.file.value, source.options
    if not isinstance(mask, torch.Tensor) or mask.dim() != 3 or 0 in mask.shape:
        raise source.refuse("it is not one tensor of layers by KV heads by channels")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise source.refuse("it holds other numbers than 0 and 1; take another copy of it")
    layers, kv_heads, head_dim = mask.shape
    source.fit(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    kept: list[list[float]] = mask.float().sum(-1).tolist()
    sink = SINK if options.sink is None else options.sink
    window = options.keep == "window"
    streaming = streaming_head(sink, options.recent or RECENT, None, window=window)
    heads = tuple(tuple(DENSE_HEAD if count else streaming for count in row) for row in kept)
    total, partly = layers * kv_heads, sum(0 < count < head_dim for row in kept for count in row)
    without = sum(count == 0 for row in kept for count in row)
    notes = [f"{of_heads(partly, total)}: some channels of their keys are left out by LeanK; here all are read"]
    if window:
        notes.append(f"{of_heads(without, total)}: the window holds in prompts too, which LeanK reads in full")
    else:
        notes.append(f"{of_heads(without, total)}: keep everything, because prompts read it; no memory is given back")
    return Imported(heads, tuple(notes), head_dim=int(head_dim))


FORMAT = Format("leank", "LeanK's masks", frozenset({"sink", "recent", "keep"}), _recognises, file_stem, _read)
