"""Folders with the shape of a model and no weights, for --load-format dummy: what time depends on is there.

    python benchmarks/dummy_model.py 8b FOLDER [--positions 131072]

The tokenizer is the packaged demo model's: token ids below 4096 are words, all others are nothing.
"""

import argparse
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from gossamer.server.config import DEMO_MODEL

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1 8B's
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def write_dummy_model(folder: Path, shape: str, positions: int) -> None:
    """config.json of a Llama of this shape, and the demo model's tokenizer."""
    demo = Path(str(files("gossamer") / "configs" / "models" / DEMO_MODEL))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 5,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        **SHAPES[shape],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--positions", type=int, default=131072)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_dummy_model(options.folder, options.shape, options.positions)


if __name__ == "__main__":
    main()
