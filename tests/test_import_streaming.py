"""Profiles that tell streaming heads from others: DuoAttention, LServe, LeanK, RedKnot; and two files together."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import (
    DIM,
    KV_HEADS,
    LAYERS,
    classes,
    heads,
    imported,
    meaning,
    note,
    patterns,
    rankings,
    refusal,
    tsv,
    write,
)

from gossamer.attention.importers.target import Target
from gossamer.attention.policy_backends import HeadEntry
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent

WEIGHTS = [[0.9, 0.1], [-0.001, 1.2], [0.4, 0.95]]  # of which -0.001 and 0.1 and 0.4 are the least
CONFIG = {"model_name": "models/some-model", "sink_size": 128, "recent_size": 256, "threshold": 0.5, "sparsity": None}


def window(sink: int, recent: int, prompt: int | None = None, **extra: Any) -> HeadEntry:
    """A head that streams, in prompts with a window of its own."""
    reach = prompt or recent
    return HeadEntry.model_validate(
        {
            "prefill": {"backend": "sink-recent", "sink": sink, "recent": reach},
            "decode": {"backend": "sink-recent", "sink": sink, "recent": recent},
            "keep": {"sink": sink, "recent": max(reach, recent)},
            **extra,
        }
    )


def duo(folder: Path, weights: list[list[float]] = WEIGHTS, config: dict[str, Any] | None = CONFIG) -> Path:
    if config is not None:
        write(folder / "config.json", config)
    return write(folder / "full_attention_heads.tsv", tsv(weights))


DENSE = HeadEntry()


def test_the_cut_is_a_share_and_no_threshold(tmp_path: Path) -> None:
    """At the threshold of 0.5 that the config.json names, three would stream as well; at a third of the heads, two."""
    file, stream = duo(tmp_path), window(128, 256)
    assert heads(imported(file, streaming_share=1 / 3)) == [[DENSE, stream], [stream, DENSE], [DENSE, DENSE]]
    half = imported(file)
    assert heads(half) == [[DENSE, stream], [stream, DENSE], [stream, DENSE]]
    assert note(half, "a share of").startswith("3 of 6 KV heads stream: a share of 0.5, which the file does not say")
    assert heads(imported(file, streaming_share=0.0)) == [[DENSE] * 2] * 3
    assert heads(imported(file, streaming_share=1.0)) == [[stream] * 2] * 3
    assert heads(imported(file, streaming_share=5 / 6))[1] == [stream, DENSE]  # 1.2 counts as 1


def test_a_folder_is_its_file(tmp_path: Path) -> None:
    file = duo(tmp_path)
    assert imported(tmp_path).points == imported(file).points


def test_ties_are_broken_by_the_seed(tmp_path: Path) -> None:
    file = duo(tmp_path, [[1.0, 1.0], [1.0, 1.5], [1.0, 1.0]])
    first, again = imported(file), imported(file, seed=0)
    assert first.points == again.points
    assert note(first, "have the weight of the cut").startswith("all 6 KV heads: have the weight of the cut, 1; seed 0")
    others = [imported(file, seed=seed) for seed in range(1, 6)]
    assert any(other.points != first.points for other in others)
    for policy in (first, *others):
        assert sum(head.keep != "all" for layer in heads(policy) for head in layer) == 3
    assert "seed 5 chose" in note(others[-1], "have the weight")


def test_sizes_come_from_the_option_then_the_configuration(tmp_path: Path) -> None:
    file = duo(tmp_path, config={**CONFIG, "deploy_sink_size": 64, "deploy_recent_size": None})
    assert heads(imported(file))[1][0] == window(64, 256)
    assert heads(imported(file, sink=4, recent=100))[1][0] == window(4, 100)
    assert heads(imported(file, prompt_recent=1024))[1][0] == window(64, 256, 1024)
    bare = duo(tmp_path / "bare", config=None)
    assert "names a sink_size; give --sink" in refusal(bare)
    assert "names a recent_size; give --recent" in refusal(bare, sink=64)
    assert heads(imported(bare, sink=64, recent=256))[1][0] == window(64, 256)


def test_heads_that_keep_everything_give_no_memory_back(tmp_path: Path) -> None:
    """Then prompts are dense, as the reference reads a first chunk."""
    policy = imported(duo(tmp_path), keep="all")
    decode = {"backend": "sink-recent", "sink": 128, "recent": 256}
    assert heads(policy)[1][0] == HeadEntry.model_validate({"decode": decode})
    rules = {type(head.keep) for layer in meaning(policy, tmp_path).point("imported").heads for head in layer}
    assert rules == {KeepAll}
    policy = imported(duo(tmp_path))
    rules = {head.keep for layer in meaning(policy, tmp_path).point("imported").heads for head in layer}
    assert rules == {KeepAll(), KeepSinkRecent(128, 256)}


def test_the_table_needs_no_model(tmp_path: Path) -> None:
    policy = imported(duo(tmp_path), model=None)
    assert (policy.model.name, policy.model.layers, policy.model.kv_heads, policy.model.query_heads) == (
        None,
        3,
        2,
        None,
    )
    known = imported(
        duo(tmp_path, [[0.5] * 8] * 32, {**CONFIG, "model_name": "models/Meta-Llama-3.1-8B-Instruct"}), model=None
    )
    assert (known.model.name, known.model.model_type, known.model.query_heads) == ("Llama-3.1-8B-Instruct", "llama", 32)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([[0.5, math.nan], [0.5, 0.5], [0.5, 0.5]], "it holds NaN"),
        ([[0.5, math.inf], [0.5, 0.5], [0.5, 0.5]], "is no profile that can be read"),
        ([[0.5, 0.5], [0.5], [0.5, 0.5]], "is no profile that can be read"),
        ([[0.5, 0.5]] * 4, "for a model with layers 4, but tiny has layers 3"),
        ([[0.5] * 4] * 3, "kv_heads 4, but tiny has kv_heads 2"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, weights: list[list[float]], said: str) -> None:
    assert said in refusal(duo(tmp_path, weights))


def test_a_wrong_configuration_beside(tmp_path: Path) -> None:
    assert "gives '-1' as its sink_size; give --sink" in refusal(duo(tmp_path, config={**CONFIG, "sink_size": -1}))
    file = duo(tmp_path)
    (tmp_path / "config.json").write_text('{"sink_size": NaN}')
    assert "cannot be read as JSON: it holds NaN" in refusal(file)


def test_a_link_that_was_downloaded_as_text(tmp_path: Path) -> None:
    """omniserve's files at the top are Git links."""
    link = write(tmp_path / "full_attention_heads.tsv", "lr=0.02-reg=0.05-ctx=1000_32000/full_attention_heads.tsv\n")
    assert "is a Git link that was downloaded as text; download the file it points to, lr=0.02" in refusal(link)
    pointer = write(tmp_path / "x.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "is a Git LFS pointer" in refusal(pointer)


def test_lserve(tmp_path: Path) -> None:
    file = duo(tmp_path)
    policy = imported(file, kinds=("lserve",))
    assert policy.provenance.files[0].format == "lserve"
    pages = {"backend": "block-sparse", "score": "bounds", "budget": {"tokens": 4096}}
    assert heads(policy)[1] == [window(128, 256, 8192), HeadEntry.model_validate({"decode": pages})]
    policy = imported(file, kinds=("lserve",), budget=1024, recent=512, prompt_recent=2048, sink=64)
    assert heads(policy)[1][0] == window(64, 512, 2048)
    assert heads(policy)[1][1].decode.budget.tokens == 1024  # type: ignore[union-attr]
    later = imported(file, kinds=("lserve",), above=8192)
    assert heads(later)[1][1] == HeadEntry.model_validate({"decode": {**pages, "above": 8192}})
    everything = imported(file, kinds=("lserve",), keep="all")
    assert heads(everything)[1][0] == window(128, 256, 8192, keep="all")


# --- LeanK


def test_leank(tmp_path: Path) -> None:
    mask = torch.ones(LAYERS, KV_HEADS, DIM)
    mask[0, 1] = 0
    mask[1, 0, 8:] = 0
    file = write(tmp_path / "x.pth", mask)
    policy = imported(file)
    decode = {"backend": "sink-recent", "sink": 128, "recent": 768}
    expected = [[DENSE] * 2 for _ in range(LAYERS)]
    expected[0][1] = HeadEntry.model_validate({"decode": decode})
    assert heads(policy) == expected
    assert note(policy, "some channels of their keys").startswith("1 of 6 KV heads")
    assert note(policy, "no memory is given back").startswith("1 of 6 KV heads")
    expected[0][1] = window(128, 768)
    assert heads(imported(file, keep="window")) == expected
    expected[0][1] = window(4, 100)
    assert heads(imported(file, keep="window", sink=4, recent=100)) == expected
    bare = imported(file, model=None)
    assert (bare.model.name, bare.model.head_dim, bare.model.query_heads) == (None, DIM, None)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.full((LAYERS, KV_HEADS, DIM), 0.5), "it holds other numbers than 0 and 1"),
        (torch.full((LAYERS, KV_HEADS, DIM), math.nan), "it holds other numbers than 0 and 1"),
        (torch.ones(LAYERS, KV_HEADS, 64), "head_dim 64, but tiny has head_dim 32"),
        (torch.ones(LAYERS, 4, DIM), "kv_heads 4, but tiny has kv_heads 2"),
        (torch.ones(0, KV_HEADS, DIM), "is not one tensor of layers by KV heads by channels"),
        (torch.ones(LAYERS, DIM), "is no profile that can be read"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path: Path, mask: torch.Tensor, said: str) -> None:
    assert said in refusal(write(tmp_path / "x.pth", mask))


