"""One forward pass of a copy of a module, to look at its autograd graph without touching the module itself.

The copy's parameters are fake tensors, without memory, so that a model of any size takes seconds. Where a forward pass
needs values (data-dependent control flow) it is repeated with real ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mlu_lightning.discovery.decisions import run_most
from mlu_lightning.discovery.weight_programs import Program, ProgramRecorder
from mlu_lightning.utilities.autograd_nodes import nodes_below
from mlu_lightning.utilities.custom_functions import seen_through
from mlu_lightning.utilities.fake_mode import RememberingFakeMode
from mlu_lightning.utilities.function_calls import CallPlace, tensors_in, watched
from mlu_lightning.utilities.lightning_private import configured_optimizers
from mlu_lightning.utilities.lightning_steps import call_module, call_step, is_lightning_module, mute, run_start_hooks
from mlu_lightning.utilities.module_copies import copied_batch, copied_module, fake_tensor
from mlu_lightning.utilities.names import listed, planned_modules, planned_parameters
from mlu_lightning.utilities.user_errors import UserErrors
from mlu_lightning.utilities.written_out import WrittenOut


@dataclass(frozen=True)
class TracedTensor:
    """A tensor with a gradient that a submodule or a function was given or returned."""

    # number among all that were given, or a function returned; position in what a submodule returned, None if that is it
    index: int | None
    node: Node
    output: int  # number among those of the node


@dataclass(frozen=True)
class ModuleCall:
    """One call of a submodule."""

    module: str
    inputs: tuple[TracedTensor, ...]  # as the caller gave them, before any hook
    outputs: tuple[TracedTensor, ...]  # as the caller got them, after all hooks
    begin: int  # counted in calls and returns of all submodules
    end: int


@dataclass(frozen=True)
class FunctionCall:
    """A call of a torch function in the first call of a submodule."""

    place: CallPlace
    inputs: tuple[TracedTensor, ...]
    outputs: tuple[TracedTensor, ...]  # those of an attention have no node yet
    sequence: int  # of the last graph node when it was called, which is an attention's own


@dataclass(frozen=True)
class Trace:
    """What one forward pass left behind."""

    roots: tuple[Node, ...]  # of the losses, or of all outputs of a plain module
    parameters: dict[int, str]  # names by identity
    calls: tuple[ModuleCall, ...]  # in order of completion
    functions: tuple[FunctionCall, ...]
    copy: nn.Module  # keeps the graph's parameters alive
    programs: dict[tuple[Node, int], Program]  # of weights, by node and number of its output, if they were asked for
    constants: frozenset[Node]  # additions of tensors that need no gradient, which autograd shows as those of numbers


def trace_module(module: nn.Module, example: Any, programs: bool = False) -> Trace:
    """Run a copy of a module once, in training mode, and keep its autograd graph; the module itself stays as it is.

    With ``programs``, it keeps those of weights, too.
    """
    step = is_lightning_module(module) and example is not None
    if example is None:
        example = getattr(module, "example_input_array", None)
    if example is None:
        raise ValueError(
            f"To plan {type(module).__name__} one forward pass has to be run, and there is no example to run it on. Give "
            "example=... (a batch as training_step takes it, for a LightningModule; the arguments of forward for any "
            "other module), or set example_input_array on the LightningModule."
        )
    _refuse_lazy(module)
    name = "training_step" if step else "forward"
    what = f"While planning, {name} of {type(module).__name__} was run on a copy of the module"
    with isolate_rng(), UserErrors(what, _ADVICE):
        try:
            return run_most(lambda: _run_with_or_without_values(module, example, step, programs), _size)
        except AttributeError:
            if not step:
                raise
            # hooks that Lightning calls before the first step may make what is missing
            return run_most(lambda: _run_with_or_without_values(module, example, step, programs, True), _size)


_LATER = (1, 2, 3, 4, 9)
"""Numbers of batches for which a step may do something else: in turns, or every third, fifth or tenth time."""
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_ADVICE = (
    "Where it only fails there, give MLUCallback or Plan.from_model what it needs: example=..., a batch as training_step "
    "takes it or the arguments of forward; or give MLUCallback plan=..., a plan of the module made where it works."
)


def _refuse_lazy(module: nn.Module) -> None:
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"Parameters of {type(module).__name__} have no shape yet: {listed(lazy)}. They are those of lazy modules, "
            "which get one in their first forward pass. Run one in the module and in its base before they are planned, for "
            "example with torch.no_grad() at the end of __init__ or in setup."
        )


def _size(trace: Trace) -> tuple[int, int]:
    """How many parameters took part in a forward pass, and how many operations."""
    nodes = [*nodes_below(trace.roots)]
    return len(_reached(nodes, trace.parameters)), len(nodes)


def _run_with_or_without_values(
    module: nn.Module, example: Any, step: bool, programs: bool, start_hooks: bool = False
) -> Trace:
    try:
        return _run(module, example, step, programs, start_hooks, RememberingFakeMode())
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        # a pass that depends on values, which fake tensors do not have, fails in any of these ways; what is wrong
        # for another reason fails with real values below too, and that error is the user's
        if any(parameter.is_meta for parameter in module.parameters()):
            raise RuntimeError(
                f"A forward pass of {type(module).__name__} without values failed ({error}), and its parameters "
                "are on the meta device, where they have none. Build the module on a real device to plan it."
            ) from error
    return _run(module, example, step, programs, start_hooks, None)


def _run(
    module: nn.Module, example: Any, step: bool, programs: bool, start_hooks: bool, fake: FakeTensorMode | None
) -> Trace:
    twin = copied_module(module, fake)
    recorder = ProgramRecorder(twin, module) if programs else None
    calls: list[ModuleCall] = []
    functions: list[FunctionCall] = []
    losses: list[Tensor] = []
    names = {id(parameter): name for name, parameter in planned_parameters(twin).items()}
    dtypes = {parameter.dtype for parameter in twin.parameters() if parameter.is_floating_point()}
    # a module that was built in the precision of the Trainer and its base, built before, share an example
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    clock = count()
    for name, submodule in planned_modules(twin):
        _record_calls(submodule, name, calls, clock)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if fake is not None:
            # what fails without values is tried again with them, and then speaks for itself
            logger = logging.getLogger("torch._subclasses.fake_tensor")
            stack.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
            stack.enter_context(fake)
        stack.enter_context(seen_through())

        def batch() -> Any:
            return copied_batch(example, lambda tensor: _as_data(tensor, fake, dtype))

        first = batch()
        if step:
            for submodule in filter(is_lightning_module, twin.modules()):
                _mute(submodule, losses)
        if start_hooks:
            run_start_hooks(twin, first)
        if recorder is not None:
            recorder.add_data(first)
            stack.enter_context(recorder)
        stack.enter_context(WrittenOut())
        stack.enter_context(watched(twin, partial(_note, functions)))
        stack.enter_context(watch := _InnerGradients(losses, {*names}))
        losses.extend(tensors_in(_train(twin, first, 0) if step else call_module(twin, first)))
        learned = {name for name, parameter in planned_parameters(module).items() if parameter.requires_grad}
        for number in _LATER if step else ():
            missing = learned - _reached(nodes_below(_roots(losses)), names)
            if not missing:
                break
            kept = len(losses), len(calls), len(functions)
            with suppress(*_FAILURES) if fake is None else nullcontext():
                losses.extend(tensors_in(_train(twin, batch(), number)))
            if missing == learned - _reached(nodes_below(_roots(losses)), names):
                for found, length in zip((losses, calls, functions), kept, strict=True):
                    del found[length:]  # type: ignore[attr-defined]  # lists of different things
    roots = _roots(losses)
    if not roots:
        raise RuntimeError(
            f"{type(module).__name__} gave nothing that depends on its parameters for the example, so there is no "
            "graph to look at. Give example=..., for which it returns a loss or an output, or plan=..., a saved plan."
        )
    of_weights = recorder.programs if recorder else {}
    return Trace(roots, names, tuple(calls), tuple(functions), twin, of_weights, frozenset(watch.constants))


def _roots(losses: list[Tensor]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(loss.grad_fn for loss in losses if loss.grad_fn is not None))


def _reached(nodes: Iterable[Node], names: Mapping[int, str]) -> set[str]:
    """Parameters among the nodes of a graph."""
    leaves = (id(getattr(node, "variable", None)) for node in nodes if not node.next_functions)
    return {names[leaf] for leaf in leaves if leaf in names}


def _as_data(tensor: Tensor, fake: FakeTensorMode | None, dtype: torch.dtype | None) -> Tensor:
    """Stand-in of an example's tensor; floating ones require a gradient, so that the graph shows where data enters."""
    stand_in = tensor.detach() if fake is None else fake_tensor(tensor, fake)
    return stand_in.to(dtype).requires_grad_().clone() if stand_in.is_floating_point() else stand_in


