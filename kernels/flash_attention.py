"""The flash-attn packages, where they are installed: looked for once, when somebody first asks.

Called as Dao-AILab/flash-attention documents them: FlashAttention-2 as `flash_attn`, FlashAttention-3, which is for
Hopper GPUs and is built from the same repository, as `flash_attn_interface`.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor

Attention = Callable[..., Tensor]

_log = logging.getLogger(__name__)


@cache
def flash_2() -> Attention | None:
    """(q [T, H, D], k and v [S, G, D], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> [T, H, D] of
    sequences side by side. It could read pages, but only of a multiple of 256 tokens."""
    return _found("flash_attn", "flash_attn_varlen_func")


@cache
def flash_3() -> Attention | None:
    """(q [B, T, H, D], k_cache and v_cache [P, tokens of a page, G, D]; cache_seqlens [B], page_table [B, L]) ->
    [B, T, H, D], of pages of any size that may lie anywhere as long as D adjoins."""
    return _found("flash_attn_interface", "flash_attn_with_kvcache")


@cache
def side_by_side() -> dict[str, Attention]:
    """What there is that takes q [B, T, H, D], k and v [B, S, G, D], for comparisons."""
    packages = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}
    found = {name: _found(package, "flash_attn_func") for name, package in packages.items()}
    return {name: call for name, call in found.items() if call is not None}


def _found(package: str, function: str) -> Attention | None:
    try:
        found: Attention = getattr(import_module(package), function)
    except ModuleNotFoundError as error:
        if error.name == package:
            return None
        reason: Exception = error
    except (ImportError, AttributeError) as error:
        reason = error
    else:
        return found
    _log.warning("%s is installed, but cannot be used: %s. Other attention is used instead.", package, reason)
    return None
