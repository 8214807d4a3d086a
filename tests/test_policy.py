"""Policies as values: what their fingerprints stand for, which heads may share pages, and a model's own windows."""

import itertools
import subprocess
import sys

import pytest

from gossamer.attention.policy import (
    DENSE,
    AttentionPolicy,
    HeadPolicy,
    OperatingPoint,
    dense_policy,
    within_windows,
)
from gossamer.attention.selectors import Dense, SinkRecent
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent

SPARSE = HeadPolicy(SinkRecent(64, 256), SinkRecent(64, 128), KeepAll())
STREAMING = HeadPolicy(Dense(), Dense(), KeepSinkRecent(64, 256))


def point(*heads: HeadPolicy, name: str = "p", layers: int = 2) -> OperatingPoint:
    return OperatingPoint(name, (heads,) * layers)


def test_fingerprint_changes_with_everything_that_changes_answers() -> None:
    sparse = SPARSE
    different = [
        point(DENSE, DENSE),
        point(DENSE, DENSE, layers=3),
        point(DENSE, DENSE, DENSE),
        point(sparse, DENSE),
        point(DENSE, sparse),
        OperatingPoint("p", ((sparse, DENSE), (DENSE, sparse))),
        point(HeadPolicy(sparse.decode, sparse.prefill, sparse.keep), DENSE),
        point(HeadPolicy(SinkRecent(65, 256), sparse.decode, sparse.keep), DENSE),
        point(HeadPolicy(SinkRecent(64, 257), sparse.decode, sparse.keep), DENSE),
        point(HeadPolicy(sparse.prefill, sparse.decode, KeepSinkRecent(64, 256)), DENSE),
        point(STREAMING, DENSE),
        point(HeadPolicy(Dense(), Dense(), KeepSinkRecent(65, 256)), DENSE),
    ]
    prints = [one.fingerprint() for one in different]
    assert len(set(prints)) == len(different)
    assert all(len(text) == 8 and int(text, 16) >= 0 for text in prints)


def test_fingerprint_is_of_the_contents_alone() -> None:
    """Not of the name, not of the process: replicas that share a policy agree."""
    mine = point(SPARSE, STREAMING, name="fast").fingerprint()
    assert point(SPARSE, STREAMING, name="other").fingerprint() == mine
    source = (
        "from gossamer.attention.policy import *\n"
        "from gossamer.attention.selectors import *\n"
        "from gossamer.kvcache.retention import *\n"
        "heads = (HeadPolicy(SinkRecent(64, 256), SinkRecent(64, 128), KeepAll()),\n"
        "         HeadPolicy(Dense(), Dense(), KeepSinkRecent(64, 256)))\n"
        "print(OperatingPoint('x', (heads, heads)).fingerprint())"
    )
    other = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.strip()
    assert other == mine


def test_points_are_found_by_name() -> None:
    policy = AttentionPolicy("x", (point(DENSE, name="exact"), point(SPARSE, name="fast")))
    assert policy.names == ("exact", "fast")
    assert policy.point("fast").heads[0] == (SPARSE,)
    with pytest.raises(KeyError):
        policy.point("balanced")


def test_only_a_point_whose_selectors_are_all_dense_is_dense() -> None:
    assert dense_policy(3, 2).points[0].is_dense
    assert point(STREAMING).is_dense, "it reads all that it may see"
    for head in (
        SPARSE,
        HeadPolicy(Dense(), SinkRecent(1, 1), KeepAll()),
        HeadPolicy(SinkRecent(1, 1), Dense(), KeepAll()),
    ):
        assert not OperatingPoint("p", ((DENSE, DENSE), (DENSE, head))).is_dense


def test_heads_share_pages_only_if_they_keep_the_same_at_every_point() -> None:
    policy = AttentionPolicy(
        "x",
        (
            OperatingPoint("exact", ((DENSE, DENSE, DENSE), (SPARSE, DENSE, DENSE))),
            OperatingPoint("fast", ((DENSE, STREAMING, STREAMING), (SPARSE, STREAMING, DENSE))),
        ),
    )
    whole, window = KeepAll(), KeepSinkRecent(64, 256)
    assert policy.rules() == [
        [(whole, whole), (whole, window), (whole, window)],
        [(whole, whole), (whole, window), (whole, whole)],
    ]
    groups = group_heads(policy.rules())
    assert [group.slots for group in groups] == [((0, (0,)), (1, (0, 2))), ((0, (1, 2)), (1, (1,)))]
    assert [group.name for group in groups] == ["all", "all/sink64+recent256"]


def test_a_model_s_own_windows_win() -> None:
    """A layer that was trained with a window keeps exactly that and no sink, at every point; selectors stay."""
    policy = AttentionPolicy("x", (point(DENSE, DENSE, name="exact"), point(STREAMING, SPARSE, name="fast")))
    fitted = within_windows(policy, [100, None])
    window = KeepSinkRecent(0, 100)
    assert fitted.name == "x" and fitted.names == ("exact", "fast")
    for before, after in zip(policy.points, fitted.points, strict=True):
        assert after.heads[1] == before.heads[1]
        assert [head.keep for head in after.heads[0]] == [window, window]
        for old, new in zip(before.heads[0], after.heads[0], strict=True):
            assert (new.prefill, new.decode) == (old.prefill, old.decode)
    unchanged = within_windows(policy, [None, None])
    assert [one.heads for one in unchanged.points] == [one.heads for one in policy.points]
    prints = [
        within_windows(policy, windows).points[0].fingerprint() for windows in ([100, None], [None, 100], [99, None])
    ]
    assert all(a != b for a, b in itertools.combinations(prints, 2))


def test_windows_are_given_for_every_layer() -> None:
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        within_windows(dense_policy(3, 1), [None, None])


def test_windows_of_layers_leave_everything_else_of_a_point() -> None:
    heads = ((DENSE,) * 2,) * 2
    policy = AttentionPolicy("p", (OperatingPoint("fast", heads, "careful"), OperatingPoint("careful", heads)))
    assert [each.safer for each in within_windows(policy, [100, None]).points] == ["careful", None]
