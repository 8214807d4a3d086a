"""Profiles of prompts alone: MInference's patterns, Qwen's config_1m.json, XAttention's thresholds."""

from pathlib import Path
from typing import Any

import pytest
from foreign_files import KV_HEADS, LAYERS, QUERY_HEADS, heads, imported, note, patterns, refusal, write

from gossamer.attention.importers.target import Target
from gossamer.attention.policy_backends import HeadEntry
from gossamer.attention.policy_file import PolicyFile


def vertical_slash(columns: int, diagonals: int, **extra: Any) -> HeadEntry:
    backend = {"backend": "vertical-slash", "columns": columns, "diagonals": diagonals, **extra}
    return HeadEntry.model_validate({"prefill": backend})


def two_in_a_group(folder: Path, first: list[Any], second: list[Any]) -> PolicyFile:
    """The first query head has one pattern, all others another."""
    layers = patterns(value=second)
    layers[0]["0"] = first
    return imported(write(folder / "x.json", layers))


def test_sizes_are_those_of_the_group(tmp_path: Path) -> None:
    policy = two_in_a_group(tmp_path, ["vertical_and_slash", 3500, 100, 0.9], ["vertical_and_slash", 1000, 6096, 18905])
    found = heads(policy)
    assert found[0] == [vertical_slash(3500, 6096), vertical_slash(1000, 6096)]
    assert found[1] == found[2] == [vertical_slash(1000, 6096)] * KV_HEADS
    assert note(policy, "sizes of the query heads differ").startswith("1 of 6 KV heads")
    assert note(policy, "one choice of columns").startswith("all 6 KV heads")
    assert (policy.model.layers, policy.model.query_heads, policy.model.head_dim) == (LAYERS, QUERY_HEADS, 32)


def test_scores_decide_nothing(tmp_path: Path) -> None:
    policies = [
        imported(write(tmp_path / "x.json", patterns(value=["vertical_and_slash", 30, 800, *score])))
        for score in ([0.2], [18905], [])
    ]
    assert policies[0].points == policies[1].points == policies[2].points


def test_least_sizes_are_those_of_the_reference(tmp_path: Path) -> None:
    policy = imported(write(tmp_path / "x.json", patterns(value=["vertical_and_slash", 0, 10, 1.0])))
    assert heads(policy)[0][0] == vertical_slash(30, 50)


def test_other_patterns(tmp_path: Path) -> None:
    stream, blocks = ["stream_llm", 100, 800, 1.0], ["block_sparse", 100, 0, 1.0]
    columns = ["vertical_and_slash", 500, 700, 1.0]
    alone = {
        "a": (stream, {"backend": "sink-recent", "sink": 100, "recent": 800}),
        "b": (blocks, {"backend": "block-sparse", "budget": {"tokens": 6400}}),
    }
    for pattern, backend in alone.values():
        policy = imported(write(tmp_path / "x.json", patterns(value=pattern)))
        assert heads(policy) == [[HeadEntry.model_validate({"prefill": backend})] * KV_HEADS] * LAYERS
    policy = two_in_a_group(tmp_path, stream, columns)
    assert heads(policy)[0][0] == vertical_slash(500, 800)
    assert note(policy, "patterns of the query heads differ").startswith("1 of 6 KV heads")
    policy = two_in_a_group(tmp_path, blocks, columns)
    assert heads(policy)[0] == [HeadEntry(), vertical_slash(500, 700)]  # only everything covers both


def test_heads_that_are_missing_are_those_of_the_reference(tmp_path: Path) -> None:
    layers = patterns()
    del layers[1]["3"]
    policy = imported(write(tmp_path / "x.json", layers))
    assert heads(policy)[1] == [vertical_slash(100, 800), vertical_slash(1000, 6096)]
    assert note(policy, "not in the file").startswith("1 of 12 query heads")


def test_a_length_from_which_to_select(tmp_path: Path) -> None:
    policy = imported(write(tmp_path / "x.json", patterns()), above=8192)
    assert heads(policy)[0][0] == vertical_slash(100, 800, above=8192)


def test_qwens_configuration(tmp_path: Path) -> None:
    block = {
        "chunk_size": 8192,
        "original_max_position_embeddings": 262144,
        "sparse_attention_config": patterns(),
        "sparse_attention_last_q": 32,
        "sparse_attention_threshold": 32768,
    }
    file = write(tmp_path / "config_1m.json", {"model_type": "qwen2", "dual_chunk_attention_config": block})
    policy = imported(file)
    assert policy.provenance.files[0].format == "minference"
    assert heads(policy)[2][1] == vertical_slash(100, 800, above=32768, probe=32)
    assert "good for 262144 tokens" in note(policy, "dual-chunk")
    assert heads(imported(file, above=0))[0][0] == vertical_slash(100, 800, probe=32)
    block["sparse_attention_last_q"] = 0
    write(file, {"dual_chunk_attention_config": block})
    (tmp_path / "policy.yaml").unlink()
    assert "sparse_attention_last_q is '0'" in refusal(file)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["vertical_and_slash", -1, 800, 0.9], "query head 0 of layer 0 is not a pattern"),
        (["vertical_and_slash", 100, 2**31, 0.9], "query head 0 of layer 0 is not a pattern"),
        (["vertical_and_slash", 100.5, 800, 0.9], "is not a pattern"),
        (["vertical_and_slash", True, 800, 0.9], "is not a pattern"),
        (["vertical_and_slash", 100], "is not a pattern"),
        (["triangle", 100, 800, 0.9], "has the pattern 'triangle'; known are vertical_and_slash, stream_llm"),
    ],
)
def test_patterns_that_are_none(tmp_path: Path, value: list[Any], said: str) -> None:
    assert said in refusal(write(tmp_path / "x.json", patterns(value=value)))


