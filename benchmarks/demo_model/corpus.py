"""Text and tokenizer of gossamer-demo: what it is trained on, and how that text becomes tokens.

Two sources, both redistributable: the sources of Python's standard library (PSF licence; `pydoc_data/topics.py` among
them is the language reference) and the documentation that Debian's packages put into /usr/share/doc. Files are split
into `train` and `eval` by a hash of their name, so held-out text is the same on every machine, and no file serves both.

    python benchmarks/demo_model/corpus.py --out demo/corpus    # train.txt, eval.txt, sources.json, tokenizer/
"""

import argparse
import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gossamer.attention.profiling.text import SKIPPED_FOLDERS, library_files, split_of, tidy

VOCABULARY = 4096
SPECIAL = ("<|bos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DOCUMENT_END = "\0"
MOST_BYTES = 200_000  # of one documentation file: a few changelogs would otherwise be most of the text

# A word with its leading space and at most one capital, else single capitals, single digits, runs of other signs, line
# ends, and blanks. Capitals in a row and digits stand alone, so that names such as ABCDE and numbers have one token per
# sign; a line end never joins what follows it, so a document may be cut at lines and encoded piece by piece.
PATTERN = (
    r" ?\p{Lu}?\p{Ll}+| ?\p{Lu}|\p{N}| ?[\p{Lo}\p{Lm}\p{Lt}\p{M}]+| ?[^\s\p{L}\p{N}\p{M}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'system' %}<|system|>{{ message['content'] }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def documentation_files(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every plain-text file below `root`, gzip opened, at most `MOST_BYTES` of each."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        plain = path.suffix in (".txt", ".md", ".rst") or path.name.startswith(("README", "NEWS", "changelog", "FAQ"))
        if (
            not plain
            or path.is_symlink()
            or not path.is_file()
            or not SKIPPED_FOLDERS.isdisjoint(name.parts)
            or path.suffix in (".html", ".pdf")
        ):
            continue
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MOST_BYTES)
        if len(raw) > 2000 and b"\0" not in raw:
            yield f"debian/{name}", raw.decode("utf-8", errors="replace")


def collect(library: Path, documentation: Path | None) -> Iterator[tuple[str, str]]:
    """(name, tidy text) of all files, each distinct text once."""
    seen: set[bytes] = set()
    sources = [library_files(library)] + ([documentation_files(documentation)] if documentation else [])
    for source in sources:
        for name, text in source:
            text = tidy(text)
            digest = hashlib.sha256(text[:4000].encode("utf-8", "replace")).digest()
            if digest not in seen:
                seen.add(digest)
                yield name, text


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE over `texts` whose alphabet is all 256 bytes, so that every text comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--library",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of Python's standard library",
    )
    parser.add_argument(
        "--documentation", type=Path, default=Path("/usr/share/doc"), help="folder of Debian's documentation"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {"train": [], "eval": []}
    names: dict[str, list[str]] = {"train": [], "eval": []}
    for name, text in collect(args.library, args.documentation if args.documentation.exists() else None):
        texts[split_of(name)].append(text)
        names[split_of(name)].append(name)
    for split, documents in texts.items():
        (args.out / f"{split}.txt").write_text(DOCUMENT_END.join(documents), encoding="utf-8", newline="\n")
        print(f"{split}: {len(documents)} files, {sum(map(len, documents)) / 1e6:.1f} M characters")
    (args.out / "sources.json").write_text(json.dumps(names, indent=1))
    save_tokenizer(train_tokenizer(texts["train"]), args.out / "tokenizer", 65536)


if __name__ == "__main__":
    main()
