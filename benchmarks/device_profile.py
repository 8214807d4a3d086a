"""What attention costs on this device for heads of one shape: a file for `gossamer profile --device-profile`.

    python benchmarks/device_profile.py --heads 32,8,128 --out configs/devices/DEVICE.json

`gossamer profile` measures the same for its own model; this needs no model. Labels and gates are noise.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy_view import PHASES
from gossamer.attention.profiling.candidates import ladder
from gossamer.attention.profiling.device import DeviceBench
from gossamer.attention.profiling.device_times import save_device_profile
from gossamer.attention.profiling.gates import GateWeights, write_gates
from gossamer.attention.profiling.labels import write_labels
from gossamer.attention.profiling.reading import Shape
from gossamer.kernels.rotary import Rotary
from gossamer.server.engine.graphs import CudaRecorder
from gossamer.server.profile.run import CHUNKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="32,8,128", help="query heads, KV heads, head size")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    query_heads, kv_heads, dim = map(int, args.heads.split(","))
    shape = Shape(1, query_heads, kv_heads, dim, getattr(torch, args.dtype), torch.device(args.device), (None,))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_labels(Path(folder) / "labels", [torch.stack([torch.randperm(dim) for _ in range(kv_heads)]).int()])
        query, key = (
            torch.randn(kv_heads, *size) * dim**-0.5 for size in ((1, shape.ratio * dim, dim), (3 * dim, dim))
        )
        gate = GateWeights(query, key)
        rotary = Rotary(10000.0 ** -(torch.arange(dim // 2) * 2 / dim))
        write_gates(Path(folder) / "gates", [dict.fromkeys(PHASES, gate)], rotary, rotary)
        candidates = {phase: ladder(phase, labels="labels", gates="gates") for phase in PHASES}
        artefacts = Artefacts(Path(folder), shape.device)
        cuda = shape.device.type == "cuda"
        chunk, record = CHUNKS[shape.device.type], CudaRecorder() if cuda else None
        found = DeviceBench(shape, artefacts, args.lengths, chunk, print, record).measure(candidates)
    save_device_profile(found, args.out)


if __name__ == "__main__":
    main()
