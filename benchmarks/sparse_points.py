"""The operating points that benchmarks compare: those of policy files, and each backend alone under many budgets."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.packaged import find_policy_file
from gossamer.attention.policy import AttentionPolicy, OperatingPoint, dense_policy
from gossamer.attention.policy_file import PolicyFile, load_policy_file

POLICIES = Path(str(files("gossamer") / "configs" / "policies"))
LAYERS, KV_HEADS = 4, 4  # of the demo model
MODEL = {"layers": LAYERS, "kv_heads": KV_HEADS, "query_heads": 8, "head_dim": 64}


def sweep(name: str) -> dict[str, PolicyFile]:
    """For each backend a policy with a point for each budget, for all heads alike. `name` begins the files' names."""
    shares = (0.5, 0.25, 0.125, 0.0625)
    gates, labels = f"{name}-gates.safetensors", f"{name}-labels.safetensors"

    def block(share: float, **more: Any) -> dict[str, Any]:
        return {"backend": "block-sparse", "budget": {"share": share}, "above": 1024, **more}

    def gate(share: float) -> dict[str, Any]:
        return {"backend": "learned-gate", "file": gates, "budget": {"share": share}, "above": 1024}

    def slash(share: float) -> dict[str, Any]:
        return {"backend": "vertical-slash", "columns": 4096, "diagonals": 1024, "mass": share, "above": 1024}

    def double(tokens: int) -> dict[str, Any]:
        return {"backend": "double-sparsity", "file": labels, "channels": 16, "tokens": tokens, "above": 1024}

    entries: dict[str, dict[str, dict[str, Any]]] = {
        "mean": {f"{s:g}": {"prefill": block(s), "decode": block(s)} for s in shares},
        "mean-corrected": {
            f"{s:g}": {key: block(s, correct_dropped=True) for key in ("prefill", "decode")} for s in shares
        },
        "antidiagonal-bounds": {
            f"{s:g}": {"prefill": block(s, score="antidiagonal"), "decode": block(s, score="bounds")} for s in shares
        },
        "learned-gate": {f"{s:g}": {"prefill": gate(s), "decode": gate(s)} for s in shares},
        "vertical-slash": {f"{m:g}": {"prefill": slash(m)} for m in (0.95, 0.8, 0.6, 0.4)},
        "double-sparsity": {f"{n}": {"decode": double(n)} for n in (4096, 1024, 256, 64)},
        "streaming": {
            f"{n}": {key: {"backend": "sink-recent", "sink": 64, "recent": n} for key in ("prefill", "decode")}
            for n in (8192, 2048)
        },
    }
    return {
        backend: PolicyFile.model_validate(
            {
                "gossamer_policy": 1,
                "name": backend,
                "model": MODEL,
                "provenance": {"source": "written by hand"},
                "points": {point: {"default": default} for point, default in points.items()},
            }
        )
        for backend, points in entries.items()
    }


def chosen_points(asked: Sequence[str], name: str) -> AttentionPolicy:
    """One policy of all the points that were asked for."""
    points: list[OperatingPoint] = []
    for each in asked:
        if each == "dense":
            points.append(OperatingPoint("dense", dense_policy(LAYERS, KV_HEADS).points[0].heads))
        elif each == "sweep":
            for backend, file in sweep(name).items():
                policy = file.policy(Artefacts(POLICIES))
                points += [OperatingPoint(f"{backend}:{point.name}", point.heads) for point in policy.points]
        else:
            file_name, _, wanted = each.partition(":")
            path = find_policy_file(file_name)
            policy = load_policy_file(path).policy(Artefacts(path.parent))
            points += [
                OperatingPoint(f"{policy.name}:{point.name}", point.heads)
                for point in policy.points
                if wanted in ("", point.name)
            ]
    return AttentionPolicy("accuracy", tuple(points))
