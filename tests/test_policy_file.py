"""Policy files: what they mean, and the one sentence that each wrong one gets."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy
from gossamer.attention.policy_file import MOST_BYTES, PolicyError, PolicyFile, check_model, load_policy_file
from gossamer.attention.selectors import SELECTORS, Dense, SinkRecent
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent

EXAMPLE = """\
gossamer_policy: 1
name: example
model: {layers: 6, kv_heads: 4}
provenance: {source: written by hand}
points:
  exact: {}
  fast:
    rows:
      - layers: 2-5
        heads: "0, 2"
        prefill: {backend: sink-recent, sink: 64, recent: 256}
        decode: {backend: sink-recent, sink: 64, recent: 128}
        keep: {sink: 64, recent: 256}
"""
STREAMING = HeadPolicy(SinkRecent(64, 256), SinkRecent(64, 128), KeepSinkRecent(64, 256))


def load(directory: Path, text: str) -> AttentionPolicy:
    file = directory / "policy.yaml"
    file.write_text(text)
    return load_policy_file(file).policy(Artefacts(directory))


def rows(*lines: str) -> str:
    """The example with other rows."""
    return EXAMPLE.split("      - layers")[0] + "".join(f"      - {line}\n" for line in lines)


def complaint(directory: Path, text: str) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(PolicyError) as caught:
        load(directory, text)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 600
    return sentence


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    policy = load(tmp_path, EXAMPLE)
    assert (policy.name, policy.names) == ("example", ("exact", "fast"))
    assert policy.points[0].heads == ((DENSE,) * 4,) * 6
    streaming = (STREAMING, DENSE, STREAMING, DENSE)
    assert policy.points[1].heads == ((DENSE,) * 4,) * 2 + (streaming,) * 4


def test_documented_policies_load(tmp_path: Path) -> None:
    """Every policy shown in docs/policies.md is one, and every part of the schema is named there."""
    docs = Path(__file__).parent.parent / "docs" / "policies.md"
    text = docs.read_text()
    shown = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "gossamer_policy" in block]
    assert shown
    for block in shown:
        load(tmp_path, block)
    schema = PolicyFile.model_json_schema()
    named = set(schema["properties"]) | {name for part in schema["$defs"].values() for name in part["properties"]}
    assert {name for name in named if f"`{name}`" not in text and f"{name}:" not in text} == set()
    assert {name for name in SELECTORS if f"`{name}`" not in text} == set()


def test_later_rows_win_and_the_default_fills_the_rest(tmp_path: Path) -> None:
    text = rows(
        "{keep: {sink: 0, recent: 64}}",
        "{layers: 1, decode: {backend: sink-recent, sink: 0, recent: 9}}",
        '{layers: "0-1, 5", heads: 3, prefill: dense}',
    ).replace("fast:\n", "fast:\n    default: {prefill: {backend: sink-recent, sink: 1, recent: 1}}\n")
    heads = load(tmp_path, text).point("fast").heads
    window = HeadPolicy(Dense(), Dense(), KeepSinkRecent(0, 64))
    assert heads[2] == heads[3] == heads[4] == (window,) * 4
    assert heads[0] == heads[5] == (window,) * 3 + (DENSE,)
    assert heads[1] == (HeadPolicy(Dense(), SinkRecent(0, 9), KeepAll()),) * 3 + (DENSE,)
    (partly,) = [load(tmp_path, text.replace("- {keep", "- {layers: 0, keep")).point("fast").heads[4]]
    assert partly == (HeadPolicy(SinkRecent(1, 1), Dense(), KeepAll()),) * 4


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", range(6)),
        ("3", [3]),
        ('"3"', [3]),
        ('"0-2"', [0, 1, 2]),
        ('"4, 0-1 ,5"', [0, 1, 4, 5]),
        ('"2-2"', [2]),
    ],
)
def test_ranges(tmp_path: Path, spec: str, layers: list[int]) -> None:
    heads = load(tmp_path, rows(f"{{layers: {spec}, keep: {{sink: 0, recent: 64}}}}")).point("fast").heads
    assert [i for i, layer in enumerate(heads) if layer[0] != DENSE] == list(layers)


@pytest.mark.parametrize("spec", ['"0 - 2"', '"1..3"', '""', '"2,"', "-1", '"5-2"', '"-"', "some"])
def test_what_is_not_a_range(tmp_path: Path, spec: str) -> None:
    assert "In row 2 of operating point 'fast'" in complaint(tmp_path, rows("{}", f"{{layers: {spec}}}"))
    assert "is not a list of KV heads" in complaint(tmp_path, rows(f"{{heads: {spec}}}"))


def test_heads_and_layers_that_do_not_exist(tmp_path: Path) -> None:
    deep = rows("{}").replace("rows:", "first_dense_layers: 7\n    rows:")
    assert "has first_dense_layers 7, but the model has 6 layers" in complaint(tmp_path, deep)
    assert "layer 6 does not exist: the model has layers 0 to 5" in complaint(tmp_path, rows("{layers: 4-6}"))
    assert "KV head 4 does not exist: the model has KV heads 0 to 3" in complaint(tmp_path, rows("{heads: 4}"))
    assert "does not exist" in complaint(tmp_path, rows('{layers: "0-99999999999999"}'))


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("layers: 6", "layers: six", "model.layers"),
        ("layers: 6", "layers: 0", "model.layers"),
        ("layers: 6", "layers: .nan", "model.layers"),
        ("layers: 6", "layers: 999999999", "model.layers"),
        ("layers: 6, ", "", "model.layers"),
        ("name: example", 'name: "a b"', "name"),
        ("exact: {}", "Exact: {}", "points.Exact"),
        ("exact: {}", "1: {}", "points.1"),
        ("exact: {}", "exact:", "points.exact"),
        ("layers: 2-5", "layers: 2.5", "points.fast.rows.0.layers"),
        ("layers: 2-5", "layers: true", "points.fast.rows.0.layers"),
        ("layers: 2-5", "layer: 2-5", "points.fast.rows.0.layer"),
        ("backend: sink-recent", "backend: quest", "points.fast.rows.0.prefill"),
        ("recent: 128", "recent: 0", "points.fast.rows.0.decode.sink-recent.recent"),
        (
            "{backend: sink-recent, sink: 64, recent: 128}",
            "{backend: block-sparse, score: bounds, stride: 8, budget: {tokens: 64}}",
            "points.fast.rows.0.decode.block-sparse",
        ),
        ("sink: 64, recent: 128", "recent: 128", "points.fast.rows.0.decode.sink-recent.sink"),
        ("keep: {sink: 64", "keep: {sink: -1", "points.fast.rows.0.keep.sink"),
        ("keep: {sink: 64", "keep: {sink: 6.5", "points.fast.rows.0.keep.sink"),
        ("keep: {sink: 64, recent: 256}", "keep: some", "points.fast.rows.0.keep"),
        ("source: written by hand", "source: 7", "provenance.source"),
        ("provenance", "extra: 1\nprovenance", "extra"),
    ],
)
def test_the_place_of_a_fault_is_named(tmp_path: Path, old: str, new: str, place: str) -> None:
    assert EXAMPLE.count(old) >= 1
    assert f"policy.yaml is wrong at {place}" in complaint(tmp_path, EXAMPLE.replace(old, new, 1))


def test_a_head_cannot_read_what_it_does_not_keep(tmp_path: Path) -> None:
    for old, new in (
        ("keep: {sink: 64", "keep: {sink: 63"),
        ("keep: {sink: 64, recent: 256", "keep: {sink: 64, recent: 255"),
    ):
        sentence = complaint(tmp_path, EXAMPLE.replace(old, new))
        assert "row 1 of operating point 'fast'" in sentence and "reads 64 + 256" in sentence
    decode = EXAMPLE.replace("recent: 128", "recent: 257")
    assert "reads 64 + 257" in complaint(tmp_path, decode)
    default = "{default: {decode: {backend: sink-recent, sink: 9, recent: 9}, keep: {sink: 9, recent: 8}}}"
    assert "the default of operating point 'exact'" in complaint(
        tmp_path, EXAMPLE.replace("exact: {}", f"exact: {default}")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must begin with 'gossamer_policy: 1'"),
        ("- 1\n", "must begin with 'gossamer_policy: 1'"),
        ("model: {}\n", "must begin with 'gossamer_policy: 1'"),
        (EXAMPLE.replace("policy: 1", "policy: 2"), "is of version 2; this server reads version 1"),
        (EXAMPLE.replace("policy: 1", 'policy: "1"'), "is of version '1'"),
        (EXAMPLE.replace("policy: 1", "policy: true"), "is of version True"),
        (EXAMPLE + "points: {exact: {}}\n", "the key 'points' is given twice"),
        (EXAMPLE.replace("exact: {}", "exact: &a {}\n  other: *a"), "aliases"),
        (EXAMPLE.replace("written by hand", '!!python/object/apply:os.system ["true"]'), "not plain YAML"),
        (EXAMPLE.replace("written by hand", "!mine 7"), "not plain YAML"),
        (EXAMPLE.replace("written by hand", "2001-99-99"), "not plain YAML"),
        (EXAMPLE.replace("layers: 6", "layers: " + "1" * 5000), "not plain YAML"),
        (EXAMPLE + "x: " + "[" * 20000, "not plain YAML"),
        (EXAMPLE + "\x00", "not plain YAML"),
        (EXAMPLE + "  bad indent\n", "not plain YAML"),
        (EXAMPLE.split("points")[0] + "points: {}\n", "is wrong at points"),
    ],
)  # fmt: skip
def test_what_is_no_policy(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    with pytest.raises(PolicyError, match=r"cannot be read: .*No such file"):
        load_policy_file(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy_file(file)
    with file.open("wb") as out:
        out.truncate(MOST_BYTES + 1)
    with pytest.raises(PolicyError, match="larger than 16 MiB"):
        load_policy_file(file)
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy_file(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("layers", 5), ("kv_heads", 8), ("query_heads", 4), ("head_dim", 128), ("model_type", "qwen3")]
)
def test_a_policy_for_another_model_is_refused(tmp_path: Path, field: str, value: int | str) -> None:
    text = EXAMPLE.replace("kv_heads: 4", "kv_heads: 4, query_heads: 8, head_dim: 64, model_type: llama")
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    entry = load_policy_file(file)
    right = {"layers": 6, "kv_heads": 4, "query_heads": 8, "head_dim": 64, "model_type": "llama"}
    check_model(entry, **right)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=f"for a model with {field} .* but this model has {field} {value};"):
        check_model(entry, **{**right, field: value})  # type: ignore[arg-type]


def test_points_name_safer_ones(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(EXAMPLE.replace("  fast:\n", "  careful: {first_dense_layers: 1}\n  fast:\n    safer: careful\n"))
    policy = load_policy_file(file).policy(Artefacts(tmp_path))
    assert policy.point("fast").safer == "careful" and policy.safer()["fast"] == "careful"
    plain = tmp_path / "plain.yaml"
    plain.write_text(EXAMPLE)
    assert load_policy_file(plain).policy(Artefacts(tmp_path)).safer() == {"fast": "exact"}


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ("  fast: {safer: elsewhere}", "operating point 'fast' names 'elsewhere' as safer, which does not exist"),
        ("  fast: {safer: fast}", "operating points 'fast' name each other as safer"),
        ("  fast: {safer: other}\n  other: {safer: fast}", "operating points 'fast', 'other' name each other as safer"),
    ],
)
def test_safer_points_lead_somewhere(tmp_path: Path, points: str, said: str) -> None:
    assert said in complaint(tmp_path, EXAMPLE[: EXAMPLE.index("points:")] + f"points:\n{points}\n")


def test_only_layers_and_kv_heads_have_to_be_given(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(EXAMPLE)
    check_model(load_policy_file(file), model_type="any", layers=6, kv_heads=4, query_heads=32, head_dim=80)


def packaged() -> list[str]:
    folder = files("gossamer") / "configs" / "policies"
    return sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))


def test_packaged_policies_load_and_survive_a_round_trip(tmp_path: Path) -> None:
    """Written out by our own classes and read again, a file means the same."""
    (tmp_path / "example.yaml").write_text(EXAMPLE)
    folder = Path(str(files("gossamer") / "configs" / "policies"))
    for file in [tmp_path / "example.yaml", *(folder / name for name in packaged())]:
        entry = load_policy_file(file)
        again = tmp_path / "again.yaml"
        again.write_text(yaml.safe_dump(entry.model_dump(mode="json"), sort_keys=False))
        assert load_policy_file(again) == entry
        points = load_policy_file(again).policy(Artefacts(file.parent)).points
        assert [point.heads for point in points] == [
            point.heads for point in entry.policy(Artefacts(file.parent)).points
        ]
