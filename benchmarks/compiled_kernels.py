"""The machine code of every Triton kernel, for GPUs that need not be there: registers, memory and instructions.

    python benchmarks/compiled_kernels.py [--only paged_prefill | --json FILE] [--jobs N]

Compiles each launch that launches.py finds, and prints a table. `stack` is where registers that did not fit were
spilled to, and `local` the instructions that do so. Kernels that are unchanged come from Triton's cache.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from launch_cases import cases
from launches import Launch, record

from gossamer.server.bench.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "compiled_kernels.json"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # a program's most, from NVIDIA's tuning guides
TENSOR_COLUMNS = 512  # of Blackwell's tensor memory
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
COUNTED = {
    "matrix": re.compile(r"HMMA|HGMMA|UTC[A-Z]*MMA"),  # by warps; by groups of four of them; tcgen05
    "loads": re.compile(r"LDG"),
    "async_loads": re.compile(r"LDGSTS|UTMALDG|UBLKCP"),
    "local": re.compile(r"LDL|STL"),
}


class Code(NamedTuple):
    """What became of a launch. Counts are of instructions in the program, not of those executed."""

    rows: int  # M: how many queries a program computes together; 0 where the kernel has no such constant
    warps: int
    stages: int
    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a program
    tensor_memory: int  # columns of a program
    instructions: int
    matrix: int
    wgmma: int  # of `matrix`, those that only Hopper has
    loads: int
    async_loads: int
    local: int


def compile_all(wanted: Iterable[Launch], jobs: int | None = None) -> Iterator[Code]:
    """Each one's code, by that many processes; None: one for each core that there is for us."""
    # Not forked: the parent may have threads, torch's among them.
    jobs = jobs or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compiled, wanted, chunksize=4)


def compiled(launch: Launch) -> Code:
    kernel = launch.compile()
    usage, text = disassembled(kernel.asm["cubin"])
    names = [name for name in INSTRUCTION.findall(text) if name != "NOP"]
    assert names, text
    counts = {kind: sum(bool(form.match(name)) for name in names) for kind, form in COUNTED.items()}
    return Code(
        rows=launch.constants.get("M", 0),
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        instructions=len(names),
        wgmma=sum(name.startswith("HGMMA") for name in names),
        **counts,
    )


def disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """A kernel's use of resources, and its instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}, text


def faults(capability: int, code: Code, spilled: int = 0) -> list[str]:
    """Why such a GPU would run this slowly, or not at all. `spilled` bytes of stack are no fault."""
    found = []
    if code.stack > spilled or (code.local and not code.stack):
        found.append(f"spills: {code.stack} bytes of stack, {code.local} instructions")
    if code.shared > SHARED_BYTES[capability]:
        found.append(f"{code.shared} bytes of shared memory, of {SHARED_BYTES[capability]}")
    if code.tensor_memory > TENSOR_COLUMNS:
        found.append(f"{code.tensor_memory} columns of tensor memory, of {TENSOR_COLUMNS}")
    return found


def write(path: Path, about: dict[str, Any], codes: dict[str, Code]) -> None:
    """One line for each launch, so that a change shows as one."""
    text = json.dumps(about | {"launches": {}}, indent=1).removesuffix("{}\n}")
    lines = (f"  {json.dumps(name)}: {json.dumps(code._asdict())}" for name, code in codes.items())
    path.write_text(text + "{\n" + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


def read(path: Path = RESULTS) -> tuple[str, dict[str, Code]]:
    """The version of Triton that a file is of, and the code of each launch."""
    held = json.loads(path.read_text(encoding="utf-8"))
    return held["versions"]["triton"], {name: Code(**code) for name, code in held["launches"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--only", default="", help="launches whose name contains this")
    one.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, help="processes; otherwise as many as cores")
    options = parser.parse_args()
    began, about = time.perf_counter(), provenance()
    wanted = [launch for launch in record(cases()) if options.only in launch.name]
    width = max(len(launch.name) for launch in wanted)
    columns = [max(len(name), 6) for name in Code._fields]
    print(" " * width, *(name.rjust(size) for name, size in zip(Code._fields, columns, strict=True)))
    codes = {}
    for launch, code in zip(wanted, compile_all(wanted, options.jobs), strict=True):
        codes[launch.name] = code
        numbers = (str(value).rjust(size) for value, size in zip(code, columns, strict=True))
        print(launch.name.ljust(width), *numbers, *faults(launch.capability, code), flush=True)
    print(f"{len(codes)} launches in {time.perf_counter() - began:.0f} s")
    if options.json is not None:
        write(options.json, about, codes)


if __name__ == "__main__":
    main()
