"""Norms and gated activations in one kernel each, by Liger-Kernel (Hsu et al. 2024), where that is installed."""

import importlib.util
import sys
from inspect import signature
from typing import Any

from torch import nn


def fuse(module: nn.Module, family: str) -> bool:
    """Let this model's norms and gated activations run as one kernel each; whether that was done.

    Rotary embeddings stay as they are: Liger-Kernel replaces their function for all models of the family. What it
    replaces so for norms and activations, the classes of models to come, is put back.
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
    return True


def _gated(module: Any) -> str:
    """Liger-Kernel's name for the model's gated activation, "" where it has none: it would not look. Experts keep
    theirs, because Liger-Kernel's read from the device how many tokens each got."""
    if any(name.endswith(".experts") for name, _ in module.named_modules()):
        return ""
    names = (getattr(module.config, name, None) for name in ("hidden_activation", "hidden_act"))
    activation = next((name for name in names if name is not None), "")
    return {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}.get(activation, "")
