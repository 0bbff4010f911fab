"""Scale an existing optimizer: during its update, and only then, it sees groups with the plan's numbers.

It keeps the user's parameter groups, so schedulers, loggers and checkpoints go on as without a plan. In the update *shadow
groups* take their place, one for each distinct set of factors (theory.md, section 3) in a group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mlu_lightning.application.applied import folded_parameters
from mlu_lightning.application.inner_optimizers import updating
from mlu_lightning.application.multipliers import check_attached, check_multiplied
from mlu_lightning.application.optimizer_rules import Factor, Family, Group, multiplied, update_rules
from mlu_lightning.application.plan_names import plan_names
from mlu_lightning.application.shadow_groups import Shadow, Split
from mlu_lightning.application.transaction import settle
from mlu_lightning.planning import Plan
from mlu_lightning.table import OptimizerFamily, Scale
from mlu_lightning.utilities.names import original_module


def scale_optimizer(
    optimizer: Optimizer | LightningOptimizer, module: nn.Module, plan: Plan, family: Family | None = None
) -> Scaled:
    """Let an optimizer update each parameter with its own multiple of learning rate, eps and weight decay.

    The factors are those of theory.md, section 3, for the stored weights: where a multiplier a was folded into a
    weight, the Adam lr is multiplied by a, eps divided by a, and so on (:meth:`mlu_lightning.Scale.folded`). Parameters
    whose factors are all 1 are updated exactly as without a plan. Hooks after a step see other groups; groups may be added
    later; ``state_dict`` goes from and to plain optimizers. A deep copy or an unpickled optimizer is plain: scale it again.

    Args:
        optimizer: optimizer of ``torch.optim`` but LBFGS, or a wrapper that leaves the update to optimizers that it holds
            (Lightning's and Fabric's, SAM, Lookahead, ``ZeroRedundancyOptimizer``), which are scaled then. Adafactor's
            weights are taken to keep the size that the plan's initialization gives them.
        module: module with the optimizer's parameters, and with the plan's multipliers.
        plan: its plan.
        family: column of the table (``"sgd"``, ``"adam"``, ``"adamw"`` or ``"muon"``) for an optimizer that
            ``torch.optim`` does not define; a list with one for each group where they differ and none is added later.

    Raises:
        TypeError: if the optimizer's class cannot be scaled or is not known.
        ValueError: if a parameter is not the module's, if the plan or its multipliers are not those of the module, or if
            a group cannot be scaled. The optimizer was not changed then.

    >>> import torch
    >>> from mlu_lightning import Role
    >>> from mlu_lightning.planning import ParameterPlan
    >>> module = nn.Linear(1, 1, bias=False)
    >>> wide = ParameterPlan(Role.STREAM_MATRIX, (1, 1), fans=(4, 1), base_fans=(1, 1))
    >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    >>> handle = scale_optimizer(optimizer, module, Plan({"weight": wide}, (), (), ()))
    >>> before = module.weight.item()
    >>> module.weight.grad = torch.ones(1, 1)
    >>> optimizer.step()
    >>> round(before - module.weight.item(), 6), optimizer.param_groups[0]["lr"]
    (0.125, 0.5)
    >>> handle.remove()
    """
    scaled = prepared(optimizer, module, plan, family)
    try:
        scaled.start()
        return scaled
    except BaseException:
        scaled.remove()
        raise


def prepared(
    optimizer: Optimizer | LightningOptimizer, module: nn.Module, plan: Plan, family: Family | None = None
) -> Scaled:
    """Make the handle of an optimizer that is not scaled yet, nor changed."""
    module = original_module(module)
    settle(module)
    optimizers = updating(optimizer)
    for each in optimizers:
        _check_optimizer(each, family)
    check_multiplied(module, plan)
    return Scaled(tuple(ScaledOptimizer(each, module, plan, family) for each in optimizers))


def is_scaled(optimizer: Optimizer | LightningOptimizer) -> bool:
    """Tell whether an optimizer, or those that a wrapper holds, update parameters with the numbers of a plan."""
    # asked at every step, and those in others are found by their parameters
    is_itself = isinstance(optimizer, Optimizer) and scaled_by(optimizer) is not None
    return is_itself or all(scaled_by(each) is not None for each in updating(optimizer))


def scaled_by(optimizer: Optimizer) -> ScaledOptimizer | None:
    """Handle of an optimizer that is scaled itself."""
    scaled = getattr(optimizer.step, _MARK, None)
    return scaled if isinstance(scaled, ScaledOptimizer) and scaled.active else None


@dataclass(frozen=True)
class Scaled:
    """Handle of an optimizer that :func:`scale_optimizer` has scaled, or of those in it."""

    parts: tuple[ScaledOptimizer, ...]

    @property
    def families(self) -> dict[str, OptimizerFamily]:
        """Column of the table that is used for every parameter of the optimizer, by name."""
        return {name: family for part in self.parts for name, family in part.families.items()}

    def start(self) -> None:
        """Scale what is prepared."""
        for part in self.parts:
            part.start()

    def remove(self) -> None:
        """Make the optimizer plain again, with what its shadow groups have of their own in the user's."""
        for part in self.parts:
            part.remove()


