"""Hash the numbers of a plan, to tell whether runs and modules have the same ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple

from mlu_lightning.planning.entries import ParameterPlan
from mlu_lightning.planning.plan import Plan


def fingerprint(plan: Plan) -> str:
    """Hash the numbers of a plan that a run depends on after its initialization: equal runs have equal fingerprints."""
    content = {
        "parameters": {name: [p.row, list(p.shape), *_ratios(p)] for name, p in plan.parameters.items()},
        "multipliers": [[m.name, m.kind, float(m.value), str(m.site), list(m.folds)] for m in plan.multipliers],
        "parameterization": plan.parameterization.value,
        "alpha": float(plan.alpha),
        "horizon": [*map(float, astuple(plan.horizon))],
    }
    if plan.tuned:
        content["tuned"] = plan.tuned
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _ratios(parameter: ParameterPlan) -> list[float]:
    """Ratios to the base; those that most parameters do not have are left out where they are 1."""
    *ratios, uses = map(float, astuple(parameter.ratios))
    rare = uses, parameter.constant_ratio
    return [*ratios, *(rare if rare != (1, 1) else ())]
