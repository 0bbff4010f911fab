"""Whether an optimizer that is not torch's uses the learning rates of its groups: seen from its first update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlu_lightning.application.optimizer_rules import multiplied
from mlu_lightning.application.shadow_groups import Shadow
from mlu_lightning.table import OptimizerFamily
from mlu_lightning.utilities.names import listed
from mlu_lightning.utilities.samples import Sample


def refuse_one_rate(
    shadows: list[Shadow],
    own: Mapping[str, Tensor],
    families: Mapping[str, OptimizerFamily],
    samples: tuple[Mapping[str, Sample], Mapping[str, Sample], Mapping[str, Sample]],
) -> None:
    """Refuse an update that is as large for all parameters where the plan gives them different learning rates.

    ``samples`` are of weights before it, of weights after it, and of gradients.
    """
    names = {id(parameter): name for name, parameter in own.items()}
    rates: dict[str, tuple[float, float]] = {}  # that was used, and factor of the plan
    for shadow in shadows:
        factor, eps = float(multiplied(1.0, shadow.factors.get("lr", 1.0))), float(shadow.given.get("eps", 0.0))
        for name in (names[id(p)] for p in shadow.given.get("params", ()) if id(p) in names):
            if all(name in each for each in samples):
                before, after, gradient = (each[name].values.double() for each in samples)
                rate = _rate(before, after, gradient, eps if families[name] in _BY_SIGN else None)
                if rate is not None:
                    rates[name] = rate, factor
    used, factors = (tuple(pair[place] for pair in rates.values()) for place in (0, 1))
    if used and max(factors) > 1.1 * min(factors) and max(used) < 1.01 * min(used):
        raise ValueError(
            f"An optimizer has updated {listed(sorted(rates))} as if all had one learning rate, where the plan gives each "
            "its own: its step uses another number than the lr of its parameter groups. Let it multiply by group['lr'] of "
            "the group that it updates, as it is in that step; copies of it, and lr in defaults, are the base's."
        )


_BY_SIGN = (OptimizerFamily.ADAM, OptimizerFamily.ADAMW)


def _rate(before: Tensor, after: Tensor, gradient: Tensor, eps: float | None) -> float | None:
    """Learning rate of a first update, if it is one: along the gradient, or along its sign, with a decay."""
    moved = before - after
    along = gradient if eps is None else gradient / (gradient.abs() + eps).clamp_min(1e-300)
    directions = torch.stack([along, before], dim=1)
    if not (bool(moved.any()) and bool(along.any()) and bool(directions.isfinite().all())):
        return None
    found = torch.linalg.lstsq(directions, moved[:, None], driver="gelsd").solution
    fits = (directions @ found - moved[:, None]).norm() < 0.01 * moved.norm()
    return float(found[0]) if fits and found[0] > 0 else None