def test_counts_that_do_not_fit_the_model(tmp_path: Path) -> None:
    assert "for a model with layers 4, but tiny has layers 3" in refusal(write(tmp_path / "x.json", patterns(4)))
    assert "layer 0 has a query head 4, and the model has 4" in refusal(write(tmp_path / "x.json", patterns(heads=5)))
    assert "how many of them share a KV head; give --model" in refusal(
        write(tmp_path / "x.json", patterns()), model=None
    )


def test_a_profile_of_another_published_model(tmp_path: Path) -> None:
    """Shapes are equal; only the names tell them apart."""
    file = write(tmp_path / "Llama_3_8B_Instruct_262k_best_pattern.json", patterns(32, 32))
    known = {
        name: Target(name, "llama", 32, 8, 32, 128)
        for name in (
            "Llama-3.1-8B-Instruct",
            "Llama-3-8B-Instruct-Gradient-1048k",
            "my-tune",
            "Meta-Llama-3.1-8B-Instruct",
        )
    }
    assert imported(file, model=None).model.name == "Llama-3-8B-Instruct-262k"
    (tmp_path / "policy.yaml").unlink()
    for name in ("Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"):
        assert (
            f"published for Llama-3-8B-Instruct-262k, and not for {name.removeprefix('Meta-')}; give --other-model"
            in (refusal(file, model=name, target=known[name]))
        )
    shared = imported(file, model="Llama-3-8B-Instruct-Gradient-1048k")
    assert "whose profile its authors use" in note(shared, "published for")
    assert "nobody has measured" in note(imported(file, model="my-tune", target=known["my-tune"]), "published for")
    other = imported(file, model="Llama-3.1-8B-Instruct", other_model=True)
    assert other.model.name == "Llama-3.1-8B-Instruct" and "nobody has measured" in note(other, "published for")


# --- XAttention


def thresholds(stride: int, rows: list[list[float]]) -> str:
    return f"llama_fuse_{stride} = {rows!r}\n"


ROWS = [[0.5, 0.9, 0.0, 0.0], [1.0, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]


def antidiagonal(mass: float, stride: int = 16, **extra: Any) -> HeadEntry:
    backend = {"backend": "block-sparse", "score": "antidiagonal", "stride": stride, "budget": {"mass": mass}, **extra}
    return HeadEntry.model_validate({"prefill": backend})


def test_thresholds_are_the_largest_of_the_group(tmp_path: Path) -> None:
    file = write(tmp_path / "llama_threshold.py", "import os\n" + thresholds(8, ROWS[::-1]) + thresholds(16, ROWS))
    policy = imported(file)
    both = {"backend": "sink-recent", "sink": 128, "recent": 128}
    assert heads(policy) == [
        [antidiagonal(0.9), HeadEntry.model_validate({"prefill": both})],
        [antidiagonal(1.0), antidiagonal(0.5)],
        [antidiagonal(0.5), antidiagonal(0.5)],
    ]
    assert note(policy, "thresholds of the query heads differ").startswith("2 of 6 KV heads")
    assert note(policy, "a threshold of 0").startswith("1 of 6 KV heads")
    policy = imported(file, stride=8, above=4096)
    assert heads(policy)[2][0] == antidiagonal(0.9, 8, above=4096)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (thresholds(4, ROWS) + thresholds(8, ROWS), "has thresholds for strides 4, 8; give one of them"),
        (thresholds(16, [[0.5, 1.5, 0.5, 0.5]] * 3), "no table of thresholds from 0 to 1"),
        (thresholds(16, [[0.5] * 4, [0.5] * 3, [0.5] * 4]), "no table of thresholds"),
        ("llama_fuse_16 = [[float('nan')] * 4] * 3", "its lists are not plain numbers; nothing in it is run"),
        ("llama_fuse_16 = [__import__('os').getpid()]", "its lists are not plain numbers; nothing in it is run"),
        ("llama_fuse_16 = [" + "[" * 3000, "its lists are not plain numbers"),
        (thresholds(16, [[0.5] * 4] * 2), "layers 2, but tiny has layers 3"),
        (thresholds(16, [[0.5] * 8] * 3), "query_heads 8, but tiny has query_heads 4"),
    ],
)  # fmt: skip
def test_thresholds_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(write(tmp_path / "llama_threshold.py", text))


def test_thresholds_need_the_model(tmp_path: Path) -> None:
    assert "give --model" in refusal(write(tmp_path / "x.py", thresholds(16, ROWS)), model=None)
