"""`gossamer policy`: show, check and diff, by the real command on real files."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import command_checks
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from gossamer.attention.policy_backends import HeadEntry
from gossamer.attention.policy_diff import ranges
from gossamer.attention.policy_file import load_policy_file
from gossamer.attention.policy_view import LOOKS, nominal_density, view_point
from gossamer.attention.selectors import SELECTORS
from gossamer.server.cli import app

LAYERS, KV_HEADS, RATIO, HEAD_DIM = 3, 2, 2, 32
GATE_DIM = 8
POLICY = """\
gossamer_policy: 1
name: all-backends
model: {name: tiny, model_type: llama, layers: 3, kv_heads: 2, query_heads: 4, head_dim: 32}
provenance: {source: written by hand, note: "for\\nthe \\e[31mtests"}
points:
  exact: {}
  mixed:
    default:
      prefill: {backend: vertical-slash, columns: 1000, diagonals: 24, mass: 0.9}
      decode: {backend: double-sparsity, file: labels.safetensors, channels: 4, tokens: 512}
    first_dense_layers: 1
    rows:
      - layers: 1
        heads: 0
        prefill: {backend: sink-recent, sink: 64, recent: 256}
        keep: {sink: 64, recent: 256}
      - layers: 1
        heads: 1
        prefill: {backend: block-sparse, score: antidiagonal, stride: 8, budget: {mass: 0.95, least: 512}}
        decode: {backend: block-sparse, budget: {share: 0.125}, above: 8192, correct_dropped: true}
      - layers: 2
        heads: 1
        prefill: {backend: learned-gate, file: gates.safetensors, budget: {tokens: 2048}}
        decode: {backend: learned-gate, file: gates.safetensors, budget: {part: 0.1}}
"""


run, complaint = partial(command_checks.run, ("policy",)), partial(command_checks.complaint, ("policy",))


def write_labels(file: Path, last: int = HEAD_DIM - 1) -> None:
    ranked = torch.arange(8, dtype=torch.int32).repeat(KV_HEADS, 1)
    ranked[-1, 0] = last
    save_file({f"layers.{layer}": ranked.clone() for layer in range(LAYERS)}, file)


def write_gates(file: Path) -> None:
    tensors = {"rotary.model": torch.ones(HEAD_DIM // 2), "rotary.gate": torch.ones(GATE_DIM // 2)}
    for part in (f"layers.{layer}.{phase}" for layer in range(LAYERS) for phase in ("prefill", "decode")):
        tensors[f"{part}.query"] = torch.ones(KV_HEADS, RATIO, RATIO * HEAD_DIM, GATE_DIM)
        tensors[f"{part}.key"] = torch.ones(KV_HEADS, 3 * HEAD_DIM, GATE_DIM)
    save_file(tensors, file)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy with every backend, and the files that it names."""
    write_labels(tmp_path / "labels.safetensors")
    write_gates(tmp_path / "gates.safetensors")
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    return file


# --- show


