"""Measure how much of a parameter weight decay takes away in one step, which is undone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlu_lightning.checking.local_effects import rms


def shrinkage(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Measure the part of every parameter that weight decay takes away in the next step.

    A step without gradients is made with and without weight decay, and undone. The difference is lr · λ for decoupled
    decay and SGD; for Adam's L2 decay it is what decay adds to the update. Parameters that do not decay are left out.
    """
    with_decay = _stepped(optimizers, parameters)
    with _without_decay(optimizers):
        without = _stepped(optimizers, parameters)
    found = {}
    for name, parameter in parameters.items():
        taken, size = rms(with_decay[name] - without[name]), rms(parameter)
        if taken > 0 and size > 0:
            found[name] = taken / size
    return found


@contextmanager
def restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give parameters their values back afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _stepped(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Values after a step without gradients, which is taken back."""
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    states = [{key: _copied(state) for key, state in optimizer.state.items()} for optimizer in optimizers]
    settings = [[copy.deepcopy(_settings(group)) for group in optimizer.param_groups] for optimizer in optimizers]
    with restored(parameters):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()
        after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    for optimizer, state, groups in zip(optimizers, states, settings, strict=True):
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before_step in zip(optimizer.param_groups, groups, strict=True):
            for key in _settings(group).keys() - before_step.keys():
                del group[key]
            group.update(before_step)  # some optimizers count their steps there
    return after


def _copied(state: Any) -> Any:
    """Copy the state of a parameter; of tensors, deepcopy would be several times as slow."""
    if not isinstance(state, dict):
        return copy.deepcopy(state)
    return {key: value.clone() if type(value) is Tensor else copy.deepcopy(value) for key, value in state.items()}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


@contextmanager
def _without_decay(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if "weight_decay" in group]
    decays = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0 * group["weight_decay"]
    try:
        yield
    finally:
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
