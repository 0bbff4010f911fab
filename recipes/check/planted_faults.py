"""Does the check find what is wrong? Plans with one wrong factor, one after the other, and what the check says of each.

    python -m recipes.check.planted_faults

Every role of the table, every one of its factors: std, multiplier, learning rate, eps (where it is large beside the
gradients, so that it matters) and weight decay. A factor that the table has is forgotten, and where it has none there is one
that does not belong there (``plan_faults.py``). A fault is *found* if the check fails, and *named* if the first role that
it names is the one that is wrong. Plans without a fault have to pass, with ever other seeds.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mlu_lightning import Shape, check
from mlu_lightning.models import CausalTransformer
from mlu_lightning.quickstart.study import load_text
from mlu_lightning.table import OptimizerFamily, Role, Variant
from recipes.check.plan_faults import FACTORS, Factor, Fault, FaultyCallback
from recipes.check.planted_faults_model import Everything, Norms
from recipes.common.gradient_descent import check_command, command, in_processes

__all__ = ["MODELS", "Case", "Outcome", "main", "measure", "run", "text_batches"]

_CONTEXT = 32
_SAMPLES = 16


@dataclass(frozen=True)
class Case:
    """A check to be made.

    Args:
        model: name of the model, in :data:`MODELS`.
        optimizer: that trains it.
        fault: what is wrong with its plan, None if nothing is.
        eps: whether eps is large beside the gradients.
        seed: of the first run at every shape.
        seeds: runs at every shape.
        residual: how multipliers are applied.
    """

    model: str
    optimizer: str
    fault: Fault | None
    eps: bool
    seed: int
    seeds: int
    residual: str = "hook"


@dataclass(frozen=True)
class Outcome:
    """What a check said.

    Args:
        case: that was checked.
        verdict: of the check.
        first: role that it names first, empty if none.
        named: all roles that it names.
        seconds: that it took.
    """

    case: Case
    verdict: str
    first: str
    named: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Model:
    """What faults are planted in.

    Args:
        build: a module for a number of tokens, an optimizer, a shape, lr, eps and weight decay.
        base: shape from which it grows.
        rows: roles, and what changes their rows, into which faults are planted.
    """

    build: Callable[[int, str, Shape, float, float, float], LightningModule]
    base: Shape
    rows: tuple[tuple[Role, Variant | None], ...]


def main(args: Sequence[str] | None = None) -> None:
    """Run the study as the command line says.

    Args:
        args: of the command line; by default those of the process.
    """
    command(run, "python -m recipes.check.planted_faults", args)


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
        quick: whether to try the machinery only, with one fault (``--quick``).
    """
    check_command(workers, seeds)
    console = Console(width=None if sys.stdout.isatty() else 125)
    outcomes = in_processes(measure, _cases(seeds, repeats, right, quick), workers, "checks", console)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(one), "case": {**asdict(one.case), "fault": str(one.case.fault)}} for one in outcomes]
    (folder / "outcomes.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    console.print(_faults_table(outcomes))
    console.print(_right_table(outcomes))
    for outcome in outcomes:
        if outcome.case.fault is not None and not _is_named(outcome):
            console.print(f"{_title(outcome.case)}: {outcome.verdict}, names {', '.join(outcome.named) or 'nothing'}")


def measure(case: Case) -> Outcome:
    """Check a model whose plan may have a fault.

    Args:
        case: which one.
    """
    model, data = MODELS[case.model], text_batches()
    # so large that updates are proportional to gradients, beside which decay would be all that is seen
    lr, eps, decay = (0.3, 1.0, 0.0) if case.eps else (_LEARNING_RATES[case.optimizer], 1e-8, 0.1)

    def build(depth: int, hidden: int, embedding: int) -> LightningModule:
        return model.build(_tokens()[1], case.optimizer, Shape(depth, hidden, embedding), lr, eps, decay)

    def callbacks(base: LightningModule) -> list[FaultyCallback]:
        return [FaultyCallback(case.fault, base, "fold" if case.residual == "fold" else "hook")]

    begin = perf_counter()
    factors = (1, 2, 4, 8) if case.fault is None else (1, 2, 4)
    report = check(build, model.base, data, callbacks=callbacks, factors=factors, seeds=case.seeds, seed=case.seed)
    named = tuple(cause.role for cause in report.causes)
    return Outcome(case, report.verdict, named[0] if named else "", named, perf_counter() - begin)


def _transformer(
    vocabulary: int, optimizer: str, shape: Shape, lr: float, eps: float, weight_decay: float
) -> LightningModule:
    return CausalTransformer(
        vocabulary,
        _CONTEXT,
        shape.depth,
        shape.embedding,
        shape.hidden,
        mlp_hidden=64 * shape.hidden,
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
        optimizer="sgd" if optimizer == "sgd" else "adamw",
    )


def _everything(norms: Norms) -> Callable[[int, str, Shape, float, float, float], LightningModule]:
    def build(
        vocabulary: int, optimizer: str, shape: Shape, lr: float, eps: float, weight_decay: float
    ) -> LightningModule:
        family = OptimizerFamily(optimizer)
        return Everything(vocabulary, shape.depth, shape.hidden, shape.embedding, norms, family, lr, eps, weight_decay)

    return build


_PLAIN = (Role.EMBEDDING, Role.BRANCH_IN, Role.BRANCH_OUT, Role.BRANCH_NORM, Role.STREAM_NORM, Role.READOUT)
_FURTHER = (
    (Role.BRANCH_IN_BIAS, None),
    (Role.BRANCH_HIDDEN, None),
    (Role.BRANCH_OUT_BIAS, None),
    (Role.BRANCH_BOUNDED, None),
    (Role.BRANCH_BOUNDED_MATRIX, None),
    (Role.READOUT_BIAS, None),
    (Role.STREAM_MATRIX, Variant.IN_HEAD),
)
MODELS = {
    "Transformer": Model(_transformer, Shape(2, 2, 32), tuple((role, None) for role in _PLAIN)),
    "everything": Model(_everything("before"), Shape(1, 2, 32), _FURTHER),
    "norms at both ends": Model(_everything("both"), Shape(1, 2, 32), ((Role.BRANCH_OUT, Variant.BEFORE_NORM),)),
    "norms after": Model(_everything("after"), Shape(1, 2, 32), ((Role.STREAM_NORM, Variant.POST_NORM),)),
}
_SEEDS = 4
"""Of a check by default."""
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


@cache
def _tokens() -> tuple[Tensor, int]:
    """The text and the number of its characters."""
    text = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8)
    vocabulary, tokens = torch.unique(text, return_inverse=True)
    return tokens, len(vocabulary)


