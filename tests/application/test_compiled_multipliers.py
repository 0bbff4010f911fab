"""Multipliers of modules that torch.compile has made code of, before or after."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.multiplied_networks import CASES, EXACT, MODES, made
from torch import Tensor, nn

from mlu_lightning import attach_multipliers
from mlu_lightning.application import residual_state

pytestmark = pytest.mark.usefixtures("fresh_compiler")
COMPILED = {"backend": "eager", "fullgraph": True}


def compiled_in_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    module.compile(**COMPILED)
    return module


COMPILERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "wrapper": lambda module: torch.compile(module, **COMPILED),
    "in place": compiled_in_place,
    "function": lambda module: torch.compile(lambda tokens: module(tokens), **COMPILED),
}


@pytest.mark.parametrize("how", COMPILERS)
@pytest.mark.parametrize("name", ["tensor", "tuple", "model output", "tied readout"])
def test_compiled_after_attaching(name: str, how: str) -> None:
    module, plan, tokens = made(name)
    expected = CASES[name].by_hand(copy.deepcopy(module), tokens)
    attach_multipliers(module, plan)
    torch.testing.assert_close(COMPILERS[how](module)(tokens), expected, **EXACT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", COMPILERS)
def test_attached_and_removed_after_the_first_compiled_call(how: str, mode: str) -> None:
    module, plan, tokens = made("tied readout")
    expected = CASES["tied readout"].by_hand(copy.deepcopy(module), tokens)
    call = COMPILERS[how](module)
    plain = call(tokens)
    handle = MODES[mode](call if isinstance(call, nn.Module) else module, plan)
    torch.testing.assert_close(call(tokens), expected, **EXACT)
    assert residual_state(module) == residual_state(call if isinstance(call, nn.Module) else module) is not None
    if mode == "hook":
        handle.remove()
        assert torch.equal(call(tokens), plain)
