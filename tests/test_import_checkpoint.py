"""The sparse_attention_config in a checkpoint's config.json, as others write it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from foreign_files import KV_HEADS, LAYERS, heads, imported, note, refusal, write, write_config

from gossamer.attention.policy_backends import HeadEntry

LENGTH = 32768
FORMULA = "a * exp(b * target_sparsity)"
LOGARITHMIC = {"formula": "exp(log_a + b*target_sparsity)", "prefill": {"log_a": 2.0, "b": 4.0}}
CALIBRATED = {"formula": FORMULA, "prefill": {"a": 100.0, "b": 5.0}, "decode": {"a": 0.5, "b": 10.0}}


def group(**extra: Any) -> dict[str, Any]:
    """As newer tools write it: a group of its own, with what it aims at and what it leaves alone."""
    skip = {"algorithm": "skip_softmax", "targets": ["LlamaAttention"], "threshold_scale_factor": CALIBRATED, **extra}
    return {"config_groups": {"group_0": skip}, "producer": {"name": "modelopt", "version": "0.45"}}


def checkpoint(folder: Path, block: Any) -> Path:
    """A config.json that holds the block."""
    file = write_config(folder / "tiny") / "config.json"
    return write(file, {**json.loads(file.read_text()), "sparse_attention_config": block})


def entry(prefill: float | None, decode: float | None) -> HeadEntry:
    backends: dict[str, Any] = {}
    if prefill is not None:
        budget = {"part": prefill / LENGTH}
        backends["prefill"] = {"backend": "block-sparse", "score": "antidiagonal", "stride": 8, "budget": budget}
    if decode is not None:
        backends["decode"] = {"backend": "block-sparse", "score": "bounds", "budget": {"part": decode / LENGTH}}
    return HeadEntry.model_validate(backends)


def test_a_calibrated_group(tmp_path: Path) -> None:
    half = entry(100 * math.exp(2.5), 0.5 * math.exp(5))
    file = checkpoint(tmp_path, group())
    policy = imported(file, length=LENGTH)
    assert policy.provenance.files[0].format == "sparse-attention-config"
    assert heads(policy) == [[half] * KV_HEADS] * LAYERS  # a half is what is aimed at when nothing is said
    aimed = checkpoint(tmp_path, group(target_sparsity={"prefill": 0.2, "decode": 0.4}))
    assert heads(imported(aimed, length=LENGTH))[0][0] == entry(100 * math.exp(1), 0.5 * math.exp(4))
    asked = imported(aimed, length=LENGTH, sparsity=0.3)
    assert heads(asked)[0][0] == entry(100 * math.exp(1.5), 0.5 * math.exp(3))
    assert "that of 32768 tokens" in note(asked, "falls with the length")


def test_layers_that_are_left_alone(tmp_path: Path) -> None:
    policy = imported(checkpoint(tmp_path, group(ignore=["model.layers.[01].self_attn", "lm_head"])), length=LENGTH)
    dense = [row == [HeadEntry()] * KV_HEADS for row in heads(policy)]
    assert dense == [True, True, False]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            {"config_groups": {"group_0": {"sparse_algo": "softmax_skip"}}, "threshold_scale_factor": CALIBRATED},
            entry(100 * math.exp(2.5), 0.5 * math.exp(5)),
        ),
        (
            group(threshold_scale_factor=LOGARITHMIC),
            entry(math.exp(4), None),
        ),
        ({"algorithm": "skip_softmax", "threshold_scale_factor": 500.0}, entry(500, 500)),
        ({"algorithm": "skip_softmax", "threshold_scale_factor": {"decode": 250}}, entry(None, 250)),
    ],
)  # fmt: skip
def test_other_ways_to_write_it(tmp_path: Path, block: dict[str, Any], expected: HeadEntry) -> None:
    policy = imported(checkpoint(tmp_path, block), length=LENGTH)
    assert heads(policy)[0][0] == expected
    silent = [each for each in policy.provenance.approximations if "which stays dense" in each]
    assert len(silent) == [expected.prefill, expected.decode].count(HeadEntry().prefill)


def test_skip_softmax_among_other_groups(tmp_path: Path) -> None:
    both = group()
    both["config_groups"] = {"a": {"algorithm": "sparse_softmax"}, **both["config_groups"]}
    assert heads(imported(checkpoint(tmp_path, both), length=LENGTH))[0][0] != HeadEntry()


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"algorithm": "dsa"}, "'dsa' has no faithful meaning as a policy: its model was trained with it"),
        ({"algorithm": "rocket", "prompt_budget": 2048}, "it evicts prompt tokens"),
        ({"config_groups": {"a": {"algorithm": "sparse_softmax"}}}, "'sparse_softmax' has no faithful meaning"),
        ({"algorithm": "newest"}, "it is not known"),
        ({"config_groups": [1]}, "its config_groups are no groups"),
        (group(threshold_scale_factor={"formula": "__import__('os')", "prefill": {"a": 1, "b": 1}}), "is not one of"),
        (group(threshold_scale_factor={"formula": FORMULA, "prefill": {"a": 1.0}}), "is not one of"),
        (group(threshold_scale_factor={"formula": FORMULA, "prefill": {"a": 1.0, "b": 1e9}}), "no finite threshold"),
        (group(threshold_scale_factor={"formula": FORMULA, "prefill": {"a": 10**400, "b": 1}}), "no finite threshold"),
        (group(threshold_scale_factor=1e9), "at 32768 tokens the threshold for prefill leaves out everything"),
        (group(threshold_scale_factor=-1.0), "its threshold for prefill is '-1.0'"),
        (group(target_sparsity=2), "its target_sparsity for prefill is '2'"),
        (group(ignore="all"), "its ignore is no list of names"),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_used(tmp_path: Path, block: dict[str, Any], said: str) -> None:
    assert said in refusal(checkpoint(tmp_path, block), length=LENGTH)


def test_the_length_has_to_be_said(tmp_path: Path) -> None:
    assert "give one to fix them at, --length 32768" in refusal(checkpoint(tmp_path, group()))
