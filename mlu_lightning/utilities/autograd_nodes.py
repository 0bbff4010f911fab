"""Walk autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch.autograd.graph import Node


def nodes_below(roots: Iterable[Node], stops: Collection[Node] = ()) -> Iterator[Node]:
    """Nodes that some were computed from, and these, each after its operands; the walk does not go on from ``stops``."""
    done: set[Node] = set()
    stack = [(root, False) for root in reversed([*roots])]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded or node in stops:
            done.add(node)
            yield node
        else:
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in done)
