"""Does one set of factors help Transformers that it was not found on? One search over three, and others that test it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from mlu_lightning.planning.tuned import Tuned
from mlu_lightning.tuning import Tuning
from mlu_lightning.tuning.found import Estimate, paired
from mlu_lightning.tuning.space import DEFAULT_ROLES
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.tune.runs import Run, tune_at
from recipes.tune.small_bases import BASES, Change, Comparison, Networks


def with_factors(models: Mapping[str, Change], tuned: Tuned) -> dict[str, Change]:
    """Models, each with those of the factors of which it has the role."""
    found = {}
    for name, model in models.items():
        roles = model.training(1, 0, 0).plan().roles.values()
        own = {key: {w: f for w, f in of.items() if key in roles or w == "multiplier"} for key, of in tuned.items()}
        found[name] = replace(model, tuned={key: of for key, of in own.items() if of})
    return found


def search(names: Sequence[str], alone: Comparison, runs: Sequence[Run], *place: Any, **limits: Any) -> Tuning:
    """Search factors with which the mean of losses, each in units of its noise, is least."""
    models, units = [alone.changes[name] for name in names], [stdev(alone.losses(runs, name)[0]) for name in names]
    rates = [2.0 ** alone.best(runs, name) for name in names]
    roles = (*DEFAULT_ROLES, "readout.multiplier")  # of which a tied readout has nothing else
    build = partial(Networks, models, rates, units)
    return tune_at(build, models[0].data(0), models[0].steps, *place, roles=roles, **limits)


def relative(tuned: Tuned) -> Tuned:
    """Factors of the four roles beside a learning rate that is everybody's own, which is that of branch_in."""
    units = {"lr": tuned.get("branch_in", {}).get("lr", 1.0)}
    return {
        key: {what: float(f"{factor / units.get(what, 1.0):.3g}") for what, factor in tuned[key].items()}
        for key in DEFAULT_ROLES
        if key in tuned
    }


def preset_table(models: Comparison, alone: Sequence[Run], preset: Sequence[Run]) -> Table:
    """Losses without and with the factors, each at its best learning rate, and the gain in pairs of seeds."""
    table = number_table("model", "lr alone", "lr", "preset", "lr", "gain")
    for name in models.changes:
        losses = [of[0] for runs in (alone, preset) if (of := models.losses(runs, name))]
        if len(losses) == 2:
            means = [Estimate.over(each).text(3) for each in losses]
            rates = [f"2^{models.best(runs, name):g}" for runs in (alone, preset)]
            table.add_row(name, means[0], rates[0], means[1], rates[1], str(paired(*losses, "min")))
    return table


def gpts(folder: Path, preset: Tuned, terminal: Console, **limits: Any) -> dict[str, Change]:
    """Changes of a GPT, and of two stds factors tuned at the base, a preset, and the plain model at its own rate."""
    found = dict(BASES)
    for name in ("as it is", "all weights of std 1/√D"):
        change = BASES[name]  # whose best learning rate is this one at both bases
        build = partial(Networks, [change], [2**-6])
        tuning = tune_at(build, change.data(0), change.steps, folder / f"std {change.std:.2g}", terminal, **limits)
        found[f"{name}, tuned"] = replace(change, tuned=tuning.found)
        found |= {f"{name}, preset": of for of in with_factors({name: change}, preset).values()}
        found[f"{name}, plain, lr tuned at 4 × widths"] = replace(change, parameterization="sp", tuned_at="4 × widths")
    return found
