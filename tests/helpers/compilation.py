"""A backend of torch.compile that counts."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.fx import GraphModule


class Counting:  # counts the graphs that it is given, next to torch's own count of breaks
    def __init__(self, backend: str) -> None:
        self._compile = lookup_backend(backend)
        self._graphs = 0
        counters.clear()

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self._graphs += 1
        return self._compile(graph, inputs)

    def counts(self) -> tuple[int, Counter[str]]:
        found = self._graphs, Counter(counters["graph_break"])
        self._graphs = 0
        counters.clear()
        return found
