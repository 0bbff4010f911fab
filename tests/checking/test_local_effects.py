"""What parameters do where they act, against the same by hand."""

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES
from torch import Tensor, nn

from mlu_lightning import Plan, Role
from mlu_lightning.checking.local_effects import Reader, find_readers, local_effects, value_effects
from mlu_lightning.models import ResNet


def at_its_base(name: str) -> tuple[nn.Module, Plan]:
    architecture = ARCHITECTURES[name]
    module, base = (architecture.build(1, 2, 16) for _ in range(2))
    return module, Plan.from_model(module, architecture.example, base=base)


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def test_local_effect_of_a_matrix_is_what_it_makes_of_its_input() -> None:
    torch.manual_seed(0)
    model, x = ResNet(depth=2, hidden=24, embedding=8, inputs=3, outputs=2), torch.randn(5, 3)
    plan = Plan.from_model(model, (x, torch.zeros(5, 2)), base=model)
    others = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    with torch.no_grad():
        found = local_effects(model, find_readers(plan), others, lambda: model(x))
        stream, block = x @ model.embed.weight.T, model.blocks[0]
    units = torch.tanh(stream @ block.read.weight.T)
    moved = units @ (block.write.weight - others["blocks.0.write.weight"]).T
    assert found["blocks.0.write.weight"] == pytest.approx(rms(moved) / rms(units), rel=1e-5)
    moved = stream @ (block.read.weight - others["blocks.0.read.weight"]).T
    assert found["blocks.0.read.weight"] == pytest.approx(rms(moved) / rms(stream), rel=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_has_other_matrices_after_it_is_told_from_its_values() -> None:
    torch.manual_seed(0)
    module, plan = at_its_base("pre-norm encoder")
    names = {name for name in plan.parameters if "in_proj" in name}
    # positions are a parameter of the module itself, in which all others come after them
    assert names | {"positions"} == set(plan.parameters) - {reader.parameter for reader in find_readers(plan)}
    values = dict(module.named_parameters())
    change = {name: value + torch.randn_like(value) for name, value in values.items()}
    weight = "encoder.layers.0.self_attn.in_proj_weight"
    found = value_effects(plan, [weight], change, values)
    difference = (change[weight] - values[weight]).detach()
    spectral = float(np.linalg.norm(difference.double().numpy(), 2))
    inputs, outputs = plan.parameters[weight].fans
    assert found[weight] == pytest.approx(spectral * (inputs / outputs) ** 0.5, rel=1e-6)


def test_what_rounding_loses_is_no_effect() -> None:
    """A change of the bias by less than the precision of what it is added to."""
    layer = nn.Sequential(nn.Linear(4, 4))
    torch.manual_seed(0)
    reader = Reader("0.bias", "0", "0", Role.BRANCH_IN_BIAS)
    with torch.no_grad():
        layer[0].bias.zero_()
        for change, seen in ((1e-9, False), (1e-3, True)):
            others = {"0.bias": torch.full((4,), change)}
            found = local_effects(layer, (reader,), others, lambda: layer(torch.ones(2, 4)))
            assert found["0.bias"] == (pytest.approx(change, rel=1e-3) if seen else 0)


def test_reader_of_what_writes_has_the_multiplier_of_its_branch() -> None:
    _, plan = at_its_base("gpt2")
    readers = {reader.parameter: reader for reader in find_readers(plan)}
    assert readers["transformer.h.0.mlp.c_proj.weight"].multiplied
    reads = "transformer.h.0.mlp.c_fc"
    assert readers[f"{reads}.weight"] == Reader(f"{reads}.weight", reads, reads, Role.BRANCH_IN)
