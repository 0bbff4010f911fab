"""Read configurations in YAML, with aliases and numbers, up to a bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mlu_lightning.utilities.plain_yaml import read_text

_OF_VALUES = (OSError, ValueError, yaml.YAMLError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What values raise that are not of the type that they say."""
_MOST_LEVELS = 50
_MOST_VALUES = 100_000


def load_config(path: Path) -> Any:
    """Read a YAML file, or say in a ``ValueError`` why it cannot be a configuration."""
    try:
        text = read_text(path)
        nesting = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            nesting += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if nesting > _MOST_LEVELS:
                raise ValueError(f"it has more than {_MOST_LEVELS} levels")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _count(root, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
        return yaml.safe_load(text)
    except _OF_VALUES as error:
        raise ValueError(f"{path} cannot be read as a configuration: {error}") from error


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Number of values of a node, with those that aliases stand for."""
    found = known.get(id(node), -1)
    if found is None:
        raise ValueError("one of its aliases stands for what it is in")
    if found >= 0:
        return found
    known[id(node)] = None
    parts = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else []
    flat = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
    known[id(node)] = count = 1 + sum(_count(part, known) for part in flat)
    return count
