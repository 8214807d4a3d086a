"""Selectors: each proposes, for every query block of its heads, the pages (and single tokens) worth reading.

A selector is a frozen dataclass with a `propose` of a page of torch. It keeps no clock and no cache, and it cannot
produce an unsafe index: `gossamer.attention.index.build_index` adds what no query may lack and removes what it may not
see. `SELECTORS` is the table of those a policy file may name.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gossamer.attention.selectors.base import Proposal, Selector
from gossamer.attention.selectors.dense import Dense
from gossamer.attention.selectors.sink_recent import SinkRecent

SELECTORS: Mapping[str, type[Selector]] = MappingProxyType({"dense": Dense, "sink-recent": SinkRecent})

__all__ = ["SELECTORS", "Dense", "Proposal", "Selector", "SinkRecent"]
