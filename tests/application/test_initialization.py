"""Initial weights have the std of the table, by the form that they are built with, and nothing else changes."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import initial_weights
from helpers.initial_weights import BASE_STD, FLOAT32, MODES, SAMPLED, STD, Bag, plan_of, rms, seeded, values_of
from helpers.perceptrons import Perceptron
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from mlu_lightning import Plan, Ratios, Role, attach_multipliers, fold, initialize
from mlu_lightning.planning import Multiplier
from mlu_lightning.table import Variant

embeddings = partial(plan_of, role=Role.EMBEDDING)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", Role)
def test_every_role_gets_the_std_of_the_table(role: Role, mode: str) -> None:
    module = seeded(lambda: Bag(p=torch.randn(200, 100) * 0.37 + 0.1))
    initialize(module, plan_of(module, role=role), mode)
    assert rms(module.p) == pytest.approx(BASE_STD * STD[role], rel=SAMPLED)
    matrix = not role.value.endswith(("_bias", "_norm", "branch_bounded", "frozen"))
    drawn = {"rescale": False, "normal": matrix, "coupled": role in (Role.EMBEDDING, Role.READOUT)}[mode]
    if drawn:
        # the mean of 2e4 numbers has a standard error of std/141; the built mean, scaled, would be 26 % of the std
        assert abs(module.p.mean()) < 5 / 141 * rms(module.p)
    else:
        assert rms(module.p) == pytest.approx(BASE_STD * STD[role], rel=FLOAT32)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": nn.init.kaiming_uniform_,
    "truncated normal": lambda w: nn.init.trunc_normal_(w, std=0.02, a=-0.03, b=0.03),
    "orthogonal": nn.init.orthogonal_,
    "sparse": lambda w: nn.init.sparse_(w, 0.4),
    "identity": nn.init.eye_,
    "constant": lambda w: nn.init.constant_(w, -0.3),
}


@pytest.mark.parametrize("form", FORMS)
def test_rescale_multiplies_by_one_number(form: str) -> None:
    module = seeded(lambda: Bag(p=FORMS[form](torch.empty(30, 50, dtype=torch.float64))))
    before = module.p.detach().clone()
    initialize(module, plan_of(module))
    torch.testing.assert_close(module.p.detach(), before * (BASE_STD / 2 / rms(before)), rtol=1e-14, atol=0)


def test_layers_are_scaled_together() -> None:
    """Their common root mean square is set, by hand; differences between layers stay."""
    layers = nn.Sequential(*(nn.Linear(4, 3, bias=False) for _ in range(2)))
    for layer, value in zip(layers, (1.0, -3.0), strict=True):
        nn.init.constant_(layer.weight, value)
    initialize(layers, plan_of(layers, **{"0.weight": {"base_std": 0.1}, "1.weight": {"base_std": 0.2}}))
    factor = 0.5 * math.sqrt((0.1**2 + 0.2**2) / 2) / math.sqrt((1 + 9) / 2)
    for layer, value in zip(layers, (1.0, -3.0), strict=True):
        torch.testing.assert_close(layer.weight.detach(), torch.full((3, 4), value * factor))


def test_parameters_of_other_roles_and_shapes_are_scaled_apart() -> None:
    """Numbers in the names of an MLP's own layers are not places along the depth."""
    layers = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 4)))
    roles = {"0.weight": "branch_in", "2.weight": "branch_out", "3.weight": "stream_matrix"}
    roles |= {"0.bias": "branch_in_bias", "2.bias": "branch_out_bias", "3.bias": "stream_norm"}
    initialize(layers, plan_of(layers, **{name: {"role": Role(role)} for name, role in roles.items()}))
    for name, parameter in layers.named_parameters():
        assert rms(parameter) == pytest.approx(BASE_STD * STD[Role(roles[name])], rel=FLOAT32)


def test_layers_of_which_some_are_before_a_norm_are_scaled_apart() -> None:
    layers = seeded(lambda: nn.Sequential(*(nn.Linear(40, 30, bias=False) for _ in range(2))))
    initialize(layers, plan_of(layers, role=Role.BRANCH_OUT, **{"1.weight": {"variant": Variant.BEFORE_NORM}}))
    assert rms(layers[0].weight) == pytest.approx(BASE_STD * 3 / 4, rel=FLOAT32)
    assert rms(layers[1].weight) == pytest.approx(BASE_STD / 2, rel=FLOAT32)


