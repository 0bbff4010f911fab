"""The table, read back: against theory.md's own columns, and real optimizers."""

import math
from dataclasses import astuple, replace

import pytest
import torch
from helpers.table_by_hand import ADAM, ADAMW, EXPECTED, MUON, ROWS, SGD, Row, Shape, wanted
from hypothesis import given
from hypothesis import strategies as st

from mlu_lightning.table import TABLES, OptimizerFamily, Parameterization, Ratios, Role, Scale, Variant, scale

CLOSE = {"rel": 1e-12}  # a few roundings

# the last is smaller than the base in some dimensions
SHAPES = [Shape(2, 3, 5, 7, 11), Shape(4, 1, 1, 1, 1), Shape(1, 8, 8, 1, 1), Shape(1, 1, 1, 16, 16)]
SHAPES.append(Shape(0.5, 0.25, 3, 0.125, 6))


def entry(row: Row, ratios: Ratios, family: OptimizerFamily, alpha: float = 1.0) -> Scale:
    role, variant = row
    return scale(role, ratios, family, alpha, variant=variant)


@pytest.mark.parametrize("family", OptimizerFamily)
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ",".join(f"{x:g}" for x in shape))
def test_every_entry(row: Row, family: OptimizerFamily, shape: Shape) -> None:
    found = entry(row, ROWS[row](shape).ratios, family)
    role, variant = row
    assert astuple(found) == pytest.approx(astuple(wanted(role, family, shape, variant)), **CLOSE)


def test_every_role_and_variant_has_a_row() -> None:
    assert set(TABLES[Parameterization.MLU].rows) == set(EXPECTED) == set(Role)
    assert {variant for _, variant in ROWS} == {None, *Variant}


def test_a_variant_of_another_role_changes_nothing() -> None:
    ratios = Ratios(2.0, 4.0, 8.0)
    for role, variant in ((role, variant) for role in Role for variant in Variant if (role, variant) not in ROWS):
        assert scale(role, ratios, ADAMW, variant=variant) == scale(role, ratios, ADAMW)
    growing = scale(Role.STREAM_MATRIX, ratios, ADAMW, variant=Variant.IN_HEAD)
    assert growing == scale(Role.STREAM_MATRIX, ratios, ADAMW)


@pytest.mark.parametrize("family", OptimizerFamily)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_identity_at_base_is_exact(row: Row, family: OptimizerFamily) -> None:
    assert entry(row, Ratios(), family) == Scale(1.0, 1.0, 1.0, 1.0, 1.0)


sizes = st.floats(min_value=1 / 64, max_value=64, allow_nan=False)
ratios = st.builds(Ratios, sizes, sizes, sizes)
roles = st.sampled_from(list(Role))
families = st.sampled_from(list(OptimizerFamily))


@given(roles, families, ratios, ratios)
def test_factors_multiply_along_the_way(role: Role, family: OptimizerFamily, first: Ratios, second: Ratios) -> None:
    through = Ratios(*(a * b for a, b in zip(astuple(first), astuple(second), strict=True)))
    one, other, whole = (astuple(scale(role, at, family)) for at in (first, second, through))
    assert whole == pytest.approx([a * b for a, b in zip(one, other, strict=True)], rel=1e-10)


@given(roles, ratios)
def test_one_rule(role: Role, at: Ratios) -> None:
    """Adam family: lr 1/n, eps g, decoupled decay n; SGD: lr 1/(n·g); decay in the gradient (any): n·g."""
    sgd, adam, adamw = (scale(role, at, family) for family in (SGD, ADAM, ADAMW))
    assert adam.lr == adamw.lr and adamw.lr * adamw.weight_decay == pytest.approx(1.0, **CLOSE)
    assert sgd.lr * adam.eps == pytest.approx(adam.lr, **CLOSE)
    assert sgd.lr * sgd.weight_decay == pytest.approx(1.0, **CLOSE) and adam.weight_decay == sgd.weight_decay
    muon = scale(role, at, MUON)
    assert (sgd.std, sgd.multiplier) == (adam.std, adam.multiplier) == (muon.std, muon.multiplier)


@given(roles, ratios)
def test_muon_leaves_vectors_embeddings_and_readouts_to_adamw(role: Role, at: Ratios) -> None:
    muon, adamw = scale(role, at, MUON), scale(role, at, ADAMW)
    if EXPECTED[role](Shape(1, 1, 1, 1, 1)).muon is None:
        assert muon == adamw
    else:
        assert muon.lr == pytest.approx(math.sqrt(at.outputs / at.inputs), **CLOSE)
        assert muon.lr * muon.weight_decay == pytest.approx(1.0, **CLOSE)


BRANCH_ROLES = {role for role in Role if role.value.startswith("branch_")}


