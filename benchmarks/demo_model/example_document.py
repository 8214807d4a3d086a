"""Write a long document with a few facts in it, a question about one of them, and its answer, to ask a server.

    python benchmarks/demo_model/example_document.py --tokens 32000 --out demo/example

The text is Python's own standard library, from files that the demo model was not trained on, so it needs no network.
`document.txt`, `question.txt`, `answer.txt` and `request.json` (a body for /v1/chat/completions) appear in the folder.
"""

import argparse
import json
import sysconfig
from pathlib import Path

from transformers import AutoTokenizer

from gossamer.attention.profiling.tasks import Filler, Prompt, Task, make_prompt
from gossamer.attention.profiling.text import library_files, split_of, tidy

DEMO = Path(__file__).parents[2] / "configs" / "models" / "gossamer-demo"


def example(tokens: int, facts: int, seed: int, tokenizer_path: Path) -> Prompt:
    """A document of about `tokens` tokens with `facts` keys in it, and one question."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    held_out = (
        tidy(text) for name, text in library_files(Path(sysconfig.get_paths()["stdlib"])) if split_of(name) == "eval"
    )
    lines = "\n".join(held_out).split("\n")
    filler = Filler(lines, lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    return make_prompt(Task("example", keys=facts), tokens, seed, filler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32000)
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, default=DEMO)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prompt = example(args.tokens, args.facts, args.seed, args.tokenizer)
    question = prompt.questions[0]
    body = {"model": "gossamer-demo", "messages": prompt.messages(0), "max_tokens": 64, "temperature": 0}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "document.txt").write_text(prompt.document, encoding="utf-8")
    (args.out / "question.txt").write_text(f"{question.text}\n", encoding="utf-8")
    (args.out / "answer.txt").write_text(f"{question.references[0]}\n", encoding="utf-8")
    (args.out / "request.json").write_text(json.dumps(body), encoding="utf-8")
    print(f"{args.out}: {len(prompt.document)} characters. Asked: {question.text} Expected: {question.references[0]}")


if __name__ == "__main__":
    main()
