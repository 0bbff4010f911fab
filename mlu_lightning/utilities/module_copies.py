"""Copies of modules that run beside the original: their parameters have shapes but no memory, or share the original's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["copied_module", "fake_tensor"]


def copied_module(module: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """Copy a module with parameters that are fake, or share memory with the originals, and all require a gradient."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        stand_in = parameter.detach() if fake is None else fake_tensor(parameter, fake)
        memo[id(parameter)] = nn.Parameter(stand_in, requires_grad=parameter.is_floating_point())
    if fake is not None:
        for buffer in module.buffers():
            memo[id(buffer)] = fake_tensor(buffer, fake)
    try:
        twin = copy.deepcopy(module, memo).train()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied ({error}), and planning runs a copy, so that the module itself "
            "stays as it is. Plan it before it holds open files, locks or results of a forward pass, or keep these "
            "outside of the module."
        ) from error
    for original, copied in zip(module.modules(), twin.modules(), strict=True):
        # the Trainer is shared, not copied: it holds the data, the loggers and the module itself
        trainer = vars(original).get("_trainer")
        if trainer is not None:
            vars(copied)["_trainer"] = trainer
        # compiled methods are kept on the instance, are the original's, and would run that
        compiled = ["_compiled_call_impl"]
        if vars(original).get("_compiler_ctx") is not None:
            compiled += ["forward", "training_step", "validation_step", "test_step", "predict_step"]
        for name in compiled:
            vars(copied).pop(name, None)
    return twin


def fake_tensor(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    """Make a tensor of the same shape without memory."""
    with fake:
        device = "cpu" if tensor.is_meta else tensor.device
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