class Watch(Protocol):
    """What looks at updates."""

    def before_update(self, scaled: ScaledOptimizer) -> None:
        """Look at what is about to be updated."""

    def after_update(self, scaled: ScaledOptimizer) -> None:
        """Look at what was updated."""

    def after_wrapped_update(self, parameters: Iterable[Tensor]) -> None:
        """Look at what an optimizer has made of the updates of those in it."""


class ScaledOptimizer:
    """One optimizer that sees its shadow groups while it updates parameters."""

    def __init__(self, optimizer: Optimizer, module: nn.Module, plan: Plan, family: Family | None = None) -> None:
        self.optimizer = optimizer
        self.active = False
        self.updates = False  # whether a step of it goes on
        self._module = module
        self._plan = plan
        self._family = _for_all(family)
        self._users: list[Group] | None = None  # the user's groups, while the shadows are in their place
        self._aside: list[Group] | None = None  # the shadows, while a state_dict in the update has the user's groups
        self.watch: Watch | None = None
        self.splits = [self._split(index) for index in range(len(optimizer.param_groups))]
        self._hooks: list[RemovableHandle] = []
        self._step_before = vars(optimizer).get("step")
        self._inner: list[RemovableHandle] = []  # the last hook before the update that goes on, and the first after it
        self._told = True  # whether what watches knows that the update was made
        # unless somebody has put another step in its place; schedulers wrap it
        step, own = type(optimizer).step, getattr(optimizer.step, "__func__", optimizer.step)
        self._hooked = getattr(step, "hooked", False) and inspect.unwrap(own) is inspect.unwrap(step)
        self._step = self._wrapped_step()

    def start(self) -> None:
        """Scale the updates to come, until :meth:`remove`, which also undoes a part of this."""
        self.active = True  # before what asks for it
        self._hooks.append(self.optimizer.register_state_dict_pre_hook(lambda _: self._before_saving()))
        self._hooks.append(self.optimizer.register_state_dict_post_hook(lambda _, state: self._after_saving(state)))
        self._take_own()
        vars(self.optimizer)["step"] = self._step

    @property
    def swapped(self) -> bool:
        """Whether its shadow groups are in the place of the user's."""
        return self._users is not None

    @property
    def families(self) -> dict[str, OptimizerFamily]:
        """Column of the table that is used for every parameter of the optimizer, by name."""
        names = plan_names(self._module, self._plan)
        groups = zip(update_rules(self.optimizer, self._family), self.optimizer.param_groups, strict=True)
        return {names[id(p)]: rule.family_of(group) for rule, group in groups for p in group["params"]}

    def planned(self, name: str) -> tuple[OptimizerFamily, Scale]:
        """Column of the table for one parameter, and its factors, for the weights as they are stored."""
        family = self.families[name]
        scale = self._plan.scales(family)[name]
        return family, scale.folded(family) if name in folded_parameters(self._module) else scale

    def remove(self) -> None:
        """Make the optimizer plain again, with what its shadow groups have of their own in the user's."""
        if self.active:
            self.end()
            self._save_own(self.optimizer.param_groups)
        own = vars(self.optimizer)
        # a scheduler may have wrapped the step since; what is left of it here only passes the call on
        if own.get("step") is self._step:
            if self._step_before is None:
                del own["step"]
            else:
                own["step"] = self._step_before
        for hook in self._hooks:
            hook.remove()
        self.active = False

    def _wrapped_step(self) -> MethodType:
        """Wrap the optimizer's step, as a method: schedulers wrap a method too, before or after this."""
        step = self.optimizer.step

        @functools.wraps(getattr(step, "__func__", step))
        def update(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return step(*args, **kwargs)
            try:
                try:
                    args, kwargs = self.begin(args, kwargs)
                    return step(*args, **kwargs)
                finally:
                    self.end()
            except BaseException:
                self.end()  # which may be what was interrupted
                raise

        vars(update)[_MARK] = self
        return MethodType(update, self.optimizer)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Prepare a step with these arguments: its update is scaled, its closure and the hooks before it are not."""
        self.updates = True
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._outside(kwargs["closure"])}
        if args and args[0] is not None:
            return (self._outside(args[0]), *args[1:]), kwargs
        if self._hooked:
            self._inner.append(
                self.optimizer.register_step_pre_hook(lambda *_: self._swap_in() if self.updates else None)
            )
        else:
            self._swap_in()
        return args, kwargs

    def end(self) -> None:
        """Let the optimizer have the user's groups again."""
        while self._inner:
            self._inner.pop().remove()
        self._swap_out()
        self.updates = False

    def _outside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Let a closure see the user's groups: Lightning runs forward, backward, clipping and callbacks in it."""

        def evaluate() -> Any:
            self._swap_out()
            loss = closure()
            self._swap_in()
            return loss

        return evaluate

    def _swap_in(self) -> None:
        """Put the shadow groups, with the numbers of this step, into the optimizer's list of groups."""
        if self._users is not None:
            return  # a step that calls that of its parent class
        groups = self.optimizer.param_groups
        current = [*self.splits, *[None] * len(groups)]
        # groups are added, and load_state_dict replaces them
        self.splits = [
            split if split is not None and split.is_of(group) else self._split(index)
            for index, (split, group) in enumerate(zip(current, groups, strict=False))
        ]
        self._take_own()
        if self.watch is not None:
            self.watch.before_update(self)
            self._told = False
            if self._hooked:  # hooks after it may change weights
                self._inner.append(first := self.optimizer.register_step_post_hook(lambda *_: self._updated()))
                hooks = self.optimizer._optimizer_step_post_hooks
                hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]  # torch says dict, and means OrderedDict
        shadows = [group for split in self.splits for group in split.groups_of_step(self.optimizer)]
        self._users = [*groups]
        groups[:] = shadows

    def _swap_out(self) -> None:
        if self._users is None:
            return
        self.optimizer.param_groups[:] = self._users
        self._updated()
        for split in self.splits:
            split.give_back()
        self._users = None

    def _updated(self) -> None:
        """Tell what watches that the update was made."""
        if not self._told and self.watch is not None:
            self._told = True
            self.watch.after_update(self)

    def _before_saving(self) -> None:
        """Let a state_dict have the user's groups, also in the middle of an update."""
        self._aside = None if self._users is None else [*self.optimizer.param_groups]
        self._swap_out()

    def _after_saving(self, state: dict[str, Any]) -> None:
        """Add what shadows have of their own, and let the update that was interrupted go on with them as they were."""
        self._save_own(state["param_groups"])
        if self._aside is not None:
            self._users = [*self.optimizer.param_groups]
            self.optimizer.param_groups[:] = self._aside

    def _split(self, index: int) -> Split:
        """Divide a group of the user's into shadows, one for each distinct set of factors."""
        check_attached(self._module)  # a group changes when parts of the module are exchanged
        group = self.optimizer.param_groups[index]
        rule = update_rules(self.optimizer, self._family)[index]
        family = rule.family_of(group)
        scales = self._plan.scales(family)
        folded = folded_parameters(self._module)
        names = plan_names(self._module, self._plan)
        members: dict[tuple[tuple[str, Factor], ...], list[Tensor]] = {}
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name not in scales:
                raise ValueError(_foreign(index, parameter, name))
            if self._plan.parameters[name].differs_by_row and _looks_at_gradients(family, group):
                raise ValueError(_two_rates(name, family))
            scale = scales[name].folded(family) if name in folded else scales[name]
            factors = rule.factors(group, name, self._plan, scale)
            members.setdefault(tuple(sorted(factors.items())), []).append(parameter)
        shadows = [Shadow({"params": parameters}, dict(factors)) for factors, parameters in members.items()]
        # give_back takes values from the first, and schedule-free optimizers keep the largest lr so far in their group
        shadows.sort(key=lambda shadow: multiplied(1.0, shadow.factors.get("lr", 1.0)), reverse=True)
        split = Split(group, [*group["params"]], shadows, rule)
        split.load_own(group.get(_OWN, []))
        return split

    def _take_own(self) -> None:
        """Take from groups what their shadows have now."""
        for split in self.splits:
            split.user.pop(_OWN, None)

    def _save_own(self, groups: list[Group]) -> None:
        """Keep in groups what their shadows have of their own, so that a resumed run goes on with it."""
        for split, user, group in zip(self.splits, self.optimizer.param_groups, groups, strict=False):
            own = split.own() if split.is_of(user) else []
            if any(own):
                group[_OWN] = own