# --- RedKnot


def test_redknot(tmp_path: Path) -> None:
    pages = {"backend": "block-sparse", "budget": {"mass": 0.9}}
    retrieval = HeadEntry.model_validate({"prefill": pages, "decode": pages})
    file = write(tmp_path / "x.json", classes())
    policy = imported(file)
    assert heads(policy) == [[DENSE] * 2, [window(4, 512)] * 2, [retrieval] * 2]
    assert note(policy, "(retrieval)").startswith("2 of 6 KV heads")
    assert heads(imported(file, keep="all"))[1][0] == window(4, 512, keep="all")
    later = {**pages, "above": 4096}
    expected = HeadEntry.model_validate({"prefill": later, "decode": later})
    assert heads(imported(file, above=4096))[2] == [expected] * 2
    kinds = [["dense"] * 2, ["local_full", "limited"], ["streaming", "sink_dominant"]]
    by_head = classes(kv_head_sink_size=[[0, 0], [8, 16], [0, 0]], kv_head_classification=kinds)
    by_head["kv_head_max_distance"] = [[-1, -1], [512, 100], [7, 0]]
    policy = imported(write(tmp_path / "y.json", by_head))
    assert heads(policy) == [[DENSE] * 2, [window(8, 512), window(16, 100)], [window(0, 7), DENSE]]
    assert note(policy, "no distance is given").startswith("1 of 6 KV heads")


