"""What is searched: names and keys by the table's roles, each factor once, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import Parameterization
from mlu_lightning.tuning.space import factors_at, search_space
from mlu_lightning.tuning.training import Training

TOKENS = [torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def plain(**more: Any) -> CausalTransformer:
    return CausalTransformer(11, 8, 1, 8, 2, head_dim=4, mlp_hidden=8, lr=0.01, **more)


def tied() -> CausalTransformer:
    module = plain()
    module.readout.weight = module.tokens.weight
    return module


def without_start() -> CausalTransformer:
    module = plain()
    nn.init.zeros_(module.readout.weight)
    return module


def names(module: CausalTransformer, *roles: str) -> list[str]:
    plan = Plan.from_model(module, TOKENS[0], base=plain())
    return [dimension.name for dimension in search_space(plan, *([roles] if roles else []))]


DEFAULT = "lr embedding.std embedding.lr branch_in.std branch_out.std branch_out.lr readout.std readout.lr".split()


def test_each_factor_is_searched_once() -> None:
    assert names(plain()) == DEFAULT
    of_tied = Plan.from_model(tied(), TOKENS[0], base=tied())
    assert [d.name for d in search_space(of_tied)] == [*DEFAULT[:-2], "readout.multiplier"]
    of_zeros = Plan.from_model(without_start(), TOKENS[0], base=without_start())
    assert [d.name for d in search_space(of_zeros)] == [*DEFAULT[:-2], "readout.lr"]
    asked = ["branch_in.lr", "branch_in@mlp", "*.query.*", "norms", "weight_decay", "branch_out.multiplier"]
    expected = "lr branch_in.lr branch_in@mlp.std branch_in@mlp.lr *.query.*.std *.query.*.lr norms.lr weight_decay"
    assert names(plain(), *asked) == [*expected.split(), "branch_out.multiplier"]
    assert names(plain(), "branch_out", "alpha") == ["lr", "branch_out.lr", "alpha"]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["readout.alpha"], "alpha for 'readout'. It is of all branches"),
        (["branch_out.speed"], "matches nothing"),
        (["nowhere"], "matches nothing"),
        (["embedding.multiplier"], "have none"),
        (["embedding", "embedding.lr"], "twice"),
    ],
)
def test_what_is_nothing_to_search_is_refused(roles: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(plain(), *roles)


def test_norms_without_parameters_are_refused() -> None:
    module = plain(norm_gains=False)
    with pytest.raises(ValueError, match="has none with parameters"):
        search_space(Plan.from_model(module, TOKENS[0], base=plain(norm_gains=False)), ["norms"])


def test_learning_rates_multiply() -> None:
    space = search_space(Plan.from_model(plain(), TOKENS[0], base=plain()), ["embedding", "norms"])
    found = factors_at(space, {"lr": 2.0, "embedding.lr": 3.0, "embedding.std": 1.23456, "norms.lr": 0.25})
    assert found["embedding"] == {"lr": 6.0, "std": 1.235}
    assert found["branch_norm"] == found["stream_norm"] == {"lr": 0.5}
    assert found["branch_in"] == found["branch_out"] == found["readout"] == {"lr": 2.0}
    assert factors_at(space, {}) == {}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_richness_is_the_std_of_branch_out_over_the_learning_rate_of_branch_in(optimizer: Any) -> None:
    """With Adam; with SGD, whose gradients grow as the branch does, over the square (theory.md, section 3)."""
    plan = Plan.from_model(plain(), TOKENS[0], base=plain())
    space = search_space(plan, ["alpha"])
    tuned = factors_at(space, {"lr": 1.0, "alpha": 4.0})
    assert tuned == {"branch_out": {"alpha": 4.0}}
    rich, given = replace(plan, tuned=tuned), replace(plan, alpha=4.0)
    assert rich.scales(optimizer) == given.scales(optimizer) and rich.forward_factors == given.forward_factors
    assert Plan.from_yaml(rich.to_yaml(), "") == rich
    own, before = rich.scales(optimizer)["branches.1.read.weight"], plan.scales(optimizer)["branches.1.read.weight"]
    assert before.lr / own.lr == (4 if optimizer == "adamw" else 16)
    with pytest.raises(ValueError, match="alpha=4"):
        replace(plan, parameterization=Parameterization.COMPLETEP, tuned=tuned)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_multiplier_says_what_std_and_learning_rate_say(optimizer: Any) -> None:
    def build() -> CausalTransformer:
        return plain(optimizer=optimizer, eps=0.0)

    data = TOKENS, TOKENS
    trainer = {"max_steps": 4, "accelerator": "cpu"}
    training = Training.of(build, build, lambda base: [MLUCallback(base, residual="hook")], data=data, trainer=trainer)
    plan = training.plan()
    for role in ("branch_out", "readout"):
        # of SGD, whose gradient has the multiplier, too, the update of the product is lr times its square
        scaled = {"std": 2.0, "lr": 2.0 if optimizer == "adamw" else 4.0}
        one = training.run(plan, {role: {"multiplier": 2.0}}, 0).value
        assert training.run(plan, {role: scaled}, 0).value == pytest.approx(one, rel=1e-5)
        assert training.run(plan, {}, 0).value != pytest.approx(one, rel=1e-5)
