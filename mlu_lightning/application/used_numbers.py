"""Whether an optimizer that is not torch's uses the numbers of its groups: seen from its first update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from mlu_lightning.application.optimizer_rules import multiplied
from mlu_lightning.application.shadow_groups import Shadow
from mlu_lightning.table import OptimizerFamily
from mlu_lightning.utilities.names import listed
from mlu_lightning.utilities.samples import Sample


def refuse_one_number(
    shadows: list[Shadow],
    own: Mapping[str, Tensor],
    families: Mapping[str, OptimizerFamily],
    samples: tuple[Mapping[str, Sample], Mapping[str, Sample], Mapping[str, Sample]],
) -> None:
    """Refuse an update at one lr, eps or weight decay for all parameters, where the plan gives them different ones.

    ``samples`` are of weights before it, of weights after it, and of gradients.
    """
    names = {id(parameter): name for name, parameter in own.items()}
    found: defaultdict[str, dict[str, tuple[float, float]]] = defaultdict(dict)  # number that was used, and the factor
    for shadow in shadows:
        factors = {key: float(multiplied(1.0, shadow.factors.get(key, 1.0))) for key in ("lr", "eps", "weight_decay")}
        eps = float(shadow.given.get("eps", 0.0))
        for name in (names[id(p)] for p in shadow.given.get("params", ()) if id(p) in names):
            if all(name in each for each in samples):
                before, after, gradient = (each[name].values.double() for each in samples)
                possible = (eps, eps / factors["eps"]) if families[name] in _BY_SIGN else (None,)
                fits = {each: _numbers(before, after, gradient, each) for each in possible}
                good = [each for each, numbers in fits.items() if numbers]
                alone = {} if len(good) != 1 or good[0] is None or len(fits) == 1 else {"eps": good[0]}
                for key, number in (fits[good[0]] | alone if good else {}).items():
                    found[key][name] = number, factors[key]
    for key, of_names in found.items():
        used, factors_of = (tuple(pair[place] for pair in of_names.values()) for place in (0, 1))
        if max(factors_of) > 1.1 * min(factors_of) and max(used) < 1.01 * min(used):
            raise ValueError(
                f"An optimizer has updated {listed(sorted(of_names))} at one {key} for all, where the plan gives each its "
                f"own: its step uses another number than that of its parameter groups. Let it use group[{key!r}] of the "
                "group that it updates, as it is in that step; copies of it, and what is in defaults, are the base's."
            )


_BY_SIGN = (OptimizerFamily.ADAM, OptimizerFamily.ADAMW)


def _numbers(before: Tensor, after: Tensor, gradient: Tensor, eps: float | None) -> dict[str, float]:
    """Learning rate and decay of a first update, if it is one: along the gradient, or along its sign."""
    moved = before - after
    along = gradient if eps is None else gradient / (gradient.abs() + eps).clamp_min(1e-300)
    directions = torch.stack([along, before], dim=1)
    if not (bool(moved.any()) and bool(along.any()) and bool(directions.isfinite().all())):
        return {}
    lr, decay = torch.linalg.lstsq(directions, moved[:, None], driver="gelsd").solution.flatten().tolist()
    rest = float((moved - lr * along - decay * before).norm())
    if lr <= 0 or rest > 0.01 * float(moved.norm()):
        return {}
    return {"lr": lr} | (
        {"weight_decay": decay / lr} if decay > 0 and rest < 0.01 * float((decay * before).norm()) else {}
    )
