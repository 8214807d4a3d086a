"""What the server says instead of starting: one sentence per mistake; and what it finds out when it does start."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Records, ask, make_engine, running_engine
from safetensors.torch import load_file, save_file
from test_policy_file import EXAMPLE
from tiny_models import FAMILIES, VOCAB, save_tiny_model

from gossamer.server.config import ServerConfig
from gossamer.server.engine import build
from gossamer.server.engine.build import build_engine
from gossamer.server.engine.engine import Engine
from gossamer.server.engine.families import SUPPORTED, StartupError
from gossamer.server.engine.loop import Loop
from gossamer.server.engine.tokenizer import Tokenizer

FEW = 200_000  # bytes


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("pristine") / "tiny-llama")


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny-llama"))


def start(path: Path | str, **settings: Any) -> tuple[Engine, list[str]]:
    """What `gossamer serve` builds, not started; and the lines that it printed."""
    lines: list[str] = []
    options: dict[str, Any] = {"device": "cpu", "kv_cache_memory": 4 * 2**20, "max_num_seqs": 4, **settings}
    return build_engine(ServerConfig(model=str(path), **options), Records(), lines.append), lines


def refused(path: Path | str, **settings: Any) -> str:
    """The sentence with which the server refuses to start."""
    with pytest.raises(StartupError) as caught:
        start(path, **settings)
    sentence = str(caught.value)
    assert sentence[-1] in ".!" and "\n" not in sentence and 20 < len(sentence) < 900, sentence
    assert "Traceback" not in sentence
    return sentence


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_nothing_but_the_engine_has_helping_threads(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread that computes in parallel makes each of the engine's small operations wait."""
    found: dict[str, int] = {}

    def noting(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            found[name] = torch.get_num_threads()
            return part(*args, **named)

        return call

    for name in ("load_model", "assemble"):
        monkeypatch.setattr(build, name, noting(name, getattr(build, name)))
    monkeypatch.setattr(Loop, "run", noting("engine", Loop.run))
    before = torch.get_num_threads()
    engine, _ = start(pristine, threads=3)
    try:
        engine.start()
        engine.stop(0)
        assert found == {"load_model": 1, "assemble": 1, "engine": 3}
    finally:
        torch.set_num_threads(before)
    refused(pristine, max_model_len=10**9)
    assert torch.get_num_threads() == before


def test_directories_that_are_none(tmp_path: Path, checkpoint: Path) -> None:
    missing = tmp_path / "nowhere"
    assert f"{missing} is not a directory" in refused(missing)
    assert "is not a directory" in refused(checkpoint / "config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no config.json" in refused(empty)
    assert "nobody/no-such-model" in refused("nobody/no-such-model")


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "{}", '{"model_type": 7}', "\x00\x01"])
def test_config_that_is_not_one(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert "config.json" in refused(checkpoint)


def test_config_that_is_not_text(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(b"\xff\xfe\x80")
    assert "cannot be read as JSON" in refused(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_size", "wide"), ("num_hidden_layers", 1.5), ("num_attention_heads", [4])]
)
def test_config_with_a_number_that_is_none(checkpoint: Path, name: str, value: object) -> None:
    """The file is at fault, not the network."""
    edit_config(checkpoint, **{name: value})
    sentence = refused(checkpoint)
    assert "config.json has a wrong entry" in sentence and name in sentence and "network" not in sentence


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mamba", "recurrent state"),
        ("jamba", "recurrent state"),
        ("qwen3_next", "recurrent state"),
        ("t5", "cross-attention"),
        ("whisper", "cross-attention"),
        ("deepseek_v3", "MLA"),
        ("llama4", "chunked layers"),
        ("gemma3", "gemma3_text"),
        ("bert", "cannot be served"),
        ("no_such_family", "cannot be served"),
    ],
)
def test_families_are_refused_by_name(checkpoint: Path, family: str, why: str) -> None:
    edit_config(checkpoint, model_type=family)
    sentence = refused(checkpoint)
    assert repr(family) in sentence and why in sentence and "llama, mistral" in sentence


def test_every_supported_family_is_tested() -> None:
    assert set(SUPPORTED) == set(FAMILIES)


def test_layers_of_unknown_kind(checkpoint: Path) -> None:
    edit_config(checkpoint, layer_types=["full_attention", "chunked_attention", "linear_attention"])
    assert "chunked_attention, linear_attention" in refused(checkpoint)


