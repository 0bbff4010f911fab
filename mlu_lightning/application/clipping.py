"""Context managers that let code clip or read the gradients and weights of a folded module as if nothing were folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from mlu_lightning.application.applied import folded_parameters, residual_state
from mlu_lightning.application.plan_names import plan_names
from mlu_lightning.application.transaction import Step, Steps, as_a_whole, multiplication, settle
from mlu_lightning.planning import Plan
from mlu_lightning.utilities.names import original_module

EDITS = "_mlu_edits"
"""Where a module counts how often its weights or gradients were unfolded, while somebody wants to know."""


@contextmanager
def unfolded_gradients(module: nn.Module, plan: Plan) -> Iterator[None]:
    """Let gradients be those of the weights without the multipliers that are folded into them, inside of the context.

    Where a multiplier a was folded into a weight, its gradient is 1/a times that of the weight without it (theory.md,
    section 3). Optimizers are scaled for that, but clipping is not linear: in this context a loop of one's own clips the
    same after :func:`mlu_lightning.fold` as after :func:`mlu_lightning.attach_multipliers`, as Lightning does with
    :class:`~mlu_lightning.MLUCallback`. At the end gradients, also others that were put in their place, are those of the
    stored weights again. A module whose multipliers are attached is left as it is.

    Args:
        module: module that has the plan's multipliers, or torch.compile's wrapper of it.
        plan: its plan.

    Raises:
        ValueError: if the plan's multipliers are not in the module.

    >>> from mlu_lightning import Role, fold
    >>> from mlu_lightning.planning import Multiplier, ParameterPlan
    >>> weight = ParameterPlan(Role.BRANCH_OUT, (1, 1), fans=(1, 1), base_fans=(1, 1), depth=4)
    >>> plan = Plan({"weight": weight}, (), (), (Multiplier("mlp", "branch", 0.25, None, ("weight",)),))
    >>> module = fold(nn.Linear(1, 1, bias=False), plan)
    >>> module.weight.grad = torch.tensor([[4.0]])
    >>> with unfolded_gradients(module, plan):
    ...     norm = nn.utils.clip_grad_norm_(module.parameters(), 2.0)
    >>> norm.item(), module.weight.grad.item()
    (1.0, 4.0)
    """
    factors = _factors(module, plan, "gradients")
    before = {parameter: parameter.grad for parameter in factors}
    unfolding = [multiplication(grad, factors[p]) for p, grad in before.items() if grad is not None]

    def fold_again(parameter: nn.Parameter, factor: float) -> Callable[[], object]:
        gradient = parameter.grad
        if gradient is None:
            return lambda: None
        if gradient is before[parameter]:
            return partial(gradient.copy_, gradient / factor)
        return partial(setattr, parameter, "grad", gradient / factor)  # theirs may be kept by whoever put it there

    folding = [partial(fold_again, parameter, factor) for parameter, factor in factors.items()]
    with _unfolded(module, "gradients", unfolding, folding):
        yield


@contextmanager
def unfolded_weights(module: nn.Module, plan: Plan) -> Iterator[None]:
    """Let weights be those without the multipliers that are folded into them, inside of the context.

    What reads or limits weights does the same then after :func:`mlu_lightning.fold` as after
    :func:`mlu_lightning.attach_multipliers`: adaptive gradient clipping (in :func:`unfolded_gradients` too), max-norm
    constraints, pruning by size, histograms. At the end weights hold their multipliers again: what was not changed is what
    it was, bit for bit, and what was is multiplied. Inside, the module is another function, and no loss may be made.

    Args:
        module: module that has the plan's multipliers, or torch.compile's wrapper of it.
        plan: its plan.

    Raises:
        ValueError: if the plan's multipliers are not in the module.

    >>> from mlu_lightning import Role, fold
    >>> from mlu_lightning.planning import Multiplier, ParameterPlan
    >>> weight = ParameterPlan(Role.BRANCH_OUT, (1, 1), fans=(1, 1), base_fans=(1, 1), depth=4)
    >>> plan = Plan({"weight": weight}, (), (), (Multiplier("mlp", "branch", 0.25, None, ("weight",)),))
    >>> module = fold(nn.Linear(1, 1, bias=False), plan)
    >>> with unfolded_weights(module, plan), torch.no_grad():
    ...     limited = module.weight.fill_(8.0).clamp_(max=2.0)
    >>> module.weight.item()
    0.5
    """
    factors = _factors(module, plan, "weights")
    stored: dict[nn.Parameter, Tensor] = {}
    unfolded: dict[nn.Parameter, Tensor] = {}

    def unfold(parameter: nn.Parameter, factor: float) -> Callable[[], object]:
        stored[parameter], unfolded[parameter] = parameter.clone(), parameter / factor
        return partial(parameter.copy_, unfolded[parameter])

    def fold_again(parameter: nn.Parameter, factor: float) -> Callable[[], object]:
        same = parameter == unfolded[parameter]
        return partial(parameter.copy_, torch.where(same, stored[parameter], parameter * factor))

    unfolding, folding = ([partial(each, *item) for item in factors.items()] for each in (unfold, fold_again))
    with _unfolded(module, "weights", unfolding, folding):
        yield


@contextmanager
def _unfolded(module: nn.Module, what: str, unfolding: Sequence[Step], folding: Sequence[Step]) -> Iterator[None]:
    steps = Steps([*unfolding, *folding])
    if EDITS in vars(original_module(module)):
        vars(original_module(module))[EDITS] += 1
    with as_a_whole(original_module(module), what, steps.run):
        steps.run(until=len(unfolding))
        yield
        steps.run()


def _factors(module: nn.Module, plan: Plan, what: str) -> dict[nn.Parameter, float]:
    """What is folded into each parameter of a module that has a plan's multipliers."""
    module = original_module(module)
    settle(module, what)
    applied = residual_state(module)
    fits = applied.is_of(plan) if applied is not None else not plan.forward_factors
    if not fits:
        raise ValueError(
            f"The plan's multipliers are not in the {type(module).__name__} that was given to unfolded_{what}. Give it "
            "the module that was given to fold or attach_multipliers, with the same plan: of a wrapper, as of "
            "DistributedDataParallel, what is inside."
        )
    folded, names = folded_parameters(module), plan_names(module, plan)
    return {p: plan.folded_factors[names[id(p)]] for p in module.parameters() if names[id(p)] in folded}
