"""Writes docs/policy.schema.json, the JSON Schema of policy files (`make docs`); with --check it only says if to."""

import json
import sys
from pathlib import Path

from gossamer.attention.policy_file import PolicyFile

PAGE = Path(__file__).with_name("policy.schema.json")


def page() -> str:
    """The schema of `PolicyFile`, as a document of its own."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **PolicyFile.model_json_schema(),
        "title": "Gossamer policy file",
    }
    return json.dumps(schema, indent=2) + "\n"


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit("docs/policy.schema.json is not what attention/policy_file.py says; run `make docs`.")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
