"""CompleteP, µP and the standard parameterization as plans, against their papers' tables and against MLU itself."""

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from helpers.parameter_groups import Weights, identical, plan_of
from helpers.table_by_hand import EXPECTED, Shape
from helpers.trainers import quiet
from lightning.pytorch import seed_everything
from torch import optim
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback, Plan, attach_multipliers, initialize, scale_optimizer
from mlu_lightning.models import CausalTransformer
from mlu_lightning.quickstart.study import Windows
from mlu_lightning.table import TABLES, OptimizerFamily, Parameterization, Ratios, Role, Scale, Variant, scale

SGD, ADAM, ADAMW, MUON = OptimizerFamily
MLU, COMPLETEP, MUP, SP = Parameterization
CLOSE = {"rel": 1e-12}  # a few roundings
# depth, hidden width and embedding over those of the base, all different
DEPTH, HIDDEN, EMBEDDING = 3.0, 5.0, 7.0
INTO, WITHIN, OUT = Ratios(DEPTH, EMBEDDING, HIDDEN), Ratios(DEPTH, HIDDEN, HIDDEN), Ratios(DEPTH, HIDDEN, EMBEDDING)
UNITS, COORDINATES = Ratios(DEPTH, outputs=HIDDEN), Ratios(DEPTH, outputs=EMBEDDING)
READ = Ratios(DEPTH, inputs=EMBEDDING)


def test_every_role_has_a_row_in_every_table() -> None:
    assert set(TABLES) == set(Parameterization)
    assert all(set(table.rows) == set(Role) for table in TABLES.values())


@pytest.mark.parametrize("parameterization", Parameterization)
@pytest.mark.parametrize("family", OptimizerFamily)
@pytest.mark.parametrize("role", Role)
def test_identity_at_base_is_exact(parameterization: Parameterization, family: OptimizerFamily, role: Role) -> None:
    assert scale(role, Ratios(), family, parameterization=parameterization) == Scale()


def test_completep_by_the_inputs_of_each_matrix() -> None:
    """Dey et al., arXiv 2505.01618, Table 1 with depth exponent 1, where one width ratio has become two."""
    expected = {
        (Role.EMBEDDING, COORDINATES): Scale(1, 1, 1, 1 / 7, 1),
        (Role.BRANCH_IN, INTO): Scale(1, 7**-0.5, 1 / 7, 1 / 15, 7),
        (Role.BRANCH_HIDDEN, WITHIN): Scale(1, 5**-0.5, 1 / 5, 1 / 15, 5),
        (Role.BRANCH_OUT, OUT): Scale(1 / 3, 5**-0.5, 1 / 5, 1 / 21, 5),
        (Role.BRANCH_OUT_BIAS, COORDINATES): Scale(1 / 3, 1, 1, 1 / 21, 1),
        (Role.BRANCH_NORM, COORDINATES): Scale(1, 1, 1, 1 / 21, 1),
        (Role.STREAM_NORM, COORDINATES): Scale(1, 1, 1, 1 / 7, 1),
        (Role.READOUT, READ): Scale(1 / 7, 1, 1, 1 / 7, 1),
    }
    for (role, ratios), numbers in expected.items():
        found = scale(role, ratios, ADAMW, parameterization=COMPLETEP)
        assert astuple(found) == pytest.approx(astuple(numbers), **CLOSE), role


@pytest.mark.parametrize("family", OptimizerFamily)
@pytest.mark.parametrize("role", Role)
def test_completep_is_mlu_but_for_the_std_of_branch_out(role: Role, family: OptimizerFamily) -> None:
    ratios = Ratios(DEPTH, HIDDEN, EMBEDDING)
    found, mlu = scale(role, ratios, family, parameterization=COMPLETEP), scale(role, ratios, family)
    if role is Role.BRANCH_OUT:
        assert (mlu.std, found.std) == pytest.approx((7**0.5 / 5, 5**-0.5), **CLOSE)
        found = replace(found, std=mlu.std)
    assert found == mlu