def test_the_matrix_counts_and_not_the_summary(tmp_path: Path) -> None:
    said = classes(summary={"global": 4, "local": 2}, rationale="the first two layers are global")
    assert heads(imported(write(tmp_path / "x.json", said)))[1] == [window(4, 512)] * 2
    policy = imported(write(tmp_path / "x.json", classes(summary={"global": 5, "local": 1})))
    assert "contradicts its matrix (2 global, 2 retrieval, 2 local)" in note(policy, "summary")
    bounded = classes()
    bounded["kv_head_max_distance"][0] = [512, -1]
    policy = imported(write(tmp_path / "x.json", bounded))
    assert heads(policy)[0] == [DENSE] * 2
    assert note(policy, "not used").startswith("1 of 6 KV heads")


def test_dense_layers_first(tmp_path: Path) -> None:
    policy = imported(write(tmp_path / "x.json", classes(dense_prefix_layers=2)))
    assert heads(policy)[:2] == [[DENSE] * 2] * 2 and heads(policy)[2] != [DENSE] * 2


def test_rows_of_a_hybrid_model_are_its_full_layers(tmp_path: Path) -> None:
    target = Target("tiny", "gemma3_text", 7, KV_HEADS, 4, DIM, full_layers=(1, 3, 6))
    policy = imported(write(tmp_path / "x.json", classes()), target=target)
    found = heads(policy)
    assert [number for number, row in enumerate(found) if row != [DENSE] * 2] == [3, 6]
    assert found[3] == [window(4, 512)] * 2
    other = Target("tiny", "gemma3_text", 7, KV_HEADS, 4, DIM, full_layers=(1, 3))
    (tmp_path / "policy.yaml").unlink()
    assert "layers 3, but tiny has layers 7" in refusal(tmp_path / "x.json", target=other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_head_classification": [["globe"] * 2] * 3}, "its kv_head_classification is no full table"),
        ({"kv_head_classification": [["global"] * 2] * 2}, "its kv_head_max_distance is no full table"),
        ({"kv_head_classification": 7}, "its kv_head_classification is no full table"),
        ({"kv_head_classification": [[["global"]] * 2] * 3}, "its kv_head_classification is no full table"),
        ({"kv_head_max_distance": [[-1, -2]] * 3}, "its kv_head_max_distance is no full table"),
        ({"kv_head_max_distance": [[-1, 5.5]] * 3}, "its kv_head_max_distance is no full table"),
        ({"num_layers": 4}, "its num_layers is 4, and its matrix has 3"),
        ({"retrieval_top_p": 0}, "its retrieval_top_p is 0, not a share"),
        ({"sink_size": -1}, "its sink_size is -1"),
        ({"dense_prefix_layers": "2"}, "its dense_prefix_layers is 2"),
    ],
)
def test_classes_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(write(tmp_path / "x.json", classes(**changes)))


