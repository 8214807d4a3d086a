"""Import every published profile, write the packaged policies that come from them, and record what each covers.

    python benchmarks/imported_policies.py --profiles FOLDER --policies configs/policies \
        --out benchmarks/results/imported_policies.json

FOLDER holds, as they were published: minference/, duo_attention/, double_sparse/, leank/ and redknot/. Each line of
`IMPORTS` is one `gossamer policy import`, run in this process. Densities are nominal: by the parameters alone.
"""

import argparse
import dataclasses
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from gossamer.attention.importers.summary import summarise
from gossamer.attention.policy_file import load_policy_file
from gossamer.server.bench.provenance import provenance, write_report
from gossamer.server.cli import app

LENGTHS = (8192, 32768, 131072, 1048576)
ORIGINS = {
    "minference": "microsoft/MInference@fb56c91, minference/configs (MIT)",
    "duo_attention": "mit-han-lab/duo-attention@fe93c31, attn_patterns (MIT)",
    "double_sparse": "andy-yang-1/DoubleSparse@b0575e6, config (MIT)",
    "leank": "microsoft/MInference@fb56c91, minference/configs/leank (MIT)",
    "redknot": "rednote-machine-learning/RedKnot@51b1737, head_class (Apache-2.0)",
}
BEST = "_kv_out_v32_fit_o_best_pattern"


class Import(NamedTuple):
    """One policy: its name, the profile (and one for generated tokens), options, and whether it is packaged."""

    name: str
    file: str
    options: str = ""
    decode: str = ""
    packaged: bool = True


IMPORTS = (
    Import(
        "Llama-3.1-8B-Instruct",
        f"minference/Llama_3.1_8B_Instruct_128k{BEST}_v2.json",
        "--above 8k",
        "duo_attention/Meta-Llama-3.1-8B-Instruct",
    ),
    Import("Llama-3.1-8B-Instruct-minference", f"minference/Llama_3.1_8B_Instruct_128k{BEST}.json", "--above 8k"),
    Import(
        "Llama-3.1-8B-Instruct-double-sparse",
        "double_sparse/Llama-3.1-8B-Instruct.json",
        "--budget 2048 --above 8k",
    ),
    Import("Llama-3.1-8B-Instruct-leank", "leank/llama3.1-8b-instruct.pth"),
    Import("Llama-3-8B-Instruct-262k", f"minference/Llama_3_8B_Instruct_262k{BEST}.json", "--above 8k"),
    Import(
        "Llama-3-8B-Instruct-Gradient-1048k",
        f"minference/Llama_3_8B_Instruct_262k{BEST}.json",
        "--model Llama-3-8B-Instruct-Gradient-1048k --above 8k",
        "duo_attention/Llama-3-8B-Instruct-Gradient-1048k",
    ),
    Import("Llama-2-7B-32K-Instruct", "duo_attention/Llama-2-7B-32K-Instruct", "--streaming-share 0.75"),
    Import("Mistral-7B-Instruct-v0.2", "duo_attention/Mistral-7B-Instruct-v0.2"),
    Import("Mistral-7B-Instruct-v0.3", "redknot/mistral-7B_optimal_g15_lf_ret.json"),
    Import("Phi-3-mini-128k-instruct", f"minference/Phi_3_mini_128k_instruct{BEST}.json", "--above 8k"),
    Import("Qwen2-7B-Instruct", f"minference/Qwen2_7B_Instruct_128k_instruct{BEST}.json", "--above 8k"),
    Import("Qwen2.5-7B-Instruct", f"minference/Qwen2.5_7B_Instruct_128k_instruct{BEST}.json", "--above 8k"),
    Import("Qwen2.5-7B-Instruct-1M", "minference/Qwen2.5_7B_Instruct_1M.json", "--above 32k"),
    Import("Qwen3-32B", "redknot/qwen3-32B_optimal_g15_lf_ret.json"),
    # The same files alone, or used otherwise, for the record.
    Import("Llama-3.1-sizes", f"minference/Llama_3.1_8B_Instruct_128k{BEST}_v2.json", "--above 8k", packaged=False),
    Import("Llama-3.1-heads", "duo_attention/Meta-Llama-3.1-8B-Instruct", packaged=False),
    Import("Llama-3.1-lserve", "duo_attention/Meta-Llama-3.1-8B-Instruct", "--format lserve", packaged=False),
    Import("Llama-3.1-leank-window", "leank/llama3.1-8b-instruct.pth", "--keep window", packaged=False),
    Import("Llama-3-heads", "duo_attention/Llama-3-8B-Instruct-Gradient-1048k", packaged=False),
)


def run(each: Import, profiles: Path, folder: Path) -> dict[str, Any]:
    """Import one, and say what it covers."""
    files = [name for name in (each.file, each.decode) if name]
    out = folder / f"{each.name}.yaml"
    arguments = ["policy", "import", str(profiles / each.file), "-o", str(out), "--force", *shlex.split(each.options)]
    if each.decode:
        arguments += ["--decode", str(profiles / each.decode)]
    for name in files:
        arguments += ["--origin", ORIGINS[name.split("/")[0]]]
    done = CliRunner().invoke(app, arguments)
    if done.exit_code:
        raise SystemExit(f"{each.name}: {done.stderr or done.exception}")
    policy = load_policy_file(out)
    labels = folder / f"{each.name}-labels.safetensors"
    decode = f" --decode {each.decode}" if each.decode else ""
    options = f" {each.options}" if each.options else ""
    return {
        "policy": each.name,
        "packaged": each.packaged,
        "command": f"gossamer policy import {each.file}{decode}{options} -o {each.name}.yaml",
        "model": policy.model.model_dump(exclude_none=True),
        "files": [file.model_dump() for file in policy.provenance.files],
        **dataclasses.asdict(summarise(policy, LENGTHS)),
        "approximations": list(policy.provenance.approximations),
        "bytes": sum(path.stat().st_size for path in (out, labels) if path.is_file()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--policies", type=Path, help="folder for the packaged ones; none when left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as spare:
        found = []
        for each in IMPORTS:
            folder = options.policies if each.packaged and options.policies else Path(spare)
            found.append(run(each, options.profiles, folder))
            phases = {phase["phase"]: phase["density"][32768] for phase in found[-1]["phases"]}
            print(f"{each.name}: {json.dumps(phases)}", flush=True)
    about = {name: value for name, value in provenance("cpu").items() if name not in ("device", "threads")}
    write_report(options.out, {**about, "imports": found})


if __name__ == "__main__":
    main()
