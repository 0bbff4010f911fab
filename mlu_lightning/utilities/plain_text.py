"""Make text from files and names printable."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape characters that cannot be seen or encoded, but for line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
