"""What the tests of single kernels share: Triton's interpreter in its own process, its compiler without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(file: str) -> None:
    """Run a file of tests under Triton's interpreter: TRITON_INTERPRET has to be set before Triton is imported."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here / file)],
        cwd=here.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert " passed" in found.stdout, found.stdout[-4000:]


def compiled(kernel, capability: int, pointers: dict[str, str], options: dict[str, object]):  # type: ignore[no-untyped-def]
    """The kernel for one GPU, as its `launch` would have it compiled. `pointers` names the elements of the arguments
    *_ptr, i32 where it does not; other arguments are i32, and fp32 when called scale or cap. Addresses and the strides
    of q, k, v and out are multiples of 16."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiler = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: value for name, value in options.items() if name not in compiler}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        bare = name.removesuffix("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif name != bare:
            signature[name] = f"*{pointers.get(bare, 'i32')}"
        else:
            signature[name] = "fp32" if name in ("scale", "cap") else "i32"
        if name != bare or re.fullmatch(r"(q|out|k|v)_[a-z]", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=compiler | {"enable_fp_fusion": True}
    )
