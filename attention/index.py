"""From a selector's proposal to an index a kernel may trust."""

from gossamer.attention.selectors.base import Proposal
from gossamer.kernels.layout import PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.runs import readable_runs


def build_index(proposal: Proposal, kv: PagedKV, blocks: QueryBlocks) -> SparseIndex:
    """What the kernels read: what was proposed, with the pages that no query may lack and without what it may not see
    (readable_runs has the rules)."""
    return readable_runs(proposal.pages, proposal.tokens, kv, blocks)
