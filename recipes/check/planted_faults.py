"""Does the check find what is wrong? Plans with one wrong factor, one after the other, and what the check says of each.

A fault is *found* if the check fails, and *named* if the first role that it names is the one that is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule
from rich.table import Table

from mlu_lightning import Shape, check
from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import OptimizerFamily, Role, Variant
from recipes.check.plan_faults import FACTORS, Factor, Fault, FaultyCallback
from recipes.check.planted_faults_model import Everything, Norms
from recipes.common.studies import check_command, console, in_processes, save_json, study_command
from recipes.common.text import CONTEXT, characters, text_batches


@dataclass(frozen=True)
class Case:
    """A check to be made."""

    model: str  # name in MODELS
    optimizer: str
    fault: Fault | None  # what is wrong with its plan
    eps: bool  # whether eps is large next to the gradients
    seed: int  # of the first run at every shape
    seeds: int  # runs at every shape


@dataclass(frozen=True)
class Outcome:
    """What a check said."""

    case: Case
    verdict: str
    named: tuple[str, ...]  # roles that it names, the most likely cause first
    seconds: float


@dataclass(frozen=True)
class Model:
    """What faults are planted in."""

    build: Callable[..., LightningModule]  # for a shape and an optimizer, its lr, eps and weight decay
    base: Shape  # from which it grows
    rows: Sequence[tuple[Role, Variant | None]]  # roles, and what changes their rows, into which faults are planted


def run(
    output: str = "planted-faults",
    workers: int = 2,
    seeds: int = 3,
    repeats: int = 2,
    right: int = 10,
    quick: bool = False,
) -> None:
    """Check plans with every fault, and plans without one.

    Args:
        output: folder of the outcomes.
        workers: number of checks at a time, each on one core.
        seeds: runs at every shape of a check of a fault, which has three sizes; those without one have the four sizes and
            the seeds of a check by default.
        repeats: checks of every fault, each with other seeds.
        right: checks of the Transformer without a fault, with either optimizer; a third of them of the other models.
    """
    check_command(workers, seeds)
    terminal = console(125)
    outcomes = in_processes(measure, _cases(seeds, repeats, right, quick), workers, "checks", terminal)
    save_json(outcomes, Path(output) / "outcomes.json")
    terminal.print(_faults_table(outcomes))
    terminal.print(_right_table(outcomes))
    for outcome in outcomes:
        if outcome.case.fault is not None and not _is_named(outcome):
            terminal.print(f"{_title(outcome.case)}: {outcome.verdict}, names {', '.join(outcome.named) or 'nothing'}")


def measure(case: Case) -> Outcome:
    """Check a model whose plan may have a fault."""
    model = MODELS[case.model]
    # so large that updates are proportional to gradients, next to which decay would be all that is seen
    lr, eps, decay = (0.3, 1.0, 0.0) if case.eps else (_LEARNING_RATES[case.optimizer], 1e-8, 0.1)
    settings = {"optimizer": case.optimizer, "lr": lr, "eps": eps, "weight_decay": decay}

    def build(depth: int, hidden: int, embedding: int) -> LightningModule:
        return model.build(Shape(depth, hidden, embedding), **settings)

    def callbacks(base: LightningModule) -> list[FaultyCallback]:
        return [FaultyCallback(case.fault, base)]

    begin = perf_counter()
    factors = (1, 2, 4, 8) if case.fault is None else (1, 2, 4)
    sizes = {"factors": factors, "seeds": case.seeds, "seed": case.seed}
    report = check(build, model.base, text_batches(), callbacks=callbacks, **sizes)
    return Outcome(case, report.verdict, tuple(cause.role for cause in report.causes), perf_counter() - begin)


def _transformer(shape: Shape, **settings: Any) -> LightningModule:
    settings |= {"depth": shape.depth, "embedding": shape.embedding, "heads": shape.hidden}
    return CausalTransformer(characters()[1], CONTEXT, mlp_hidden=64 * shape.hidden, **settings)


def _everything(norms: Norms) -> Callable[..., LightningModule]:
    def build(shape: Shape, **settings: Any) -> LightningModule:
        return Everything(characters()[1], shape.depth, shape.hidden, shape.embedding, norms, **settings)

    return build


_BASE = Shape(1, 2, 32)
_PLAIN = (Role.EMBEDDING, Role.BRANCH_IN, Role.BRANCH_OUT, Role.BRANCH_NORM, Role.STREAM_NORM, Role.READOUT)
_FURTHER = (Role.BRANCH_IN_BIAS, Role.BRANCH_HIDDEN, Role.BRANCH_OUT_BIAS, Role.BRANCH_BOUNDED)
_FURTHER += (Role.BRANCH_BOUNDED_MATRIX, Role.READOUT_BIAS)
MODELS = {
    "Transformer": Model(_transformer, Shape(2, 2, 32), [(role, None) for role in _PLAIN]),
    "everything": Model(
        _everything("before"), _BASE, [*((role, None) for role in _FURTHER), (Role.STREAM_MATRIX, Variant.IN_HEAD)]
    ),
    "norms at both ends": Model(_everything("both"), _BASE, [(Role.BRANCH_OUT, Variant.BEFORE_NORM)]),
    "norms after": Model(_everything("after"), _BASE, [(Role.STREAM_NORM, Variant.POST_NORM)]),
}
_SEEDS = 4  # of a check by default
_LEARNING_RATES = {"adamw": 2**-6, "sgd": 0.1}


def _cases(seeds: int, repeats: int, right: int, quick: bool) -> list[Case]:
    """All checks, those that take longest last."""
    if quick:
        return [Case("Transformer", "adamw", Fault(Role.BRANCH_IN, "lr"), False, 0, seeds)]
    cases = []
    for optimizer in _LEARNING_RATES:
        family = OptimizerFamily(optimizer)
        for name, model in MODELS.items():
            if optimizer == "sgd" and name != "Transformer":
                continue
            faults = [Fault(role, factor, variant) for role, variant in model.rows for factor in FACTORS]
            cases += [
                Case(name, optimizer, fault, fault.factor == "eps", 1000 + seeds * number, seeds)
                for fault in faults
                if fault.is_possible(family)
                for number in range(repeats)
            ]
            count = right if name == "Transformer" else right // 3
            cases += [Case(name, optimizer, None, False, _SEEDS * number, _SEEDS) for number in range(count)]
    return sorted(cases, key=lambda case: case.model != "Transformer")


def _is_named(outcome: Outcome) -> bool:
    return outcome.case.fault is not None and outcome.named[:1] == (outcome.case.fault.row,)


def _title(case: Case) -> str:
    return f"{case.fault} ({case.model}, {case.optimizer}, seed {case.seed})"


def _faults_table(outcomes: Sequence[Outcome]) -> Table:
    """How many of the checks of each fault found it, and how many named its role first."""
    table = Table("optimizer", "role", *(factor.replace("_", " ") for factor in FACTORS), title="found, named / checks")
    groups: dict[tuple[str, str], dict[Factor, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        if (fault := outcome.case.fault) is not None:
            groups[outcome.case.optimizer, fault.row][fault.factor].append(outcome)
    last = ""
    for (optimizer, row), by_factor in groups.items():
        if last not in ("", optimizer):
            table.add_section()
        cells = [
            f"{sum(outcome.verdict == 'fail' for outcome in found)}, {sum(map(_is_named, found))} / {len(found)}"
            if (found := by_factor[factor])
            else ""
            for factor in FACTORS
        ]
        table.add_row("" if optimizer == last else optimizer, row, *cells)
        last = optimizer
    return table


def _right_table(outcomes: Sequence[Outcome]) -> Table:
    """What checks said of plans without a fault."""
    table = Table("model", "optimizer", "checks", "pass", "undecided", "fail", "seconds each", title="without a fault")
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.case.fault is None:
            groups[outcome.case.model, outcome.case.optimizer].append(outcome)
    for names, found in groups.items():
        numbers = [sum(outcome.verdict == verdict for outcome in found) for verdict in ("pass", "undecided", "fail")]
        seconds = sum(outcome.seconds for outcome in found) / len(found)
        table.add_row(*names, *map(str, (len(found), *numbers)), f"{seconds:.0f}")
    return table


main = study_command(run, "python -m recipes.check.planted_faults")

if __name__ == "__main__":
    main()