def test_depth_dependent_init_of_gpt2_is_undone() -> None:
    """GPT-2 divides the std of what writes to the stream by sqrt(2L); MLU has 1/l on the branch instead."""

    def gpt2(layers: int) -> GPT2LMHeadModel:
        return seeded(lambda: GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=64, n_head=4, vocab_size=32)))

    base, deep = gpt2(2), gpt2(8)
    plan = Plan.from_model(deep, {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, base=base)
    before = values_of(deep)
    initialize(deep, plan)
    for which, entries in (("attn.c_proj", 64 * 64), ("mlp.c_proj", 4 * 64 * 64)):
        weights = [p for name, p in deep.named_parameters() if name.endswith(f"{which}.weight")]
        assert len(weights) == 8
        assert rms(*weights) == pytest.approx(0.02 / math.sqrt(2 * 2), rel=5 / math.sqrt(4 * entries))
    for name, value in deep.state_dict().items():
        if name.endswith(("ln_f.weight", "ln_1.weight", "bias")):
            assert torch.equal(value, before[name])
        elif name.endswith(("wte.weight", "wpe.weight")):  # the base's up to the noise of a sample
            torch.testing.assert_close(value, before[name], rtol=5 / math.sqrt(32 * 64), atol=0)


def test_biases_have_the_std_of_the_base_where_only_the_fan_in_beside_them_grows() -> None:
    """nn.Linear draws a bias from ±fan_in^(-1/2), which is not the base's where the fan-in is another."""
    base, wide = Perceptron(1, 64, 512), Perceptron(1, 1024, 512)
    plan = Plan.from_model(wide, (torch.zeros(1, 3), torch.zeros(1, 2)), base=base)
    bias, expected = wide.branches[0].write.bias, rms(base.branches[0].write.bias)
    assert plan.parameters["branches.0.write.bias"].ratios.is_identity
    assert rms(bias) == pytest.approx(expected / 4, rel=0.2)
    initialize(wide, plan)
    assert rms(bias) == pytest.approx(expected, rel=FLOAT32)


@pytest.mark.parametrize("base_std", [BASE_STD, 0.0999], ids=["same std", "sampled std"])
def test_the_base_shape_is_left_alone_bit_for_bit(base_std: float) -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4)))
    before = values_of(module)
    shapes = {name: {"base_shape": tuple(value.shape)} for name, value in module.named_parameters()}
    initialize(module, plan_of(module, ratios=Ratios(), base_std=base_std, **shapes))
    initial_weights.assert_same(module, before)


@pytest.mark.parametrize(("ratios", "base_shape"), [(Ratios(depth=4.0), (4, 4)), (Ratios(), (4, 2))])
def test_another_depth_or_shape_is_not_the_base(ratios: Ratios, base_shape: tuple[int, int]) -> None:
    module = seeded(lambda: nn.Linear(4, 4, bias=False))
    initialize(module, plan_of(module, ratios=ratios, base_shape=base_shape))
    assert rms(module.weight) == pytest.approx(BASE_STD, rel=FLOAT32)


