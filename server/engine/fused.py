"""Norms, gated activations and rotations in one kernel each, by Liger-Kernel (Hsu et al. 2024), where installed."""

import importlib.util
import sys
from inspect import signature
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from transformers.models.llama import modeling_llama


def fuse(module: nn.Module, family: str) -> bool:
    """Let this model's norms, gated activations and rotations of queries and keys run as one kernel each; whether that
    was done.

    Liger-Kernel would change all models of the family that are loaded or to come. What it replaces so for norms and
    activations is put back; its rotation is given to this model's attention alone.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    patch: Any = MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    if patch is None:
        return False
    names = signature(patch).parameters
    wanted = {name: name in ("rms_norm", _gated(module)) for name in names if name != "model"}
    source = vars(sys.modules[type(module).__module__])
    before = dict(source)
    try:
        patch(model=module, **wanted)
    finally:
        source.update(before)
    _rotate_at_once(module)
    return True


ROTATION = "apply_rotary_pos_emb"  # what the layers of transformers' models call


def _rotate_at_once(module: nn.Module) -> None:
    """Where a layer's rotation is Llama's, which is the one that Liger-Kernel has."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    for attention in module.modules():
        forward = type(attention).forward
        if not isinstance(forward, FunctionType) or forward.__closure__ or ROTATION not in forward.__code__.co_names:
            continue
        own = forward.__globals__.get(ROTATION)
        if not isinstance(own, FunctionType) or not _rotates_like_llama(own):
            continue
        names = {**forward.__globals__, ROTATION: liger_rotary_pos_emb}
        turned = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
        turned.__kwdefaults__ = forward.__kwdefaults__
        attention.forward = MethodType(turned, attention)


def _rotates_like_llama(function: FunctionType) -> bool:
    half, halves = function.__globals__.get("rotate_half"), modeling_llama.rotate_half
    return (
        isinstance(half, FunctionType)
        and _same(function.__code__, modeling_llama.apply_rotary_pos_emb.__code__)
        and _same(half.__code__, halves.__code__)
    )


def _same(one: CodeType, other: CodeType) -> bool:
    """But for what they say of themselves."""
    return (one.co_code, one.co_consts[1:], one.co_names) == (other.co_code, other.co_consts[1:], other.co_names)


def _gated(module: Any) -> str:
    """Liger-Kernel's name for the model's gated activation, "" where it has none: it would not look. Experts keep
    theirs, because Liger-Kernel's read from the device how many tokens each got."""
    if any(name.endswith(".experts") for name, _ in module.named_modules()):
        return ""
    names = (getattr(module.config, name, None) for name in ("hidden_activation", "hidden_act"))
    activation = next((name for name in names if name is not None), "")
    return {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}.get(activation, "")