@pytest.mark.parametrize("width", [3.0, 7.0, 0.3, 1 / 3])
@pytest.mark.parametrize("role", Role)
def test_they_are_equal_exactly_where_hidden_width_and_embedding_grow_alike(role: Role, width: float) -> None:
    ratios = Ratios(DEPTH, width, width)
    assert scale(role, ratios, ADAMW, parameterization=COMPLETEP) == scale(role, ratios, ADAMW)


@pytest.mark.parametrize("family", [SGD, ADAMW])
def test_mup_by_the_inputs_of_each_matrix(family: OptimizerFamily) -> None:
    """Yang et al., arXiv 2203.03466, Table 8: 1/fan_in for Adam, fan_out/fan_in for SGD; depth changes nothing."""
    sgd = family is SGD
    expected = {
        (Role.EMBEDDING, COORDINATES): (1, 1, 7 if sgd else 1),
        (Role.BRANCH_IN, INTO): (1, 7**-0.5, 5 / 7 if sgd else 1 / 7),
        (Role.BRANCH_HIDDEN, WITHIN): (1, 5**-0.5, 1 if sgd else 1 / 5),
        (Role.BRANCH_OUT, OUT): (1, 5**-0.5, 7 / 5 if sgd else 1 / 5),
        (Role.BRANCH_IN_BIAS, UNITS): (1, 1, 5 if sgd else 1),
        (Role.BRANCH_OUT_BIAS, COORDINATES): (1, 1, 7 if sgd else 1),
        (Role.STREAM_NORM, COORDINATES): (1, 1, 7 if sgd else 1),
        (Role.READOUT, READ): (1 / 7, 1, 7 if sgd else 1),
    }
    for (role, ratios), numbers in expected.items():
        found = scale(role, ratios, family, parameterization=MUP)
        if role is Role.STREAM_NORM:
            assert found == scale(role, ratios, family, parameterization=MUP, variant=Variant.POST_NORM)
        assert (found.multiplier, found.std, found.lr) == pytest.approx(numbers, **CLOSE), role
        assert found == scale(role, replace(ratios, depth=1000.0), family, parameterization=MUP)


@pytest.mark.parametrize("family", [SGD, ADAM, ADAMW])
@pytest.mark.parametrize("width", [0.25, 3.0, 64.0])
def test_at_fixed_depth_mlu_is_mup(width: float, family: OptimizerFamily) -> None:
    others = {Role.BRANCH_BOUNDED_MATRIX, Role.STREAM_BOUNDED_MATRIX}  # of which the paper says nothing
    for role in (role for role in Role if role not in others):
        ratios = EXPECTED[role](Shape(1, width, width, width, width)).ratios
        mup, mlu = (scale(role, ratios, family, parameterization=each) for each in (MUP, MLU))
        assert (mup.multiplier, mup.std, mup.lr) == pytest.approx((mlu.multiplier, mlu.std, mlu.lr), **CLOSE), role


@pytest.mark.parametrize("family", OptimizerFamily)
def test_standard_parameterization_has_the_std_of_a_sum_and_nothing_else(family: OptimizerFamily) -> None:
    for role, ratios, inputs in (
        (Role.EMBEDDING, Ratios(DEPTH, HIDDEN, EMBEDDING), HIDDEN),  # as of sinusoids, one for each coordinate
        (Role.BRANCH_IN, INTO, EMBEDDING),
        (Role.BRANCH_HIDDEN, WITHIN, HIDDEN),
        (Role.BRANCH_OUT, OUT, HIDDEN),
        (Role.BRANCH_BOUNDED_MATRIX, READ, EMBEDDING),
        (Role.STREAM_MATRIX, READ, EMBEDDING),
        (Role.READOUT, READ, EMBEDDING),
        (Role.BRANCH_NORM, COORDINATES, 1.0),
        (Role.STREAM_NORM, COORDINATES, 1.0),
        (Role.READOUT_BIAS, COORDINATES, 1.0),
    ):
        expected = Scale(std=pytest.approx(inputs**-0.5, **CLOSE))
        for variant in (None, *Variant):
            assert scale(role, ratios, family, parameterization=SP, variant=variant) == expected, role


