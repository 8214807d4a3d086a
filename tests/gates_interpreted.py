"""The Triton form of gate_queries under Triton's interpreter. test_kernels_gates.py runs this file in a process of its
own, because TRITON_INTERPRET has to be set before Triton is imported."""

import os
from dataclasses import replace

import pytest
import torch
from test_kernels_gates import SHAPES, make_gate

from gossamer.kernels.gates import gate_queries_torch
from gossamer.kernels.triton import gates

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels_gates.py runs this file"


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_torch_form(shape: tuple[int, ...], dtype: torch.dtype, norm: bool) -> None:
    given = make_gate(shape, 1, norm=norm, dtype=dtype)
    mine, theirs = (form(*given).unflatten(1, (3, -1))[:, [0, 2]] for form in (gates.launch, gate_queries_torch))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_block_without_a_query_is_left_out() -> None:
    q, kv, blocks, *rest = make_gate(SHAPES[0], 1, norm=False)
    empty = replace(blocks, count=torch.tensor([1, 0, 1], dtype=torch.int32))
    mine = gates.launch(q, kv, empty, *rest).unflatten(1, (3, -1))
    assert mine[1].isnan().all() and mine[[0, 2]][:, [0, 2]].isfinite().all()
