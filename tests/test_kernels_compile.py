"""Every Triton kernel compiles for the GPUs we name, without spilled registers and within their shared memory.

No GPU is needed: the compiler runs ahead of time.
"""

import inspect
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gossamer.kernels.triton import compact, paged_decode, paged_prefill, store  # noqa: E402

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # a program's most, from NVIDIA's tuning guides
INT_POINTERS = {
    *("table", "length", "heads", "sink", "window", "seq", "token", "pos", "queries", "count", "first"),
    *("start", "pages", "token_start", "token_count", "tokens", "packed", "items"),
}
FLOAT_POINTERS = {"lse", "part", "part_lse"}


def compiled(kernel, capability: int, dtype: str, options: dict[str, object]):  # type: ignore[no-untyped-def]
    """The kernel for one GPU, as `launch` would have it compiled: strides and addresses are multiples of 16."""
    compiler = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: value for name, value in options.items() if name not in compiler}
    compiler["enable_fp_fusion"] = True
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        bare = name.removesuffix("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif name != bare:
            element = "i32" if bare in INT_POINTERS else "fp32" if bare in FLOAT_POINTERS else dtype
            signature[name] = f"*{element}"
        else:
            signature[name] = "fp32" if name in ("scale", "cap") else "i32"
        if name != bare or re.fullmatch(r"(q|out|k|v)_[a-z]", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler)


def spilled(kernel) -> int:  # type: ignore[no-untyped-def]
    """Bytes of stack a thread uses, which is where spilled registers go."""
    tool = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    return int(found[1])


def hold(kernel, capability: int) -> None:  # type: ignore[no-untyped-def]
    assert spilled(kernel) == 0
    assert kernel.metadata.shared <= SHARED_BYTES[capability]


# Each takes a second or more, so not every combination is here.
PREFILL = [
    *((capability, dim, False, False) for capability in SHARED_BYTES for dim in (64, 128)),
    *((80, 96, True, True), (90, 128, True, True), (90, 256, False, True), (90, 256, True, False)),
]
DECODE = [(80, 128, True, True), (90, 64, False, False), (90, 256, True, True), (100, 128, False, False)]


@pytest.mark.parametrize(("capability", "dim", "tokens", "capped"), PREFILL)
def test_prefill(capability: int, dim: int, tokens: bool, capped: bool) -> None:
    options = paged_prefill.tile(dim, 2, 128, tokens=tokens, capability=capability)
    flags = {"PAGE": 64, "DIM": dim, "TOKENS": tokens, "SOFTCAP": capped, "SINKS": capped}
    kernel = compiled(paged_prefill._paged_prefill, capability, "bf16", options | flags)
    hold(kernel, capability)
    if capability == 90 and options["M"] >= 64:
        assert "wgmma.mma_async" in kernel.asm["ptx"]
    if dim <= 128 and capability >= 90:
        assert options["M"] == 128


@pytest.mark.parametrize(("capability", "dim", "tokens", "capped"), DECODE)
def test_decode(capability: int, dim: int, tokens: bool, capped: bool) -> None:
    options = paged_decode.tile(dim, 2, 4)
    cut = {"PAGE": 64, "LEAST": paged_decode.LEAST_PAGES, "MOST": paged_decode.MOST_PIECES, "TOKENS": tokens}
    flags = {"DIM": dim, "SOFTCAP": capped} | cut
    hold(compiled(paged_decode._attend_pieces, capability, "bf16", options | flags), capability)
    flags = {"DIM": dim, "SINKS": capped} | {name: options[name] for name in ("M", "WIDE")}
    hold(compiled(paged_decode._join_pieces, capability, "bf16", flags), capability)
    hold(compiled(paged_decode._list_pieces, capability, "bf16", cut), capability)


@pytest.mark.parametrize("dim", [128])
def test_float32(dim: int) -> None:
    options = paged_prefill.tile(dim, 4, 128, tokens=False, capability=90)
    flags = {"PAGE": 64, "DIM": dim, "TOKENS": False, "SOFTCAP": False, "SINKS": False}
    hold(compiled(paged_prefill._paged_prefill, 90, "fp32", options | flags), 90)
    cut = {"PAGE": 64, "LEAST": paged_decode.LEAST_PAGES, "MOST": paged_decode.MOST_PIECES, "TOKENS": False}
    flags = {"DIM": dim, "SOFTCAP": False} | cut
    hold(compiled(paged_decode._attend_pieces, 90, "fp32", paged_decode.tile(dim, 4, 4) | flags), 90)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_store_and_compact(capability: int) -> None:
    options = {"ROWS": store.ROWS, "WIDE": 128, "PAGE": 64, "DIM": 80}
    hold(compiled(store._store, capability, "bf16", options), capability)
    for values, dtype in ((False, "u8"), (True, "i32")):
        options = {"VALUES": values, "COLUMNS": compact.COLUMNS}
        hold(compiled(compact._compact, capability, dtype, options), capability)
