"""Fingerprints tell plans of different runs apart, and only these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning.entries import Multiplier, ParameterPlan
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Ratios, Role

PLAN = Plan(
    {"w": ParameterPlan(Role.BRANCH_OUT, (2, 3), (2, 3), Ratios(2.0, 1.5, 1.0), 0.02, (3, 2))},
    (),
    (),
    (Multiplier("m", "branch", 0.5, Site("a", "output", 0), ("w",)),),
)


def with_parameter(**changes: Any) -> Plan:
    return replace(PLAN, parameters={"w": replace(PLAN.parameters["w"], **changes)})


def with_multiplier(**changes: Any) -> Plan:
    return replace(PLAN, multipliers=(replace(PLAN.multipliers[0], **changes),))


@pytest.mark.parametrize(
    "other",
    [
        with_parameter(role=Role.BRANCH_IN),
        with_parameter(shape=(2, 4)),
        with_parameter(ratios=Ratios(2.0, 1.5, 1.0 + 1e-15)),
        with_multiplier(value=0.25),
        with_multiplier(site=Site("b")),
        with_multiplier(folds=()),
        replace(PLAN, alpha=2.0),
    ],
)
def test_fingerprint_tells_plans_apart(other: Plan) -> None:
    assert fingerprint(other) != fingerprint(PLAN)


@pytest.mark.parametrize("same", [with_parameter(base_std=1.0), with_parameter(ratios=Ratios(2, 1.5, 1))])
def test_fingerprint_of_equal_runs_is_equal(same: Plan) -> None:
    assert fingerprint(replace(same, warnings=("read me",), alpha=1)) == fingerprint(PLAN)