@pytest.mark.parametrize("mode", MODES)
def test_gains_stay_exactly_what_they_are(mode: str) -> None:
    tenths = {f"tenths{n}": torch.full((n + 4,), n / 10, dtype=torch.float64) for n in range(1, 8)}
    module = Bag(ones=torch.ones(11), **tenths)
    before = values_of(module)
    # root mean squares as NumPy finds them at the base, where the vectors are shorter
    says = {name: {"base_std": rms(value[:3])} for name, value in before.items()}
    initialize(module, plan_of(module, role=Role.BRANCH_NORM, **says), mode)
    initial_weights.assert_same(module, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", [Role.EMBEDDING, Role.BRANCH_OUT, Role.READOUT])
def test_zero_stays_zero(role: Role, mode: str) -> None:
    table = seeded(lambda: nn.Embedding(40, 500, padding_idx=3))
    nn.init.zeros_(table.weight[20:])
    vector = nn.Parameter(torch.zeros(500))
    module = nn.ModuleDict({"zero": nn.Linear(5, 6, bias=False), "table": table, "vector": nn.ParameterList([vector])})
    nn.init.zeros_(module["zero"].weight)
    reads = role is Role.READOUT
    says = {
        "table.weight": {"fans": (500, 40) if reads else (40, 500), "transposed": not reads},
        "vector.0": {"fans": (500, 1) if reads else (1, 500), "transposed": reads},
    }
    initialize(module, plan_of(module, role=role, **says), mode)
    assert not module["zero"].weight.any() and not vector.any()
    # zero rows count in the root mean square, as they do at the base
    alive = (torch.arange(40) != 3) & (torch.arange(40) < 20)
    assert torch.equal(table.weight.any(1), alive)
    assert rms(table.weight) == pytest.approx(BASE_STD * STD[role], rel=1.5 * SAMPLED)
    assert rms(table.weight[alive]) == pytest.approx(BASE_STD * STD[role] * math.sqrt(40 / 19), rel=1.5 * SAMPLED)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_of_zeros_counts_in_the_scale_of_the_others(mode: str) -> None:
    layers = seeded(lambda: nn.Sequential(*(nn.Linear(100, 200, bias=False) for _ in range(2))))
    nn.init.zeros_(layers[1].weight)
    initialize(layers, plan_of(layers, role=Role.READOUT), mode)
    assert not layers[1].weight.any()
    assert rms(layers[0].weight) == pytest.approx(math.sqrt(2) * BASE_STD, rel=SAMPLED)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_std_of_the_base_nothing_is_set(mode: str) -> None:
    module = seeded(lambda: nn.Linear(4, 4))
    if mode == "coupled":  # which draws embeddings anew, unless they are zero
        module.load_state_dict({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    before = values_of(module)
    initialize(module, embeddings(module, base_std=None), mode)
    initial_weights.assert_same(module, before)


@pytest.mark.parametrize("mode", MODES)
def test_buffers_and_the_random_state_are_left_alone_and_frozen_parameters_are_drawn_at_most(mode: str) -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).requires_grad_(False)
    module[1].running_mean.normal_()
    built = module[0].weight.clone()
    buffers, state = {name: buffer.clone() for name, buffer in module.named_buffers()}, torch.get_rng_state()
    assert initialize(module, embeddings(module), mode) is module
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    if mode == "rescale":
        assert torch.equal(module[0].weight, built)
    else:
        assert rms(module[0].weight) == pytest.approx(BASE_STD, rel=1.0)
    assert not any(p.requires_grad for p in module.parameters())


def with_folded_multiplier(module: nn.Module, plan: Plan) -> Plan:
    plan = replace(plan, multipliers=(Multiplier("b", "branch", 0.5, None, ("2.weight",)),))
    fold(module, plan)
    return plan


CHANGES: dict[str, Callable[[Any, Plan], Any]] = {
    "no change": lambda module, plan: plan,
    "another module": lambda module, plan: plan_of(nn.Linear(2, 2)),
    "folded": with_folded_multiplier,
    "on meta": lambda module, plan: module[2].to("meta"),
    "infinite": lambda module, plan: module[2].weight.data[1, 1].fill_(math.inf),
    "no std": lambda module, plan: embeddings(module, base_std=None),
    "no axis": lambda module, plan: embeddings(module, **{"2.weight": {"fans": (4, 99)}}),
}


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("xavier", "no change", r"Unknown initialization 'xavier'\. Use one of: rescale, normal, coupled"),
        ("rescale", "another module", r"not made for this Sequential.*0\.weight is in the module only"),
        ("rescale", "folded", r"folded into the weights already.*Initialize before fold"),
        ("normal", "on meta", r"meta device and have no values to scale: 2\.weight\. Materialize the module"),
        ("rescale", "infinite", r"2\.weight holds values that are not finite.*to_empty"),
        ("coupled", "no std", r"draws 0\.weight anew, but .*base_std is not given.*Plan relative to a base module"),
        ("coupled", "no axis", r"which axis of 2\.weight, of shape \[5, 4\], holds the 99 coordinates.*nn\.Linear"),
    ],
)
def test_refused_with_nothing_changed(mode: Any, change: str, message: str) -> None:
    module = seeded(lambda: nn.Sequential(*(nn.Linear(4, size, bias=False) for size in (3, 4, 5))))
    plan = embeddings(module)
    changed = CHANGES[change](module, plan)
    before = values_of(module)
    with pytest.raises(ValueError, match=message):
        initialize(module, changed if isinstance(changed, Plan) else plan, mode)
    assert all(value.is_meta or torch.equal(module.get_parameter(name), value) for name, value in before.items())


def test_multipliers_that_are_attached_do_not_matter() -> None:
    plain = seeded(lambda: nn.Sequential(nn.Linear(4, 4)))
    hooked = copy.deepcopy(plain)
    plan = plan_of(plain)
    attach_multipliers(hooked, plan)
    initialize(hooked, plan)
    initial_weights.assert_same(hooked, values_of(initialize(plain, plan)))
