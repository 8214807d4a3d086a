"""Selectors: each proposes, for every query block of its heads, the pages (and single tokens) worth reading.

A selector is a frozen dataclass with a `propose` of a page of torch. It keeps no clock and no cache, and it cannot
produce an unsafe index: `gossamer.attention.index.build_index` adds what no query may lack and removes what it may not
see. `SELECTORS` is the table of those a policy file may name.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gossamer.attention.selectors.base import Proposal, Selector
from gossamer.attention.selectors.block_sparse import BlockSparse
from gossamer.attention.selectors.budget import Budget
from gossamer.attention.selectors.dense import Dense
from gossamer.attention.selectors.double_sparsity import DoubleSparsity
from gossamer.attention.selectors.learned_gate import LearnedGate
from gossamer.attention.selectors.sink_recent import SinkRecent
from gossamer.attention.selectors.vertical_slash import VerticalSlash

SELECTORS: Mapping[str, type[Selector]] = MappingProxyType(
    {
        "dense": Dense,
        "sink-recent": SinkRecent,
        "block-sparse": BlockSparse,
        "vertical-slash": VerticalSlash,
        "double-sparsity": DoubleSparsity,
        "learned-gate": LearnedGate,
    }
)

__all__ = [
    "SELECTORS",
    "BlockSparse",
    "Budget",
    "Dense",
    "DoubleSparsity",
    "LearnedGate",
    "Proposal",
    "Selector",
    "SinkRecent",
    "VerticalSlash",
]