@cache
def text_batches() -> list[Tensor]:
    """Batches of consecutive characters, from places drawn at random, the same ones in every process."""
    tokens = _tokens()[0]
    starts = torch.randint(len(tokens) - _CONTEXT, (64, _SAMPLES, 1), generator=torch.Generator().manual_seed(0))
    return list(tokens[starts + torch.arange(_CONTEXT + 1)])


def _is_named(outcome: Outcome) -> bool:
    return outcome.case.fault is not None and outcome.first == outcome.case.fault.row


def _title(case: Case) -> str:
    return f"{case.fault} ({case.model}, {case.optimizer}, seed {case.seed})"


def _faults_table(outcomes: Sequence[Outcome]) -> Table:
    """How many of the checks of each fault found it, and how many named its role first."""
    counts: dict[tuple[str, Role], dict[Factor, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        fault = outcome.case.fault
        if fault is not None:
            counts[outcome.case.optimizer, fault.row][fault.factor].append(outcome)
    table = Table("optimizer", "role", *(factor.replace("_", " ") for factor in FACTORS), title="found, named / checks")
    last = ""
    for (optimizer, row), of_factor in counts.items():
        if last not in ("", optimizer):
            table.add_section()
        cells = []
        for factor in FACTORS:
            of_fault = of_factor.get(factor, [])
            found, named = (sum(map(test, of_fault)) for test in (lambda one: one.verdict == "fail", _is_named))
            cells.append(f"{found}, {named} / {len(of_fault)}" if of_fault else "")
        table.add_row("" if optimizer == last else optimizer, row, *cells)
        last = optimizer
    return table


def _right_table(outcomes: Sequence[Outcome]) -> Table:
    """What checks said of plans without a fault."""
    verdicts: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.case.fault is None:
            verdicts[outcome.case.model, outcome.case.optimizer].append(outcome)
    table = Table("model", "optimizer", "checks", "pass", "undecided", "fail", "seconds each", title="without a fault")
    for (model, optimizer), found in verdicts.items():
        numbers = [sum(one.verdict == verdict for one in found) for verdict in ("pass", "undecided", "fail")]
        seconds = sum(one.seconds for one in found) / len(found)
        table.add_row(model, optimizer, *map(str, (len(found), *numbers)), f"{seconds:.0f}")
    return table


if __name__ == "__main__":
    main()
