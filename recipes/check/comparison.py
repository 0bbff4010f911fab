"""Our check next to the coordinate check of microsoft/mup: the same networks, the same faults, and what each finds.

*plan* is the package's Transformer with the package's plan and its scaled AdamW, and *mup* is the same Transformer as mup's
README makes it, with ``MuReadout`` and ``MuAdamW`` (``mup_transformer.py``), which has no rule for eps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import process_time

from lightning.pytorch import Callback, LightningModule
from rich.table import Table
from torch.optim import Optimizer

from mlu_lightning import Plan, Shape, attach_multipliers, check, initialize, scale_optimizer
from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import OptimizerFamily, Role
from recipes.check.plan_faults import FACTORS, Fault, FaultyCallback, faulty
from recipes.common.studies import check_command, console, in_processes, save_json, study_command
from recipes.common.text import text_batches

SUBJECTS = ("plan", "mup")
_ROLES = (Role.EMBEDDING, Role.BRANCH_IN, Role.BRANCH_OUT, Role.BRANCH_NORM, Role.STREAM_NORM, Role.READOUT)
_STEPS, _VOCABULARY, _CONTEXT, _DEPTH, _EMBEDDING, _HEADS = 4, 128, 32, 2, 32, 2


@dataclass(frozen=True)
class Case:
    """Networks that are checked in both ways."""

    subject: str  # one of SUBJECTS
    fault: Fault | None  # what is wrong with it
    eps: bool  # whether eps is large next to the gradients
    seed: int  # of the first network of every width
    seeds: int  # networks of every width
    factors: tuple[int, ...]  # widths, relative to the narrowest

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
    """What one of the two checks said."""

    verdict: str  # "pass", "fail", or "undecided", which ours has
    says: str  # the role that ours names first, or how many of mup's curves are off and the first or steepest of them
    named: bool  # whether that is the role with the fault
    seconds: float  # of one core that the check took


@dataclass(frozen=True)
class Outcome:
    """What both said."""

    case: Case
    ours: Answer
    mups: Answer


def run(
    output: str = "check-comparison", workers: int = 2, seeds: int = 4, right: int = 10, quick: bool = False
) -> None:
    """Check networks with every fault, and networks without one, in both ways.

    Args:
        output: folder of the outcomes.
        workers: number of cases at a time, each on one core.
        seeds: networks of every width in a check.
        right: checks of networks without a fault, each with other seeds.
    """
    check_command(workers, seeds)
    if find_spec("mup") is None or find_spec("pandas") is None:
        sys.exit("The study compares with mup: pip install pandas, and pip install --no-deps mup.")
    terminal = console(155)
    outcomes = in_processes(measure, cases(seeds, right, quick), workers, "cases", terminal)
    save_json(outcomes, Path(output) / "outcomes.json")
    terminal.print(_faults_table([outcome for outcome in outcomes if outcome.case.wrong]))
    terminal.print(_right_table([outcome for outcome in outcomes if not outcome.case.wrong]))


def cases(seeds: int, right: int, quick: bool) -> list[Case]:
    """List what is checked: every fault that there is along the width, and nothing wrong with ever other seeds."""
    factors = (1, 2, 4) if quick else (1, 2, 4, 8)
    faults = [Fault(role, factor) for role in _ROLES for factor in FACTORS]
    faults = [fault for fault in faults if fault.is_possible(OptimizerFamily.ADAMW)]
    faults.remove(Fault(Role.BRANCH_OUT, "multiplier"))  # it is 1/l, and only widths grow
    if quick:
        faults = [fault for fault in faults if fault.role is Role.BRANCH_IN and fault.factor != "std"]
    found = []
    for subject in SUBJECTS:
        scales_eps = subject == "plan"
        own = [fault for fault in faults if scales_eps or fault.factor != "eps"]
        found += [Case(subject, fault, fault.factor == "eps", 1000, seeds, factors) for fault in own]
        for eps, number in ((False, right), (True, right if scales_eps else 1)):
            found += [Case(subject, None, eps, seeds * place, seeds, factors) for place in range(number)]
    return found


def measure(case: Case) -> Outcome:
    """Check a case in both ways."""
    return Outcome(case, _ours(case), _mups(case))


def _ours(case: Case) -> Answer:
    def build(depth: int, hidden: int, embedding: int) -> LightningModule:
        return _transformer(case, embedding)

    def callbacks(base: LightningModule) -> list[Callback]:
        return [FaultyCallback(case.fault, base)] if case.subject == "plan" else []

    begin = process_time()
    factors = (*case.factors, 2 * case.factors[-1])  # all grow together by all of these but the last
    settings = {"axes": ["together"], "factors": factors, "seeds": case.seeds, "steps": _STEPS, "seed": case.seed}
    report = check(build, Shape(1, 1, 1), text_batches(), callbacks=callbacks, **settings)
    seconds = process_time() - begin
    first = report.causes[0].role if report.causes else ""
    return Answer(report.verdict, first, first in case.wrong, seconds)


def _mups(case: Case) -> Answer:
    from recipes.check.coordinate_check import coordinate_check, excess, is_off  # which needs mup

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
    # eps so large that updates are proportional to gradients, next to which decay would be all that is seen
    lr, eps, decay = (0.3, 1.0, 0.0) if case.eps else (2**-6, 1e-8, 0.1)
    settings = {"vocabulary": _VOCABULARY, "context": _CONTEXT, "depth": _DEPTH}
    settings |= {"lr": lr, "eps": eps, "weight_decay": decay}
    if case.subject == "mup":
        from recipes.check.mup_transformer import MuTransformer

        return MuTransformer(factor, case.fault, embedding=_EMBEDDING, heads=_HEADS, **settings)
    return CausalTransformer(embedding=_EMBEDDING * factor, heads=_HEADS * factor, **settings)


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
        scale_optimizer(optimizer, module, plan)
        return optimizer

    vars(module)["configure_optimizers"] = scaled
    return module


def _optimizer(module: CausalTransformer) -> Optimizer:
    return module.configure_optimizers()


def _faults_table(outcomes: Sequence[Outcome]) -> Table:
    """A line for every fault, and how many of them were found and named."""
    table = Table("in", "fault", "ours", "names first", "s", "mup's", "curves off: slope of the first", "s")
    table.columns[4].justify = table.columns[7].justify = "right"
    for subject in SUBJECTS:
        found = [outcome for outcome in outcomes if outcome.case.subject == subject]
        for outcome in found:
            table.add_row(subject, str(outcome.case), *_cells(outcome.ours), *_cells(outcome.mups))
        ours, mups = (
            f"{sum(answer.verdict == 'fail' for answer in answers)} found, {sum(answer.named for answer in answers)} named"
            for answers in ([outcome.ours for outcome in found], [outcome.mups for outcome in found])
        )
        table.add_row(subject, f"all {len(found)}", ours, "", "", mups, "", "", end_section=True, style="bold")
    return table


def _cells(answer: Answer) -> tuple[str, str, str]:
    verdict = {"fail": "found, named" if answer.named else "found", "pass": "-"}.get(answer.verdict, answer.verdict)
    return verdict, answer.says, f"{answer.seconds:.1f}"


def _right_table(outcomes: Sequence[Outcome]) -> Table:
    """What both said of networks without a fault."""
    ours = "ours: pass", "undecided", "fail", "s"
    table = Table("in", "eps", "checks", *ours, "mup's: pass", "fail", "s", title="no fault")
    for subject, eps in dict.fromkeys((outcome.case.subject, outcome.case.eps) for outcome in outcomes):
        found = [outcome for outcome in outcomes if (outcome.case.subject, outcome.case.eps) == (subject, eps)]
        cells = []
        for name, verdicts in (("ours", ("pass", "undecided", "fail")), ("mups", ("pass", "fail"))):
            answers: list[Answer] = [getattr(outcome, name) for outcome in found]
            cells += [str(sum(answer.verdict == verdict for answer in answers)) for verdict in verdicts]
            cells.append(f"{sum(answer.seconds for answer in answers) / len(answers):.1f}")
        table.add_row(subject, "large" if eps else "", str(len(found)), *cells)
    return table


main = study_command(run, "python -m recipes.check.comparison")

if __name__ == "__main__":
    main()
