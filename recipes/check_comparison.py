"""The check of this package and the coordinate check of microsoft/mup, on the same faults of the same model.

    pip install --no-deps mup pandas tqdm
    python recipes/check_comparison.py

Without ``--no-deps``, mup installs torchvision, and with that another torch. Only the width grows, heads and embedding
alike, because mup does not change depth, and there the MLU parameterization is µP. Every plan has one wrong factor
(``plan_faults.py``); modules, plans, optimizers and seeds are the same for both, and so are batches, of which the coordinate
check takes the first one in every step, as by default.

The coordinate check records the mean absolute value of what every submodule returns, at every step, and leaves it to the
user to look at the curves. Here they are read as its documentation says, with the bound that the check of this package has
for finite networks: a curve that grows with the width at any step is wrong, and so is one that falls at the last step; at
the first ones outputs may fall, because a random readout cancels out. The role that it names is that of the steepest curve.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gradient_descent import check_command, command, in_processes
from lightning.pytorch import LightningModule
from plan_faults import FACTORS, Fault, FaultyCallback, faulty
from planted_faults import text_batches
from rich.console import Console
from rich.table import Table
from torch import nn

from mlu_lightning import Plan, Shape, attach_multipliers, check, initialize, scale_optimizer
from mlu_lightning.checking.quantities import DRIFT
from mlu_lightning.models import CausalTransformer
from mlu_lightning.rules import OptimizerFamily, Role

__all__ = ["Case", "Finding", "Outcome", "compare", "main", "run"]

FACTORS_OF_WIDTH = (1, 2, 4, 8)
STEPS = 4
_BASE = 32
_ROLES = (Role.EMBEDDING, Role.BRANCH_IN, Role.BRANCH_OUT, Role.BRANCH_NORM, Role.STREAM_NORM, Role.READOUT)


@dataclass(frozen=True)
class Case:
    """What both are asked.

    Args:
        fault: of the plan, None if it is right.
        seed: of the first run.
        seeds: runs at every width.
    """

    fault: Fault | None
    seed: int
    seeds: int


@dataclass(frozen=True)
class Finding:
    """What one of them says.

    Args:
        verdict: ``"fail"``, ``"pass"`` or ``"undecided"``.
        role: that it names first, empty if none.
        seconds: that it took.
    """

    verdict: str
    role: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What both say.

    Args:
        case: that they were asked.
        ours: of this package.
        theirs: of mup.
    """

    case: Case
    ours: Finding
    theirs: Finding


def main(args: Sequence[str] | None = None) -> None:
    """Run the comparison as the command line says.

    Args:
        args: of the command line; by default those of the process.
    """
    command(run, Path(__file__).name, args)


def run(workers: int = 2, seeds: int = 4, right: int = 5, quick: bool = False) -> None:
    """Plant every fault that width shows, and ask both.

    Args:
        workers: number of comparisons at a time, each on one core.
        seeds: runs at every width.
        right: number of comparisons without a fault.
        quick: whether to try one fault only (``--quick``).
    """
    check_command(workers, seeds)
    if find_spec("mup") is None:
        sys.exit("mup is not installed: pip install --no-deps mup pandas tqdm")
    console = Console(width=None if sys.stdout.isatty() else 125)
    faults = [Fault(role, factor) for role in _ROLES for factor in FACTORS]
    faults = [fault for fault in faults if fault.is_possible(OptimizerFamily.ADAMW) and _shows_in_width(fault)]
    cases = [Case(fault, 0, seeds) for fault in faults[:1] if quick] or [
        *(Case(fault, 0, seeds) for fault in faults),
        *(Case(None, number * seeds, seeds) for number in range(right)),
    ]
    console.print(_table(in_processes(compare, cases, workers, "comparisons", console)))


def compare(case: Case) -> Outcome:
    """Ask both.

    Args:
        case: what they are asked.
    """
    return Outcome(case, _ours(case), _theirs(case))


def _ours(case: Case) -> Finding:
    begin = perf_counter()
    report = check(
        lambda depth, hidden, embedding: _model(embedding, case.fault),
        Shape(1, 1, _BASE),
        text_batches(),
        callbacks=lambda base: [FaultyCallback(case.fault, base)],
        axes=["embedding"],
        factors=FACTORS_OF_WIDTH,
        seeds=case.seeds,
        steps=STEPS,
        seed=case.seed,
    )
    first = report.causes[0].role if report.causes else ""
    return Finding(report.verdict, first, perf_counter() - begin)


