"""Writes docs/configuration.md from the fields of ServerConfig (`make docs`); with --check it only says whether to."""

import dataclasses
import sys
import typing
from itertools import groupby
from pathlib import Path

from gossamer.server.config import ServerConfig, default_text, flag_of, kind_of

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

Written by `make docs` from the fields of `ServerConfig` in [server/config.py](../server/config.py): edit those.

Every setting is a flag of `gossamer serve`, and `gossamer serve --help` shows the same list. A yes-or-no flag is given
without a value; one that is on by default is turned off with `--no-` before its name. `--config FILE` reads settings
from a YAML file, a mapping from names to values; a flag given as well wins over the file.

```yaml
# settings.yaml, for: gossamer serve --config settings.yaml
model: gossamer-demo
max_model_len: 32k
kv_cache_memory: 4GiB
api_key_file: keys.txt
```

Numbers of tokens may be written as `8192`, `128k` or `1m` (units of 1024), sizes of memory as `512MB` or `4GiB`.
Gossamer reads no environment variables of its own; those of the libraries below it (`HF_HOME`, `HF_TOKEN`,
`HF_HUB_OFFLINE`, `CUDA_VISIBLE_DEVICES`, `OMP_NUM_THREADS`) work as they always do.
"""


def page() -> str:
    """The whole page: a section per group of settings, a table row per setting."""
    parts = [INTRODUCTION]
    specs = dataclasses.fields(ServerConfig)
    for group, members in groupby(specs, key=lambda spec: str(spec.metadata["group"])):
        parts.append(f"\n## {group}\n\n| flag | value | default | meaning |\n| --- | --- | --- | --- |\n")
        parts.extend(row(spec) for spec in members)
    return "".join(parts)


def row(spec: "dataclasses.Field[object]") -> str:
    kind = kind_of(spec)
    value = {bool: "yes or no", tuple: "text, may be repeated", int: "whole number", float: "number"}.get(kind, "text")
    if typing.get_origin(spec.type) is typing.Literal:
        value = ", ".join(f"`{choice}`" for choice in typing.get_args(spec.type))
    if spec.metadata["unit"] is not None:
        value = {"parse_bytes": "size", "parse_tokens": "tokens"}[spec.metadata["unit"].__name__]
    default = {True: "yes", False: "no"}[bool(spec.default)] if kind is bool else default_text(spec)
    name = "MODEL" if spec.name == "model" else flag_of(spec.name)  # the one positional argument
    return f"| `{name}` | {value} | {default} | {spec.metadata['help']} |\n"


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit("docs/configuration.md is not what ServerConfig says; run `make docs`.")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
