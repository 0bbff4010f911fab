"""Our check beside the coordinate check of microsoft/mup: the same networks, the same faults, and what each of them finds.

    pip install pandas
    pip install --no-deps mup
    python -m recipes.check.comparison

Without ``--no-deps``, mup installs torchvision, and with that another torch. pandas is all else that its check needs.

mup's parameterization is of width alone. So a causal Transformer grows in width alone here, heads and embedding together,
where µP and MLU have the same numbers. There is one wrong factor after the other (``plan_faults.py``) in two of them:
*plan* is the package's Transformer with the package's plan and its scaled AdamW, and *mup* is the same Transformer as mup's
README makes it, with ``MuReadout`` and ``MuAdamW`` (``mup_transformer.py``), which has no rule for eps. Each of them is
checked in both ways, with the same widths, seeds and number of updates, on one core. Ours *found* a fault if its verdict is
fail, and *named* it if the first role that it names is the one that is wrong. mup's draws curves and leaves the verdict to
its reader; ``coordinate_check.py`` reads them by the rule that ours has for its slopes. There a fault is named if it is in
the module whose curve is the first to be off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import process_time

from lightning.pytorch import Callback, LightningModule
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from mlu_lightning import Plan, Shape, attach_multipliers, check, initialize, scale_optimizer
from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import OptimizerFamily, Role
from recipes.check.plan_faults import FACTORS, Fault, FaultyCallback, faulty
from recipes.check.planted_faults import text_batches
from recipes.common.gradient_descent import check_command, command, in_processes

__all__ = ["SUBJECTS", "Case", "Outcome", "cases", "main", "measure", "run"]

SUBJECTS = ("plan", "mup")


@dataclass(frozen=True)
class Case:
    """Networks that are checked in both ways.

    Args:
        subject: one of :data:`SUBJECTS`.
        fault: what is wrong with it, None if nothing is.
        eps: whether eps is large beside the gradients.
        seed: of the first network of every width.
        seeds: networks of every width.
        factors: widths, next to the narrowest.
    """

    subject: str
    fault: Fault | None
    eps: bool
    seed: int
    seeds: int
    factors: tuple[int, ...]

    @property
    def wrong(self) -> tuple[Role, ...]:
        """Roles that have a wrong number, which all have whose eps does not scale."""
        if self.fault is not None:
            return (self.fault.role,)
        return _ROLES if self.subject == "mup" and self.eps else ()

    def __str__(self) -> str:
        if self.fault is not None:
            return str(self.fault)
        return "eps of every role" if self.wrong else "no fault"


@dataclass(frozen=True)
class Answer:
    """What one of the two checks said.

    Args:
        verdict: ``"pass"``, ``"fail"``, or ``"undecided"``, which ours has.
        says: the role that ours names first; how many curves of mup's are off, and the slope of the first of them, or
            the largest slope if none is.
        named: whether that is the role with the fault.
        seconds: of one core that the check took.
    """

    verdict: str
    says: str
    named: bool
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What both said.

    Args:
        case: that was checked.
        ours: our check.
        mups: that of mup.
    """

    case: Case
    ours: Answer
    mups: Answer


def main(args: Sequence[str] | None = None) -> None:
    """Run the study as the command line says.

    Args:
        args: of the command line; by default those of the process.
    """
    command(run, "python -m recipes.check.comparison", args)


