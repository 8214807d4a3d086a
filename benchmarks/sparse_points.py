"""The operating points that benchmarks compare: those of policy files, and each backend alone under many budgets."""

from collections.abc import Mapping, Sequence
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


FINDER = {"layers": 1, "heads": 1}  # the head of the demo model that finds facts: no whole page stands for a token


def sweep(name: str) -> dict[str, PolicyFile]:
    """For each backend a policy with a point for each budget, for all heads alike; the page-level backends leave the
    finder dense, and streaming leaves out its layer. `name` begins the names of the files with labels and gates."""
    shares = (0.5, 0.25, 0.125, 0.0625)
    gates, labels = f"{name}-gates.safetensors", f"{name}-labels.safetensors"

    def block(share: float, **more: Any) -> dict[str, Any]:
        return {"backend": "block-sparse", "budget": {"share": share, "recent": 128}, **more}

    def both(backend: dict[str, Any], decode: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"default": {"prefill": backend, "decode": decode or backend}, "rows": [FINDER]}

    points: dict[str, dict[str, dict[str, Any]]] = {
        "block-sparse-mean": {f"{s:g}": both(block(s, correct_dropped=True)) for s in shares},
        "block-sparse-antidiagonal": {
            f"{s:g}": both(block(s, score="antidiagonal", stride=8), block(s, score="bounds")) for s in shares
        },
        "learned-gate": {
            f"{s:g}": both({"backend": "learned-gate", "file": gates, "budget": {"share": s, "recent": 128}})
            for s in shares
        },
        "vertical-slash": {
            f"{columns}-{diagonals}": {
                "default": {"prefill": {"backend": "vertical-slash", "columns": columns, "diagonals": diagonals}}
            }
            for columns, diagonals in ((2048, 64), (512, 8), (128, 4), (32, 2))
        },
        "double-sparsity": {
            f"{tokens}": {"default": {"decode": {"backend": "double-sparsity", "file": labels, "tokens": tokens}}}
            for tokens in (2048, 512, 128, 32)
        },
        "streaming": {
            f"{recent}": {
                "rows": [
                    {"layers": "0, 2-3"}
                    | {key: {"backend": "sink-recent", "sink": 64, "recent": recent} for key in ("prefill", "decode")}
                ]
            }
            for recent in (1024, 256, 64)
        },
    }
    return {
        backend: PolicyFile.model_validate(
            {
                "gossamer_policy": 1,
                "name": backend,
                "model": MODEL,
                "provenance": {"source": "written by hand"},
                "points": own,
            }
        )
        for backend, own in points.items()
    }


def shaped_points(shape: Mapping[str, Any], share: float, tokens: int) -> AttentionPolicy:
    """For a model without weights: "dense", and "sparse", which reads as much whatever the weights are."""
    block = {"backend": "block-sparse"}
    sparse = {
        "prefill": {**block, "budget": {"share": share, "recent": 128}},
        "decode": {**block, "budget": {"tokens": tokens, "recent": 128}},
    }
    model = {
        "layers": shape["num_hidden_layers"],
        "kv_heads": shape["num_key_value_heads"],
        "query_heads": shape["num_attention_heads"],
        "head_dim": shape["head_dim"],
    }
    file = PolicyFile.model_validate(
        {
            "gossamer_policy": 1,
            "name": "shaped",
            "model": model,
            "provenance": {"source": "written by hand"},
            "points": {"dense": {}, "sparse": {"default": sparse}},
        }
    )
    return file.policy(Artefacts(POLICIES))


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
