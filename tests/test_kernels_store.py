"""store: the torch form against what it is defined to do."""

import pytest
import torch
from kernel_cases import make_case

from gossamer.kernels.layout import QueryBlocks
from gossamer.kernels.store import store


@pytest.mark.parametrize("tile", [1, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_writes_each_token_to_its_place_and_nothing_else(tile: int, dtype: torch.dtype) -> None:
    spans = [(past, 1 if tile == 1 else new) for past, new in ((0, 1), (63, 90), (64, 64), (127, 2), (500, 30))]
    case = make_case(spans, tile=tile, heads=(3, 0), layer_heads=4, dtype=dtype, dim=32)
    new_k, new_v = (torch.randn(4, case.q.shape[0], 32, dtype=dtype).transpose(0, 1) for _ in range(2))
    expected_k, expected_v = case.kv.k.clone(), case.kv.v.clone()
    for row in case.blocks.rows:
        for i in range(row.count):
            physical, offset = int(case.kv.table[row.seq, (row.pos + i) // 64]), (row.pos + i) % 64
            for g, head in enumerate((3, 0)):
                expected_k[g, physical, offset] = new_k[row.token + i, head]
                expected_v[g, physical, offset] = new_v[row.token + i, head]
    store(new_k, new_v, case.kv, case.blocks)
    for found, expected in ((case.kv.k, expected_k), (case.kv.v, expected_v)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_store_of_nothing_changes_nothing() -> None:
    case = make_case([(0, 10)])
    before = case.kv.k.clone()
    store(torch.randn(0, 2, 64), torch.randn(0, 2, 64), case.kv, QueryBlocks.of(64, []))
    torch.testing.assert_close(case.kv.k, before, rtol=0, atol=0, equal_nan=True)