def _theirs(case: Case) -> Finding:
    from mup.coord_check import _get_coord_data  # the public function makes its optimizers itself

    begin = perf_counter()
    batch = text_batches()[0]
    plans: dict[nn.Module, Plan] = {}
    base = Plan.from_model(_model(_BASE, case.fault), batch, base=_model(_BASE, case.fault))

    def lazy(width: int) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            module = _model(width, case.fault)
            plan = Plan.from_model(module, batch, base=base)
            plans[module] = plan if case.fault is None else faulty(plan, case.fault)
            initialize(module, plans[module], seed=torch.initial_seed())
            attach_multipliers(module, plans[module])
            return module

        return build

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = module.configure_optimizers()  # type: ignore[operator]  # a LightningModule
        scale_optimizer(made, module, plans[module])
        return made

    torch.manual_seed(case.seed)
    frame = _get_coord_data(
        {_BASE * factor: lazy(_BASE * factor) for factor in FACTORS_OF_WIDTH},
        [(batch[:, :-1], batch[:, 1:].flatten())],
        optimizer,
        nsteps=STEPS,
        flatten_output=True,
        cuda=False,
        nseeds=case.seeds,
        show_progress=False,
    )
    slopes = _slopes(frame)
    wrong = {
        (module, step): slope
        for (module, step), slope in slopes.items()
        if slope > DRIFT or (step == STEPS and slope < -DRIFT)
    }
    if not wrong:
        return Finding("pass", "", perf_counter() - begin)
    steepest, _ = max(wrong, key=lambda key: abs(wrong[key]))
    return Finding("fail", _role_of(steepest, base), perf_counter() - begin)


def _model(embedding: int, fault: Fault | None) -> LightningModule:
    # with eps so large, updates are proportional to gradients, beside which decay would be all that is seen
    lr, eps, decay = (0.3, 1.0, 0.0) if fault is not None and fault.factor == "eps" else (2**-6, 1e-8, 0.1)
    heads = embedding // 16
    return CausalTransformer(128, 32, 2, embedding, heads, mlp_hidden=64 * heads, lr=lr, eps=eps, weight_decay=decay)


def _shows_in_width(fault: Fault) -> bool:
    """Multipliers of branches are powers of the depth alone."""
    return fault.factor != "multiplier" or fault.role is Role.READOUT


def _slopes(frame: Any) -> dict[tuple[str, int], float]:
    """Slope of log l1 against log width for every submodule and step, over the mean of seeds."""
    means = frame.groupby(["module", "t", "width"])["l1"].mean()
    curves: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for (module, step, width), size in means.items():
        curves[module, step].append((np.log(width), np.log(size)))
    return {key: float(np.polyfit(*np.array(curve).T, 1)[0]) for key, curve in curves.items()}


def _role_of(module: str, plan: Plan) -> str:
    """Role of the matrix, or else of the gain, that a submodule has, or that is the last one in it."""
    roles = [one.role for name, one in plan.parameters.items() if name.startswith(f"{module}.") or not module]
    matrices = [role for role in roles if role.is_matrix]
    return str((matrices or roles or [""])[-1])


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("", "mlu_lightning", "names", "seconds", "mup", "names", "seconds")
    faults = [one for one in outcomes if one.case.fault is not None]
    for one in faults:
        cells = [cell for finding in (one.ours, one.theirs) for cell in _cells(finding, one.case.fault)]
        table.add_row(str(one.case.fault), *cells)
    table.add_section()
    for title, part in (("found", _is_found), ("named", _is_named)):
        counts = [sum(part(finding(one), one.case.fault) for one in faults) for finding in (_first, _second)]
        table.add_row(f"{title}, of {len(faults)}", str(counts[0]), "", "", str(counts[1]), "", "")
    rights = [one for one in outcomes if one.case.fault is None]
    if rights:
        passed = [sum(finding(one).verdict == "pass" for one in rights) for finding in (_first, _second)]
        table.add_row(f"no fault: pass, of {len(rights)}", str(passed[0]), "", "", str(passed[1]), "", "")
    seconds = [sum(finding(one).seconds for one in outcomes) / len(outcomes) for finding in (_first, _second)]
    table.add_row("mean", "", "", f"{seconds[0]:.1f}", "", "", f"{seconds[1]:.1f}")
    return table


def _first(outcome: Outcome) -> Finding:
    return outcome.ours


def _second(outcome: Outcome) -> Finding:
    return outcome.theirs


def _is_found(finding: Finding, _: Fault | None) -> bool:
    return finding.verdict == "fail"


def _is_named(finding: Finding, fault: Fault | None) -> bool:
    return fault is not None and finding.role == fault.role.value


def _cells(finding: Finding, fault: Fault | None) -> tuple[str, str, str]:
    mark = " ✓" if _is_named(finding, fault) else ""
    return finding.verdict, f"{finding.role}{mark}", f"{finding.seconds:.1f}"


if __name__ == "__main__":
    main()
