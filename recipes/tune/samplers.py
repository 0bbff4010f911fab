"""Which search finds the best factors in 150 trials? Optuna's samplers and a trust region, on quarter-second runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from optuna.samplers import CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from rich.table import Table

from mlu_lightning.models import CausalTransformer
from mlu_lightning.tuning.found import Estimate
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.text import Text

ROLES = {"embedding": ("tokens",), "branch_in": ("query", "key", "value", "read"), "branch_out": ("out", "write")}
"""Parts of the names of a role's parameters; the readout is what is left."""
OCTAVES = 4.0
"""Factors of std are between 2^-4 and 2^4, and those of learning rates, too."""
DIMENSIONS = [f"{role}.{what}" for role in (*ROLES, "readout") for what in ("lr", "std")]


@dataclass(frozen=True)
class Search:
    """One search: what a sampler found with a seed, and what became of it with other seeds of the weights."""

    sampler: str
    seed: int
    best: list[float]  # least loss so far, after each trial
    default: float = math.nan  # loss with all factors at 1, over other seeds
    found: float = math.nan  # loss at the best point, over the same seeds


class TrustRegion(RandomSampler):
    """Draws at random ten times, and then from a box around the best point.

    It is of 2 octaves to each side, and halves, to 1/4, with every 20 trials without gain.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._draws = np.random.default_rng(seed)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """All dimensions, when there are enough trials."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return dict(done[0].distributions) if len(done) >= 10 else {}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, float]:
        """Draw from the box."""
        if not search_space:
            return {}
        best = study.best_trial
        radius = max(0.25, 2.0 * 0.5 ** ((trial.number - best.number) // 20))
        return {
            name: float(np.clip(best.params[name] + self._draws.uniform(-radius, radius), space.low, space.high))
            for name, space in search_space.items()
        }


SAMPLERS = {
    "TPE": lambda seed: TPESampler(multivariate=True, seed=seed),
    "CMA-ES": lambda seed: CmaEsSampler(sigma0=1.5, seed=seed),
    "trust region": TrustRegion,
}


def search_factors(sampler: str, seed: int, trials: int, steps: int) -> Search:
    """Search from the default, and train the best point and the default again with three other seeds."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=SAMPLERS[sampler](seed))
    study.enqueue_trial(dict.fromkeys(DIMENSIONS, 0.0))

    def objective(trial: optuna.Trial) -> float:
        return train({name: trial.suggest_float(name, -OCTAVES, OCTAVES) for name in DIMENSIONS}, seed, steps)

    study.optimize(objective, n_trials=trials)
    best = np.minimum.accumulate([trial.value for trial in study.trials]).tolist()
    again = range(100 * seed + 1000, 100 * seed + 1003)
    points = dict.fromkeys(DIMENSIONS, 0.0), study.best_params
    return Search(sampler, seed, best, *(fmean(train(point, other, steps) for other in again) for point in points))


def train(exponents: Mapping[str, float], seed: int, steps: int, lr: float = 2**-4) -> float:
    """Train a small Transformer with factors of two to these powers, as a plan has them at the base; return its loss."""
    torch.manual_seed(seed)
    model = CausalTransformer(256, 16, 1, 16, 1, head_dim=8, mlp_hidden=32)
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            groups.append({"params": [parameter], "lr": lr})
            continue
        role = next((role for role, parts in ROLES.items() if name.split(".")[-2] in parts), "readout")
        with torch.no_grad():
            parameter.mul_(2.0 ** exponents[f"{role}.std"])
        groups.append({"params": [parameter], "lr": lr * 2.0 ** exponents[f"{role}.lr"]})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 5, 1 - step / steps))
    training, validation = _batches(steps, seed)
    for batch in training:
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss = _loss(model, validation).item()
    return loss if math.isfinite(loss) else 10.0


def sampler_table(searches: Sequence[Search]) -> Table:
    """Least loss after 50, 100 and all trials, and the gain over the default with other seeds, over all searches."""
    table = number_table("sampler", "searches", "after 50", "after 100", "after all", "gain with other seeds")
    for name in dict.fromkeys(search.sampler for search in searches):
        own = [search for search in searches if search.sampler == name]
        columns = [[one.best[n - 1] for one in own if len(one.best) >= n] for n in (50, 100)]
        columns += [[one.best[-1] for one in own], [one.default - one.found for one in own]]
        table.add_row(name, str(len(own)), *(Estimate.over(of).text(3) if of else "-" for of in columns))
    return table


@cache
def _batches(steps: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Batches for training, and one for validation."""
    data = Text(16, steps, 16, seed, 16)
    return [*data.train_dataloader()], torch.cat([*data.val_dataloader()])


def _loss(model: CausalTransformer, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
