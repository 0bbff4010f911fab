"""Read untrusted YAML that has only texts, lists and mappings.

What can grow or run when it is read is left out: anchors and aliases, and tags, which name classes. Numbers, truth values
and null stay texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any

import yaml

LONGEST = 2**25  # bytes; a plan has about 300 for each parameter
_MOST_LEVELS = 8
_PARSER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def read_text(path: str | PathLike[str]) -> str:
    """Read a text file of 32 MB at most."""
    with open(path, "rb") as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"{path} {_TOO_LONG}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: it is not text in UTF-8 ({error}).") from error


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML as texts, lists and mappings from texts; errors name the ``source``."""
    if len(text) > LONGEST:
        raise ValueError(f"{source} {_TOO_LONG}")
    try:
        events = iter(yaml.parse(text, Loader=_PARSER))
        next(events)  # the stream starts
        if isinstance(next(events), yaml.StreamEndEvent):
            return ""
        content = _parse_node(next(events), events, source, 0)
        next(events)  # the document ends
        _refuse(not isinstance(event := next(events), yaml.StreamEndEvent), event, source, "a second document")
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    return content


_TOO_LONG = f"is longer than {LONGEST >> 20} MB, which is more than is read."


def _parse_node(event: Any, events: Iterator[Any], source: str, level: int) -> Any:
    _refuse(level > _MOST_LEVELS, event, source, f"more than {_MOST_LEVELS} levels")
    _refuse(isinstance(event, yaml.AliasEvent) or event.anchor is not None, event, source, "an anchor or alias")
    _refuse(event.tag is not None and event.tag != "!", event, source, "a tag")
    if isinstance(event, yaml.ScalarEvent):
        return event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_parse_node(event, events, source, level + 1))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        _refuse(not isinstance(event, yaml.ScalarEvent), event, source, "a key that is no text")
        key = _parse_node(event, events, source, level + 1)
        _refuse(key in mapping, event, source, f"the key {key[:80]!r} a second time")
        mapping[key] = _parse_node(next(events), events, source, level + 1)
    return mapping


def _refuse(wrong: bool, event: Any, source: str, what: str) -> None:
    if wrong:
        raise ValueError(f"{source} has {what} in line {event.start_mark.line + 1}, which is not read here.")