@given(roles, families, ratios, st.floats(min_value=0.1, max_value=10))
def test_richness(role: Role, family: OptimizerFamily, at: Ratios, alpha: float) -> None:
    """α on branches, their lr by α² (gradient descent) or α (Adam, Muon); gradients of branches grow by α."""
    plain, rich = scale(role, at, family), scale(role, at, family, alpha)
    if role not in BRANCH_ROLES:
        assert rich == plain
        return
    writes = role in (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS)
    lr = alpha**-2 if family is SGD else 1 / alpha
    decay = 1 / lr if family in (SGD, ADAMW, MUON) else alpha**2  # Adam's L2 goes as SGD's
    multiplier = plain.multiplier * (alpha if writes else 1)
    expected = Scale(multiplier, plain.std, plain.lr * lr, plain.eps * alpha, plain.weight_decay * decay)
    assert astuple(rich) == pytest.approx(astuple(expected), **CLOSE)


def optimizer_of(family: OptimizerFamily, parameter: torch.nn.Parameter, factors: Scale) -> torch.optim.Optimizer:
    numbers = {"lr": 0.03 * factors.lr, "weight_decay": 0.1 * factors.weight_decay}
    if family is SGD:
        return torch.optim.SGD([parameter], momentum=0.9, **numbers)
    eps = 0.02 * factors.eps  # large enough to matter
    if family is MUON:
        return torch.optim.Muon([parameter], eps=eps, **numbers)
    return {ADAM: torch.optim.Adam, ADAMW: torch.optim.AdamW}[family]([parameter], eps=eps, **numbers)


def trained(family: OptimizerFamily, factors: Scale, folded: Scale | None) -> torch.Tensor:
    """Effective weight, multiplier times parameter, after a few steps of regression."""
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 4), (9, 3), (3, 4)))
    multiplier = factors.multiplier if folded is None else 1.0
    parameter = torch.nn.Parameter(w * (factors.std if folded is None else folded.std))
    optimizer = optimizer_of(family, parameter, factors if folded is None else folded)
    for _ in range(15):
        optimizer.zero_grad()
        (multiplier * x @ parameter.T - y).square().mean().backward()
        optimizer.step()
    return multiplier * parameter.detach()


@pytest.mark.parametrize("family", OptimizerFamily)
@pytest.mark.parametrize("factors", [Scale(0.25, 0.5, 2.0, 0.5, 0.25), Scale(2.0, 1.0, 1.0, 1.0, 1.0)])
def test_folded_numbers_train_the_same_effective_weight(family: OptimizerFamily, factors: Scale) -> None:
    """With torch's own optimizers; multipliers are powers of two, so that Muon's bfloat16 rounds the same way."""
    attached = trained(family, factors, None)
    torch.testing.assert_close(trained(family, factors, factors.folded(family)), attached, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(trained(family, factors, replace(factors, multiplier=1.0)), attached, rtol=1e-3)


@given(families, st.tuples(*[sizes] * 5))
def test_folding_with_the_formulas_of_the_table(family: OptimizerFamily, numbers: tuple[float, ...]) -> None:
    """Effective weight a·W: std a·b, Adam lr a·c and eps ε/a, SGD lr a²·c, decay λ/a decoupled and λ/a² in the gradient."""
    a, std, lr, eps, decay = numbers
    expected = {
        SGD: (1.0, std * a, lr * a**2, eps / a, decay / a**2),
        ADAM: (1.0, std * a, lr * a, eps / a, decay / a**2),
        ADAMW: (1.0, std * a, lr * a, eps / a, decay / a),
        MUON: (1.0, std * a, lr * a, eps / a, decay / a),
    }
    assert astuple(Scale(*numbers).folded(family)) == pytest.approx(expected[family], **CLOSE)


@pytest.mark.parametrize("family", OptimizerFamily)
def test_a_family_can_be_named(family: OptimizerFamily) -> None:
    numbers, ratios = Scale(multiplier=0.5, lr=4.0, weight_decay=8.0), Ratios(2.0, 4.0, 8.0)
    assert numbers.folded(family.value) == numbers.folded(family)
    assert scale(Role.BRANCH_OUT, ratios, family.value, 2.0) == scale(Role.BRANCH_OUT, ratios, family, 2.0)
    assert numbers.folded("sgd").lr == 4 * 0.5**2 and numbers.folded("adam").lr == 4 * 0.5
    with pytest.raises(ValueError, match="'lion' is not a valid OptimizerFamily"):
        numbers.folded("lion")


@pytest.mark.parametrize("role", Role)
def test_where_roles_are(role: Role) -> None:
    matrices = "embedding branch_in branch_hidden branch_out branch_bounded_matrix stream_matrix stream_bounded_matrix"
    assert str(role) == role.value and role.in_branch == (role in BRANCH_ROLES)
    assert role.is_matrix == (role.value in (*matrices.split(), "readout"))
