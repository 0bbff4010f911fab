"""What a module computes next to its base: right modules of all kinds pass, and each fault is named with its factor."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.architecture_runs import built
from helpers.architectures import ARCHITECTURES
from helpers.faulty_functions import BASE, GROWN, TOKENS, Language, Signs
from helpers.recurrences import Model, batches
from torch import nn
from torch.nn import functional

from mlu_lightning import Plan, attach_multipliers, fold, initialize
from mlu_lightning.observation.verification import deviations, verify


def planned(
    fault: str = "", shape: Any = GROWN, put: Callable[..., Any] = attach_multipliers, seen: str | None = None
) -> Any:
    """A module with a fault, and the plan of one with what was seen of it."""
    base, module = Language(BASE, fault), Language(shape, fault)
    like = fault if seen is None else seen
    plan = Plan.from_model(Language(shape, like), TOKENS, base=Language(BASE, like))
    put(initialize(module, plan), plan)
    return module, base, plan, TOKENS


def drawn_again(module: Language) -> None:
    for block in module.blocks:
        nn.init.xavier_normal_(block.write.weight)


def multiplied_again(module: Language) -> None:
    for block in module.blocks:
        block.register_forward_hook(lambda module, args, output: output / 4)


def without_hooks(module: Language) -> None:
    for part in module.modules():
        part._forward_hooks.clear()


def one_multiplied_again(module: Language) -> None:
    module.blocks[5].register_forward_hook(lambda module, args, output: output / 4)


def becomes(fault: str) -> Callable[[Language], None]:
    return lambda module: setattr(module, "fault", fault)


COMPENSATED = ["sqrt(D) on embeddings", "1/L on branches", "D^-1/2 on logits", "tied, D^-1/2 before the readout"]
# where branches read the stream as it is, a constant on it is that of what made it
COMPENSATED += ["bare, sqrt(D) on embeddings", "bare, sqrt(D) in training"]
WRITTEN = "the residual branch of blocks.*.norm.bias, blocks.*.norm.weight"


@pytest.mark.parametrize("put", [attach_multipliers, fold])
@pytest.mark.parametrize("constant", ["", "tied", *COMPENSATED])
def test_right_modules_pass_and_stay_as_they_are(put: Callable[..., Any], constant: str) -> None:
    module, base, plan, example = planned(constant, put=put)
    before = copy.deepcopy((module.state_dict(), base.state_dict()))
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(module, base, plan, example)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training and all(parameter.grad is None for parameter in module.parameters())
    for values, now in zip(before, (module.state_dict(), base.state_dict()), strict=True):
        assert all(torch.equal(value, now[name]) for name, value in values.items())


def test_what_a_pass_writes_to_parameters_is_put_back() -> None:
    module, base, plan, example = planned()
    before = copy.deepcopy(dict(module.named_parameters()))

    def write(*_: Any) -> None:
        module.head.weight.data.view(-1)[1:3].mul_(1.5)
        torch._foreach_add_([parameter.data for parameter in module.norm.parameters()], 1.0)
        module.tokens.weight.data = module.tokens.weight.data * 2

    module.register_forward_pre_hook(write)
    deviations(module, base, plan, example)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


# the factors by hand, with depth, embedding and hidden width times four: 1/l on branches times the sqrt(d/m) = 1 that random
# sums have, and 1/d times sqrt(d) on the readout
@pytest.mark.parametrize(
    ("fault", "name", "expected", "found"),
    [
        ("sqrt(D) on embeddings", "tokens.weight", 1, 2),
        ("a buffer on embeddings", "tokens.weight", 1, 2),
        ("1/L on branches", "blocks.0.write.weight", 1 / 4, 1 / 16),
        ("1/L in a kernel", "blocks.0.write.weight", 1 / 4, 1 / 16),
        (without_hooks, "blocks.0.write.weight", 1 / 4, 1),
        ("mixing without parameters", "what the residual branch of something without parameters adds", 1 / 4, 1),
        ("D^-1/2 on logits", "head.weight", 1 / 2, 1 / 4),
        ("tied, D^-1/2 before the readout", "tokens.weight", 1 / 2, 1 / 4),
        (multiplied_again, "blocks.0.write.weight", 1 / 4, 1 / 16),
        (one_multiplied_again, "blocks.5.write.weight", 1 / 4, 1 / 16),
        (becomes("applied twice"), f"how often {WRITTEN} is applied", 1, 2),
        (becomes("not added"), f"what {WRITTEN} adds", 1 / 4, 0),
        (drawn_again, "blocks.0.write.weight", 1 / 4, math.nan),
    ],
)
def test_faults_are_named_with_what_was_expected_and_found(
    fault: Any, name: str, expected: float, found: float
) -> None:
    named = fault if isinstance(fault, str) else ""
    module, base, plan, example = planned(named, seen=named[:4] if named.startswith("tied") else "")
    if not isinstance(fault, str):
        fault(module)
    found_ones = deviations(module, base, plan, example)
    certain = {each.what.partition(" (")[0].partition(" and ")[0]: each for each in found_ones}
    assert certain[name].is_certain
    assert certain[name].expected == pytest.approx(expected)
    if not math.isnan(found):
        assert certain[name].found == pytest.approx(found, rel=0.1)
    with pytest.raises(ValueError, match="does not compute what its plan says"):
        verify(module, base, plan, example)


def test_functions_of_weights_are_measured_as_they_are_used() -> None:
    """Signs do not have the sqrt(d)/m of branch_out where the hidden width alone grows by 16."""
    module, base, plan, example = planned(shape=(2, 16, 512))
    for block in (*module.blocks, *base.blocks):
        block.write.forward = lambda x, write=block.write: functional.linear(x, Signs()(write.weight), write.bias)
    worst = deviations(module, base, plan, example)[0]
    assert (worst.expected, worst.found) == (pytest.approx(1 / 4), pytest.approx(1))


def drawn(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def frozen(module: nn.Module) -> None:
    for parameter in [*module.parameters()][::3]:
        parameter.requires_grad = False


def emptied(module: nn.Module) -> None:
    for parameter in [*module.parameters()][1::3]:
        nn.init.zeros_(parameter)


@pytest.mark.parametrize("name", ["mixer", "tied llama"])
@pytest.mark.parametrize("of_base, of_module", [(drawn, None), (None, frozen), (None, emptied)])
def test_what_is_left_as_it_was_built_is_no_fault(name: str, of_base: Any, of_module: Any) -> None:
    """Zeros next to what is drawn at the base, what requires no gradient, and gains of norms that are not 1."""
    architecture = ARCHITECTURES[name]
    base, module = built(architecture, (1, 2, 16), seed=1), built(architecture, (3, 4, 32))
    if of_base is not None:
        of_base(base)
    plan = Plan.from_model(built(architecture, (3, 4, 32)), architecture.example, base=base)
    if of_module is not None:
        of_module(module)
    fold(initialize(module, plan), plan)
    assert not [str(each) for each in deviations(module, base, plan, architecture.example) if each.is_certain]


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "post-norm decoder", "basic resnet"])
def test_no_false_alarm(name: str) -> None:
    _assert_no_alarm(name, (3, 4, 32), seeds=1)


@pytest.mark.parametrize("kind", ["gru", "deltanet"])
def test_steps_of_a_recurrence_are_no_branches(kind: str) -> None:
    base, module = Model(kind, 1, 4, 8), Model(kind, 3, 8, 16)
    (batch,) = batches(1)
    plan = Plan.from_model(module, batch, base=base)
    assert not plan.warnings
    fold(initialize(module, plan), plan)
    assert not deviations(module, base, plan, batch)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 2, 16), (1, 8, 64), (2, 4, 32), (6, 4, 32), (3, 16, 128)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_false_alarm_at_five_shapes_and_twenty_seeds(name: str, shape: Any) -> None:
    _assert_no_alarm(name, shape, seeds=20)


def _assert_no_alarm(name: str, shape: Any, seeds: int) -> None:
    architecture = ARCHITECTURES[name]
    base = built(architecture, (1, 2, 16), seed=100 + shape[0])
    plan = Plan.from_model(built(architecture, shape), architecture.example, base=base)
    for seed in range(seeds):
        module = built(architecture, shape, seed=seed)
        fold(initialize(module, plan), plan)
        found = deviations(module, base, plan, architecture.example)
        assert not found, [*map(str, found)]
