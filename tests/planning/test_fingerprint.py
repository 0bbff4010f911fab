"""Fingerprints tell plans of different runs apart, and only these."""

from dataclasses import replace
from typing import Any

import pytest
from helpers.plans import entry

from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.planning.horizon import Horizon
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Parameterization, Ratios, Role

OUT = entry(Role.BRANCH_OUT, (2, 3), Ratios(2.0, 1.5, 1.0), base_shape=(2, 3), base_std=0.02, fans=(3, 2))
PLAN = Plan({"w": OUT}, (), (), (Multiplier("m", "branch", 0.5, Site("a", "output", 0), ("w",)),))


def with_parameter(**changes: Any) -> Plan:
    return replace(PLAN, parameters={"w": replace(PLAN.parameters["w"], **changes)})


def with_multiplier(**changes: Any) -> Plan:
    return replace(PLAN, multipliers=(replace(PLAN.multipliers[0], **changes),))


def test_fingerprint_does_not_change_between_versions() -> None:
    """Written down once, it changes with what is hashed and with nothing else."""
    assert fingerprint(PLAN) == "eaba5ce391ff8df656f53de1fa189da5b4b10b2629c53a1ec4d2a106bdf2677b"


@pytest.mark.parametrize(
    "other",
    [
        with_parameter(role=Role.BRANCH_IN),
        with_parameter(shape=(2, 4)),
        with_parameter(base_fans=(1, 2)),
        with_multiplier(value=0.25),
        with_multiplier(site=Site("b")),
        with_multiplier(folds=()),
        *(replace(PLAN, parameterization=each) for each in Parameterization if each is not Parameterization.MLU),
        *(replace(PLAN, horizon=horizon) for horizon in (Horizon(2.0), Horizon(1.0, 2.0))),
        replace(PLAN, alpha=2.0),
    ],
)
def test_fingerprint_tells_plans_apart(other: Plan) -> None:
    assert fingerprint(other) != fingerprint(PLAN)


@pytest.mark.parametrize("same", [with_parameter(base_std=1.0), with_parameter(fans=(6, 2), base_fans=(4, 2))])
def test_fingerprint_of_equal_runs_is_equal(same: Plan) -> None:
    assert fingerprint(replace(same, warnings=("read me",), alpha=1, horizon=Horizon())) == fingerprint(PLAN)