def run(
    output: str = "check-comparison", workers: int = 2, seeds: int = 4, right: int = 10, quick: bool = False
) -> None:
    """Check networks with every fault, and networks without one, in both ways.

    Args:
        output: folder of the outcomes.
        workers: number of cases at a time, each on one core.
        seeds: networks of every width in a check.
        right: checks of networks without a fault, each with other seeds.
        quick: whether to try the machinery only, with few faults and widths (``--quick``).
    """
    check_command(workers, seeds)
    if find_spec("mup") is None or find_spec("pandas") is None:
        sys.exit("The study compares with mup: pip install pandas, and pip install --no-deps mup.")
    console = Console(width=None if sys.stdout.isatty() else 155)
    outcomes = in_processes(measure, cases(seeds, right, quick), workers, "cases", console)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(one), "case": {**asdict(one.case), "fault": str(one.case)}} for one in outcomes]
    (folder / "outcomes.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    console.print(_faults_table([one for one in outcomes if one.case.wrong]))
    console.print(_right_table([one for one in outcomes if not one.case.wrong]))


def cases(seeds: int, right: int, quick: bool) -> list[Case]:
    """List what is checked: every fault that there is along the width, and nothing wrong with ever other seeds.

    Args:
        seeds: networks of every width in a check.
        right: checks without a fault.
        quick: whether to take few faults and widths.
    """
    factors = (1, 2, 4) if quick else (1, 2, 4, 8)
    faults = [Fault(role, factor) for role in _ROLES for factor in FACTORS]
    faults = [fault for fault in faults if fault.is_possible(OptimizerFamily.ADAMW) and _is_in_widths(fault)]
    if quick:
        faults = [fault for fault in faults if fault.role is Role.BRANCH_IN and fault.factor != "std"]
    found = []
    for subject in SUBJECTS:
        own_eps = subject == "plan"
        found += [
            Case(subject, fault, fault.factor == "eps", 1000, seeds, factors)
            for fault in faults
            if own_eps or fault.factor != "eps"
        ]
        found += [Case(subject, None, False, seeds * number, seeds, factors) for number in range(right)]
        found += [
            Case(subject, None, True, seeds * number, seeds, factors) for number in range(right if own_eps else 1)
        ]
    return found


def measure(case: Case) -> Outcome:
    """Check a case in both ways.

    Args:
        case: which one.
    """
    return Outcome(case, _ours(case), _mups(case))


def _ours(case: Case) -> Answer:
    def build(depth: int, hidden: int, embedding: int) -> LightningModule:
        return _transformer(case, embedding)

    def callbacks(base: LightningModule) -> list[Callback]:
        return [FaultyCallback(case.fault, base)] if case.subject == "plan" else []

    begin = process_time()
    report = check(
        build,
        Shape(1, 1, 1),
        text_batches(),
        callbacks=callbacks,
        axes=["together"],
        factors=(*case.factors, 2 * case.factors[-1]),  # all grow together by all of these but the last
        seeds=case.seeds,
        steps=_STEPS,
        seed=case.seed,
    )
    seconds = process_time() - begin
    first = report.causes[0].role if report.causes else ""
    return Answer(report.verdict, first, first in case.wrong, seconds)


def _mups(case: Case) -> Answer:
    from coordinate_check import coordinate_check, excess, is_off  # which needs mup

    batches = text_batches()
    batch = batches[case.seed % len(batches)]
    begin = process_time()
    curves = coordinate_check(
        lambda factor: _network(case, factor), _optimizer, batch, case.factors, case.seeds, _STEPS, case.seed
    )
    seconds = process_time() - begin
    off = [curve for curve in curves if is_off(curve, "readout")]
    if not off:
        largest = max(curves, key=lambda curve: excess(curve, "readout"))
        return Answer("pass", f"largest {largest}", False, seconds)
    base = _transformer(case, 1)
    roles = Plan.from_model(base, base=base).roles
    named = roles.get(f"{off[0].module}.weight") in case.wrong
    return Answer("fail", f"{len(off)} of {len(curves)}: {off[0]}", named, seconds)


def _transformer(case: Case, factor: int) -> CausalTransformer:
    # eps so large that updates are proportional to gradients, beside which decay would be all that is seen
    lr, eps, decay = (0.3, 1.0, 0.0) if case.eps else (2**-6, 1e-8, 0.1)
    if case.subject == "mup":
        from mup_transformer import MuTransformer

        return MuTransformer(factor, case.fault, _VOCABULARY, _CONTEXT, _DEPTH, _EMBEDDING, _HEADS, lr, eps, decay)
    embedding, heads = _EMBEDDING * factor, _HEADS * factor
    return CausalTransformer(_VOCABULARY, _CONTEXT, _DEPTH, embedding, heads, lr=lr, eps=eps, weight_decay=decay)


def _network(case: Case, factor: int) -> CausalTransformer:
    """Build a network for mup's check, as our check and its callback do."""
    module = _transformer(case, factor)
    if case.subject == "mup":
        return module
    plan = Plan.from_model(module, base=_transformer(case, 1))
    plan = plan if case.fault is None else faulty(plan, case.fault)
    initialize(module, plan)
    attach_multipliers(module, plan)
    make = module.configure_optimizers

    def scaled() -> Optimizer:
        optimizer = make()
        assert isinstance(optimizer, Optimizer)
        scale_optimizer(optimizer, module, plan)
        return optimizer

    vars(module)["configure_optimizers"] = scaled
    return module


def _optimizer(module: nn.Module) -> Optimizer:
    assert isinstance(module, CausalTransformer)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, Optimizer)
    return optimizer