def test_show_draws_every_backend(policy: Path) -> None:
    result = run("show", policy, "--point", "mixed")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        "all-backends, operating point mixed",
        "model: tiny (llama), 3 layers of 2 KV heads",
        "provenance: written by hand: for the  [31mtests",
    ]
    assert lines[4:9] == [
        "prefill                 decode",
        "KV head   0     1       KV head   0     1",
        "layer 0 D100  D100      layer 0 D100  D100",
        "layer 1 S <1~ B  ?      layer 1 D <1~ B 12",
        "layer 2 V  3  G  6      layer 2 T  2  G  ?",
    ]
    for line in (
        "D  dense: 100% [heads: prefill 2, decode 2]",
        "D~ dense, keeps sink 64, recent 256: 0.98% [heads: prefill 0, decode 1]",
        "S~ sink-recent (sink 64, recent 256), keeps sink 64, recent 256: 0.98% [heads: prefill 1, decode 0]",
        "B  block-sparse (score antidiagonal, stride 8, budget mass 0.95, least 512): unknown until measured "
        "[heads: prefill 1, decode 0]",
        "B  block-sparse (score mean, budget share 0.125, above 8192, correct_dropped): 12.5% "
        "[heads: prefill 0, decode 1]",
        "V  vertical-slash (columns 1000, diagonals 24, probe 64, mass 0.9): at most 3.1% [heads: prefill 1, decode 0]",
        "T  double-sparsity (file labels.safetensors, channels 4, tokens 512): 1.6% [heads: prefill 0, decode 1]",
        "G  learned-gate (file gates.safetensors, budget tokens 2048): 6.2% [heads: prefill 1, decode 0]",
    ):
        assert line in lines
    shares = (1 + 1 + 320 / 32768 + 1024 / 32768 + 2048 / 32768) / 5, (1 + 1 + 320 / 32768 + 0.125 + 512 / 32768) / 5
    assert lines[-3:] == [
        "mean nominal density at 32768 tokens",
        f"  prefill: at most {100 * shares[0]:.1f}% over the 5 of 6 heads where it is known",
        f"  decode: {100 * shares[1]:.1f}% over the 5 of 6 heads where it is known",
    ]


def test_show_takes_the_first_point_and_another_length(policy: Path) -> None:
    default = run("show", policy).stdout
    assert default.startswith("all-backends, operating point exact, the default\n")
    assert "  prefill: 100%\n" in default and "~" not in default and "?" not in default
    short = run("show", policy, "--point", "mixed", "--length", "2k").stdout
    assert "layer 1 S 16~ B  ?      layer 1 D 16~ B100\n" in short  # `above` leaves the short prompt dense
    assert "layer 2 V 50  G100      layer 2 T 25  G  ?\n" in short
    assert "mean nominal density at 2048 tokens" in short


def test_show_stacks_panels_that_do_not_fit(policy: Path) -> None:
    lines = run("show", policy, COLUMNS="40").stdout.splitlines()
    assert [line for line in lines if line in ("prefill", "decode")] == ["prefill", "decode"]