def test_outputs_averaged_over_active_experts() -> None:
    """k times the experts: gradients are 1/k of those that they were, at hidden units and at the experts' outputs."""
    for family, expected in {ADAMW: Scale(eps=1 / 4), SGD: Scale(lr=4.0, eps=1 / 4, weight_decay=1 / 4)}.items():
        for role in (Role.BRANCH_IN, Role.BRANCH_OUT):
            assert scale(role, Ratios(active=4.0), family) == expected


BASE = {"depth": 1, "heads": 2, "embedding": 16, "mlp_hidden": 24}
PROPORTIONAL = {"depth": 3, "heads": 6, "embedding": 48, "mlp_hidden": 72}  # M ∝ D, by factors that are not exact
EXAMPLE = torch.zeros(2, 9, dtype=torch.long)


def _model(shape: dict[str, int], **optimizer: Any) -> CausalTransformer:
    return CausalTransformer(20, 8, head_dim=8, lr=0.01, weight_decay=0.1, **shape, **optimizer)


def _plans(module: CausalTransformer, base: CausalTransformer | None = None) -> dict[Parameterization, Plan]:
    base = base or _model(BASE)
    return {each: Plan.from_model(module, EXAMPLE, base=base, parameterization=each) for each in Parameterization}


def _fitted(shape: dict[str, int], parameterization: str | None, **optimizer: Any) -> CausalTransformer:
    seed_everything(3, verbose=False)
    base, model = _model(BASE), _model(BASE | shape, **optimizer)
    tokens = torch.randint(20, (200,), generator=torch.Generator().manual_seed(0))
    data = DataLoader(Windows(tokens, torch.arange(0, 64), 9), batch_size=8)
    callbacks = [] if parameterization is None else [MLUCallback(base, parameterization=parameterization)]
    quiet(*callbacks, max_epochs=1).fit(model, data)
    return model


def test_with_m_proportional_to_d_mlu_and_completep_are_the_same_run() -> None:
    mlu = _fitted(PROPORTIONAL, "mlu")
    assert identical(mlu, _fitted(PROPORTIONAL, "completep"))
    assert not any(identical(mlu, _fitted(PROPORTIONAL, other)) for other in ("mup", "sp"))


def test_standard_parameterization_is_how_layers_draw_themselves() -> None:
    """``nn.Linear`` draws by the number of inputs: the plan's std differs by the noise of the base's draws alone."""
    module = _model(PROPORTIONAL)
    built = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    plan = _plans(module)[SP]
    assert all(plan.forward_multiplier(multiplier) == 1 for multiplier in plan.multipliers)
    assert set(plan.scales("adamw").values()) >= {Scale(std=3**-0.5)}
    initialize(module, plan)
    # 256 uniform entries or more have a root mean square with a standard error of 3 % or less
    ratios = {name: (parameter.norm() / built[name].norm()).item() for name, parameter in module.named_parameters()}
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=0.1)


