"""Record how a forward pass computes weights from parameters, so that they can be computed again.

Operations are seen where torch dispatches them: also those that autograd does not show, such as a rounding whose
gradient goes straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from mlu_lightning.utilities.names import planned_parameters


@dataclass(frozen=True, eq=False)
class _Leaf:
    value: Tensor
    parameter: str | None = None


@dataclass(frozen=True, eq=False)
class _Step:
    index: int
    function: Any
    args: Any
    kwargs: Any
    parameters: frozenset[str]

    def run(self, value_of: Callable[[Any], Any]) -> list[Any]:
        args, kwargs = tree_map(value_of, (self.args, self.kwargs))
        if self.function._schema.is_mutable:
            args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        return tree_leaves(self.function(*args, **kwargs))


@dataclass(frozen=True, eq=False)
class Program:
    """A tensor that is computed from parameters, buffers and constants alone."""

    step: _Step
    output: int

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters that it is computed from."""
        return self.step.parameters

    @property
    def operations(self) -> tuple[str, ...]:
        """What torch calls its operations, in order."""
        names = (step.function._schema.name.rpartition("::")[2].strip("_") for step in self._steps())
        return tuple(dict.fromkeys(names))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Parameters, buffers and constants that it begins with."""
        return tuple(leaf.value for leaf in self._leaves())

    @property
    def values(self) -> dict[str, Tensor]:
        """Values of its parameters as they were built."""
        return {leaf.parameter: leaf.value for leaf in self._leaves() if leaf.parameter is not None}

    def run(self, values: Mapping[str, Tensor]) -> Tensor:
        """Compute it from other values of parameters, with the same random numbers every time."""
        results: dict[_Step, list[Any]] = {}

        def value_of(part: Any) -> Any:
            if isinstance(part, Program):
                return results[part.step][part.output]
            if isinstance(part, _Leaf):
                return part.value if part.parameter is None else values.get(part.parameter, part.value)
            return part

        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for step in self._steps():
                results[step] = step.run(value_of)
        found = results[self.step][self.output]
        assert isinstance(found, Tensor)
        return found

    def _leaves(self) -> list[_Leaf]:
        parts = (part for step in self._steps() for part in tree_leaves((step.args, step.kwargs)))
        return [part for part in parts if isinstance(part, _Leaf)]

    def _steps(self) -> list[_Step]:
        steps, stack = {self.step}, [self.step]
        while stack:
            step = stack.pop()
            parts = {part.step for part in tree_leaves((step.args, step.kwargs)) if isinstance(part, Program)} - steps
            steps |= parts
            stack += parts
        return sorted(steps, key=lambda step: step.index)


class ProgramRecorder(TorchDispatchMode):
    """Records the programs of weights in a forward pass of a module's ``twin``, with the values of the module itself."""

    def __init__(self, twin: nn.Module, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.programs: dict[tuple[Node, int], Program] = {}
        self._known: Any = WeakTensorKeyDictionary()  # None for data
        self._steps = 0
        copies = planned_parameters(twin)
        for name, parameter in planned_parameters(module).items():
            self._known[copies[name]] = _Leaf(parameter.detach(), name)
        for copied, buffer in zip(twin.buffers(), module.buffers(), strict=True):
            self._known[copied] = _Leaf(buffer)

    def add_data(self, data: Any) -> None:
        """Take tensors for data."""
        for leaf in tree_leaves(data):
            if isinstance(leaf, Tensor):
                self._known[leaf] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if torch._C._current_autograd_node() is not None:  # gradients that a step asks for
            return func(*args, **given)
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        parts = [self._part(tensor) for tensor in tensors]
        with torch._C.DisableTorchFunction():  # or modes that watch functions see attributes
            for tensor, part in zip(tensors, parts, strict=True):
                if isinstance(part, Program) and part.parameters and tensor.grad_fn is not None:
                    self.programs.setdefault((tensor.grad_fn, tensor.output_nr), part)
        step = None
        if None not in parts:
            known = tree_map(lambda x: self._part(x) if isinstance(x, Tensor) else x, (args, given))
            self._steps += 1
            step = _Step(self._steps, func, known[0], known[1], frozenset[str]().union(*map(_parameters, parts)))
        result = func(*args, **given)
        for output, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._known[leaf] = None if step is None else Program(step, output)
                if func._schema.is_mutable and leaf._base is not None:
                    self._known[leaf._base] = None  # a part of it was changed in place
        return result

    def _part(self, tensor: Tensor) -> Program | _Leaf | None:
        if tensor in self._known:
            found: Program | _Leaf | None = self._known[tensor]
            return found
        return None if isinstance(tensor, FakeTensor) else _Leaf(tensor)


def _parameters(part: Program | _Leaf | None) -> Iterable[str]:
    if isinstance(part, Program):
        return part.parameters
    return () if part is None or part.parameter is None else (part.parameter,)
