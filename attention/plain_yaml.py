"""YAML as people write it in policy and configuration files."""

from typing import Any

import yaml


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases (no expansion bombs) and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_plain_yaml(text: str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError, and for dates, long numbers, deep nesting ValueError or
    RecursionError."""
    return yaml.load(text, Loader=_PlainLoader)
