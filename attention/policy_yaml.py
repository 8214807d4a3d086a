"""A policy file as text that people can read: a line for each backend, and nothing that is at its default."""

from typing import Any

import yaml

from gossamer.attention.policy_file import PolicyFile


def to_yaml(file: PolicyFile) -> str:
    """What is at its default is left out; a backend is one line."""
    raw = file.model_dump(mode="json", exclude_defaults=True)
    for point in raw["points"].values():
        if "default" in point:
            point["default"] = _lines(point["default"])
        if "rows" in point:
            point["rows"] = [_lines(row) for row in point["rows"]]
    raw["model"] = _Line(raw["model"])
    return yaml.dump({"gossamer_policy": 1, **raw}, Dumper=_Lines, sort_keys=False, width=1000, allow_unicode=True)


class _Line(dict[str, Any]):
    """A mapping that is written on one line."""


class _Lines(yaml.SafeDumper):
    """Knows such mappings."""

    def represent_data(self, data: Any) -> yaml.Node:
        if isinstance(data, _Line):
            return self.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
        return super().represent_data(data)


def _lines(entry: dict[str, Any]) -> dict[str, Any]:
    """A row with its heads first."""
    order = ("layers", "heads", "prefill", "decode", "keep")
    return {key: _Line(entry[key]) if isinstance(entry[key], dict) else entry[key] for key in order if key in entry}
