"""Where MLU is needed, and where its regime ends: best learning rates, distances and losses as M/D changes.

Runs are those of recipes.lr_transfer, whose search, files and estimates these are; studies.yaml says what is trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from recipes.aspect.attention import measure_attention
from recipes.aspect.curves import curve_runs, save_curves
from recipes.aspect.figures import save_drifts, save_limits
from recipes.aspect.limit import Distances, measure
from recipes.aspect.report import Row, attention_lines, drift_table, limit_table, rows_of, thresholds
from recipes.common.studies import check_command, console, deadline, study_commands
from recipes.lr_transfer.run import make_runs, state_of
from recipes.lr_transfer.runs import CAPPED, Study, shared_runs

STUDIES: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8")
)
QUICK = STUDIES.pop("quick")


def study(output: str = "aspect", workers: int = 2, minutes: float | None = None, quick: bool = False) -> None:
    """Search the best learning rate at all shapes of all studies, and report how far it is from the base's.

    Args:
        output: folder of the runs, one for each study, and of the figure; runs that are in it are not made again.
        workers: number of runs at a time, each on one core.
        minutes: after which no run is begun, and what there is is reported; another call goes on.
    """
    terminal, end, found = console(125), deadline(minutes), list[Row]()
    for name, part in _studies(quick).items():
        check_command(workers, part.seeds)
        plans, runs = make_runs(part, Path(output) / name, workers, end, terminal)
        terminal.print(f"{name}: {state_of(part, shared_runs(plans), runs)}", highlight=False)
        found += rows_of(name, part, plans, runs)
    if not found:
        return
    terminal.print(drift_table(found), *thresholds(found), sep="\n", highlight=False)
    save_drifts(found, Path(output) / "aspect.png")
    terminal.print(f"Wrote {Path(output) / 'aspect.png'}.", highlight=False, soft_wrap=True)


def curves(output: str = "aspect", exponent: float = -1.0, quick: bool = False) -> None:
    """Draw the losses of all shapes of the first study, at one learning rate, for each parameterization.

    Args:
        output: folder of the figure.
        exponent: the learning rate is two to this power.
    """
    check_command(1, 1)
    part = next(iter(_studies(quick).values()))
    Path(output).mkdir(parents=True, exist_ok=True)
    compared = [name for name in part.parameterizations if name != CAPPED]
    save_curves(curve_runs(replace(part, parameterizations=compared), exponent), Path(output) / "aspect_curves.png")
    console().print(f"Wrote {Path(output) / 'aspect_curves.png'}.", highlight=False, soft_wrap=True)


def limit(output: str = "aspect", quick: bool = False) -> None:
    """Measure how far networks are from the infinite model, and from the widest one, as M grows at the same D.

    Args:
        output: folder of the figure.
    """
    check_command(1, 1)
    found: list[Distances] = measure(quick)
    Path(output).mkdir(parents=True, exist_ok=True)
    console().print(limit_table(found), highlight=False)
    save_limits(found, Path(output) / "aspect_limit.png")
    console().print(f"Wrote {Path(output) / 'aspect_limit.png'}.", highlight=False, soft_wrap=True)


def attention(quick: bool = False) -> None:
    """Measure the constants of the error bound for attention blocks, which ``mlu-lightning shape`` needs."""
    check_command(1, 1)
    console().print(*attention_lines(measure_attention(quick)), sep="\n", highlight=False)


def _studies(quick: bool) -> dict[str, Study]:
    studies = {name: Study(**content) for name, content in STUDIES.items()}
    return {"quick": Study(**next(iter(STUDIES.values())) | QUICK)} if quick else studies


main = study_commands(study, curves, limit, attention, program="python -m recipes.aspect.run")

if __name__ == "__main__":
    main()
