"""Shadow groups: the parameter groups that an optimizer sees in place of the user's while it makes a step.

A *shadow* of a group has some of its parameters, and its numbers times their factors. It takes over what the user changes
in the group; what the optimizer changes goes to the group, while the shadow goes on with its own value.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlu_lightning.application.optimizer_rules import Factor, Group, UpdateRule, divided, multiplied


@dataclass
class Shadow:
    """What the optimizer sees of one of the user's groups."""

    group: Group  # kept between steps
    factors: dict[str, Factor]
    seen: Group = field(default_factory=dict)  # the user's other values when they were last taken over
    given: Group = field(default_factory=dict)  # the group's values at the beginning of the update

    def fill(self, user: Group) -> None:
        """Take over what has changed in the user's group, and its learning rate, eps and decay times the factors."""
        for key, value in user.items():
            if key in _MEMBERS:
                continue
            if key in self.factors or key in _NUMBERS:
                self.group[key] = multiplied(value, self.factors.get(key, 1.0))
            elif self.seen.get(key, _UNSEEN) is not value:
                self.group[key] = self.seen[key] = value


@dataclass(frozen=True)
class Split:
    """One of the user's groups and its shadows."""

    user: Group
    members: list[Tensor]  # its parameters
    shadows: list[Shadow]
    rule: UpdateRule
    taken: Group = field(
        default_factory=dict
    )  # the user's values that the shadows have, as long as no step changes them

    def is_of(self, group: Group) -> bool:
        """Whether this is the split of the group, with the parameters that it has now."""
        return self.user is group and _are(self.members, group["params"])

    def groups_of_step(self, optimizer: Optimizer) -> list[Group]:
        """Groups of the step that begins: the user's own if all factors are 1."""
        if not any(shadow.factors for shadow in self.shadows):
            return [self.user]
        if self.taken.keys() == self.user.keys() and _are(self.taken.values(), self.user.values()):
            return [shadow.group for shadow in self.shadows]
        self.taken.clear()
        for shadow in self.shadows:
            shadow.fill(self.user)
            if self.rule.at_step is not None:
                states = (optimizer.state.get(parameter, {}) for parameter in shadow.group["params"])
                step = 1 + next((int(state["step"]) for state in states if "step" in state), 0)
                self.rule.at_step(self.user, shadow.group, shadow.factors, step)
            shadow.given = {**shadow.group}
            shadow.group = {**shadow.group}
        # others may be changed where they are
        fixed = all(isinstance(value, _FIXED) for key, value in self.user.items() if key not in _MEMBERS)
        if fixed and self.rule.at_step is None:
            self.taken.update(self.user)
        return [shadow.group for shadow in self.shadows]

    def own(self) -> list[dict[str, tuple[Any, Any]]]:
        """For each shadow the values that differ from the user's, after these, as in schedule-free optimizers."""
        # what the user, or a scheduler, has changed since is taken over in the next step
        return [
            {
                key: (self.user[key], value)
                for key, value in shadow.group.items()
                if key in shadow.seen.keys() - shadow.factors.keys() - {*_NUMBERS}
                and self.user.get(key, _UNSEEN) is shadow.seen[key]
                and _differ(value, shadow.seen[key])
            }
            for shadow in self.shadows
        ]

    def load_own(self, own: list[dict[str, tuple[Any, Any]]]) -> None:
        """Let shadows go on with values of :meth:`own`, unless it had others or the user's have changed since."""
        changed = any(_differ(self.user.get(key), user) for values in own for key, (user, _) in values.items())
        if changed or len(own) != len(self.shadows):
            return
        for shadow, values in zip(self.shadows, own, strict=True):
            for key, (_, value) in values.items():
                shadow.seen[key] = self.user[key]
                shadow.group[key] = value

    def give_back(self) -> None:
        """Hand what the optimizer has changed in the shadows to the user's group."""
        changed: Group = {}
        for shadow in self.shadows:
            if _are(shadow.group.values(), shadow.given.values()):
                continue
            for key, value in shadow.group.items():
                if key not in changed and value is not shadow.given.get(key, _UNSEEN) and key not in _MEMBERS:
                    changed[key] = divided(value, shadow.factors.get(key, 1.0))
        if changed:
            self.taken.clear()
        self.user.update(changed)
        for shadow in self.shadows:
            shadow.seen.update(changed)  # each goes on with its own value until the user changes it


_MEMBERS = ("params", "param_names")
_NUMBERS = ("lr", "eps", "weight_decay")
_FIXED = (int, float, str, tuple, type(None))
_UNSEEN = object()


def _are(values: Collection[Any], others: Collection[Any]) -> bool:
    """Whether these are the same objects, in the same order."""
    return len(values) == len(others) and all(map(operator.is_, values, others))


def _differ(value: Any, other: Any) -> bool:
    return bool(torch.as_tensor(value != other).any())
