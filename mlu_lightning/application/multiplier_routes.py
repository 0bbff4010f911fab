"""Check that every multiplier acts in the first steps, and that no gradient reaches a weight around its multiplier."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from mlu_lightning.application.applied import folded_parameters, residual_state
from mlu_lightning.application.hooks import products, sites_seen, track
from mlu_lightning.application.plan_names import plan_names
from mlu_lightning.discovery.graph import LOOKUPS, PARTS, RESHAPES, SELECTIONS, WEIGHT_SLOTS
from mlu_lightning.planning import Multiplier, Plan
from mlu_lightning.utilities.autograd_nodes import nodes_below
from mlu_lightning.utilities.names import listed


class ActingMultipliers:
    """Multipliers that act in hooks, until each was seen."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self._module, self._plan = module, plan
        applied = residual_state(module)
        self._all = [*applied.acting] if applied is not None else []
        self._hooks = () if applied is None else applied.hooks
        self._folded = folded_parameters(module)
        self._looked = False
        of_branch: dict[str, list[str]] = {}
        for name, parameter in plan.parameters.items():
            if parameter.branch is not None:
                of_branch.setdefault(plan.branches[parameter.branch].name, []).append(name)
        self._unseen = {m: m.folds or (*of_branch.get(m.name, ()),) for m in self._all if m.folds or m.kind == "branch"}

    def track(self, on: bool = True) -> None:
        """Note what hooks multiply from now on, for :meth:`refuse_detours`, or stop to do so."""
        track(self._hooks, on)
        self._looked = False

    def forget(self) -> None:
        """Forget what was multiplied, if it was looked at: graphs may be kept over several batches."""
        if self._looked:
            self.track()

    def refuse_unseen(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Stop a run in which parameters have got gradients, by name, but their multiplier was not called."""
        if not self._unseen:
            return
        seen = sites_seen(self._hooks)
        self._unseen = {m: names for m, names in self._unseen.items() if m.site not in seen}
        for multiplier, names in self._unseen.items():
            reached = [name for name in names if (grad := gradients.get(name)) is not None and bool(grad.any())]
            if reached:
                raise ValueError(_unseen(multiplier, reached))

    def refuse_detours(self, loss: Tensor) -> None:
        """Stop a run in which a loss depends on weights around their multipliers, in some of their uses or in all."""
        self._looked = True
        multiplied, seen = products(self._hooks), sites_seen(self._hooks)
        looked_at = [m for m in self._all if m.site in multiplied and (multiplied[m.site] or m.site not in seen)]
        if not looked_at and not self._folded:
            return
        found = routes(loss, [multiplied[m.site] for m in looked_at if m.site is not None])
        names = plan_names(self._module, self._plan)
        by_name = {names[id(p)]: found[id(p)] for p in self._module.parameters() if id(p) in found}
        uses = {name: by_name[name].uses for name in self._folded if name in by_name}
        if again := [name for name, of_it in uses.items() if of_it & _MAPS and of_it - _MAPS]:
            raise ValueError(
                f"The plan has put multipliers into {listed(sorted(again))}, which the loss also depends on in another way, "
                "as with a penalty on weights, so it is not that of the same run with hooks. Let the plan be made with this "
                "loss, with base=...: such multipliers stay in hooks then."
            )
        for number, multiplier in enumerate(looked_at):
            of_inputs = multiplier.site is not None and multiplier.site.where == "input"
            found_by = {name: by_name[name] for name in multiplier.folds if name in by_name}
            places = {n: route.beside if of_inputs else route.passed for n, route in found_by.items()}
            around = [n for n, on_route in places.items() if not on_route >> number & 1]
            # a matrix that is an embedding, too, has uses without it
            tied = not multiplier.folds and multiplier.kind == "readout" and multiplier.site not in seen
            if tied and multiplier.name in by_name and by_name[multiplier.name].uses - LOOKUPS - {_COMPILED}:
                around = [multiplier.name]
            if around and multiplier.site not in seen:
                raise ValueError(_unseen(multiplier, around))
            if around:
                raise ValueError(
                    f"The multiplier of the {multiplier.kind} {multiplier.name!r} is not on all that is made of "
                    f"{listed(around)} in the first step: its hook on {multiplier.site} was called, but the loss depends on "
                    f"them around it, too. {_REMEDY}"
                )


def _unseen(multiplier: Multiplier, names: list[str]) -> str:
    return (
        f"The multiplier of the {multiplier.kind} {multiplier.name!r} was not seen in the forward pass: its "
        f"hook on {multiplier.site} was not called, but {listed(names)} got a gradient. {_REMEDY}"
    )


_REMEDY = (
    "Hooks run where a module is called, not where its forward or its weights are, or code that was traced before they were "
    'attached. Call the module, or put the multiplier into the weights: residual="fold", or fold(module, plan).'
)
_COMPILED = "CompiledFunction"
_MAPS = WEIGHT_SLOTS.keys() | LOOKUPS | RESHAPES | PARTS | SELECTIONS | {_COMPILED}


@dataclass(frozen=True)
class Route:
    """How a loss depends on a leaf: places, as bits in their order, and what autograd calls the operations that use it."""

    passed: int  # places that are on every route to it
    beside: int  # places that are before every product that it is in
    uses: frozenset[str]


def routes(loss: Tensor, places: Iterable[Iterable[Node]]) -> dict[int, Route]:
    """Find which places are on every route from a loss to a leaf, by the ``id`` of the leaf.

    A place is where one thing happens, however often. Compiled code, into which autograd does not see, counts as all
    places; a reentrant checkpoint is not in the graph.
    """
    own: dict[Node, int] = {}
    for number, nodes in enumerate(places):
        for node in nodes:
            own[node] = own.get(node, 0) | 1 << number
    if loss.grad_fn is None:
        return {}
    order = [*nodes_below([loss.grad_fn])]
    users: dict[Any, list[Node]] = {node: [] for node in order}
    before: dict[Any, int] = {}
    for node in order:
        before[node] = -1 if _name(node) == _COMPILED else own.get(node, 0)
        for operand, _ in node.next_functions:
            if operand is not None:
                before[node] |= before[operand]
                users[operand].append(node)
    passed: dict[Any, int] = {}
    found: dict[int, Route] = {}
    for node in reversed(order):
        bits = -1 if users[node] else 0
        for user in users[node]:
            bits &= -1 if _name(user) == _COMPILED else passed[user]
        passed[node] = bits | own.get(node, 0)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = Route(passed[node], _beside(node, users, before), frozenset(map(_name, users[node])))
    return found


def _beside(leaf: Node, users: Mapping[Any, list[Node]], before: Mapping[Any, int]) -> int:
    """Places before the first product with another operand on each way from a leaf to the loss; all if there is none."""
    bits, seen, rest = -1, {leaf}, [leaf]
    while rest:
        for user in users[rest.pop()]:
            if _name(user) in WEIGHT_SLOTS:
                bits &= before[user]
            elif user not in seen:
                seen.add(user)
                rest.append(user)
    return bits


def _name(node: Node) -> str:
    """What autograd calls an operation, without ``Backward`` and number."""
    return re.sub(r"(Backward)?\d*$", "", node.name())
