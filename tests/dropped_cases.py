"""Inputs for add_dropped_pages, and what must come out, straight from the definition in float64."""

import math

import torch
from kernel_cases import NAN, Case, reference
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, PAGE_SIZE


def page_means(case: Case) -> tuple[Tensor, Tensor]:
    """mean_k, mean_v [G, P, D] for the pages that are past for some block; NaN elsewhere."""
    kv, size = case.kv, case.blocks.size
    means = [torch.full((pool.shape[0], pool.shape[1], pool.shape[3]), NAN, dtype=pool.dtype) for pool in (kv.k, kv.v)]
    for row in case.blocks.rows:
        for page in range(row.pos // size * size // PAGE_SIZE):
            physical = int(kv.table[row.seq, page])
            if physical != NULL_PAGE:
                for mean, stored in zip(means, (case.keys[row.seq], case.values[row.seq]), strict=True):
                    mean[:, physical] = stored[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].mean(0).to(mean.dtype)
    return means[0], means[1]


def dropped_pages(case: Case, g: int, n: int) -> list[int]:
    row = case.blocks.rows[n]
    sink, window = int(case.kv.sink[row.seq, g]), int(case.kv.window[row.seq, g])
    begin = int(case.index.start[g, n])
    run = case.index.pages[begin : begin + int(case.index.count[g, n])].tolist()
    dropped = []
    for page in range(row.pos // case.blocks.size * case.blocks.size // PAGE_SIZE):
        keys = range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        queries = range(row.pos, row.pos + row.count)
        whole = all(key > pos - window or key < sink for key in keys for pos in queries)
        if case.kv.table[row.seq, page] != NULL_PAGE and page not in run and whole:
            dropped.append(page)
    return dropped


def corrected(
    case: Case, out: Tensor, lse: Tensor, mean_k: Tensor, mean_v: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse as the attention kernel left them -> both in float64, and [T, H] bool: the rows that change."""
    out, lse = out.double(), lse.double()
    changed = torch.zeros(lse.shape, dtype=torch.bool)
    ratio = case.kv.ratio
    for n, row in enumerate(case.blocks.rows):
        for g, head in enumerate(case.kv.heads.tolist()):
            physical = case.kv.table[row.seq, dropped_pages(case, g, n)].tolist()
            for token in range(row.token, row.token + row.count):
                for query_head in range(head * ratio, (head + 1) * ratio):
                    if not physical:
                        continue
                    changed[token, query_head] = True
                    total = lse[token, query_head].exp()
                    value = out[token, query_head] * total
                    for page in physical:
                        logit = float(case.q[token, query_head].double() @ mean_k[g, page].double()) * case.scale
                        if softcap:
                            logit = softcap * math.tanh(logit / softcap)
                        total += PAGE_SIZE * math.exp(logit)
                        value += PAGE_SIZE * math.exp(logit) * mean_v[g, page].double()
                    out[token, query_head], lse[token, query_head] = value / total, total.log()
    return out, lse, changed


def attended(case: Case, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """What the attention kernel leaves: NaN in the rows that it does not write."""
    out, lse = reference(case, softcap)
    return out.to(case.q.dtype), lse.float()