def _looks_at_gradients(family: OptimizerFamily, group: Group) -> bool:
    """Whether updates, or the decay in the gradient, depend on the size of a gradient."""
    return family is OptimizerFamily.SGD or (family.has_l2_decay and bool(group.get("weight_decay")))


def _two_rates(name: str, family: OptimizerFamily) -> str:
    rate = "learning rates" if family is OptimizerFamily.SGD else "weight decays"
    return (
        f"Some rows of {name} make hidden units and others what all units share, and with this optimizer ({family}) these "
        f"have different {rate}, of which a parameter has one. Use AdamW, whose numbers are the same for all rows, or keep "
        "the number of heads or channels at the base's, or let two projections make them."
    )


_MARK = "_mlu_scaled_by"  # where a step has its handle; schedulers that wrap the step take it along
_OWN = "mlu_own"  # where a group has what its shadows have of their own


def _for_all(family: Family | None) -> Family | None:
    """Make one of a list of families that do not differ: groups that are added later have it, too."""
    several = family is not None and not isinstance(family, str)
    return family[0] if several and family and all(each == family[0] for each in family) else family


def _check_optimizer(optimizer: Optimizer, family: Family | None) -> None:
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} has not called Optimizer.__init__, so it has neither hooks nor a step that can be "
            "scaled. Call super().__init__(params, defaults) in its __init__, and keep lr, eps and weight_decay in its "
            "param_groups, where its step reads them."
        )
    update_rules(optimizer, family)  # refuses what has none
    if not isinstance(vars(optimizer).get("param_groups"), list):
        raise ValueError(
            f"The param_groups of {type(optimizer).__name__} are not a list of its own, so its update cannot be given "
            "other groups. If there are optimizers inside it, scale each of these with scale_optimizer instead."
        )
    if scaled_by(optimizer) is not None:
        raise ValueError(
            "The optimizer is scaled already; doing it again would multiply its numbers twice. Call .remove() of the "
            "handle that scale_optimizer returned first."
        )


def _foreign(index: int, parameter: Tensor, name: str | None) -> str:
    what = f"A parameter of shape {list(parameter.shape)}" if name is None else f"The parameter {name}"
    return (
        f"{what} in group {index} of the optimizer is not a parameter of the module that the plan was made for. Make "
        "the optimizer from the module's own parameters; one that updates float32 copies of them has to keep these in its "
        "state, not in its groups. Where a strategy flattens them, their learning rates cannot be told apart: use FSDP with "
        "use_orig_params=True, or ModelParallelStrategy (FSDP2), instead of use_orig_params=False or DeepSpeed ZeRO."
    )