@pytest.mark.parametrize(
    "build",
    [
        lambda m: optim.Muon([m.branch_in, m.branch_out], lr=0.1),
        lambda m: optim.Muon([m.branch_in, m.branch_out], lr=0.1, adjust_lr_fn="match_rms_adamw"),
        lambda m: optim.Adafactor(m.parameters(), lr=0.1, weight_decay=0.1),
        lambda m: optim.AdamW(m.parameters(), lr=0.1, eps=0.1),
        lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
    ids=["Muon", "Muon as AdamW", "Adafactor", "AdamW", "SGD"],
)
def test_standard_parameterization_leaves_optimizers_alone(build: Any) -> None:
    """Also where they look at shapes or sizes of weights themselves, which the others divide out."""
    plan = plan_of(Weights())

    def trained(plan: Plan | None, steps: int) -> Weights:
        module = Weights()
        optimizer = build(module)
        if plan is not None:
            scale_optimizer(optimizer, module, plan)
        for step in range(steps):
            module.load_gradients(step)
            optimizer.step()
        return module

    assert identical(trained(replace(plan, parameterization=SP), 3), trained(None, 3))
    assert not identical(trained(plan, 1), trained(None, 1))


def test_rules_are_kept_in_a_file_and_printed(tmp_path: Any) -> None:
    module = _model(PROPORTIONAL)
    plans = _plans(module)
    titles = {MLU: "MLU plan", COMPLETEP: "CompleteP plan", MUP: "µP plan", SP: "Standard plan"}
    for parameterization, plan in plans.items():
        plan.save(tmp_path / "plan.yaml")
        assert Plan.load(tmp_path / "plan.yaml") == plan
        assert str(plan).startswith(titles[parameterization])
        # a plan is a base for any parameterization: it holds the base's shape
        again = Plan.from_model(module, EXAMPLE, base=tmp_path / "plan.yaml")
        assert again.scales("adamw") == plans[MLU].scales("adamw")


WITHOUT_BASE = "parameterization='mup' was given with .*a plan of a module without a base.*give the others"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameterization": "sp"}, "parameterization='sp' was given with base=None.*give the others a base"),
        ({"parameterization": "mup", "base": "a plan"}, WITHOUT_BASE),
        ({"parameterization": "mup", "base": "a file"}, WITHOUT_BASE),
        ({"parameterization": "completep", "alpha": 2.0, "base": "a module"}, "given with alpha=2.*leave alpha at 1"),
        ({"parameterization": "ntk"}, "'ntk' is not a valid Parameterization"),
    ],
)
def test_rules_that_cannot_be(arguments: dict[str, Any], message: str, tmp_path: Any) -> None:
    absolute = Plan.from_model(_model(BASE), EXAMPLE)
    absolute.save(tmp_path / "absolute.yaml")
    bases = {"a module": _model(BASE), "a plan": absolute, "a file": tmp_path / "absolute.yaml"}
    given = {key: bases.get(value, value) for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        Plan.from_model(_model(PROPORTIONAL), EXAMPLE, **given)


def test_file_whose_rules_are_edited() -> None:
    """Its multipliers stay as they are written, and its header says so; what no plan can be is refused."""
    module = _model(PROPORTIONAL)
    plans = _plans(module)
    text = plans[MLU].to_yaml()
    edited = Plan.from_yaml(text.replace("parameterization: mlu", "parameterization: sp"), "edited")
    assert edited.multipliers == plans[MLU].multipliers != plans[SP].multipliers
    for factor in ("std", "lr", "eps", "weight_decay"):
        scales = edited.scales("adamw"), plans[SP].scales("adamw")
        found, expected = ({name: getattr(one, factor) for name, one in each.items()} for each in scales)
        assert found == expected
    header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert "multipliers are the numbers in their lines, whatever it is. For another parameterization make" in header

    rich = replace(plans[MLU], alpha=2.0)
    for plan, given in ((Plan.from_model(module, EXAMPLE), "base=None"), (rich, "alpha=2")):
        message = f"^plan.yaml: parameterization='sp' was given with {given}.* leave alpha at 1"
        with pytest.raises(ValueError, match=message):
            Plan.from_yaml(plan.to_yaml().replace("parameterization: mlu", "parameterization: sp"), "plan.yaml")


def test_logits_keep_their_scale_in_the_standard_parameterization() -> None:
    base, module = (CausalTransformer(20, 8, 1, 16, heads=2, head_dim=head_dim) for head_dim in (8, 32))
    plans = _plans(module, base)
    kinds = {each: {m.kind: m.value for m in plan.multipliers} for each, plan in plans.items()}
    assert "logits" not in kinds.pop(SP)
    assert {numbers["logits"] for numbers in kinds.values()} == {0.5}


def test_multipliers_by_hand() -> None:
    tokens = torch.randint(20, (2, 8))
    expected = {MLU: (1 / 3, 1 / 3), COMPLETEP: (1 / 3, 1 / 3), MUP: (1.0, 1 / 3), SP: (1.0, 1.0)}
    for parameterization, (branch, readout) in expected.items():
        module = _model(PROPORTIONAL)
        plan = _plans(module)[parameterization]
        initialize(module, plan)
        stream = module.tokens(tokens)
        for block in module.branches:
            stream = stream + branch * block(stream)
        by_hand = readout * module.readout(module.norm(stream))
        attach_multipliers(module, plan)
        torch.testing.assert_close(module(tokens), by_hand, rtol=1e-5, atol=1e-6)