def _is_in_widths(fault: Fault) -> bool:
    """Whether a fault is one where only widths grow: multipliers of branches are 1/l."""
    return fault != Fault(Role.BRANCH_OUT, "multiplier")


def _faults_table(outcomes: Sequence[Outcome]) -> Table:
    """A line for every fault, and how many of them were found and named."""
    table = Table("in", "fault", "ours", "names first", "s", "mup's", "curves off: slope of the first", "s")
    table.columns[4].justify = table.columns[7].justify = "right"
    for subject in SUBJECTS:
        found = [one for one in outcomes if one.case.subject == subject]
        for one in found:
            cells = (*_cells(one.ours), *_cells(one.mups))
            table.add_row(subject, str(one.case), *cells)
        counts = (_counts([one.ours for one in found]), _counts([one.mups for one in found]))
        table.add_row(
            subject, f"all {len(found)}", counts[0], "", "", counts[1], "", "", end_section=True, style="bold"
        )
    return table


def _cells(answer: Answer) -> tuple[str, str, str]:
    verdict = {"fail": "found, named" if answer.named else "found", "pass": "-"}.get(answer.verdict, answer.verdict)
    return verdict, answer.says, f"{answer.seconds:.1f}"


def _counts(answers: Sequence[Answer]) -> str:
    found = sum(one.verdict == "fail" for one in answers)
    return f"{found} found, {sum(one.named for one in answers)} named"


def _right_table(outcomes: Sequence[Outcome]) -> Table:
    """What both said of networks without a fault."""
    table = Table(
        "in", "eps", "checks", "ours: pass", "undecided", "fail", "s", "mup's: pass", "fail", "s", title="no fault"
    )
    for subject, eps in dict.fromkeys((one.case.subject, one.case.eps) for one in outcomes):
        found = [one for one in outcomes if (one.case.subject, one.case.eps) == (subject, eps)]
        cells = []
        for answers, verdicts in (
            ([one.ours for one in found], ("pass", "undecided", "fail")),
            ([one.mups for one in found], ("pass", "fail")),
        ):
            cells += [str(sum(one.verdict == verdict for one in answers)) for verdict in verdicts]
            cells.append(f"{sum(one.seconds for one in answers) / len(answers):.1f}")
        table.add_row(subject, "large" if eps else "", str(len(found)), *cells)
    return table


_STEPS = 4
_VOCABULARY = 128
_CONTEXT = 32
_DEPTH = 2
_EMBEDDING = 32
_HEADS = 2
_ROLES = (Role.EMBEDDING, Role.BRANCH_IN, Role.BRANCH_OUT, Role.BRANCH_NORM, Role.STREAM_NORM, Role.READOUT)


if __name__ == "__main__":
    main()
