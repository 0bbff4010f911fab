"""Multipliers as hooks, folded into weights and baked are the same function and the same training run."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.architecture_runs import attachable, doubled, in_double, loss_of
from helpers.architectures import ARCHITECTURES, TOKENS, Architecture, Encoder
from helpers.architectures.language import gpt2_with_heads_of
from helpers.attentions import built
from helpers.leaving import BASE, TWICE, hooks
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, bake, fold, initialize, scale_optimizer
from mlu_lightning.application import residual_state
from mlu_lightning.application.state_mark import without_mark
from mlu_lightning.models import CausalTransformer

STEPS = 2
# eps is as large as gradients are, so that its factor counts; with a small one, Adam amplifies rounding errors without
# bound where the gradient is zero but for these, as that of the bias of keys is
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-2, weight_decay=0.1),
}


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def initialized(architecture: Architecture) -> tuple[nn.Module, Plan]:
    """A module in double precision with its plan; dropout is off, because its masks would not matter."""
    torch.manual_seed(0)
    base, module = architecture.build(*BASE), architecture.build(*TWICE)
    plan = Plan.from_model(module, architecture.example, base=base, alpha=1.5)
    initialize(module, plan)
    return doubled(module).eval(), plan


@pytest.fixture
def made(initialized: tuple[nn.Module, Plan]) -> tuple[nn.Module, Plan]:
    """A module of a test's own, and the plan."""
    return copy.deepcopy(initialized[0]), initialized[1]


def _loss(module: nn.Module, example: Any) -> Tensor:
    return loss_of(module, in_double(example))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_run(architecture: Architecture, made: tuple[nn.Module, Plan], name: str) -> None:
    hooked, plan = made
    folded = copy.deepcopy(hooked)
    if not attachable(plan):
        with pytest.raises(ValueError, match="cannot be attached as a hook"):
            attach_multipliers(hooked, plan)
        return
    attach_multipliers(hooked, plan)
    fold(folded, plan)
    torch.testing.assert_close(*(_loss(each, architecture.example) for each in (folded, hooked)), rtol=1e-13, atol=0)
    losses = []
    for module in (hooked, folded):
        optimizer = OPTIMIZERS[name](module.parameters())
        scale_optimizer(optimizer, module, plan)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = _loss(module, architecture.example)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    factors = {parameter: scale.multiplier for parameter, scale in plan.scales("sgd").items()}
    for parameter, value in hooked.named_parameters():
        expected, found = value * factors[parameter], folded.get_parameter(parameter)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=lambda text, p=parameter: f"{p}: {text}")


def test_a_folded_module_is_a_plain_module_of_the_same_function(
    architecture: Architecture, made: tuple[nn.Module, Plan]
) -> None:
    """Also where hooks move into the weights; tied readouts and norms at the ends of branches keep hooks."""
    module, plan = made
    hooked = copy.deepcopy(module)
    fold(module, plan)
    if attachable(plan):
        handle = attach_multipliers(hooked, plan)
        moved = fold(copy.deepcopy(hooked), plan), fold(hooked, plan)  # hooks of copies are found as well
        handle.remove()  # does nothing any more
        for each in moved:
            assert (hooks(each), residual_state(each)) == (hooks(module), residual_state(module))
            assert all(torch.equal(value, module.state_dict()[key]) for key, value in each.state_dict().items())
    if not all(multiplier.folds for multiplier in plan.multipliers):
        assert architecture.tied or architecture.unfoldable
        return
    plain = doubled(architecture.build(*TWICE)).eval()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(_loss(plain, architecture.example), _loss(module, architecture.example))


def _outputs(module: Any, example: Any) -> Tensor:
    if isinstance(example, dict):
        return module(**example).logits  # its loss has single precision
    return module(*example) if isinstance(example, tuple) else module(example)


def _baked(module: nn.Module, plan: Plan) -> None:
    attach_multipliers(module, plan)
    bake(bake(module, plan), plan)
    assert hooks(module) == 0


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
NEOX = built("GPTNeoX", "CausalLM", hidden_size=lambda dim: 2 * dim, **SIZES)
IDS = {"input_ids": TOKENS, "labels": TOKENS}
QUERIES = [*range(64)]  # of two heads with 32 each, where they come before all keys
BEFORE_KEYS = [*range(32), *range(96, 128)]  # of the same head


@pytest.mark.parametrize(
    ("build", "example", "queries", "rows"),
    [
        (lambda dim: CausalTransformer(50, 8, 2, 32, heads=2, head_dim=dim), TOKENS, "query.weight", QUERIES),
        (gpt2_with_heads_of, IDS, "c_attn.", QUERIES),
        (lambda dim: Encoder(2, 2, 2 * dim, True), (TOKENS,), "in_proj_", QUERIES),
        (NEOX, IDS, "query_key_value.", BEFORE_KEYS),
    ],
)
def test_logits_where_head_dim_differs(build: Any, example: Any, queries: str, rows: list[int]) -> None:
    """Multiplying logits is multiplying the rows of the queries by hand, in whichever direction they are stored."""
    module, base = build(32).double().eval(), build(16)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    plan = Plan.from_model(module, example, base=base, alpha=1.5)
    others = replace(plan, multipliers=tuple(m for m in plan.multipliers if m.kind != "logits"))
    by_hand = fold(copy.deepcopy(module), others)
    without = _outputs(by_hand, example).detach()
    fused = [name for name, _ in by_hand.named_parameters() if queries in name]
    with torch.no_grad():
        for name in fused:
            parameter = by_hand.get_parameter(name)
            (parameter.T if "c_attn.weight" in name else parameter)[rows] *= 0.5**0.5
    expected = _outputs(by_hand, example).detach()
    assert not torch.allclose(without, expected, rtol=1e-6, atol=0)
    for put in (attach_multipliers, fold, _baked):
        put(copied := copy.deepcopy(module), plan)
        torch.testing.assert_close(_outputs(copied, example), expected, rtol=1e-10, atol=1e-12)
        _loss(copied, example).backward()
        assert all(parameter.grad is not None for parameter in copied.parameters())
        if put is _baked:  # which may untie a readout
            for name in fused:
                value = copied.get_parameter(name)
                torch.testing.assert_close(value, by_hand.get_parameter(name), rtol=1e-14, atol=0)
        else:
            assert list(without_mark(copied.state_dict())) == list(module.state_dict())