def test_show_colours_a_terminal(policy: Path) -> None:
    """FORCE_COLOR makes rich take any output for a terminal."""
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    result = CliRunner().invoke(app, ["policy", "show", str(policy), "--point", "mixed"], env=terminal)
    assert result.exit_code == 0
    rows = [line for line in result.stdout.splitlines() if re.match(r"layer \d", line)]
    cells = [re.findall(r"\x1b\[\d+;48;2;(\d+;\d+;\d+)m(...)\x1b\[0m", row) for row in rows]
    assert [[text for _, text in row] for row in cells] == [
        ["   "] * 4,
        [" ~ ", " ? ", " ~ ", "   "],
        ["   "] * 3 + [" ? "],
    ]
    assert {colour for colour, _ in cells[0]} == {"77;77;77"}
    sums = [sum(map(int, colour.split(";"))) for colour, _ in cells[2]]
    assert sums[0] > sums[1]  # vertical-slash reads 3%, the gate 6%: paler
    assert cells[0][0][0] != cells[1][2][0]  # dense that streams is paler than dense


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--point", "fast"), 2, "The policy 'all-backends' has no operating point 'fast'; it has: exact, mixed."),
        (("--length", "0"), 2, "--length is '0': give a number of tokens from 1 to 1073741824."),
        (("--length", "2000m"), 2, "give a number of tokens from 1"),
        (("--length", "-5"), 2, "--length is '-5': expected a number of tokens such as 8192, 128k or 1m."),
        (("--length", "long"), 2, "expected a number of tokens"),
        (("--png", "no/such/folder.png"), 1, "cannot be written to no/such/folder.png (No such file or directory)"),
    ],
)
def test_show_refuses(policy: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    assert said in complaint(code, "show", policy, *arguments)


def test_what_is_no_policy_is_refused_by_every_command(policy: Path, tmp_path: Path) -> None:
    commands: tuple[Callable[[object], str], ...] = (
        lambda file: complaint(1, "show", file),
        lambda file: complaint(1, "check", file, "--model", "gossamer-demo"),
        lambda file: complaint(2, "diff", file, policy),
        lambda file: complaint(2, "diff", policy, file),
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text(POLICY.replace("recent: 256}", "recent: 0}"))
    lacking = tmp_path / "elsewhere" / "policy.yaml"
    lacking.parent.mkdir()
    lacking.write_text(POLICY)
    for command in commands:
        assert "'nosuch' is neither a file nor a packaged policy; packaged are: " in command("nosuch")
        assert "gossamer-demo" in command(tmp_path)
        assert "'dense' needs no file" in command("dense")
        assert "is wrong at points.mixed.rows.0.prefill.sink-recent.recent" in command(broken)
        assert "labels.safetensors, which the policy names, cannot be read" in command(lacking)


def test_usage_errors() -> None:
    for arguments in (("show",), ("check", "gossamer-demo"), ("diff", "gossamer-demo"), ("nosuch",)):
        assert run(*arguments).exit_code == 2


# --- the picture


def test_png(policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "heads.png"
    assert (
        run("show", policy, "--point", "mixed", "--png", file).stdout == run("show", policy, "--point", "mixed").stdout
    )
    from matplotlib.image import imread

    pixels = imread(file)[..., :3]
    view = view_point(load_policy_file(policy), "mixed", 32768)
    for cell in (cell for panel in view.panels for cell in panel):
        tint = [channel / 255 for channel in cell.tint]
        assert (abs(pixels - tint).max(-1) < 0.004).sum() > 400, cell  # more than its swatch in the legend


def test_png_of_a_note_that_looks_like_mathematics(policy: Path, tmp_path: Path) -> None:
    policy.write_text(POLICY.replace("for\\nthe", "$x_{ $\\\\frac" + " many words" * 60))
    assert run("show", policy, "--png", tmp_path / "heads.png").exit_code == 0


def test_png_without_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"  # importing it fails from now on
        "from gossamer.server.cli import main\n"
        f"sys.argv = ['gossamer', 'policy', 'show', 'gossamer-demo', '--png', {str(tmp_path / 'x.png')!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "gossamer: --png needs matplotlib, which is not installed; install it with: pip install 'gossamer[plots]'.\n"
    )
    assert not (tmp_path / "x.png").exists()


# --- nominal densities


@pytest.mark.parametrize(
    ("entry", "share"),
    [
        ({}, 1.0),
        ({"keep": {"sink": 10, "recent": 90}}, 0.1),
        ({"decode": {"backend": "sink-recent", "sink": 100, "recent": 100}}, 0.2),
        ({"decode": {"backend": "sink-recent", "sink": 1000, "recent": 1000}}, 1.0),
        ({"decode": {"backend": "block-sparse", "budget": {"tokens": 250}}}, 0.25),
        ({"decode": {"backend": "block-sparse", "budget": {"share": 0.125}}}, 0.125),
        ({"decode": {"backend": "block-sparse", "budget": {"share": 0.125}, "above": 999}}, 0.125),
        ({"decode": {"backend": "block-sparse", "budget": {"share": 0.125}, "above": 1000}}, 1.0),
        ({"decode": {"backend": "block-sparse", "budget": {"mass": 0.9}, "above": 1000}}, 1.0),
        ({"decode": {"backend": "block-sparse", "budget": {"share": 0.5}}, "keep": {"sink": 0, "recent": 80}}, 0.08),
        ({"decode": {"backend": "block-sparse", "budget": {"mass": 0.9}}}, None),
        ({"decode": {"backend": "learned-gate", "file": "g", "budget": {"part": 0.1}}}, None),
        ({"decode": {"backend": "double-sparsity", "file": "l", "tokens": 60}}, 0.06),
        ({"decode": {"backend": "vertical-slash", "columns": 30, "diagonals": 20}}, 0.05),
    ],
)
def test_nominal_density_at_a_thousand_tokens(entry: dict[str, Any], share: float | None) -> None:
    head = HeadEntry.model_validate(entry)
    nominal = nominal_density(head.decode, head.keep, 1000)
    assert nominal.share == (None if share is None else pytest.approx(share)) and not nominal.at_most


def test_every_backend_has_a_look() -> None:
    assert list(LOOKS) == list(SELECTORS)
    assert len({look.letter for look in LOOKS.values()}) == len({look.colour for look in LOOKS.values()}) == len(LOOKS)


# --- check


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Only a config.json: no weights and no tokenizer."""
    return save_config(tmp_path / "model")


def save_config(directory: Path, family: str = "llama", **extra: object) -> Path:
    directory.mkdir(exist_ok=True)
    known = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    CONFIG_MAPPING[family](**{**known, "head_dim": 32, **FAMILIES[family], **extra}).save_pretrained(directory)
    return directory


def test_check_says_that_a_policy_fits(policy: Path, model: Path) -> None:
    result = run("check", policy, "--model", model)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"fits: all-backends on {model} (llama: 3 layers of 2 KV heads, 4 query heads of 32)",
        "  exact: prefill 6 dense; decode 6 dense; none of 6 heads stream",
        "  mixed: prefill 2 dense, 1 sink-recent, 1 block-sparse, 1 vertical-slash, 1 learned-gate; "
        "decode 3 dense, 1 block-sparse, 1 double-sparsity, 1 learned-gate; 1 of 6 heads streams",
    ]


def test_check_of_packaged_names() -> None:
    result = run("check", "gossamer-demo", "--model", "gossamer-demo")
    assert result.exit_code == 0 and result.stdout.startswith("fits: gossamer-demo on gossamer-demo (llama: 4 layers")


@pytest.mark.parametrize("family", FAMILIES)
def test_check_reads_the_config_of_every_family(policy: Path, tmp_path: Path, family: str) -> None:
    policy.write_text(POLICY.replace("model_type: llama", f"model_type: {family}"))
    model = save_config(tmp_path / "model", family)
    assert run("check", policy, "--model", model).stdout.startswith("fits: ")
    wider = save_config(tmp_path / "wider", family, head_dim=64)
    assert "head_dim 32, but this model has head_dim 64" in complaint(1, "check", policy, "--model", wider)


def test_check_where_the_config_leaves_things_out(policy: Path, model: Path) -> None:
    """As many KV heads as query heads, and heads that divide the width of the model."""
    policy.write_text(POLICY.replace("query_heads: 4", "query_heads: 2"))
    config = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 64}
    (model / "config.json").write_text(json.dumps(config))
    assert run("check", policy, "--model", model).exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("layers: 3", "layers: 4", "is for a model with layers 4, but this model has layers 3"),
        ("query_heads: 4", "query_heads: 8", "is for a model with query_heads 8, but this model has query_heads 4"),
        ("model_type: llama", "model_type: qwen3", "model_type qwen3, but this model has model_type llama"),
        ("channels: 4", "channels: 9", "ranks 8 channels of layer 2; ask for no more, not 9"),
        ("decode: {backend: learned-gate", "decode: {backend: vertical-slash", "is wrong at points.mixed.rows.2"),
    ],
)
def test_check_says_what_does_not_fit(policy: Path, model: Path, old: str, new: str, said: str) -> None:
    assert POLICY.count(old) == 1
    if old == "layers: 3":
        save = {f"layers.{layer}": torch.arange(8, dtype=torch.int32).repeat(2, 1) for layer in range(4)}
        save_file(save, policy.parent / "labels.safetensors")
    policy.write_text(POLICY.replace(old, new))
    assert said in complaint(1, "check", policy, "--model", model)


def test_check_looks_into_the_files(policy: Path, model: Path) -> None:
    write_labels(policy.parent / "labels.safetensors", last=HEAD_DIM)
    assert "names a channel of layer 2 that a head of 32 has not" in complaint(1, "check", policy, "--model", model)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "holds no config.json"),
        ("{", "cannot be read as JSON"),
        ('{"model_type": "mamba"}', "Models of the family 'mamba' cannot be served"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "gives 0 as its num_hidden_layers"),
    ],
)
def test_check_of_models_that_cannot_be_served(policy: Path, model: Path, config: str | None, said: str) -> None:
    file = model / "config.json"
    if config is None:
        file.unlink()
    else:
        file.write_text(config)
    assert said in complaint(1, "check", policy, "--model", model)


# --- diff


def test_diff_of_equal_policies(policy: Path, tmp_path: Path) -> None:
    """What is written otherwise and means the same is the same: names, comments, order, names of files."""
    again = tmp_path / "again.yaml"
    text = POLICY.replace("all-backends", "again").replace("labels.safetensors", "other.safetensors")
    again.write_text(text.replace("layers: 1\n        heads: 0", 'layers: "1-1"\n        heads: "0"'))
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "labels.safetensors").read_bytes())
    for pair in ((policy, policy), (policy, again), ("gossamer-demo", "gossamer-demo")):
        result = run("diff", *pair)
        assert result.exit_code == 0 and result.stdout.startswith("no difference at exact")


def test_diff_names_ranges_parts_and_points(policy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    rows = (
        "    rows: [{layers: 1-2, keep: {sink: 0, recent: 64}}, {layers: 0, heads: 1, prefill: {backend: sink-recent,"
    )
    text = POLICY.replace("exact: {}", f"exact:\n{rows} sink: 1, recent: 2}}}}]\n  more: {{}}")
    other.write_text(text.replace("tokens: 2048", "tokens: 1024"))
    result = run("diff", policy, other)
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.splitlines() == [
        f"{policy} -> {other}",
        "operating point exact",
        "  layers 0; KV heads 1",
        "    prefill: dense -> sink-recent (sink 1, recent 2)",
        "  layers 1-2; KV heads all",
        "    keep: all -> sink 0, recent 64",
        "operating point mixed",
        "  layers 2; KV heads 1",
        "    prefill: learned-gate (file gates.safetensors, budget tokens 2048) -> "
        "learned-gate (file gates.safetensors, budget tokens 1024)",
        f"operating point more is in {other} only",
    ]
    assert f"operating point more is in {other} only" in run("diff", other, policy).stdout


def test_diff_sees_other_contents_of_a_file(policy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "policy.yaml"
    other.parent.mkdir()
    other.write_text(POLICY)
    write_gates(other.parent / "gates.safetensors")
    write_labels(other.parent / "labels.safetensors", last=20)
    result = run("diff", policy, other)
    assert result.exit_code == 1
    words = "double-sparsity (file labels.safetensors, channels 4, tokens 512)"
    assert (
        f"  layers 2; KV heads 0\n    decode: {words} -> the same, with other contents of its file\n" in result.stdout
    )
    assert "learned-gate" not in result.stdout


def test_diff_of_policies_for_other_models_and_of_the_default(policy: Path, tmp_path: Path) -> None:
    result = run("diff", policy, "gossamer-demo")
    assert result.exit_code == 1
    assert {"layers: 3 -> 4", "kv_heads: 2 -> 4", f"operating point mixed is in {policy} only"} <= set(
        result.stdout.splitlines()
    )
    assert "operating point exact" not in result.stdout  # heads of other shapes are not compared
    turned = tmp_path / "turned.yaml"
    first, second = POLICY.split("  exact: {}\n")
    turned.write_text(f"{first}{second}  exact: {{}}\n".replace("model_type: llama, ", ""))
    assert run("diff", policy, turned).stdout.splitlines()[1:] == [
        "model_type: llama -> not given",
        "default operating point: exact -> mixed",
    ]


def test_diff_names_what_is_safer(policy: Path) -> None:
    other = policy.with_name("safer.yaml")
    other.write_text(POLICY.replace("  mixed:\n", "  mixed:\n    safer: exact\n"))
    result = run("diff", policy, other)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1:] == ["safer than mixed: not given -> exact"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0, 1, 2, 3], "all"), ([0], "0"), ([1, 2, 3], "1-3"), ([0, 2], "0, 2"), ([0, 1, 3], "0-1, 3"), ([3], "3")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers, 4) == text