class _InnerGradients(TorchFunctionMode):
    """Shows gradients that a step takes, as of its inputs, as data, and what they are of as losses.

    Otherwise operations of the backward pass, which use every weight a second time, would be in the graph of the loss.
    Notes additions of constant tensors, too.
    """

    def __init__(self, losses: list[Tensor], parameters: set[int]) -> None:
        super().__init__()
        self.losses, self.parameters = losses, parameters
        self.constants: set[Node] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        # torch's types have a bool here, and it is a descriptor
        if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__) and not args[0].is_leaf:  # type: ignore[attr-defined]
            args[0].retain_grad()  # torch allows it on the batch, and its stand-in requires a gradient already
            return args[0]
        if func in _ADDITIONS:
            total = func(*args, **given)
            if any(isinstance(one, Tensor) and one.numel() > 1 and not one.requires_grad for one in args):
                self.constants.update([] if total.grad_fn is None else [total.grad_fn])
            return total
        if func not in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            return func(*args, **given)
        self.losses += tensors_in(args[0] if args else next(iter(given.values())))
        differentiable = given.pop("create_graph", False)
        if func is torch.autograd.grad and not given.get("allow_unused"):
            # what first gradients, which are data here, came from is not in the graph of second ones
            given |= {"allow_unused": True, "materialize_grads": True}
        gradients = func(*args, **{**given, "retain_graph": True})
        if func is not torch.autograd.grad:
            return gradients
        of = tree_leaves(args[1] if len(args) > 1 else given["inputs"])
        return tuple(self._as_new(*pair, differentiable) for pair in zip(gradients, of, strict=True))

    def _as_new(self, gradient: Tensor | None, of: Tensor, differentiable: bool) -> Tensor | None:
        """A gradient as data of its own; that of a weight, with which weights may be computed, as zeros."""
        nodes = () if of.grad_fn is None else nodes_below([of.grad_fn])
        leaves = [id(getattr(node, "variable", None)) for node in nodes if not node.next_functions] or [id(of)]
        if self.parameters.issuperset(leaves):
            return torch.zeros_like(of)
        return gradient.detach().requires_grad_().clone() if differentiable and gradient is not None else gradient


