"""EleutherAI's lm-evaluation-harness against the real server: its `local-completions` reads log-likelihoods of choices
through `echo` and `logprobs`. Left out where it is not installed (`pip install "lm_eval[api]"`)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import running_server

from gossamer.server.config import ServerConfig
from gossamer.server.engine.build import build_engine
from gossamer.server.metrics import Metrics

TASK = """
task: pass_keys
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_reads_likelihoods(tmp_path: Path) -> None:
    """The key that stands in the text is the likelier one; the last question is marked wrong, and counts as wrong."""
    data = tmp_path / "keys.jsonl"
    text = "The pass key for red-hat is 4821{}.\nWhat is the pass key for red-hat?"
    rows = [{"text": text.format(n), "choices": [" 77777", f" 4821{n}"], "gold": int(n < 3)} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "keys.yaml").write_text(TASK.format(data=data), "utf-8")
    config = ServerConfig(device="cpu", max_model_len=2048, max_num_seqs=8, threads=1)
    metrics = Metrics(config.names[0])
    engine = build_engine(config, metrics, lambda line: None)
    with running_server(engine, config, metrics) as server:
        arguments = {
            "model": config.names[0],
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": config.model_path,
        }
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
        command += ["--tasks", "pass_keys", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
        quiet = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(file.read_text("utf-8"))["results"]["pass_keys"]["acc,none"] == 0.75