# --- two files


def test_prompts_from_one_file_and_generated_tokens_from_another(tmp_path: Path) -> None:
    """Where a head streams, its prompts cannot read what it does not keep; with --keep all they read all of the first
    file, and no memory comes back."""
    columns, table = write(tmp_path / "x.json", patterns()), duo(tmp_path)
    prefill = {"backend": "vertical-slash", "columns": 100, "diagonals": 800}
    policy = imported(columns, table)
    slash = HeadEntry.model_validate({"prefill": prefill})
    assert heads(policy)[1] == [window(128, 256), slash]
    assert note(policy, "their prompts read the window").startswith("3 of 6 KV heads")
    assert [each.format for each in policy.provenance.files] == ["minference", "duo-attention"]
    policy = imported(columns, table, keep="all")
    decode = {"backend": "sink-recent", "sink": 128, "recent": 256}
    assert heads(policy)[1] == [HeadEntry.model_validate({"prefill": prefill, "decode": decode}), slash]
    assert [each for each in policy.provenance.approximations if "their prompts" in each] == []


def test_heads_that_stream_in_prompts_stream(tmp_path: Path) -> None:
    """The table for prompts, and ranked channels for generated tokens."""
    table, ranked = duo(tmp_path), write(tmp_path / "y.json", rankings())
    policy = imported(table, ranked, budget=64, dense_layers=0)
    assert heads(policy)[1][0] == window(128, 256)
    assert heads(policy)[1][1].decode.backend == "double-sparsity"
    assert len(meaning(policy, tmp_path).point("imported").heads) == LAYERS


def test_two_files_for_models_of_other_sizes(tmp_path: Path) -> None:
    table = duo(tmp_path, [[0.5] * 4] * 3)
    mask = write(tmp_path / "x.pth", torch.ones(LAYERS, KV_HEADS, DIM))
    assert "3 layers of 4 KV heads, and that for generated tokens 3 of 2" in refusal(table, mask, model=None)