_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


def _record_calls(submodule: nn.Module, name: str, calls: list[ModuleCall], clock: Iterator[int]) -> None:
    """Note which graph nodes go into a submodule and come out of it."""
    begun: list[tuple[int, tuple[TracedTensor, ...]]] = []  # more than one while the module calls itself

    def given(module: nn.Module, *args_and_kwargs: Any) -> None:
        begun.append((next(clock), _traced(enumerate(tensors_in(args_and_kwargs)))))

    def returned(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts: Iterable[tuple[int | None, Any]] = [(None, output)]
        if isinstance(output, (Mapping, tuple, list)):
            parts = enumerate(output.values() if isinstance(output, Mapping) else output)
        begin, inputs = begun.pop()
        calls.append(ModuleCall(name, inputs, _traced(parts), begin, next(clock)))

    submodule.register_forward_pre_hook(given, prepend=True, with_kwargs=True)
    submodule.register_forward_hook(returned)


def _traced(parts: Iterable[tuple[int | None, Any]]) -> tuple[TracedTensor, ...]:
    tensors = [(index, part) for index, part in parts if isinstance(part, Tensor)]
    with torch._C.DisableTorchFunction():  # or every attribute goes through all modes that watch functions
        nodes = [part.grad_fn for _, part in tensors]
        return tuple(
            TracedTensor(index, node, part.output_nr)
            for (index, part), node in zip(tensors, nodes, strict=True)
            if node is not None
        )


def _note(
    functions: list[FunctionCall], place: CallPlace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], None]:
    """Note which graph nodes go into a function, which may change tensors in place, and then what comes out of it."""
    inputs = _traced(enumerate(tensors_in((args, kwargs))))
    sequence = torch._C._autograd._get_sequence_nr() - 1

    def returned(output: Any) -> None:
        functions.append(FunctionCall(place, inputs, _traced(enumerate(tensors_in(output))), sequence))

    return returned


def _train(module: Any, batch: Any, number: int) -> Any:
    output = call_step(module, "training_step", batch, number)
    return output.get("loss") if isinstance(output, Mapping) else output


def _mute(module: Any, losses: list[Tensor]) -> None:
    """Mute a copied LightningModule, with optimizers of its own; losses of manual optimization are kept."""

    configured = cache(lambda: configured_optimizers(module.configure_optimizers()))

    def schedulers() -> list[Any]:
        return [found["scheduler"] if isinstance(found, dict) else found for found in configured()[1]]

    mute(module, losses, lambda: configured()[0], schedulers, gradients=True)
