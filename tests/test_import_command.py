"""`gossamer policy import` as a command: recognition, refusals, what is written, and the policies that were shipped."""

import dataclasses
import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import command_checks
import pytest
import torch
import yaml
from foreign_files import (
    DIM,
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    RATIO,
    classes,
    gates,
    heads,
    imported,
    patterns,
    rankings,
    tsv,
    write,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.importers import foreign
from gossamer.attention.importers.formats import FORMATS
from gossamer.attention.importers.summary import summarise
from gossamer.attention.importers.target import PUBLISHED, published_model
from gossamer.attention.packaged import find_policy_file, packaged_for, packaged_policies
from gossamer.attention.policy_file import PolicyError, PolicyFile, load_policy_file

run, complaint = (
    partial(command_checks.run, ("policy", "import")),
    partial(command_checks.complaint, ("policy", "import")),
)
show = partial(command_checks.run, ("policy",))

WEIGHTS = tsv([[0.9, 0.1], [0.2, 0.8], [0.4, 0.95]])


def one_of_each(folder: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """A file of every format under a name that says nothing, and the options that it needs."""
    model = ("--model", str(write_config(folder / "tiny")))
    config = json.loads((folder / "tiny" / "config.json").read_text())
    block = {"sparse_attention_config": {"algorithm": "skip_softmax", "threshold_scale_factor": 100.0}}
    thresholds = f"some_16 = {[[0.9] * QUERY_HEADS] * LAYERS!r}\n"
    prefill = gates(mask_linear_k=(QUERY_HEADS, 3 * DIM, DIM))
    decode = gates(attngate_linear_q=(KV_HEADS, RATIO, DIM, DIM), attngate_linear_k=(KV_HEADS, 3 * DIM, DIM))
    return {
        "minference": (write(folder / "a", patterns()), model),
        "duo-attention": (write(folder / "b", WEIGHTS), ("--sink", "64", "--recent", "256")),
        "lserve": (write(folder / "c", WEIGHTS), ("--format", "lserve")),
        "double-sparse": (write(folder / "d", rankings()), ("--budget", "2048")),
        "seer-attention": (write(folder / "e", prefill), (*model, "--budget", "2048")),
        "seer-attention-r": (write(folder / "f", decode), (*model, "--budget", "2048")),
        "xattention": (write(folder / "g", thresholds), model),
        "leank": (write(folder / "h", torch.zeros(LAYERS, KV_HEADS, DIM)), ()),
        "redknot": (write(folder / "i", classes()), ()),
        "sparse-attention-config": (write(folder / "tiny" / "config.json", {**config, **block}), ("--length", "32k")),
    }


def test_every_format_is_recognised_by_its_contents(tmp_path: Path) -> None:
    files = one_of_each(tmp_path)
    assert list(files) == [each.name for each in FORMATS]
    for name, (file, options) in files.items():
        out = tmp_path / f"{name}.yaml"
        done = run(file, "-o", out, *options)
        assert (done.exit_code, done.stderr) == (0, ""), name
        assert f"from: {file.name} ({name}), sha256 " in done.stdout
        assert "imported, not verified here" in done.stdout and "\napproximations:\n- " in done.stdout
        policy = load_policy_file(out)
        assert policy.name == name and list(policy.points) == ["exact", "imported"]
        assert policy.policy(Artefacts(tmp_path)).points[0].is_dense
        assert policy.provenance.files[0].format == name and policy.provenance.approximations
        checked = show("check", out, "--model", tmp_path / "tiny")
        assert checked.exit_code == 0, checked.stderr
        assert show("show", out, "--point", "imported").exit_code == 0


def test_the_table_that_is_printed(tmp_path: Path) -> None:
    file = write(tmp_path / "full_attention_heads.tsv", WEIGHTS)
    out = tmp_path / "mine.yaml"
    done = run(file, "-o", out, "--sink", "64", "--recent", "192", "--keep", "window", "--origin", "someone@1234 (MIT)")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{out}: imported, not verified here"
    assert lines[1] == "model: not known, 3 layers of 2 KV heads"
    assert lines[4] == "3 of 6 heads read less than everything; 3 of them give memory back"
    assert [line.split() for line in lines[5:9]] == [
        ["prefill", "decode"],
        ["heads", *["3", "dense,", "3", "sink-recent", "3", "dense,", "3", "sink-recent"]],
        ["density", "at", "32K", "50.4%", "50.4%"],
        ["density", "at", "128K", "50.1%", "50.1%"],
    ]
    assert lines[-1].endswith(f"gossamer serve MODEL --attention-policy {out} --attention-point imported")
    assert load_policy_file(out).provenance.files[0].origin == "someone@1234 (MIT)"


def test_two_files(tmp_path: Path) -> None:
    files = one_of_each(tmp_path)
    columns, model = files["minference"]
    out = tmp_path / "both.yaml"
    table = files["lserve"][0]
    done = run(
        columns, "--decode", table, "--decode-format", "lserve", "-o", out, *model, "--above", "8k", "--keep", "all"
    )
    assert done.exit_code == 0, done.stderr
    (entry,) = {
        entry.model_dump_json()
        for layer in heads(load_policy_file(out))
        for entry in layer
        if "bounds" in entry.model_dump_json()
    }
    assert '"backend":"vertical-slash"' in entry and '"above":8192' in entry
    assert "give --decode too" in complaint(2, columns, "-o", out, "--decode-format", "lserve")
    assert "more often than there are files" in complaint(2, columns, "-o", out, "--origin", "a", "--origin", "b")


def test_an_option_that_means_nothing_is_refused(tmp_path: Path) -> None:
    file, model = one_of_each(tmp_path)["minference"]
    sentence = complaint(1, file, "-o", tmp_path / "x.yaml", *model, "--streaming-share", "0.5")
    assert "--streaming-share means nothing for minference, which takes --above." in sentence
    for option, value, said in (
        ("--streaming-share", "1.5", "--streaming-share is 1.5; give a number from 0 to 1."),
        ("--streaming-share", "nan", "--streaming-share is nan; give a number from 0 to 1."),
        ("--recent", "0", "--recent is 0; give a number from 1 to"),
        ("--threshold", "0", "--threshold is 0"),
        ("--keep", "some", "--keep is 'some'; write window or all."),
    ):
        assert said in complaint(1, file, "-o", tmp_path / "x.yaml", option, value)
    assert "--length is '0'" in complaint(2, file, "-o", tmp_path / "x.yaml", "--length", "0")


def test_where_it_is_written(tmp_path: Path) -> None:
    file = write(tmp_path / "x.pth", torch.zeros(LAYERS, KV_HEADS, DIM))
    assert "ends in .yaml" in complaint(1, file, "-o", tmp_path / "x.json")
    assert "A policy cannot be called '.hidden'" in complaint(1, file, "-o", tmp_path / ".hidden.yaml")
    assert "A policy cannot be called 'a b'" in complaint(1, file, "-o", tmp_path / "a b.yaml")
    assert "does not exist; make it" in complaint(1, file, "-o", tmp_path / "no" / "x.yaml")
    out = write(tmp_path / "x.yaml", "mine")
    assert "is there already; give another -o, or --force" in complaint(1, file, "-o", out)
    assert out.read_text() == "mine"
    assert run(file, "-o", out, "--force").exit_code == 0
    labels, ranked = tmp_path / "y-labels.safetensors", write(tmp_path / "y.json", rankings())
    labels.write_text("mine")
    assert "y-labels.safetensors is there already" in complaint(1, ranked, "-o", tmp_path / "y.yaml", "--budget", "64")
    assert labels.read_text() == "mine" and not (tmp_path / "y.yaml").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def hostile(folder: Path) -> list[tuple[Path, str]]:
    """Files that must not be imported, and what is said of them."""
    pickled, bomb, cut = folder / "evil.pth", folder / "bomb.pth", folder / "cut.pth"
    torch.save({"a": Evil()}, pickled)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/0", bytes(2000))
    torch.save(torch.zeros(3, 2, 32), cut)
    cut.write_bytes(cut.read_bytes()[:400])
    header = (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9]'
    return [
        (folder / "nosuch.json", "does not exist; name a file that holds a profile"),
        (folder, "holds none of full_attention_heads.tsv, attn_gate_weights.pth, config.json"),
        (write(folder / "empty", ""), "is no profile that can be read, which are: MInference's pattern lists"),
        (write(folder / "words", "some words\nand more"), "is no profile that can be read"),
        (write(folder / "other.json", {"a": 1}), "is no profile that can be read"),
        (write(folder / "list.json", []), "is no profile that can be read"),
        (write(folder / "nan.json", '[{"0": ["vertical_and_slash", NaN, 1, 1]}]'), "JSON: it holds NaN"),
        (write(folder / "twice.json", '[{"0": [1], "0": [2]}]'), "it gives the key '0' twice"),
        (write(folder / "deep.json", "[" * 100_000), "cannot be read as JSON"),
        (write(folder / "long.json", '{"a": ' + "1" * 5000 + "}"), "cannot be read as JSON"),
        (write(folder / "half.json", '[{"0": ["vertical'), "cannot be read as JSON"),
        (pickled, "cannot be read as a file of tensors"),
        (bomb, "cannot be read as a file of tensors"),
        (cut, "cannot be read as a file of tensors"),
        (write(folder / "names.pth", {"x": torch.zeros(1)}), "is no profile that can be read"),
        (Path("/dev/zero"), "is not a file"),
        (write(folder / "new\nline\x1b[31m.json", {"a": 1}), "new line [31m.json is no profile that can be read"),
        (
            write(folder / "digits.json", [{"1" * 5000: ["vertical_and_slash", 1, 1, 1]}]),
            "is no profile that can be read",
        ),
        (write(folder / "wide.tsv", "0 " * 20_000 + "\n"), "makes no policy: kv_heads: Input should be less than"),
        (write(folder / "huge.tsv", ("0 " * 2000 + "\n") * 600), "is no profile that can be read"),
        (write(folder / "escape.json", classes(num_layers="\x1b[2J")), "its num_layers is  [2J, and its matrix has 3"),
    ] + [
        (file, "cannot be read as a file of tensors") for file in [folder / "x.safetensors"] if file.write_bytes(header)
    ]


def test_hostile_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, said in hostile(tmp_path):
        sizes = ("--sink", 1, "--recent", 1) if file.suffix == ".tsv" else ()
        assert said in complaint(1, file, "-o", tmp_path / "out.yaml", *sizes), file
    assert not (tmp_path / "out.yaml").exists()
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9\n" * 9)
    assert "is neither text nor a file of tensors" in complaint(1, tmp_path / "latin", "-o", tmp_path / "out.yaml")
    torch.save([1, 2], tmp_path / "numbers.pth")
    assert "holds other things than tensors" in complaint(1, tmp_path / "numbers.pth", "-o", tmp_path / "out.yaml")
    assert "run" not in capsys.readouterr().out


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, tensors = write(tmp_path / "x.json", patterns()), write(tmp_path / "y.pth", torch.zeros(3, 2, 32))
    monkeypatch.setattr(foreign, "MOST_TEXT", 100)
    monkeypatch.setattr(foreign, "MOST_TENSORS", 100)
    for file in (text, tensors):
        assert "it cannot be a profile" in complaint(1, file, "-o", tmp_path / "out.yaml")
    monkeypatch.setattr(foreign, "MOST_TENSORS", tensors.stat().st_size)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/0", bytes(100_000))
    assert "unpacks to more than" in complaint(1, tmp_path / "bomb.pth", "-o", tmp_path / "out.yaml")


def test_formats_by_name(tmp_path: Path) -> None:
    file, model = one_of_each(tmp_path)["minference"]
    assert "--format is 'quest'; it is one of minference, duo-attention" in complaint(
        1, file, "-o", tmp_path / "x.yaml", "--format", "quest"
    )
    for name in ("lserve", "leank", "redknot"):
        sentence = complaint(1, file, "-o", tmp_path / "x.yaml", *model, "--format", name)
        assert "does not hold" in sentence and f"({name}); leave --format out" in sentence
    assert run(file, "-o", tmp_path / "x.yaml", *model, "--format", "minference").exit_code == 0


def test_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    file = write(tmp_path / "x.json", patterns())
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in complaint(1, file, "-o", tmp_path / "x.yaml", "--model", tmp_path / "empty")


def test_the_names_of_published_models() -> None:
    for given_name, name in (
        ("Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2", "Llama-3.1-8B-Instruct"),
        ("Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern", "Llama-3-8B-Instruct-262k"),
        ("models/Llama-3-8B-Instruct-Gradient-1048k", "Llama-3-8B-Instruct-Gradient-1048k"),
        ("Qwen2.5_7B_Instruct_1M", "Qwen2.5-7B-Instruct-1M"),
        ("Qwen2.5_7B_Instruct_128k_instruct_kv_out", "Qwen2.5-7B-Instruct"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Meta-Llama-3-8B-Instruct"),
        ("llama3.1-8b-instruct", "Llama-3.1-8B-Instruct"),
        ("Phi_3_mini_128k_instruct_kv_out", "Phi-3-mini-128k-instruct"),
    ):
        found = published_model(given_name)
        assert found is not None and found.name == name
    for unknown in ("llama_threshold", "x", "", "Llama-4-Scout"):
        assert published_model(unknown) is None
    for model in PUBLISHED:
        assert model.query_heads % model.kv_heads == 0 and published_model(model.name) == model


# --- whatever is imported

SIZES = st.integers(0, 20_000)
PATTERN = st.tuples(
    st.sampled_from(["vertical_and_slash", "stream_llm", "block_sparse"]), SIZES, SIZES, st.floats(0, 1)
)
CLASS = st.sampled_from(["global", "local", "retrieval", "dense", "local_full", "limited", "sink_dominant"])


def tables(item: st.SearchStrategy[Any], heads_of_a_layer: int) -> st.SearchStrategy[Any]:
    row = st.lists(item, min_size=heads_of_a_layer, max_size=heads_of_a_layer)
    return st.lists(row, min_size=LAYERS, max_size=LAYERS)


@st.composite
def foreign_values(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    """The contents of a file, and options that suit it."""
    above = draw(st.sampled_from([None, 0, 4096]))
    kind = draw(st.sampled_from(["patterns", "weights", "classes", "mask", "thresholds", "rankings"]))
    if kind == "patterns":
        table = draw(tables(PATTERN, QUERY_HEADS))
        return [{str(n): list(each) for n, each in enumerate(row)} for row in table], {"above": above}
    if kind == "weights":
        options = {"sink": draw(SIZES), "recent": 1 + draw(SIZES), "streaming_share": draw(st.floats(0, 1))}
        return tsv(draw(tables(st.floats(-0.1, 1.1), KV_HEADS))), {**options, "seed": draw(st.integers())}
    if kind == "classes":
        distances = draw(tables(st.integers(-1, 9000), KV_HEADS))
        said = {"kv_head_classification": draw(tables(CLASS, KV_HEADS)), "kv_head_max_distance": distances}
        return classes(**said), {"keep": draw(st.sampled_from([None, "all", "window"]))}
    if kind == "mask":
        kept = draw(tables(st.integers(0, DIM), KV_HEADS))
        return (torch.arange(DIM) < torch.tensor(kept)[..., None]).float(), {}
    if kind == "thresholds":
        return f"some_8 = {draw(tables(st.floats(0, 1), QUERY_HEADS))!r}\n", {"above": above}
    order = draw(st.permutations(range(DIM)))
    said = {f"model.layers.{n}.self_attn.qk_proj": [order[n:] + order[:n]] * QUERY_HEADS for n in range(LAYERS)}
    return said, {"budget": 1 + draw(SIZES), "channels": draw(st.integers(1, DIM)), "above": above}


@settings(max_examples=30)
@given(foreign_values())
def test_whatever_is_imported_loads_and_is_the_same_after_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Any, dict[str, Any]]
) -> None:
    """`imported` reads what was written and compares; then once more through YAML, as a program would write it."""
    folder = tmp_path_factory.mktemp("any")
    policy = imported(write(folder / "x", case[0]), **case[1])
    assert (policy.model.layers, policy.model.kv_heads, policy.model.head_dim) == (LAYERS, KV_HEADS, DIM)
    again = write(folder / "again.yaml", yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False))
    assert load_policy_file(again) == policy
    points = [each.policy(Artefacts(folder)).points for each in (policy, load_policy_file(again))]
    assert [point.heads for point in points[0]] == [point.heads for point in points[1]]
    assert [len(row) for row in points[0][1].heads] == [KV_HEADS] * LAYERS


# --- what was shipped


def shipped() -> dict[str, PolicyFile]:
    """The packaged policies that were imported."""
    files = {name: load_policy_file(path) for name, path in packaged_policies().items()}
    return {name: file for name, file in files.items() if file.provenance.source == "imported"}


def test_shipped_policies_fit_the_models_that_they_are_named_after(tmp_path: Path) -> None:
    """`gossamer policy check` says so of a config.json with the model's published sizes."""
    from transformers import CONFIG_MAPPING

    files = shipped()
    assert len(files) >= 10
    for name, file in files.items():
        model = next(each for each in PUBLISHED if each.name == file.model.name)
        config = CONFIG_MAPPING[model.model_type](
            hidden_size=model.query_heads * model.head_dim,
            num_hidden_layers=model.layers,
            num_attention_heads=model.query_heads,
            num_key_value_heads=model.kv_heads,
            pad_token_id=0,
        )
        if model.head_dim != config.hidden_size // config.num_attention_heads or hasattr(config, "head_dim"):
            config.head_dim = model.head_dim
        config.save_pretrained(tmp_path / name)
        done = show("check", name, "--model", tmp_path / name)
        assert done.exit_code == 0, done.stderr
        assert list(file.points) == ["exact", "imported"] and file.provenance.approximations
        assert file.provenance.note == "imported, not verified here"
        assert all(each.origin and each.sha256 for each in file.provenance.files)
        assert name.startswith(model.name)


def test_a_model_finds_the_policy_that_is_named_after_it() -> None:
    for model in (
        "meta-llama/Llama-3.1-8B-Instruct",
        "some/where/Meta-Llama-3.1-8B-Instruct",
        "llama-3.1-8b-instruct",
        "Llama_3.1_8B_Instruct/",
    ):
        found = packaged_for(model)
        assert found is not None and found.stem == "Llama-3.1-8B-Instruct", model
    assert packaged_for("gossamer-demo") == packaged_policies()["gossamer-demo"]
    for other in ("Llama-3.1-8B", "Llama-3.1-8B-Instruct-tuned", "snapshots", "", "."):
        assert packaged_for(other) is None
    assert find_policy_file("llama-3.1-8b-instruct") == packaged_policies()["Llama-3.1-8B-Instruct"]
    with pytest.raises(PolicyError, match="neither a file nor a packaged policy"):
        find_policy_file("no/such/folder/Llama-3.1-8B-Instruct")


def test_the_record_is_of_the_packaged_policies() -> None:
    """benchmarks/results/imported_policies.json says what the policies do, and docs/importing.md what it says."""
    root = Path(__file__).parent.parent
    record = json.loads((root / "benchmarks" / "results" / "imported_policies.json").read_text())["imports"]
    page, files = (root / "docs" / "importing.md").read_text(), shipped()
    assert {each["policy"] for each in record if each["packaged"]} == set(files)
    for each in (one for one in record if one["packaged"]):
        file = files[each["policy"]]
        lengths = [int(length) for length in each["phases"][0]["density"]]
        now = json.loads(json.dumps(dataclasses.asdict(summarise(file, lengths))))
        assert {name: each[name] for name in now} == now
        assert each["approximations"] == list(file.provenance.approximations)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{each['policy']}` |")]
        for phase in each["phases"]:
            for count in (f"{number} {backend}" for backend, number in phase["backends"].items()):
                assert count in row
            assert all(phase["density"][str(length)].split()[0] in row for length in (32768, 131072, 1048576))
