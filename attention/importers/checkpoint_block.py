"""The `sparse_attention_config` that other tools write into a checkpoint's config.json: skip-softmax thresholds, as
NVIDIA's Model Optimizer and AMD's Quark calibrate them and TensorRT-LLM's configuration gives them.

Skip-softmax (BLASST) computes every product and leaves out a tile of keys whose largest weight is below lambda times
the largest so far; lambda is a factor divided by the length of the sequence, and the factor may be a calibrated
function of the sparsity that is wanted. The nearest meaning here chooses pages by an estimate of their weight, before
any product.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import DENSE_HEAD, Format, Imported, Source, is_number
from gossamer.attention.policy_backends import Backend, BlockSparseBackend, BudgetEntry, DenseBackend, HeadEntry

BLOCK = "sparse_attention_config"
FORMULAS = {"a*exp(b*target_sparsity)": False, "exp(log_a+b*target_sparsity)": True}
STRIDE = 8
NATIVE = {
    "dsa": "its model was trained with it",
    "deepseek_v4": "its model was trained with it",
    "minimax_m3": "its model was trained with it",
    "rocket": "it evicts prompt tokens by their scores, which no retention rule here does",
    "sparse_softmax": "it leaves out single weights of every few, which no backend here does",
    "vsa": "it is for video models",
}


def _recognises(file: ForeignFile) -> bool:
    if file.kind != "json" or not isinstance(file.value, dict):
        return False
    block = file.value.get(BLOCK)
    return isinstance(block, dict) and bool({"algorithm", "config_groups", "threshold_scale_factor"} & block.keys())


def _read(source: Source) -> Imported:
    block = source.file.value[BLOCK]
    group = _skip_softmax(source, block)
    target, options = (
        source.model("is for a model that cannot be told from it"),
        source.options,
    )
    if options.length is None:
        raise source.refuse("its thresholds fall with a sequence's length; give one to fix them at, --length 32768")
    parts = {phase: _part(source, group, phase, options.length) for phase in ("prefill", "decode")}
    ignored = group.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(each, str) for each in ignored):
        raise source.refuse("its ignore is no list of names")
    chosen = HeadEntry(
        prefill=_backend(parts["prefill"], "antidiagonal", options.above or 0),
        decode=_backend(parts["decode"], "bounds", options.above or 0),
    )
    dense = {
        layer
        for layer in range(target.layers)
        if any(fnmatch.fnmatchcase(f"model.layers.{layer}.self_attn", each) for each in ignored)
    }
    heads = tuple(((DENSE_HEAD if layer in dense else chosen),) * target.kv_heads for layer in range(target.layers))
    notes = [
        f"all heads: the threshold is that of {options.length} tokens; the file's falls with the length, so that "
        "shorter sequences are read more fully here, and longer ones less",
        "all heads: pages are judged before they are read, by antidiagonals in prompts and by bounds for generated "
        "tokens; skip-softmax sees the exact weights",
        "all heads: a page is compared with the best one of all, and not with the best so far",
    ]
    for phase, part in parts.items():
        if part is None:
            notes.append(f"all heads: the file gives nothing for {phase}, which stays dense")
    return Imported(heads, tuple(notes), target.query_heads, target.head_dim)


def _skip_softmax(source: Source, block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the block that describes skip-softmax: a group, or all of it. Others are refused by name."""
    groups = block.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise source.refuse("its config_groups are no groups")
    for group in groups.values():
        if group.get("algorithm") == "skip_softmax":
            return dict(group)
    names = {str(each.get("algorithm") or each.get("sparse_algo")) for each in (block, *groups.values())} - {"None"}
    if names <= {"skip_softmax", "softmax_skip"}:
        return block
    name = min(names - {"skip_softmax", "softmax_skip"})
    why = NATIVE.get(name, "it is not known")
    raise source.refuse(f"its algorithm {name[:40]!r} has no faithful meaning as a policy: {why}")


def _part(source: Source, group: Mapping[str, Any], phase: str, length: int) -> float | None:
    """The threshold of a phase at a length, as a part of the best page's weight; None where the file gives none."""
    factor = group.get("threshold_scale_factor")
    if isinstance(factor, dict) and "formula" in factor:
        coefficients = factor.get(phase, factor.get("coefficients") if phase == "prefill" else None)
        if coefficients is None:
            return None
        factor = _calibrated(source, factor["formula"], coefficients, _wanted(source, group, phase))
    elif isinstance(factor, dict):
        factor = factor.get(phase)
    if factor is None or factor == 0:
        return None
    if not is_number(factor) or factor < 0:
        raise source.refuse(f"its threshold for {phase} is {str(factor)[:40]!r}, not a number")
    if factor >= length:
        raise source.refuse(
            f"at {length} tokens the threshold for {phase} leaves out everything; give a larger --length"
        )
    return float(factor) / length


def _wanted(source: Source, group: Mapping[str, Any], phase: str) -> float:
    """The sparsity that is asked for: the option, else the file's, else a half as its readers take."""
    if source.options.sparsity is not None:
        return source.options.sparsity
    value = group.get("target_sparsity", 0.5)
    value = value.get(phase, 0.5) if isinstance(value, dict) else value
    if not is_number(value) or not 0 <= value <= 1:
        raise source.refuse(f"its target_sparsity for {phase} is {str(value)[:40]!r}, not from 0 to 1; give --sparsity")
    return float(value)


def _calibrated(source: Source, formula: Any, coefficients: Any, wanted: float) -> float:
    """One of two known formulas; none is evaluated as code."""
    known = FORMULAS.get(str(formula).replace(" ", ""))
    names = ("log_a", "b") if known else ("a", "b")
    if known is None or not isinstance(coefficients, dict) or not all(is_number(coefficients.get(n)) for n in names):
        raise source.refuse(f"its formula {str(formula)[:60]!r} with its numbers is not one of {', '.join(FORMULAS)}")
    try:
        first, slope = (float(coefficients[name]) for name in names)
        return math.exp(first + slope * wanted) if known else first * math.exp(slope * wanted)
    except OverflowError as error:
        raise source.refuse("its coefficients give no finite threshold") from error


def _backend(part: float | None, score: str, above: int) -> Backend:
    if part is None:
        return DenseBackend(backend="dense")
    stride = {"stride": STRIDE} if score == "antidiagonal" else {}
    budget = BudgetEntry(part=part)
    return BlockSparseBackend.model_validate(
        {"backend": "block-sparse", "score": score, **stride, "budget": budget, "above": above}
    )


FORMAT = Format(
    "sparse-attention-config", "a checkpoint's sparse_attention_config", frozenset({"length", "sparsity", "above"}),
    _recognises, lambda file: file.path.resolve().parent.name, _read,
)  # fmt: skip
