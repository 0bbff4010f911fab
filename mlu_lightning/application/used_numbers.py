"""Whether an optimizer that is not torch's uses the numbers of its groups, and no others: seen from its first update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mlu_lightning.application.shadow_groups import Shadow
from mlu_lightning.table import OptimizerFamily, Scale
from mlu_lightning.utilities.names import listed
from mlu_lightning.utilities.samples import Sample


def refuse_other_numbers(
    shadows: list[Shadow],
    own: Mapping[str, Tensor],
    planned: Callable[[str], tuple[OptimizerFamily, Scale]],
    samples: tuple[Mapping[str, Sample], Mapping[str, Sample], Mapping[str, Sample]],
) -> None:
    """Refuse an update whose lr, eps or weight decay is not in proportion to the plan's, among shadows of one group.

    ``samples`` are of weights before it, of weights after it, and of gradients.
    """
    names = {id(parameter): name for name, parameter in own.items()}
    used: defaultdict[str, dict[str, tuple[float, float]]] = defaultdict(dict)  # number, and what it should be
    for shadow in shadows:
        members = [names[id(p)] for p in shadow.given.get("params", ()) if id(p) in names]
        for name in (name for name in members if all(name in each for each in samples)):
            family, scale = planned(name)
            before, after, gradient = (each[name].values.double() for each in samples)
            if family is OptimizerFamily.ADAM:  # in the gradient
                gradient = gradient + float(shadow.given.get("weight_decay") or 0.0) * before
            numbers = _numbers(before, after, gradient, family in _BY_SIGN) if family in _FITTED else {}
            for key, number in numbers.items():
                # what the group does not have is the step's own, and so the base's
                used[key][name] = number, float(shadow.given.get(key) or getattr(scale, key))
    for key, of_names in used.items():
        wanted, ratios = zip(*((each, number / each) for number, each in of_names.values()), strict=True)
        if max(wanted) > 1.1 * min(wanted) and max(ratios) > 1.1 * min(ratios):
            raise ValueError(
                f"An optimizer has updated {listed(sorted(of_names))} with a number of its own for {key}: one for all, from "
                "elsewhere than its parameter groups, or one that depends on a weight's size or shape, as in LARS and LAMB. "
                f"Let its step use group[{key!r}] of the group that it updates, as it is in that step, and nothing else; "
                "copies of it, and what is in defaults, are the base's."
            )


_BY_SIGN = (OptimizerFamily.ADAM, OptimizerFamily.ADAMW)
_FITTED = (*_BY_SIGN, OptimizerFamily.SGD)
_ENTRIES = 16  # of a parameter of which numbers can be told


def _numbers(before: Tensor, after: Tensor, gradient: Tensor, by_sign: bool) -> dict[str, float]:
    """Numbers of a first update, if it is lr·(g + decay·w), or lr·(g/(|g| + eps) + decay·w)."""
    moved, size = before - after, gradient.abs()
    if len(moved) < _ENTRIES or not (bool(moved.any()) and bool(gradient.any())):
        return {}
    # both sides times |g| + eps: linear in lr, eps, lr·decay and lr·decay·eps
    columns = [gradient, -moved, before * size, before] if by_sign else [gradient, before]
    matrix = torch.stack(columns, dim=1)
    lengths = matrix.norm(dim=0).clamp_min(1e-300)
    if not bool(matrix.isfinite().all()):
        return {}
    wanted = (moved * size if by_sign else moved)[:, None]
    found = torch.linalg.lstsq(matrix / lengths, wanted, driver="gelsd").solution.flatten() / lengths
    lr, eps, decay = (*found.tolist(),)[:3] if by_sign else (found[0].item(), 0.0, found[1].item())
    eps = max(eps, 0.0)
    along = lr * (gradient / (size + eps).clamp_min(1e-300) if by_sign else gradient)
    rest = float((moved - along - decay * before).norm())
    if lr <= 0 or rest > 0.01 * float(moved.norm()):
        return {}
    numbers = {"lr": lr}
    if eps > 0.1 * float(size.median()):
        numbers["eps"] = eps
    if decay > 0 and rest < 0.01 * float((decay * before).norm()):
        numbers["weight_decay"] = decay / lr
    return numbers
