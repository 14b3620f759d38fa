"""YAML that a user writes: a repeated key is an error."""

from __future__ import annotations

import yaml


class UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a repeated key: the safe loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
