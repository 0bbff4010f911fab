"""Text from files and names, made fit to be printed."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return text in which characters that cannot be seen, or encoded, stand by their numbers, but for line ends and tabs.

    >>> printable("a\x1b[8m\udc80")
    'a\\x1b[8m\\udc80'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