def test_code_in_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    edit_config(checkpoint, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (checkpoint / "modeling.py").write_text(f"open({str(checkpoint / 'ran')!r}, 'w')")
    assert "Python code of its own" in refused(checkpoint)
    assert not (checkpoint / "ran").exists()


def test_pickled_weights(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refused(checkpoint)


@pytest.mark.parametrize("length", [0, 5, 2000, -100])
def test_truncated_weights(checkpoint: Path, length: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert "weights" in refused(checkpoint) and str(checkpoint) in refused(checkpoint)


def test_weights_that_are_something_else(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    assert "weights" in refused(checkpoint)


def test_a_shard_is_missing(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, part in halves.items():
        save_file({key: weights[key] for key in part}, checkpoint / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in halves.items() for key in part}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").unlink()
    start(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002" in refused(checkpoint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 4, "layer_types": None}, "lacks model.layers.3."),
        ({"num_hidden_layers": 2, "layer_types": None}, "has weights of layer 2, but its config.json names 2 layers"),
        ({"hidden_size": 128}, "has the wrong shape for"),
        ({"num_key_value_heads": 4}, "has the wrong shape for model.layers.0.self_attn.k_proj.weight"),
        ({"vocab_size": VOCAB + 8}, "has the wrong shape for"),
    ],
)
def test_weights_that_do_not_belong_to_the_config(checkpoint: Path, change: dict[str, Any], said: str) -> None:
    edit_config(checkpoint, **change)
    sentence = refused(checkpoint)
    assert said in sentence and "do not belong to its config.json" in sentence


def test_missing_tokenizer(checkpoint: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / file).unlink()
    assert "tokenizer" in refused(checkpoint)
    start(checkpoint, tokenizer=str(save_tiny_model(checkpoint.parent / "other")))


def test_broken_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(checkpoint)


def write_policy(directory: Path, text: str) -> str:
    file = directory / "policy.yaml"
    file.write_text(text)
    return str(file)


FITTING = EXAMPLE.replace("layers: 6, kv_heads: 4", "layers: 3, kv_heads: 2").replace(
    'layers: 2-5\n        heads: "0, 2"', "layers: 1-2\n        heads: 0"
)


def test_policies_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    assert "'nosuch' is neither a file nor a packaged policy" in refused(checkpoint, attention_policy="nosuch")
    wrong = write_policy(tmp_path, EXAMPLE)
    assert "is for a model with layers 6, but this model has layers 3" in refused(checkpoint, attention_policy=wrong)
    broken = write_policy(tmp_path, FITTING.replace("sink: 64", "sink: -64"))
    assert "points.fast.rows.0.prefill" in refused(checkpoint, attention_policy=broken)
    greedy = write_policy(tmp_path, FITTING.replace("keep: {sink: 64", "keep: {sink: 32"))
    assert "keep more, or read less" in refused(checkpoint, attention_policy=greedy)
    assert "row 1 of operating point 'fast', layer 3 does not exist" in refused(
        checkpoint, attention_policy=write_policy(tmp_path, FITTING.replace("1-2", "1-3"))
    )


def test_operating_points(checkpoint: Path, tmp_path: Path) -> None:
    file = write_policy(tmp_path, FITTING)
    engine, _ = start(checkpoint, attention_policy=file)
    assert (engine.points, engine.default_point) == (("exact", "fast"), "exact")
    assert re.fullmatch(r"gossamer-.+-example@exact-[0-9a-f]{8}", engine.fingerprint)
    assert engine.fingerprint_of("fast") != engine.fingerprint
    engine, _ = start(checkpoint, attention_policy=file, attention_point="fast", attention_allow_points=("exact",))
    assert (engine.points, engine.default_point) == (("exact",), "fast")
    for setting in ({"attention_point": "quick"}, {"attention_allow_points": ("exact", "quick")}):
        sentence = refused(checkpoint, attention_policy=file, **setting)
        assert "no operating point 'quick'; it has: exact, fast" in sentence
        sentence = refused(checkpoint, **setting)
        assert "no operating point" in sentence and "exact" in sentence


def test_memory_is_for_the_points_that_can_be_chosen(checkpoint: Path, tmp_path: Path) -> None:
    """Where no request can be dense, memory that streaming heads never need goes to the others."""

    def room(**settings: Any) -> int:
        options = {"attention_policy": write_policy(tmp_path, FITTING), "kv_cache_memory": 32 * 2**20, **settings}
        _, lines = start(checkpoint, attention_point="fast", **options)
        (found,) = re.findall(r"room for (\d+) tokens", "\n".join(lines))
        return int(found)

    both = room()
    assert room(attention_allow_points=("exact",)) == room(attention_allow_points=("exact", "fast")) == both
    assert room(attention_allow_points=("fast",)) > both


def test_a_profile_that_others_published_is_mentioned_and_not_used(checkpoint: Path) -> None:
    named = checkpoint.rename(checkpoint.with_name("Qwen3-32B"))
    engine, lines = start(named)
    assert engine.points == ("exact",) and "-dense@exact-" in engine.fingerprint
    (line,) = [line for line in lines if "published" in line]
    assert line.endswith("not verified: --attention-policy Qwen3-32B")
    assert "'Qwen3-32B' is for a model with layers 64, but this model has" in refused(
        named, attention_policy="qwen3_32b"
    )


def test_longer_than_the_model(checkpoint: Path) -> None:
    assert "2049 exceeds the model's 2048 positions" in refused(checkpoint, max_model_len=2049)


def test_memory_that_is_too_small(checkpoint: Path) -> None:
    """One page of 64 tokens, 3 layers, 2 heads of 32, K and V in float32: 98304 bytes."""
    sentence = refused(checkpoint, kv_cache_memory=90_000, dtype="float32")
    assert "not one page" in sentence and "--kv-cache-memory" in sentence
    sentence = refused(checkpoint, kv_cache_memory=900 * 2**40)
    assert "not enough memory" in sentence and "--kv-cache-memory" in sentence
    sentence = refused(checkpoint, kv_cache_memory=FEW, dtype="float32", max_model_len=129)
    assert "--max-model-len" in sentence and "--kv-cache-memory" in sentence and "128 tokens" in sentence


def test_length_shrinks_to_what_memory_holds(checkpoint: Path) -> None:
    engine, lines = start(checkpoint, kv_cache_memory=FEW, dtype="float32")
    assert engine.model.max_model_len == 128 == engine.token_capacity
    assert any("128 tokens" in line for line in lines)
    engine, _ = start(checkpoint, kv_cache_memory=10 * FEW, dtype="float32", max_model_len=100)
    assert engine.model.max_model_len == 100


def test_steps_smaller_than_the_batch(checkpoint: Path) -> None:
    sentence = refused(checkpoint, max_num_seqs=5, max_num_batched_tokens=4)
    assert "--max-num-batched-tokens (4) must be at least --max-num-seqs (5)" in sentence


def test_gpu_that_is_not_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda was asked for" in refused(checkpoint, device="cuda")
    assert build._device("auto") == torch.device("cpu")


def test_random_weights_need_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    first, _ = start(checkpoint, load_format="dummy", dtype="float32")
    again, _ = start(checkpoint, load_format="dummy", dtype="float32")
    answers = []
    for engine in (first, again):
        engine.start()
        answers.append(ask(engine, range(4, 40)).tokens())
        engine.stop(0.0)
    assert answers[0] == answers[1] and len(answers[0]) == 16


def test_generation_defaults(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20})
    )
    engine, _ = start(checkpoint)
    assert dict(engine.model.default_sampling) == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert engine._eos_ids == {1, 7}
    engine, _ = start(checkpoint, generation_config="none")
    assert dict(engine.model.default_sampling) == {}
    (checkpoint / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    engine, _ = start(checkpoint)
    assert dict(engine.model.default_sampling) == {"temperature": 0.0} and engine._eos_ids == {1}
    (checkpoint / "generation_config.json").unlink()
    engine, _ = start(checkpoint)
    assert dict(engine.model.default_sampling) == {} and engine._eos_ids == {1}
    (checkpoint / "generation_config.json").write_text("{")
    assert "generation_config.json" in refused(checkpoint)


def longrope() -> dict[str, Any]:
    half = 16  # of the head's 32
    return {
        "hidden_size": 128,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * half,
            "long_factor": [1.0 + i for i in range(half)],
            "original_max_position_embeddings": 64,
        },
    }


def dynamic() -> dict[str, Any]:
    return {
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    }


@pytest.mark.parametrize(("family", "extra"), [("phi3", longrope), ("llama", dynamic)])
def test_rope_does_not_depend_on_the_neighbours(
    family: str, extra: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """Some RoPE variants choose their factors by the longest position of the batch, which one long request would
    change for everybody."""
    path = save_tiny_model(tmp_path / family, family, **extra())
    short, long = list(range(4, 40)), [4 + i % 300 for i in range(110)]
    with running_engine(path, enable_prefix_caching=False) as engine:
        alone = ask(engine, short).tokens()
        asked = [ask(engine, prompt) for prompt in (long, short, long, short)]
        beside = [answer.tokens() for answer in asked]
        assert beside[1] == beside[3] == alone
        assert ask(engine, short).tokens() == alone


def test_longrope_factors_are_those_of_the_served_length(tmp_path: Path) -> None:
    """A server that serves only short sequences computes with the short factors, as transformers would."""
    path = save_tiny_model(tmp_path / "phi3", "phi3", **longrope())
    short = list(range(4, 40))
    answers = []
    for served in (60, 512):
        engine, _ = start(path, max_model_len=served, dtype="float32")
        engine.start()
        answers.append(ask(engine, short).tokens())
        engine.stop(0.0)
    assert answers[0] != answers[1]


def test_tests_see_the_tokenizer_that_the_server_loads(pristine: Path) -> None:
    engine, _ = make_engine(pristine)
    assert engine.tokenizer.vocab_size == Tokenizer.load(str(pristine)).vocab_size
    assert engine.model.vocab_size == VOCAB
